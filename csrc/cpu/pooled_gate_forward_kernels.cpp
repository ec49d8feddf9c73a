// Forward pass of the pooled-gate ConvLSTM.
//
// Per step and sample: the frame is brought into a padded image with the channels innermost and pooled; the gates are a
// product with the pooled frame and state; then, block of pixels by block, both depthwise convolutions, both pointwise
// ones as one product, and the cell, whose epilogue also sums the new state for the pooling of the next step. A sample
// needs no other: either every thread runs the whole sequence of its own samples, or, if there are too few, all threads
// share each step.
#include "pooled_gate_parts.h"

namespace fused_convlstm {
namespace FC_ISA {

namespace {

template <class T> class Forward {
  using A = Accumulator<T>;
  using N = Product<T>;
  using Elem = typename N::Elem;
  static constexpr int64_t kLane = kLanes<A>;

public:
  explicit Forward(const PooledGateForward &call)
      : call_(call), p_(call.problem), x_(p_.input, p_.padding), h_(p_.recurrent, p_.padding),
        x_blocks_(p_.input.height, p_.input.width, kTransferSize),
        blocks_(p_.input.out_height, p_.input.out_width, kComputeSize),
        out_blocks_(blocks_.height, blocks_.width, kTransferSize), width_(h_.vectors),
        pixels_(blocks_.height * blocks_.width), state_{width_, blocks_.height, blocks_.width, 0, 0},
        saved_{h_.s.channels, blocks_.height, blocks_.width, 0, 0}, x_chunks_(parts(x_.s.channels, kChunk)),
        h_chunks_(parts(h_.s.channels, kChunk)) {
    candidate_ = {h_.s.channels, {x_.s.channels, h_.s.channels}, nullptr};
    for (Packed<N> &gate : gates_)
      gate = candidate_;
  }

  void run(int threads) {
    const int64_t bytes =
        (x_.image.size() + 2 * h_.image.size()) * int64_t(sizeof(T)) + state_.size() * int64_t(sizeof(A));
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
      if (team.rank == 0)
        std::memset(mine.begin, 0, size_t(mine.end - mine.begin));
      wait_for_all(size);
      const Range samples = plan.samples(thread, size);
      for (int64_t b = samples.begin; b < samples.end; b += group_)
        run_group(team, mine, thread_memory_[thread], b, smaller(group_, samples.end - b));
    });
  }

private:
  // Shared by a team; group_ of each.
  struct TeamMemory {
    char *begin, *end;
    T *x, *h[2];        // images
    A *c;               // (pixels)
    A *x_sums, *h_sums; // (blocks, channels)
    A *gates;           // (3, width)
  };
  struct ThreadMemory {
    Elem *y;      // (chunks, kBlockSize, kChunk): both depthwise convolutions
    A *z;         // (kBlockSize, panel)
    Elem *pooled; // (chunks, kGroup, kChunk)
  };

  void carve(Carver &carver, int threads, int teams) {
    x_.carve(carver);
    h_.carve(carver);
    candidate_.carve(carver);
    for (Packed<N> &gate : gates_)
      gate.carve(carver);
    bias_ = carver.take<A>(width_);
    gate_bias_ = carver.take<A>(3 * width_);
    team_memory_ = carver.take<TeamMemory>(teams);
    thread_memory_ = carver.take<ThreadMemory>(threads);
    for (int k = 0; k < teams; ++k) {
      TeamMemory m;
      const int64_t begin = carver.used;
      m.x = carver.take<T>(group_ * x_.image.size());
      m.h[0] = carver.take<T>(group_ * h_.image.size());
      m.h[1] = carver.take<T>(group_ * h_.image.size());
      m.c = carver.take<A>(group_ * state_.size());
      m.x_sums = carver.take<A>(group_ * x_blocks_.count * x_.vectors);
      m.h_sums = carver.take<A>(group_ * blocks_.count * width_);
      m.gates = carver.take<A>(group_ * 3 * width_);
      m.begin = carver.base + begin;
      m.end = carver.base + carver.used;
      if (carver.base)
        team_memory_[k] = m;
    }
    for (int k = 0; k < threads; ++k) {
      ThreadMemory m;
      m.y = carver.take<Elem>((x_chunks_ + h_chunks_) * kBlockSize * kChunk);
      m.z = carver.take<A>(kBlockSize * Packed<N>::kPanel);
      m.pooled = carver.take<Elem>((x_chunks_ + h_chunks_) * kGroup * kChunk);
      if (carver.base)
        thread_memory_[k] = m;
    }
  }

