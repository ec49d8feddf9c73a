// Backward pass of the pooled-gate ConvLSTM.
//
// Step by step from the last to the first, and for each sample of a step: the frame and the state before it are brought
// into padded images again; then, block of pixels by block, the cell backward, the products that carry its gradient to
// the outputs of the two depthwise convolutions, and the sums for the pointwise weights; then the gates, whose gradient
// reaches every pixel of the frame and the state alike; then the depthwise convolutions backward. Nothing is kept from
// step to step but the gradients of the state. Without a saved candidate, a block computes it again first.
#include "pooled_gate_parts.h"

#include <initializer_list>

namespace fused_convlstm {
namespace FC_ISA {

namespace {

template <class T> class Backward {
  using A = Accumulator<T>;
  using N = Product<T>;
  using Elem = typename N::Elem;
  static constexpr int64_t kLane = kLanes<A>;
  static constexpr int64_t kBlockChunk = kBlockSize * kChunk;

public:
  explicit Backward(const PooledGateBackward &call)
      : call_(call), p_(call.problem), x_(p_.input, p_.padding), h_(p_.recurrent, p_.padding),
        x_blocks_(p_.input.height, p_.input.width, kTransferSize),
        blocks_(p_.input.out_height, p_.input.out_width, kComputeSize),
        out_blocks_(blocks_.height, blocks_.width, kTransferSize), width_(h_.vectors),
        state_{width_, blocks_.height, blocks_.width, 0, 0}, saved_{h_.s.channels, blocks_.height, blocks_.width, 0, 0},
        x_chunks_(parts(x_.s.channels, kChunk)), h_chunks_(parts(h_.s.channels, kChunk)),
        needs_y_(!call.candidate || call.grad_pointwise_ih || call.grad_pointwise_hh),
        needs_x_(call.grad_x.data || call.grad_depthwise_ih) {
    const int64_t channels = h_.s.channels;
    candidate_ = {channels, {x_.s.channels, channels}, nullptr};
    point_x_ = {x_.s.channels, {channels, 0}, nullptr};
    point_h_ = {channels, {channels, 0}, nullptr};
    gates_x_ = {x_.s.channels, {3 * channels, 0}, nullptr};
    gates_h_ = {channels, {3 * channels, 0}, nullptr};
  }

  void run(int threads) {
    const int64_t bytes =
        (x_.image.size() + h_.image.size() + x_.spread.size() + h_.spread.size() + state_.size()) * int64_t(sizeof(T)) +
        (x_.image.size() + h_.image.size() + 2 * state_.size()) * int64_t(sizeof(A));
    const Plan plan(p_.batch, threads, bytes, 3 * h_.s.channels * candidate_.terms() * int64_t(sizeof(Elem)));
    group_ = plan.group;
    Carver count;
    carve(count, threads, plan.teams);
    const Buffer<char> memory(count.used);
    Carver carver{memory.get()};
    carve(carver, threads, plan.teams);
    run_team(threads, [&](int thread, int size) {
      prepare(thread, size);
      const Team team = plan.team(thread, size);
      const TeamMemory &mine = team_memory_[plan.alone ? thread : 0];
      const ThreadMemory &scratch = thread_memory_[thread];
      if (team.rank == 0)
        std::memset(mine.begin, 0, size_t(mine.end - mine.begin));
      std::memset(scratch.begin, 0, size_t(scratch.end - scratch.begin));
      wait_for_all(size);
      const Range samples = plan.samples(thread, size);
      for (int64_t b = samples.begin; b < samples.end; b += group_)
        run_group(team, mine, scratch, b, smaller(group_, samples.end - b));
      wait_for_all(size);
      reduce(thread, size);
    });
  }

private:
  // Shared by a team; group_ of each.
  struct TeamMemory {
    char *begin, *end;
    T *x, *h;               // images of the frame and of the state before the step
    A *grad_x, *grad_h;     // images
    T *spread_x, *spread_h; // gradients of what the depthwise convolutions return
    T *grad_output;         // of the step, as `state_`
    A *grad_c, *c_0;        // as `state_`
    A *x_sums, *h_sums;     // (blocks, channels)
    A *gate_sums;           // (blocks, 3, width): gradients of the gates' values
    A *start_x, *start_h;   // (channels): the gradient that reaches every pixel through the pooling
  };
  struct ThreadMemory {
    Elem *y;  // (chunks, kBlockSize, kChunk): both depthwise convolutions
    Elem *dz; // (chunks of the state, kBlockSize, kChunk): gradient of the candidate before its activation
    Elem *y_groups, *dz_groups; // the same with the pixels of a group side by side, see group_pixels()
    A *z;                       // (kBlockSize, panel)
    Elem *gates;                // (chunks of 3 * C, kGroup, kChunk): gradients of the gates before the activation
    char *begin, *end;          // of the sums over samples and steps
    A *point;                   // (chunks of the state, chunks, kChunk, kChunk)
    A *depth_x, *depth_h;
    A *bias;
  };

  void carve(Carver &carver, int threads, int teams) {
    x_.carve(carver);
    h_.carve(carver);
    for (Packed<N> *packed : {&candidate_, &point_x_, &point_h_, &gates_x_, &gates_h_})
      packed->carve(carver);
    bias_ = carver.take<A>(width_);
    team_memory_ = carver.take<TeamMemory>(teams);
    thread_memory_ = carver.take<ThreadMemory>(threads);
    for (int k = 0; k < teams; ++k) {
      TeamMemory m;
      const int64_t begin = carver.used;
      m.x = carver.take<T>(group_ * x_.image.size());
      m.h = carver.take<T>(group_ * h_.image.size());
      m.grad_x = carver.take<A>(group_ * x_.image.size());
      m.grad_h = carver.take<A>(group_ * h_.image.size());
      m.spread_x = carver.take<T>(group_ * x_.spread.size());
      m.spread_h = carver.take<T>(group_ * h_.spread.size());
      m.grad_output = carver.take<T>(group_ * state_.size());
      m.grad_c = carver.take<A>(group_ * state_.size());
      m.c_0 = carver.take<A>(group_ * state_.size());
      m.x_sums = carver.take<A>(group_ * x_blocks_.count * x_.vectors);
      m.h_sums = carver.take<A>(group_ * out_blocks_.count * width_);
      m.gate_sums = carver.take<A>(group_ * blocks_.count * 3 * width_);
      m.start_x = carver.take<A>(group_ * x_.vectors);
      m.start_h = carver.take<A>(group_ * width_);
      m.begin = carver.base + begin;
      m.end = carver.base + carver.used;
      if (carver.base)
        team_memory_[k] = m;
    }
    for (int k = 0; k < threads; ++k) {
      ThreadMemory m;
      m.y = carver.take<Elem>((x_chunks_ + h_chunks_) * kBlockChunk);
      m.dz = carver.take<Elem>(h_chunks_ * kBlockChunk);
      m.y_groups = N::kGroup == 1 ? m.y : carver.take<Elem>((x_chunks_ + h_chunks_) * kBlockChunk);
      m.dz_groups = N::kGroup == 1 ? m.dz : carver.take<Elem>(h_chunks_ * kBlockChunk);
      m.z = carver.take<A>(kBlockSize * Packed<N>::kPanel);
      m.gates = carver.take<Elem>(parts(3 * h_.s.channels, kChunk) * kGroup * kChunk);
      const int64_t begin = carver.used;
      m.point = carver.take<A>(h_chunks_ * (x_chunks_ + h_chunks_) * kChunk * kChunk);
      m.depth_x = carver.take<A>(x_.taps * x_.vectors);
      m.depth_h = carver.take<A>(h_.taps * width_);
      m.bias = carver.take<A>(width_);
      m.begin = carver.base + begin;
      m.end = carver.base + carver.used;
      if (carver.base)
        thread_memory_[k] = m;
    }
  }

  void prepare(int thread, int threads) {
    const int64_t channels = h_.s.channels, in_channels = x_.s.channels;
    const T *point_ih = static_cast<const T *>(p_.pointwise_ih), *point_hh = static_cast<const T *>(p_.pointwise_hh);
    const T *gate_ih = static_cast<const T *>(p_.gate_weight_ih), *gate_hh = static_cast<const T *>(p_.gate_weight_hh);
    Range share = part_of(candidate_.panels(), thread, threads);
    for (int64_t k = share.begin; k < share.end; ++k) {
      candidate_.fill(k, false, point_ih, in_channels, 1);
      candidate_.fill(k, true, point_hh, channels, 1);
      point_h_.fill(k, false, point_hh, 1, channels);
      gates_h_.fill(k, false, gate_hh, 1, channels);
    }
    share = part_of(point_x_.panels(), thread, threads);
    for (int64_t k = share.begin; k < share.end; ++k) {
      point_x_.fill(k, false, point_ih, 1, in_channels);
      gates_x_.fill(k, false, gate_ih, 1, in_channels);
    }
    if (thread == 0) {
      x_.prepare(static_cast<const T *>(p_.depthwise_ih));
      h_.prepare(static_cast<const T *>(p_.depthwise_hh));
      for (int64_t c = 0; c < width_; ++c)
        bias_[c] = c < channels && p_.bias ? convert<A>(static_cast<const T *>(p_.bias)[c]) : A(0);
    }
  }

  int64_t step_of(int64_t s) const { return p_.reverse ? p_.steps - 1 - s : s; }
  uint8_t flags_of(int64_t s, int64_t sample) const {
    return p_.step_flags ? p_.step_flags[step_of(s) * p_.batch + sample] : 0;
  }

  // What a sample of a group does in one step.
  struct Sample {
    int64_t sample;       // number in the batch
    int64_t step, before; // index in time, and that of the step whose state it starts from; -1: h_0, c_0
    bool active, reset;
  };

  void run_group(const Team &team, const TeamMemory &m, const ThreadMemory &scratch, int64_t first, int64_t samples) {
    Range share = team.share(samples * blocks_.count);
    for (int64_t k = share.begin; k < share.end; ++k)
      load_state_gradients(m, first, k / blocks_.count, blocks_[k % blocks_.count]);
    team.wait();
    for (int64_t s = p_.steps - 1; s >= 0; --s) {
      Sample now[kGroup];
      for (int64_t b = 0; b < samples; ++b) {
        const uint8_t flags = flags_of(s, first + b);
        int64_t before = s - 1;
        while (before >= 0 && flags_of(before, first + b) & kFlagPastEnd)
          --before;
        now[b] = {first + b, step_of(s), before < 0 ? -1 : step_of(before), !(flags & kFlagPastEnd),
                  (flags & kFlagReset) != 0};
      }
      step(team, m, scratch, now, samples);
    }
    share = team.share(samples * blocks_.count);
    for (int64_t k = share.begin; k < share.end; ++k) {
      const int64_t b = k / blocks_.count;
      const Block block = blocks_[k % blocks_.count];
      if (call_.grad_h_0.data)
        store_block<T>(m.grad_h + b * h_.image.size(), h_.image, h_.s.channels, block, call_.grad_h_0, 0, first + b);
      if (call_.grad_c_0.data)
        store_block<A>(m.grad_c + b * state_.size(), state_, h_.s.channels, block, call_.grad_c_0, 0, first + b);
    }
    team.wait();
  }

  void load_state_gradients(const TeamMemory &m, int64_t first, int64_t b, const Block &block) const {
    load_or_zero<T>(call_.grad_h_n, first + b, block, m.grad_h + b * h_.image.size(), h_.image);
    load_or_zero<A>(call_.grad_c_n, first + b, block, m.grad_c + b * state_.size(), state_);
    load_or_zero<A>(p_.c_0, first + b, block, m.c_0 + b * state_.size(), state_);
  }

  template <class From, class I>
  void load_or_zero(const Frames &frames, int64_t sample, const Block &block, I *to, const Image &image) const {
    if (frames.data)
      load_block<From>(frames, 0, sample, h_.s.channels, block, to, image);
    else
      zero_block(to, image, block);
  }

  void step(const Team &team, const TeamMemory &m, const ThreadMemory &scratch, const Sample *now, int64_t samples) {
    for_blocks(team, now, samples, x_blocks_, [&](int64_t b, int64_t k) { load_input(m, now[b], b, k); });
    for_blocks(team, now, samples, out_blocks_, [&](int64_t b, int64_t k) { load_state(m, now[b], b, k); });
    team.wait();
    if (x_.folds() || h_.folds()) {
      for (int64_t b = team.rank; b < samples; b += team.size) {
        x_.pad(m.x + b * x_.image.size());
        h_.pad(m.h + b * h_.image.size());
      }
      team.wait();
    }
    for_blocks(team, now, samples, blocks_, [&](int64_t b, int64_t k) {
      prefetch_saved(now[b], k + 1);
      compute_block(m, scratch, now[b], b, k);
    });
    team.wait();
    compute_gates(team, m, scratch, now, samples);
    team.wait();
    for_blocks(team, now, samples, blocks_, [&](int64_t b, int64_t k) {
      prefetch_next(now[b], k);
      sum_weights(h_, m.h + b * h_.image.size(), m.spread_h + b * h_.spread.size(), blocks_[k], scratch.depth_h);
      if (call_.grad_depthwise_ih)
        sum_weights(x_, m.x + b * x_.image.size(), m.spread_x + b * x_.spread.size(), blocks_[k], scratch.depth_x);
    });
    convolve_back(team, now, samples, h_, blocks_, m.spread_h, m.start_h, m.grad_h);
    if (call_.grad_x.data)
      convolve_back(team, now, samples, x_, x_blocks_, m.spread_x, m.start_x, m.grad_x);
    team.wait();
    for (int64_t b = team.rank; b < samples; b += team.size) {
      if (now[b].active && now[b].reset) {
        std::memset(m.grad_h + b * h_.image.size(), 0, size_t(h_.image.size()) * sizeof(A));
        std::memset(m.grad_c + b * state_.size(), 0, size_t(state_.size()) * sizeof(A));
      }
    }
    if (call_.grad_x.data)
      store_input_gradients(team, m, now, samples);
    team.wait();
  }

  template <class Action>
  static void for_blocks(const Team &team, const Sample *now, int64_t samples, const Tiling &blocks,
                         const Action &action) {
    const Range share = team.share(samples * blocks.count);
    for (int64_t k = share.begin; k < share.end; ++k) {
      if (now[k / blocks.count].active)
        action(k / blocks.count, k % blocks.count);
    }
  }

  void load_input(const TeamMemory &m, const Sample &now, int64_t b, int64_t index) const {
    T *x = m.x + b * x_.image.size();
    load_block<T>(p_.x, now.step, now.sample, x_.s.channels, x_blocks_[index], x, x_.image);
    sum_block(x, x_.image, x_blocks_[index], m.x_sums + (b * x_blocks_.count + index) * x_.vectors);
  }

  void load_state(const TeamMemory &m, const Sample &now, int64_t b, int64_t index) const {
    T *h = m.h + b * h_.image.size();
    const Block block = out_blocks_[index];
    if (now.reset)
      zero_block(h, h_.image, block);
    else if (now.before >= 0)
      load_block<T>(call_.output, now.before, now.sample, h_.s.channels, block, h, h_.image);
    else
      load_or_zero<T>(p_.h_0, now.sample, block, h, h_.image);
    sum_block(h, h_.image, block, m.h_sums + (b * out_blocks_.count + index) * width_);
  }

  // What compute_block reads of the caller's memory.
  FC_INLINE void prefetch_saved(const Sample &now, int64_t index) const {
    if (index == blocks_.count)
      return;
    const Block block = blocks_[index];
    const int64_t frame = now.step * p_.batch + now.sample, before = now.before * p_.batch + now.sample;
    for (int64_t c = 0; c < saved_.channels; c += kChunk) {
      for (int64_t y = 0; y < block.rows; ++y) {
        const int64_t at = saved_.at(c, block.row + y, block.column), count = block.columns * saved_.pixel(c);
        const T *cells = static_cast<const T *>(call_.cells) + at;
        prefetch(cells + frame * saved_.size(), count * int64_t(sizeof(T)));
        if (now.before >= 0)
          prefetch(cells + before * saved_.size(), count * int64_t(sizeof(T)));
        if (call_.candidate)
          prefetch(static_cast<const T *>(call_.candidate) + frame * saved_.size() + at, count * int64_t(sizeof(T)));
      }
    }
  }

  // Part `index` of the frames that the next step reads.
  FC_INLINE void prefetch_next(const Sample &now, int64_t index) const {
    const int64_t next = now.step + (p_.reverse ? 1 : -1), after = next + (p_.reverse ? 1 : -1);
    if (next < 0 || next >= p_.steps)
      return;
    prefetch_frame<T>(p_.x, next, now.sample, x_.s.channels, x_blocks_, index, blocks_.count);
    prefetch_frame<T>(call_.grad_output, next, now.sample, h_.s.channels, out_blocks_, index, blocks_.count);
    if (after >= 0 && after < p_.steps)
      prefetch_frame<T>(call_.output, after, now.sample, h_.s.channels, out_blocks_, index, blocks_.count);
  }

  void compute_block(const TeamMemory &m, const ThreadMemory &scratch, const Sample &now, int64_t b,
                     int64_t index) const {
    const Block block = blocks_[index];
    const int64_t pixels = block.pixels();
    if (needs_y_) {
      x_.convolve_block(m.x + b * x_.image.size(), block, scratch.y);
      h_.convolve_block(m.h + b * h_.image.size(), block, scratch.y + x_chunks_ * kBlockChunk);
    }
    if (call_.grad_output.data)
      load_block<T>(call_.grad_output, now.step, now.sample, h_.s.channels, block, m.grad_output + b * state_.size(),
                    state_);
    for (int64_t panel = 0; panel < candidate_.panels(); ++panel) {
      const int64_t vectors = candidate_.vectors(panel);
      if (!call_.candidate)
        candidate_.multiply(panel, pixels, scratch.y, kBlockChunk, scratch.z);
      for (int64_t v = 0; v < vectors; ++v)
        differentiate_cell(m, scratch, scratch.z + v * kLane, panel * Packed<N>::kPanel + v * kLane, now, b, block,
                           index);
    }
    if (needs_x_)
      spread_gradient(x_, point_x_, scratch, block, m.spread_x + b * x_.spread.size());
    spread_gradient(h_, point_h_, scratch, block, m.spread_h + b * h_.spread.size());
    if (needs_y_)
      group_pixels(x_chunks_ + h_chunks_, pixels, scratch.y, scratch.y_groups);
    group_pixels(h_chunks_, pixels, scratch.dz, scratch.dz_groups);
    for (int64_t out = 0; out < h_chunks_; ++out) {
      for (int64_t in = 0; in < x_chunks_ + h_chunks_; ++in) {
        const bool from_x = in < x_chunks_;
        if (!(from_x ? call_.grad_pointwise_ih : call_.grad_pointwise_hh))
          continue;
        const int64_t width = from_x ? x_.image.pixel(in * kChunk) : h_.image.pixel((in - x_chunks_) * kChunk);
        for (int64_t k = 0; k < width; k += Packed<N>::kPanel) {
          multiply<N, N::kGroup, kChunk * N::kGroup>(
              smaller(kChunk, h_.s.channels - out * kChunk), smaller(kTileVectors, (width - k) / kLane), {pixels, 0},
              scratch.dz_groups + out * kBlockChunk, kChunk * kChunk,
              scratch.y_groups + in * kBlockChunk + k * N::kGroup, kChunk * N::kGroup,
              scratch.point + (out * (x_chunks_ + h_chunks_) + in) * kChunk * kChunk + k, kChunk, true);
        }
      }
    }
  }

  // Chunks (pixels, kChunk) as (groups of pixels, kChunk, pixels of a group), for products that sum over pixels.
  static void group_pixels(int64_t chunks, int64_t pixels, const Elem *from, Elem *to) {
    if constexpr (N::kGroup == 2) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int64_t p = 0; p < pixels; p += 2) {
          const Elem *row = from + chunk * kBlockChunk + p * kChunk;
          A *pairs = reinterpret_cast<A *>(to + chunk * kBlockChunk + p * kChunk);
          for (int64_t c = 0; c < kChunk; c += kLane)
            store(pairs + c, load_pairs(row + c, p + 1 < pixels ? row + kChunk + c : nullptr, kLane));
        }
      }
    }
  }