  // Weights into the form that the kernels read.
  void prepare(int thread, int threads) {
    const int64_t channels = h_.s.channels, in_channels = x_.s.channels, panels = candidate_.panels();
    const T *weight_ih = static_cast<const T *>(p_.gate_weight_ih),
            *weight_hh = static_cast<const T *>(p_.gate_weight_hh);
    const T *point_ih = static_cast<const T *>(p_.pointwise_ih), *point_hh = static_cast<const T *>(p_.pointwise_hh);
    const Range share = part_of(4 * panels, thread, threads);
    for (int64_t k = share.begin; k < share.end; ++k) {
      const int64_t gate = k / panels, panel = k % panels;
      const Packed<N> &packed = gate == 3 ? candidate_ : gates_[gate];
      packed.fill(panel, false, gate == 3 ? point_ih : weight_ih + gate * channels * in_channels, in_channels, 1);
      packed.fill(panel, true, gate == 3 ? point_hh : weight_hh + gate * channels * channels, channels, 1);
    }
    if (thread == 0) {
      x_.prepare(static_cast<const T *>(p_.depthwise_ih));
      h_.prepare(static_cast<const T *>(p_.depthwise_hh));
      for (int64_t c = 0; c < width_; ++c) {
        const bool real = c < channels;
        bias_[c] = real && p_.bias ? convert<A>(static_cast<const T *>(p_.bias)[c]) : A(0);
        for (int64_t gate = 0; gate < 3; ++gate) {
          gate_bias_[gate * width_ + c] =
              real && p_.gate_bias ? convert<A>(static_cast<const T *>(p_.gate_bias)[gate * channels + c]) : A(0);
        }
      }
    }
  }

  void run_group(const Team &team, const TeamMemory &m, const ThreadMemory &scratch, int64_t first, int64_t samples) {
    int current[kGroup] = {}; // which of the two images holds the state
    Range share = team.share(samples * blocks_.count);
    for (int64_t k = share.begin; k < share.end; ++k)
      load_state(m, first, k / blocks_.count, k % blocks_.count);
    for (int64_t s = 0; s < p_.steps; ++s) {
      const int64_t step = p_.reverse ? p_.steps - 1 - s : s;
      uint8_t flags[kGroup];
      for (int64_t b = 0; b < samples; ++b)
        flags[b] = p_.step_flags ? p_.step_flags[step * p_.batch + first + b] : 0;

      share = team.share(samples * x_blocks_.count);
      for (int64_t k = share.begin; k < share.end; ++k) {
        const int64_t b = k / x_blocks_.count;
        if (!(flags[b] & kFlagPastEnd))
          load_input(m, step, first, b, k % x_blocks_.count);
      }
      team.wait();
      for (int64_t b = team.rank; b < samples; b += team.size) {
        if (flags[b] & kFlagPastEnd)
          continue;
        if (flags[b] & kFlagReset)
          reset(m, b, current[b]);
        x_.pad(m.x + b * x_.image.size());
        h_.pad(m.h[current[b]] + b * h_.image.size());
      }
      compute_gates(team, m, scratch, step, first, samples, flags);
      team.wait();
      share = team.share(samples * blocks_.count);
      for (int64_t k = share.begin; k < share.end; ++k) {
        const int64_t b = k / blocks_.count;
        if (s + 1 < p_.steps)
          prefetch_frame<T>(p_.x, p_.reverse ? step - 1 : step + 1, first + b, x_.s.channels, x_blocks_,
                            k % blocks_.count, blocks_.count);
        if (!(flags[b] & kFlagPastEnd))
          compute_block(m, scratch, step, first, b, current[b], k % blocks_.count);
      }
      for (int64_t b = 0; b < samples; ++b) {
        if (!(flags[b] & kFlagPastEnd))
          current[b] ^= 1;
      }
      team.wait();
      share = team.share(samples * out_blocks_.count);
      for (int64_t k = share.begin; k < share.end; ++k) {
        const int64_t b = k / out_blocks_.count;
        const Block block = out_blocks_[k % out_blocks_.count];
        if (flags[b] & kFlagPastEnd)
          skip_block(step, first + b, block);
        else
          store_block<T>(m.h[current[b]] + b * h_.image.size(), h_.image, h_.s.channels, block, call_.output, step,
                         first + b);
      }
    }
    share = team.share(samples * blocks_.count);
    for (int64_t k = share.begin; k < share.end; ++k) {
      const int64_t b = k / blocks_.count;
      const Block block = blocks_[k % blocks_.count];
      store_block<T>(m.h[current[b]] + b * h_.image.size(), h_.image, h_.s.channels, block, call_.h_n, 0, first + b);
      store_block<A>(m.c + b * state_.size(), state_, h_.s.channels, block, call_.c_n, 0, first + b);
    }
    team.wait();
  }

  void load_state(const TeamMemory &m, int64_t first, int64_t b, int64_t index) const {
    const Block block = blocks_[index];
    T *h = m.h[0] + b * h_.image.size();
    A *c = m.c + b * state_.size();
    if (p_.h_0.data)
      load_block<T>(p_.h_0, 0, first + b, h_.s.channels, block, h, h_.image);
    else
      zero_block(h, h_.image, block);
    if (p_.c_0.data)
      load_block<A>(p_.c_0, 0, first + b, h_.s.channels, block, c, state_);
    else
      zero_block(c, state_, block);
    sum_block(h, h_.image, block, m.h_sums + (b * blocks_.count + index) * width_);
  }

  void load_input(const TeamMemory &m, int64_t step, int64_t first, int64_t b, int64_t index) const {
    const Block block = x_blocks_[index];
    T *x = m.x + b * x_.image.size();
    load_block<T>(p_.x, step, first + b, x_.s.channels, block, x, x_.image);
    sum_block(x, x_.image, block, m.x_sums + (b * x_blocks_.count + index) * x_.vectors);
  }

  void reset(const TeamMemory &m, int64_t b, int current) const {
    std::memset(m.h[current] + b * h_.image.size(), 0, size_t(h_.image.size()) * sizeof(T));
    std::memset(m.c + b * state_.size(), 0, size_t(state_.size()) * sizeof(A));
  }

  // Every member of the team pools everything, which is little, and computes a part of the gates.
  void compute_gates(const Team &team, const TeamMemory &m, const ThreadMemory &scratch, int64_t step, int64_t first,
                     int64_t samples, const uint8_t *flags) const {
    constexpr int64_t chunk = kGroup * kChunk;
    for (int64_t b = 0; b < samples; ++b) {
      if (flags[b] & kFlagPastEnd)
        continue;
      pool(m.x_sums + b * x_blocks_.count * x_.vectors, x_blocks_, x_.s.channels, x_.vectors, false,
           scratch.pooled + b * kChunk);
      pool(m.h_sums + b * blocks_.count * width_, blocks_, h_.s.channels, width_, flags[b] & kFlagReset,
           scratch.pooled + x_chunks_ * chunk + b * kChunk);
    }
    const int64_t channels = h_.s.channels, panels = candidate_.panels();
    const Range share = team.share(3 * panels);
    for (int64_t k = share.begin; k < share.end; ++k) {
      const int64_t gate = k / panels, panel = k % panels, vectors = candidate_.vectors(panel);
      gates_[gate].multiply(panel, samples, scratch.pooled, chunk, scratch.z);
      for (int64_t b = 0; b < samples; ++b) {
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t c = panel * Packed<N>::kPanel + v * kLane, at = gate * width_ + c;
          const Vec<A> z = load(scratch.z + b * Packed<N>::kPanel + v * kLane) + load(gate_bias_ + at);
          const Vec<A> open = open_gate<N>(p_.activation, z);
          store(m.gates + b * 3 * width_ + at, clamp_gate<A>(p_.activation, open));
          if (call_.gates) {
            A *to = static_cast<A *>(call_.gates) + ((step * p_.batch + first + b) * 3 + gate) * channels + c;
            store_first(to, flags[b] & kFlagPastEnd ? Vec<A>{} : open, int(smaller(kLane, channels - c)));
          }
        }
      }
    }
  }