  // One vector of channels, from c on, of all pixels of a block; eq. (13) to (15) backward.
  void differentiate_cell(const TeamMemory &m, const ThreadMemory &scratch, const A *z, int64_t c, const Sample &now,
                          int64_t b, const Block &block, int64_t index) const {
    const int64_t channels = h_.s.channels;
    const int count = int(smaller(kLane, channels - c));
    const A *gates = static_cast<const A *>(call_.gates) + (now.step * p_.batch + now.sample) * 3 * channels + c;
    const Vec<A> i = clamp_gate<A>(p_.activation, load_first(gates, count)),
                 f = clamp_gate<A>(p_.activation, load_first(gates + channels, count)),
                 o = clamp_gate<A>(p_.activation, load_first(gates + 2 * channels, count)), bias = load(bias_ + c);
    const int64_t pixel = state_.pixel(c), saved_pixel = saved_.pixel(c), h_pixel = h_.image.pixel(c);
    const int64_t frame = (now.step * p_.batch + now.sample) * saved_.size();
    const int64_t frame_before = (now.before * p_.batch + now.sample) * saved_.size();
    Elem *dz = scratch.dz + c / kChunk * kBlockChunk + c % kChunk;
    Vec<A> sum_i{}, sum_f{}, sum_o{}, sum_z{};
    for (int64_t row = 0; row < block.rows; ++row) {
      const int64_t y = block.row + row, at = b * state_.size() + state_.at(c, y, block.column),
                    saved = saved_.at(c, y, block.column);
      const T *cell = static_cast<const T *>(call_.cells) + frame + saved;
      const T *cell_before = now.before < 0 ? nullptr : static_cast<const T *>(call_.cells) + frame_before + saved;
      const T *candidate = call_.candidate ? static_cast<const T *>(call_.candidate) + frame + saved : nullptr;
      const A *dh_state = m.grad_h + b * h_.image.size() + h_.image.at(c, y, block.column);
      A *dc_state = m.grad_c + at;
      for (int64_t x = 0; x < block.columns; ++x, z += Packed<N>::kPanel, dz += kChunk) {
        Vec<A> dh = load(dh_state + x * h_pixel);
        if (call_.grad_output.data)
          dh += load_as<A>(m.grad_output + at + x * pixel);
        const Vec<A> g =
            candidate ? load_first_as<A>(candidate + x * saved_pixel, count) : CellFunctions<N>::tanh(load(z) + bias);
        const Vec<A> c_before = now.reset     ? Vec<A>{}
                                : cell_before ? load_first_as<A>(cell_before + x * saved_pixel, count)
                                              : load(m.c_0 + at + x * pixel);
        const Vec<A> tanh_c = CellFunctions<N>::tanh(load_first_as<A>(cell + x * saved_pixel, count));
        const Vec<A> dc = fma(dh * o, A(1) - tanh_c * tanh_c, load(dc_state + x * pixel));
        const Vec<A> dz_now = dc * i * (A(1) - g * g);
        sum_i = fma(dc, g, sum_i);
        sum_f = fma(dc, c_before, sum_f);
        sum_o = fma(dh, tanh_c, sum_o);
        sum_z += dz_now;
        store(dc_state + x * pixel, dc * f);
        store_as<A>(dz, dz_now);
      }
    }
    A *sums = m.gate_sums + (b * blocks_.count + index) * 3 * width_ + c;
    store(sums, sum_i);
    store(sums + width_, sum_f);
    store(sums + 2 * width_, sum_o);
    store(scratch.bias + c, load(scratch.bias + c) + sum_z);
  }