  // The mean of an image, from the sums of its blocks, in chunks.
  void pool(const A *sums, const Tiling &blocks, int64_t channels, int64_t width, bool zero, Elem *pooled) const {
    const A scale = A(1) / A(blocks.height * blocks.width);
    for (int64_t c = 0; c < channels; c += kLane) {
      Vec<A> sum{};
      for (int64_t k = 0; !zero && k < blocks.count; ++k)
        sum += load(sums + k * width + c);
      store_as<A>(pooled + c / kChunk * kGroup * kChunk + c % kChunk, sum * scale);
    }
  }

  void compute_block(const TeamMemory &m, const ThreadMemory &scratch, int64_t step, int64_t first, int64_t b,
                     int current, int64_t index) const {
    const Block block = blocks_[index];
    const T *x = m.x + b * x_.image.size(), *h = m.h[current] + b * h_.image.size();
    T *h_next = m.h[current ^ 1] + b * h_.image.size();
    constexpr int64_t chunk = kBlockSize * kChunk;
    x_.convolve_block(x, block, scratch.y);
    h_.convolve_block(h, block, scratch.y + x_chunks_ * chunk);
    for (int64_t panel = 0; panel < candidate_.panels(); ++panel) {
      const int64_t vectors = candidate_.vectors(panel);
      candidate_.multiply(panel, block.pixels(), scratch.y, chunk, scratch.z);
      for (int64_t v = 0; v < vectors; ++v)
        update_cell(m, scratch.z + v * kLane, panel * Packed<N>::kPanel + v * kLane, h_next, step, first, b, block,
                    index);
    }
  }

  // One vector of channels, from c on, of all pixels of a block; eq. (13) to (15).
  void update_cell(const TeamMemory &m, const A *z, int64_t c, T *h_next, int64_t step, int64_t first, int64_t b,
                   const Block &block, int64_t index) const {
    const A *gates = m.gates + b * 3 * width_ + c;
    const Vec<A> i = load(gates), f = load(gates + width_), o = load(gates + 2 * width_), bias = load(bias_ + c);
    const int count = int(smaller(kLane, h_.s.channels - c));
    const int64_t frame = (step * p_.batch + first + b) * saved_.size();
    Vec<A> sum{};
    for (int64_t row = 0; row < block.rows; ++row, z += block.columns * Packed<N>::kPanel) {
      const int64_t y = block.row + row, saved = frame + saved_.at(c, y, block.column);
      T *cells = call_.cells ? static_cast<T *>(call_.cells) + saved : nullptr;
      T *candidate = call_.candidate ? static_cast<T *>(call_.candidate) + saved : nullptr;
      sum = update_row(sum, block.columns, z, bias, i, f, o, m.c + b * state_.size() + state_.at(c, y, block.column),
                       state_.pixel(c), h_next + h_.image.at(c, y, block.column), h_.image.pixel(c), cells, candidate,
                       saved_.pixel(c), count);
    }
    store(m.h_sums + (b * blocks_.count + index) * width_ + c, sum);
  }