  // The gradient of a depthwise convolution's output, at its place in the spread image.
  void spread_gradient(const Depthwise<A> &conv, const Packed<N> &point, const ThreadMemory &scratch,
                       const Block &block, T *spread) const {
    for (int64_t panel = 0; panel < point.panels(); ++panel) {
      const int64_t vectors = point.vectors(panel);
      point.multiply(panel, block.pixels(), scratch.dz, kBlockChunk, scratch.z);
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t c = panel * Packed<N>::kPanel + v * kLane, stride = conv.s.stride_w * conv.spread.pixel(c);
        const A *z = scratch.z + v * kLane;
        for (int64_t y = 0; y < block.rows; ++y) {
          T *to = spread + conv.spread.at(c, (block.row + y) * conv.s.stride_h, block.column * conv.s.stride_w);
          for (int64_t x = 0; x < block.columns; ++x, z += Packed<N>::kPanel)
            store_as<A>(to + x * stride, load(z));
        }
      }
    }
  }

  // Every member of the team sums everything, which is little, and computes a part of what goes back to the pixels.
  void compute_gates(const Team &team, const TeamMemory &m, const ThreadMemory &scratch, const Sample *now,
                     int64_t samples) const {
    const int64_t channels = h_.s.channels;
    for (int64_t b = 0; b < samples; ++b) {
      if (!now[b].active)
        continue;
      const int64_t row = now[b].step * p_.batch + now[b].sample;
      const A *gates = static_cast<const A *>(call_.gates) + row * 3 * channels;
      const bool writes = b % team.size == team.rank;
      A *grad_gates = static_cast<A *>(call_.grad_gates) + row * 3 * channels;
      for (int64_t gate = 0; gate < 3; ++gate) {
        for (int64_t c = 0; c < channels; c += kLane) {
          const int count = int(smaller(kLane, channels - c));
          Vec<A> sum{};
          for (int64_t k = 0; k < blocks_.count; ++k)
            sum += load(m.gate_sums + ((b * blocks_.count + k) * 3 + gate) * width_ + c);
          sum *= gate_slope<A>(p_.activation, load_first(gates + gate * channels + c, count));
          for (int lane = 0; lane < count; ++lane) {
            const int64_t at = gate * channels + c + lane;
            scratch.gates[at / kChunk * kGroup * kChunk + b * kChunk + at % kChunk] = convert<Elem>(A(sum[lane]));
          }
          if (writes)
            store_first(grad_gates + gate * channels + c, sum, count);
        }
      }
      for (int64_t at = 3 * channels; at % N::kGroup; ++at)
        scratch.gates[at / kChunk * kGroup * kChunk + b * kChunk + at % kChunk] = Elem{};
      if (writes) {
        pool(m.x_sums + b * x_blocks_.count * x_.vectors, x_blocks_, x_,
             static_cast<A *>(call_.pooled_x) + row * x_.s.channels);
        pool(m.h_sums + b * out_blocks_.count * width_, out_blocks_, h_,
             static_cast<A *>(call_.pooled_h) + row * channels);
      }
    }
    const Range share = team.share(gates_x_.panels() + gates_h_.panels());
    for (int64_t k = share.begin; k < share.end; ++k) {
      const bool is_x = k < gates_x_.panels();
      if (is_x)
        back_through_pooling(gates_x_, k, x_blocks_, x_, scratch, samples, m.start_x);
      else
        back_through_pooling(gates_h_, k - gates_x_.panels(), blocks_, h_, scratch, samples, m.start_h);
    }
  }

  static void pool(const A *sums, const Tiling &blocks, const Depthwise<A> &conv, A *pooled) {
    const A scale = A(1) / A(blocks.height * blocks.width);
    for (int64_t c = 0; c < conv.s.channels; c += kLane) {
      Vec<A> sum{};
      for (int64_t k = 0; k < blocks.count; ++k)
        sum += load(sums + k * conv.vectors + c);
      store_first(pooled + c, sum * scale, int(smaller(kLane, conv.s.channels - c)));
    }
  }

  void back_through_pooling(const Packed<N> &gates, int64_t panel, const Tiling &blocks, const Depthwise<A> &conv,
                            const ThreadMemory &scratch, int64_t samples, A *start) const {
    const int64_t vectors = gates.vectors(panel);
    gates.multiply(panel, samples, scratch.gates, kGroup * kChunk, scratch.z);
    const A scale = A(1) / A(blocks.height * blocks.width);
    for (int64_t b = 0; b < samples; ++b) {
      for (int64_t v = 0; v < vectors; ++v)
        store(start + b * conv.vectors + panel * Packed<N>::kPanel + v * kLane,
              load(scratch.z + b * Packed<N>::kPanel + v * kLane) * scale);
    }
  }

  // sums (taps, channels) += what a block of outputs adds to the gradient of the depthwise weights.
  static void sum_weights(const Depthwise<A> &conv, const T *image, const T *spread, const Block &block, A *sums) {
    const bool threes = conv.threes() && conv.s.stride_w == 1;
    for (int64_t c = 0; c < conv.vectors; c += kLane) {
      int64_t tap = 0;
      for (; threes && tap + 9 <= conv.taps; tap += 9)
        sum_taps<3, 3>(conv, image, spread, block, c, tap, sums);
      for (; threes && tap + 3 <= conv.taps; tap += 3)
        sum_taps<1, 3>(conv, image, spread, block, c, tap, sums);
      for (; tap + 3 <= conv.taps; tap += 3)
        sum_taps<3, 1>(conv, image, spread, block, c, tap, sums);
      for (; tap < conv.taps; ++tap)
        sum_taps<1, 1>(conv, image, spread, block, c, tap, sums);
    }
  }

  // kRows rows of kWidth taps; those of a row, if more than one, lie side by side, and outputs as near as they.
  template <int kRows, int kWidth>
  static FC_INLINE void sum_taps(const Depthwise<A> &conv, const T *image, const T *spread, const Block &block,
                                 int64_t c, int64_t tap, A *sums) {
    const int64_t pixel = conv.image.pixel(c), stride = conv.s.stride_w * pixel;
    A *to = sums + tap * conv.vectors + c;
    Vec<A> sum[kRows][kWidth];
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int k = 0; k < kWidth; ++k)
        sum[r][k] = Vec<A>{};
    }
    for (int64_t row = 0; row < block.rows; ++row) {
      const int64_t y = (block.row + row) * conv.s.stride_h, column = block.column * conv.s.stride_w;
      const T *dy = spread + conv.spread.at(c, y, column);
      const T *first = image + conv.image.at(c, y - conv.s.top, column - conv.s.left);
      const T *x[kRows];
      Vec<A> window[kRows][kWidth]; // pixels of the image, the newest last
#pragma GCC unroll 3
      for (int r = 0; r < kRows; ++r) {
        x[r] = first + (conv.tap_offset[tap + r * kWidth] + kWidth - 1) * pixel;
#pragma GCC unroll 3
        for (int k = 0; k < kWidth - 1; ++k)
          window[r][k + 1] = load_as<A>(x[r] + (k - kWidth + 1) * pixel);
      }
      for (int64_t p = 0; p < block.columns; ++p) {
        const Vec<A> d = load_as<A>(dy + p * stride);
#pragma GCC unroll 3
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
          for (int k = 0; k < kWidth - 1; ++k)
            window[r][k] = window[r][k + 1];
          window[r][kWidth - 1] = load_as<A>(x[r] + p * stride);
#pragma GCC unroll 3
          for (int k = 0; k < kWidth; ++k)
            sum[r][k] = fma(d, window[r][k], sum[r][k]);
        }
      }
    }
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int k = 0; k < kWidth; ++k, to += conv.vectors)
        store(to, load(to) + sum[r][k]);
    }
  }

  // The gradient of the convolution's input. With padding that repeats pixels, that of the whole padded image, to be
  // folded when all of it is there; else of the pixels alone, and what comes through the pooling added.
  void convolve_back(const Team &team, const Sample *now, int64_t samples, const Depthwise<A> &conv,
                     const Tiling &inside, const T *spread, const A *start, A *grad) const {
    const bool folds = conv.folds();
    const Tiling blocks = folds ? Tiling(conv.image.height, conv.image.width, kTransferSize) : inside;
    for_blocks(team, now, samples, blocks, [&](int64_t b, int64_t k) {
      Block block = blocks[k];
      if (folds) {
        block.row -= conv.s.top;
        block.column -= conv.s.left;
      }
      for (int64_t c = 0; c < conv.vectors; c += kChunk) {
        const int64_t pixel = conv.image.pixel(c);
        // Element (0, 0) of the padded image stands at the beginning of both.
        const T *from =
            spread + b * conv.spread.size() +
            conv.spread.at(c, block.row + conv.s.top - conv.spread.top, block.column + conv.s.left - conv.spread.left);
        convolve<A>(block.rows, block.columns, pixel, from, pixel, conv.spread.row(c), pixel,
                    {conv.back_offset, conv.taps, conv.back_weights + c, conv.vectors, conv.threes()},
                    folds ? nullptr : start + b * conv.vectors + c,
                    grad + b * conv.image.size() + conv.image.at(c, block.row, block.column), conv.image.row(c), pixel);
      }
    });
    if (!folds)
      return;
    team.wait();
    for (int64_t b = team.rank; b < samples; b += team.size) {
      if (!now[b].active)
        continue;
      A *image = grad + b * conv.image.size();
      conv.fold(image);
      for (int64_t c = 0; c < conv.vectors; c += kLane) {
        const Vec<A> value = load(start + b * conv.vectors + c);
        for (int64_t y = 0; y < conv.s.height; ++y) {
          A *p = image + conv.image.at(c, y, 0);
          for (int64_t x = 0; x < conv.s.width; ++x)
            store(p + x * conv.image.pixel(c), load(p + x * conv.image.pixel(c)) + value);
        }
      }
    }
  }

  void store_input_gradients(const Team &team, const TeamMemory &m, const Sample *now, int64_t samples) const {
    const Range share = team.share(samples * x_blocks_.count);
    for (int64_t k = share.begin; k < share.end; ++k) {
      const int64_t b = k / x_blocks_.count;
      const Block block = x_blocks_[k % x_blocks_.count];
      if (now[b].active)
        store_block<T>(m.grad_x + b * x_.image.size(), x_.image, x_.s.channels, block, call_.grad_x, now[b].step,
                       now[b].sample);
      else
        fill_zero<T>(call_.grad_x, now[b].step, now[b].sample, x_.s.channels, block);
    }
  }

  // Sums over the threads, always in the same order.
  void reduce(int thread, int threads) const {
    const int64_t in_channels = x_.s.channels, channels = h_.s.channels, chunks = x_chunks_ + h_chunks_;
    const Range share = part_of(channels, thread, threads);
    for (int64_t c = share.begin; c < share.end; ++c) {
      const int64_t row = c / kChunk * chunks * kChunk * kChunk + c % kChunk * kChunk;
      const auto at = [row](int64_t chunk, int64_t k) {
        return row + (chunk + k / kChunk) * kChunk * kChunk + k % kChunk;
      };
      if (call_.grad_pointwise_ih) {
        for (int64_t k = 0; k < in_channels; ++k)
          static_cast<T *>(call_.grad_pointwise_ih)[c * in_channels + k] =
              convert<T>(sum_threads(threads, &ThreadMemory::point, at(0, k)));
      }
      if (call_.grad_pointwise_hh) {
        for (int64_t k = 0; k < channels; ++k)
          static_cast<T *>(call_.grad_pointwise_hh)[c * channels + k] =
              convert<T>(sum_threads(threads, &ThreadMemory::point, at(x_chunks_, k)));
      }
    }
    if (thread != 0)
      return;
    for (int64_t c = 0; c < channels && call_.grad_bias; ++c)
      static_cast<T *>(call_.grad_bias)[c] = convert<T>(sum_threads(threads, &ThreadMemory::bias, c));
    reduce_depthwise(threads, x_, &ThreadMemory::depth_x, static_cast<T *>(call_.grad_depthwise_ih));
    reduce_depthwise(threads, h_, &ThreadMemory::depth_h, static_cast<T *>(call_.grad_depthwise_hh));
  }

  void reduce_depthwise(int threads, const Depthwise<A> &conv, A *ThreadMemory::*sums, T *grad) const {
    for (int64_t c = 0; c < conv.s.channels && grad; ++c) {
      for (int64_t tap = 0; tap < conv.taps; ++tap)
        grad[c * conv.taps + tap] = convert<T>(sum_threads(threads, sums, tap * conv.vectors + c));
    }
  }

  A sum_threads(int threads, A *ThreadMemory::*array, int64_t at) const {
    A sum = 0;
    for (int k = 0; k < threads; ++k)
      sum += (thread_memory_[k].*array)[at];
    return sum;
  }

  const PooledGateBackward &call_;
  const PooledGateProblem &p_;
  Depthwise<A> x_, h_;
  const Tiling x_blocks_, blocks_, out_blocks_; // of the frame, of the state, and larger ones of the state
  const int64_t width_;                         // channels of the state in whole vectors
  const Image state_, saved_; // of gradients of the state; of cells and candidate in the caller's memory
  const int64_t x_chunks_, h_chunks_;
  const bool needs_y_, needs_x_; // outputs of the depthwise convolutions; the gradient of that of the frame
  int64_t group_ = 1;
  Packed<N> candidate_, point_x_, point_h_, gates_x_, gates_h_;
  A *bias_ = nullptr;
  TeamMemory *team_memory_ = nullptr;
  ThreadMemory *thread_memory_ = nullptr;
};

} // namespace

void pooled_gate_backward(const PooledGateBackward &call, DType type, int threads) {
  switch (type) {
  case DType::float32:
    return Backward<float>(call).run(threads);
  case DType::bfloat16:
    return Backward<bfloat16>(call).run(threads);
  case DType::float64:
    return Backward<double>(call).run(threads);
  }
}

} // namespace FC_ISA
} // namespace fused_convlstm