  // Returns `sum` and what the new state adds to it. Not inline: its loop needs all registers.
  __attribute__((noinline)) static Vec<A> update_row(Vec<A> sum, int64_t columns, const A *z, Vec<A> bias, Vec<A> i,
                                                     Vec<A> f, Vec<A> o, A *cell, int64_t cell_pixel, T *h,
                                                     int64_t h_pixel, T *cells, T *candidate, int64_t saved_pixel,
                                                     int count) {
    constexpr int kAtOnce = 4; // pixels, whose chains of operations overlap
    const auto update = [&](auto pixels, int64_t x) FC_LAMBDA_INLINE {
      constexpr int kPixels = decltype(pixels)::kValue;
      Vec<A> g[kPixels], c[kPixels], h_new[kPixels];
#pragma GCC unroll 4
      for (int k = 0; k < kPixels; ++k)
        g[k] = CellFunctions<N>::tanh(load(z + (x + k) * Packed<N>::kPanel) + bias);
#pragma GCC unroll 4
      for (int k = 0; k < kPixels; ++k) {
        c[k] = fma(f, load(cell + (x + k) * cell_pixel), i * g[k]);
        store(cell + (x + k) * cell_pixel, c[k]);
      }
#pragma GCC unroll 4
      for (int k = 0; k < kPixels; ++k)
        h_new[k] = o * CellFunctions<N>::tanh(c[k]);
#pragma GCC unroll 4
      for (int k = 0; k < kPixels; ++k)
        store_as<A>(h + (x + k) * h_pixel, h_new[k]);
#pragma GCC unroll 4
      for (int k = 0; k < kPixels; ++k)
        sum += load_as<A>(h + (x + k) * h_pixel); // as rounded
      for (int k = 0; cells && k < kPixels; ++k)
        store_first_as<A>(cells + (x + k) * saved_pixel, c[k], count);
      for (int k = 0; candidate && k < kPixels; ++k)
        store_first_as<A>(candidate + (x + k) * saved_pixel, g[k], count);
    };
    int64_t x = 0;
    for (; x + kAtOnce <= columns; x += kAtOnce)
      update(Constant<kAtOnce>{}, x);
    for (; x < columns; ++x)
      update(Constant<1>{}, x);
    return sum;
  }

  // Past the end of a sample: output zero; what is saved is never read, but has to have a value.
  void skip_block(int64_t step, int64_t sample, const Block &block) const {
    const int64_t frame = (step * p_.batch + sample) * saved_.size();
    fill_zero<T>(call_.output, step, sample, saved_.channels, block);
    for (int64_t c = 0; c < saved_.channels; ++c) {
      for (int64_t y = block.row; y < block.row + block.rows; ++y) {
        for (int64_t x = block.column; x < block.column + block.columns; ++x) {
          if (call_.cells)
            static_cast<T *>(call_.cells)[frame + saved_.at(c, y, x)] = convert<T>(A(0));
          if (call_.candidate)
            static_cast<T *>(call_.candidate)[frame + saved_.at(c, y, x)] = convert<T>(A(0));
        }
      }
    }
  }

  const PooledGateForward &call_;
  const PooledGateProblem &p_;
  Depthwise<A> x_, h_;
  const Tiling x_blocks_, blocks_, out_blocks_; // of the frame, of the state, of the output
  const int64_t width_, pixels_;                // channels in whole vectors, pixels of the state
  const Image state_, saved_;                   // of c; of cells and candidate in the caller's memory
  const int64_t x_chunks_, h_chunks_;
  int64_t group_ = 1;
  Packed<N> candidate_, gates_[3];
  A *bias_ = nullptr, *gate_bias_ = nullptr;
  TeamMemory *team_memory_ = nullptr;
  ThreadMemory *thread_memory_ = nullptr;
};

} // namespace

void pooled_gate_forward(const PooledGateForward &call, DType type, int threads) {
  switch (type) {
  case DType::float32:
    return Forward<float>(call).run(threads);
  case DType::bfloat16:
    return Forward<bfloat16>(call).run(threads);
  case DType::float64:
    return Forward<double>(call).run(threads);
  }
}

} // namespace FC_ISA
} // namespace fused_convlstm
