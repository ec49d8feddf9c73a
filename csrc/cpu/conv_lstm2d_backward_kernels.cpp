// Backward of the ConvLSTM. Per timestep one transposed product over dz of the following step (dz: gradient before the
// gate activations) gives dh; the cell's own backward follows while the sums are in the cache. A few steps at a time
// make a chunk; its gradients of input, weights, bias and peepholes are summed over all of its steps at once.
#include <algorithm>

#include "cell.h"

namespace fused_convlstm {
namespace FC_ISA {

namespace {

// Products with transposed weights: from dz of all gates to gradients of the channels that the gates read.
template <class N> struct TransposedConvolution {
  using Elem = typename N::Elem;
  using T = typename N::Acc;
  static constexpr int L = kLanes<T>, G = N::kGroup;
  static constexpr bool kCanTransform = sizeof(Elem) == 4;
  const Geometry &geometry;
  Blocks blocks; // of input channels
  int64_t out_per_group;
  int tile;                     // of a transformed convolution, 0 for a direct one
  Buffer<Elem> weights;         // [block][tap][gate, channel / G][lane][G]
  WinogradProduct<T> winograd;  // empty for a direct one
  const Pass *passes = nullptr; // of a direct one
  int pass_count = 0;

  TransposedConvolution(const Geometry &geometry_, int64_t groups, int64_t in_per_group, int64_t out_per_group_,
                        int tile_)
      : geometry(geometry_), blocks(groups, in_per_group, kVectors * L), out_per_group(out_per_group_),
        tile(kCanTransform ? tile_ : 0) {}

  int64_t block_stride() const { return int64_t(geometry.taps) * 4 * out_per_group * kVectors * L; }
  int vectors(int64_t block) const { return int((blocks.channels(block) + L - 1) / L); }

  void allocate() {
    weights.allocate(blocks.count() * block_stride());
    const ConvolutionShape &s = geometry.shape;
    if (tile == 0) {
      passes = geometry.transposed().data();
      pass_count = int(geometry.transposed().size());
    } else {
      winograd.allocate(tile, s.height, s.width, blocks.count(),
                        {{4 * out_per_group, s.out_height, s.out_width, 2 - s.pad_top, 2 - s.pad_left}});
    }
  }

  // This thread's part of the weights. All threads call it; a barrier has to follow.
  template <class From> void pack(const Tensor &weight, int64_t channels, int thread, int threads) {
    const int64_t taps = geometry.taps, kernel_w = geometry.shape.kernel_w;
    const Range range = part_of(blocks.count() * taps, thread, threads);
    for (int64_t part = range.begin; part < range.end; ++part) {
      const int64_t block = part / taps, tap = part % taps, lanes = blocks.channels(block);
      const int64_t width = vectors(block) * L;
      Elem *to = weights.get() + block * block_stride() + tap * 4 * out_per_group * width;
      const From *from = static_cast<const From *>(weight.data) + tap / kernel_w * weight.stride[2] +
                         tap % kernel_w * weight.stride[3] + blocks.first(block) * weight.stride[1];
      for (int64_t n = 0; n < 4 * out_per_group; ++n) {
        const int64_t out = n / out_per_group * channels + blocks.group(block) * out_per_group + n % out_per_group;
        const From *at = from + out * weight.stride[0];
        Elem *row = to + n / G * G * width + n % G;
        for (int64_t lane = 0; lane < width; ++lane)
          row[lane * G] = lane < lanes ? convert<Elem>(at[lane * weight.stride[1]]) : Elem{};
      }
    }
    if constexpr (kCanTransform) {
      if (tile != 0) {
#pragma omp barrier
        winograd.pack(
            weights.get(), block_stride(), [&](int64_t block) { return vectors(block); }, 0, 4 * out_per_group, true,
            thread, threads);
      }
    }
  }

  // This thread's part of the sums for all pixels of `count` images: body(block, begin, end, sums) for pixels of the
  // images laid end to end. images: dz rows of each, null for zeros.
  template <class Body>
  void run(const Elem *const *images, int64_t count, int thread, int threads, const ProductScratch<N> &scratch,
           const WinogradScratch<T> &winograd_scratch, const Body &body) const {
    if constexpr (kCanTransform) {
      const auto has_data = [](const T *rows) { return rows != nullptr; };
      if (tile != 0 && std::any_of(images, images + count, has_data)) { // the last step has no step after it
        winograd.for_pieces(&images, count, thread, threads, winograd_scratch,
                            [&](int64_t block, int64_t begin, int64_t end) {
                              run_transformed(block, begin, end, winograd_scratch,
                                              [&](T *sums, int64_t from, int64_t to) { body(block, from, to, sums); });
                            });
        return;
      }
    }
    for_pieces(blocks.count(), count, geometry.in_pixels, false, thread, threads,
               [&](int64_t block, int64_t begin, int64_t end) {
                 run_direct(images, block, begin, end, scratch);
                 body(block, begin, end, scratch.sums.get());
               });
  }

private:
  template <class Body>
  void run_transformed(int64_t block, int64_t begin, int64_t end, const WinogradScratch<T> &scratch,
                       const Body &body) const {
    switch (vectors(block)) {
    case 1:
      return winograd.template run<1>(block, begin, end, scratch, body);
    case 2:
      return winograd.template run<2>(block, begin, end, scratch, body);
    case 3:
      return winograd.template run<3>(block, begin, end, scratch, body);
    default:
      return winograd.template run<4>(block, begin, end, scratch, body);
    }
  }

  void run_direct(const Elem *const *images, int64_t block, int64_t begin, int64_t end,
                  const ProductScratch<N> &scratch) const {
    const int64_t group_row = 4 * out_per_group;
    const Operand<N> operand{images,
                             weights.get(),
                             blocks.groups * group_row,
                             group_row,
                             block_stride(),
                             geometry.taps,
                             int(group_row / G),
                             false,
                             nullptr,
                             nullptr,
                             passes,
                             pass_count};
    const int64_t group = blocks.group(block), pixels = geometry.in_pixels;
    switch (vectors(block)) {
    case 1:
      return product<N, 1>(&operand, 1, block, group, pixels, begin, end, scratch);
    case 2:
      return product<N, 2>(&operand, 1, block, group, pixels, begin, end, scratch);
    case 3:
      return product<N, 3>(&operand, 1, block, group, pixels, begin, end, scratch);
    default:
      return product<N, 4>(&operand, 1, block, group, pixels, begin, end, scratch);
    }
  }
};

constexpr int kPanel = kTilePixels<kVectors>; // rows of dz that one weight-gradient tile takes
constexpr int64_t kPixelBlock = 1024;         // pixels summed at once: what they read stays in the second-level cache

struct PixelPair {
  int64_t dz, input; // where a pixel's dz and the pixel that it read lie, in elements
};

// sums[p][lane] += dz[k][p] * input[k][lane] over the pairs k; each of dz and input is N::kGroup numbers, of so many
// images.
template <class N, int NV>
static __attribute__((noinline)) void weight_gradient_tile(typename N::Acc *sums, const typename N::Elem *panel,
                                                           const typename N::Elem *input, const PixelPair *pairs,
                                                           int64_t count) {
  using T = typename N::Acc;
  constexpr int L = kLanes<T>, G = N::kGroup;
  for (int64_t first = 0; first < count; first += kChain) {
    const int64_t last = smaller(count, first + kChain);
    Vec<T> sum[kPanel][NV];
    clear_sums<N, kPanel, NV>(sum);
    for (int64_t k = first; k < last; ++k) {
      const typename N::Elem *a = panel + pairs[k].dz, *b = input + pairs[k].input;
      Vec<T> w[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        w[v] = N::load_weights(b + v * L * G);
#pragma GCC unroll 6
      for (int p = 0; p < kPanel; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
          sum[p][v] = N::multiply_add(sum[p][v], a + p * G, w[v]);
    }
#pragma GCC unroll 6
    for (int p = 0; p < kPanel; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        T *to = sums + (p * kVectors + v) * L;
        store(to, load(to) + sum[p][v]);
      }
  }
}

template <class N>
static void weight_gradient_tile(int64_t vectors, typename N::Acc *sums, const typename N::Elem *panel,
                                 const typename N::Elem *input, const PixelPair *pairs, int64_t count) {
  switch (vectors) {
  case 1:
    return weight_gradient_tile<N, 1>(sums, panel, input, pairs, count);
  case 2:
    return weight_gradient_tile<N, 2>(sums, panel, input, pairs, count);
  case 3:
    return weight_gradient_tile<N, 3>(sums, panel, input, pairs, count);
  default:
    return weight_gradient_tile<N, 4>(sums, panel, input, pairs, count);
  }
}

// Gradient of one convolution's weights, summed chunk by chunk.
template <class N> struct WeightGradient {
  using Elem = typename N::Elem;
  using T = typename N::Acc;
  static constexpr int L = kLanes<T>, G = N::kGroup;
  const Geometry &geometry;
  Blocks blocks; // of input channels
  int64_t out_per_group, tiles;
  Buffer<T> sums; // [group][tap][block of the group][tile][kPanel][kVectors * L]

  WeightGradient(const Geometry &geometry_, int64_t groups, int64_t in_per_group, int64_t out_per_group_)
      : geometry(geometry_), blocks(groups, in_per_group, kVectors * L), out_per_group(out_per_group_),
        tiles((4 * out_per_group_ + kPanel - 1) / kPanel) {}

  int64_t tile_size() const { return kPanel * kVectors * L; }
  T *at(int64_t group, int64_t tap, int64_t block, int64_t tile) const {
    return sums.get() +
           (((group * geometry.taps + tap) * blocks.blocks_per_group + block) * tiles + tile) * tile_size();
  }
  void allocate() {
    sums.allocate(blocks.groups * geometry.taps * blocks.blocks_per_group * tiles * tile_size());
    sums.fill_zero();
  }

  // This thread's part of a chunk of `sets` of G images. panels: dz as [group][tile][pixel of all sets][kPanel][G];
  // inputs: rows [pixel][channel][G] of each set, as offsets from `base`, negative for sets to leave out.
  void add(const Elem *panels, const Elem *base, const int64_t *inputs, int64_t sets, const Row &row, PixelPair *pairs,
           int thread, int threads) const {
    const int64_t pixels = geometry.out_pixels, pixel_row = row.size() * G;
    const int64_t panel_size = sets * pixels * kPanel * G;
    const Range range = part_of(tiles, thread, threads);
    for (const Pass &pass : geometry.forward) {
      int64_t count = 0;
      for (int64_t set = 0; set < sets; ++set) {
        if (inputs[set] < 0)
          continue;
        for (int j = 0; j < pass.count; ++j)
          pairs[count++] = {(set * pixels + pass.dst[j]) * kPanel * G, inputs[set] + pass.src[j] * pixel_row};
      }
      for (int64_t group = 0; group < blocks.groups; ++group)
        for (int64_t block = 0; block < blocks.blocks_per_group; ++block)
          for (int64_t first = 0; first < count; first += kPixelBlock) {
            const int64_t length = smaller(kPixelBlock, count - first);
            const int64_t vectors = (blocks.channels(block) + L - 1) / L;
            const Elem *input = base + (group * row.padded + blocks.first(block)) * G;
            for (int64_t tile = range.begin; tile < range.end; ++tile) {
              T *to = at(group, pass.tap, block, tile);
              const Elem *panel = panels + (group * tiles + tile) * panel_size;
              weight_gradient_tile<N>(vectors, to, panel, input, pairs + first, length);
            }
          }
    }
  }

  // This thread's part of the caller's tensor (4 * C, in_per_group, kh, kw), contiguous.
  template <class To> void write(To *to, int64_t channels, int thread, int threads) const {
    const int64_t taps = geometry.taps, in_per_group = blocks.per_group;
    const Range range = part_of(4 * channels, thread, threads);
    for (int64_t out = range.begin; out < range.end; ++out) {
      const int64_t gate = out / channels, channel = out % channels, group = channel / out_per_group;
      const int64_t n = gate * out_per_group + channel % out_per_group;
      for (int64_t c = 0; c < in_per_group; ++c)
        for (int64_t tap = 0; tap < taps; ++tap)
          to[(out * in_per_group + c) * taps + tap] =
              convert<To>(at(group, tap, c / blocks.width, n / kPanel)[n % kPanel * kVectors * L + c % blocks.width]);
    }
  }
};

constexpr int64_t kGradientTiles = 256; // tiles summed at once: what they read stays in the second-level cache

// Gradients of both convolutions' weights at once, in the transform domain: sums over tiles of products of transformed
// windows with transformed dz.
template <class T> struct WinogradWeightGradient {
  static constexpr int L = kLanes<T>;
  WinogradWindows<T> windows;
  int64_t positions;
  int64_t outputs, panels; // 4 * C, and in panels of kPanel
  int64_t blocks;          // of kVectors * L input channels
  int64_t input_plane;     // elements from one position of `inputs` to the next
  Buffer<T> inputs;        // [position][tile of a chunk][depth]
  Buffer<T> sums;          // [position][block][panel][kPanel][kVectors * L]
  Buffer<T> zeros;         // (outputs)

  // A thread's scratch memory.
  struct Scratch {
    int64_t row, plane;      // elements from one tile to the next, from one position to the next
    Buffer<T> dz;            // [position][tile][output], of the outputs that the thread sums
    Buffer<PixelPair> pairs; // (kGradientTiles)
  };

  // images: of a chunk, at most.
  void allocate(const ConvLSTM2dCall &call, int64_t images) {
    const ConvolutionShape &x = call.input_conv->shape, &h = call.recurrent_conv->shape;
    windows.allocate(call.winograd.to_weights, h.out_height, h.out_width,
                     {{call.in_channels, x.height, x.width, x.pad_top, x.pad_left},
                      {call.channels, h.height, h.width, h.pad_top, h.pad_left}});
    positions = windows.positions();
    outputs = 4 * call.channels;
    panels = (outputs + kPanel - 1) / kPanel;
    blocks = (windows.depth + kVectors * L - 1) / (kVectors * L);
    input_plane = images * windows.tiles() * windows.depth + L; // planes begin in different sets of the cache
    inputs.allocate(positions * input_plane + kVectors * L);
    sums.allocate(positions * blocks * panels * tile_size());
    sums.fill_zero();
    zeros.allocate(outputs);
    zeros.fill_zero();
  }

  void allocate(Scratch &scratch, int threads) const {
    scratch.row = round_up((panels + threads - 1) / threads * kPanel, L) + L; // rows begin in different sets as well
    scratch.plane = kGradientTiles * scratch.row + L;
    scratch.dz.allocate(positions * scratch.plane);
    scratch.pairs.allocate(kGradientTiles);
    for (int64_t k = 0; k < kGradientTiles; ++k)
      scratch.pairs[k] = {k * scratch.row, k * windows.depth};
  }

  static int64_t tile_size() { return kPanel * kVectors * L; }
  T *at(int64_t position, int64_t block, int64_t panel) const {
    return sums.get() + ((position * blocks + block) * panels + panel) * tile_size();
  }

  // This thread's part of a chunk of `count` images, of which dz_images has dz and images[n] the rows of input n, null
  // for zeros. All threads call it.
  void add(const T *const *dz_images, const T *const *const *images, int64_t count, const Scratch &scratch, int thread,
           int threads) const {
    const int64_t total = count * windows.tiles();
    const Range tiles = part_of(total, thread, threads), range = part_of(panels, thread, threads);
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile)
      windows.transform(images, tile, inputs.get() + tile * windows.depth, input_plane);
#pragma omp barrier
    for (int64_t first = 0; first < total; first += kGradientTiles) {
      const int64_t length = smaller(kGradientTiles, total - first);
      for (int64_t k = 0; k < length; ++k)
        transform_dz(dz_images, first + k, range, scratch.dz.get() + k * scratch.row, scratch.plane);
      for (int64_t position = 0; position < positions; ++position)
        for (int64_t block = 0; block < blocks; ++block) {
          const T *input = inputs.get() + position * input_plane + first * windows.depth + block * kVectors * L;
          const int64_t channels = smaller(kVectors * L, windows.depth - block * kVectors * L);
          for (int64_t panel = range.begin; panel < range.end; ++panel)
            weight_gradient_tile<Plain<T>>((channels + L - 1) / L, at(position, block, panel),
                                           scratch.dz.get() + position * scratch.plane + (panel - range.begin) * kPanel,
                                           input, scratch.pairs.get(), length);
        }
    }
  }

  // This thread's part of the gradient of the weights of an input whose channels begin at `first`: the caller's tensor
  // (4 * C, channels, 3, 3), contiguous.
  template <class To> void write(To *to, int64_t first, int64_t channels, int thread, int threads) const {
    const Range range = part_of(outputs, thread, threads);
    const int64_t last = first + channels, position_stride = blocks * panels * tile_size();
    for (int64_t out = range.begin; out < range.end; ++out)
      for (int64_t c = first / L * L; c < last; c += L) {
        const T *from = at(0, c / (kVectors * L), out / kPanel) + out % kPanel * kVectors * L + c % (kVectors * L);
        Vec<T> taps[9];
        with_tile(windows.tile, [&](auto m) { inverse_transform_taps<T, m()>(taps, from, position_stride); });
        for (int64_t lane = larger(first - c, 0); lane < smaller(L, last - c); ++lane)
          for (int tap = 0; tap < 9; ++tap)
            to[(out * channels + c + lane - first) * 9 + tap] = convert<To>(taps[tap][lane]);
      }
  }

private:
  void transform_dz(const T *const *images, int64_t k, const Range &range, T *to, int64_t plane) const {
    const int64_t image = k / windows.tiles(), in_image = k % windows.tiles(), tile = windows.tile;
    const int64_t first_y = in_image / windows.columns * tile, first_x = in_image % windows.columns * tile;
    const int64_t begin = range.begin * kPanel, end = smaller(outputs, range.end * kPanel);
    const T *pixels[kMostTile * kMostTile];
    for (int64_t n = 0; n < tile * tile; ++n) {
      const int64_t y = first_y + n / tile, x = first_x + n % tile;
      const bool inside = y < windows.height && x < windows.width;
      pixels[n] = inside ? images[image] + (y * windows.width + x) * outputs + begin : zeros.get();
    }
    with_tile(windows.tile, [&](auto m) { transform_outputs<T, m()>(to, plane, pixels, end - begin); });
  }
};

// to[k * G + r] = rows[r][first + k], k < n; zeros for rows that are null.
template <int G, class Elem>
static FC_INLINE void interleave(Elem *to, const Elem *const *rows, int64_t first, int64_t n) {
  if constexpr (G == 1) {
    if (rows[0] != nullptr)
      std::memcpy(to, rows[0] + first, size_t(n) * sizeof(Elem));
    else
      std::memset(static_cast<void *>(to), 0, size_t(n) * sizeof(Elem));
  } else {
    const auto at = [&](int r, int64_t k) { // may read beyond the row, where the buffers have slack
      if (rows[r] == nullptr)
        return BitVec{};
      return __builtin_convertvector(*reinterpret_cast<const UnalignedHalfVec *>(rows[r] + first + k), BitVec);
    };
    constexpr int L = kLanes<float>;
    for (int64_t k = 0; k < n; k += L)
      store_first(reinterpret_cast<float *>(to + k * G), (Vec<float>)(at(0, k) | at(1, k) << 16),
                  int(smaller(L, n - k)));
  }
}

// N: number types of the products. Io: type of the caller's tensors.
template <class N, class Io> class Backward {
  using Elem = typename N::Elem; // dz is rounded to it
  using T = typename N::Acc;     // of all other arithmetic
  static constexpr int L = kLanes<T>, G = N::kGroup;
  static constexpr bool kCanTransform = sizeof(Elem) == 4;
  static constexpr int kInitial = -1, kZero = -2; // state before a step: the sequence's initial one; zero by a reset

public:
  explicit Backward(const ConvLSTM2dBackward &call)
      : call_(call), batch_(call.batch), channels_(call.channels), per_group_(call.channels / call.groups),
        pixels_(call.recurrent_conv->out_pixels), width_(call.recurrent_conv->shape.out_width),
        input_row_{call.groups, call.in_channels / call.groups, round_up(call.in_channels / call.groups, G)},
        h_row_{call.groups, per_group_, round_up(per_group_, G)}, cell_row_{1, channels_, channels_},
        input_rows_per_image_(int64_t(call.input_conv->in_pixels) + 1), h_rows_per_image_(pixels_ + 1),
        chunk_(chunk_steps(call)), to_h_(*call.recurrent_conv, call.groups, per_group_, per_group_, call.winograd.to_h),
        to_input_(*call.input_conv, call.groups, input_row_.per_group, per_group_, call.winograd.to_input),
        weight_ih_(*call.input_conv, call.groups, input_row_.per_group, per_group_),
        weight_hh_(*call.recurrent_conv, call.groups, per_group_, per_group_), lanes_(call.groups, per_group_, L),
        parameters_(call, lanes_), recompute_(call.gates == nullptr),
        transform_weights_(kCanTransform && call.winograd.to_weights && call.grad_weight_ih && call.grad_weight_hh) {
    const int64_t frame = batch_ * pixels_;
    needs_input_rows_ = recompute_ || call.grad_weight_ih;
    needs_h_rows_ = recompute_ || call.grad_weight_hh;
    if (needs_input_rows_)
      input_rows_.allocate(chunk_ * batch_ * input_rows_per_image_ * input_row_.size());
    if (needs_h_rows_)
      h_rows_.allocate(chunk_ * batch_ * h_rows_per_image_ * h_row_.size());
    if (G > 1 && call.grad_weight_ih)
      input_sets_.allocate(sets(chunk_) * G * int64_t(call.input_conv->in_pixels) * input_row_.size());
    if (G > 1 && call.grad_weight_hh)
      h_sets_.allocate(sets(chunk_) * G * pixels_ * h_row_.size());
    dz_.allocate((chunk_ + 1) * frame * 4 * channels_);
    if (call.grad_output)
      grad_output_rows_.allocate(2 * frame * channels_);
    if (call.grad_h_n)
      grad_h_n_rows_.allocate(frame * channels_);
    if (call.c_0)
      c_0_rows_.allocate(frame * channels_);
    dc_.allocate(frame * channels_);
    to_h_.allocate();
    if (call.grad_h_0)
      dh_0_rows_.allocate(frame * channels_);
    if (call.grad_input)
      to_input_.allocate();
    if (transform_weights_)
      winograd_weights_.allocate(call, chunk_ * batch_);
    if (call.grad_weight_ih && !transform_weights_)
      weight_ih_.allocate();
    if (call.grad_weight_hh && !transform_weights_)
      weight_hh_.allocate();
    if ((call.grad_weight_ih || call.grad_weight_hh) && !transform_weights_)
      panels_.allocate(call.groups * weight_hh_.tiles * sets(chunk_) * pixels_ * kPanel * G);
    if (call.grad_bias) {
      bias_sums_.allocate(4 * channels_);
      bias_sums_.fill_zero();
    }
    if (call.grad_peephole) {
      peephole_sums_.allocate((call.pixel_peephole ? pixels_ : 1) * 3 * channels_);
      peephole_sums_.fill_zero();
    }
    if (recompute_)
      new (&gates_) GateProduct<N>(call);
    find_predecessors();
  }
  Backward(const Backward &) = delete;
  Backward &operator=(const Backward &) = delete;
  ~Backward() {
    if (recompute_)
      gates_.~GateProduct<N>();
  }

  void run() {
    Buffer<ThreadState> states(call_.threads);
    const int gates_tile = recompute_ ? gates_.tile : 0;
    const int tile = int(larger(gates_tile, larger(to_h_.tile, to_input_.tile)));
    for (int k = 0; k < call_.threads; ++k) {
      new (&states[k]) ThreadState(batch_, chunk_, larger(pixels_, 1));
      if (tile != 0)
        states[k].winograd.allocate(tile, larger(4 * channels_, gates_tile != 0 ? gates_.winograd.depth : 0));
    }
    run_team(call_.threads, [&](int thread, int threads) { run_thread(states[thread], thread, threads); });
    for (int k = 0; k < call_.threads; ++k)
      states[k].~ThreadState();
  }

private:
  // Where each sample's gradients come from. Every thread keeps its own copy.
  struct ThreadState {
    ProductScratch<N> scratch;
    WinogradScratch<T> winograd;
    typename WinogradWeightGradient<T>::Scratch winograd_weights;
    Buffer<bool> pending;                  // (B), dh comes from dz of the following step
    Buffer<bool> from_end;                 // (B), dh begins with grad_h_n
    Buffer<bool> has_dc;                   // (B), dc_ is not all zero
    Buffer<int64_t> active;                // samples of a step, or step * B + sample of a chunk
    Buffer<const Elem *> images, h_images; // (active)
    Buffer<const Elem *> dz_images;        // (active)
    Buffer<int64_t> inputs;                // (sets of a chunk)
    Buffer<PixelPair> pairs;               // (sets of a chunk * pixels)

    ThreadState(int64_t batch, int64_t chunk, int64_t pixels)
        : pending(batch), from_end(batch), has_dc(batch), active(chunk * batch), images(chunk * batch),
          h_images(chunk * batch), dz_images(chunk * batch), inputs(chunk * batch), pairs(chunk * batch * pixels) {}
  };

  // Steps of a chunk; for an odd batch an even number where it can be, as the weight gradients take G images at once.
  static int64_t chunk_steps(const ConvLSTM2dBackward &call) {
    const int64_t frame = larger(1, call.batch * call.recurrent_conv->out_pixels);
    const int64_t steps = larger(1, smaller(call.steps / 4, 3 * kPixelBlock / frame));
    return smaller(call.steps, call.batch % G == 0 ? steps : round_up(steps, G));
  }
  // Sets of G images that so many steps make.
  int64_t sets(int64_t steps) const { return (steps * batch_ + G - 1) / G; }

  bool is_active(int64_t s, int64_t b) const { return !(flags_of(call_, s, b) & kFlagPastEnd); }

  // predecessor_[s][b]: the step whose state step s begins with, or kInitial, or kZero.
  void find_predecessors() {
    predecessor_.allocate(call_.steps * batch_);
    for (int64_t b = 0; b < batch_; ++b) {
      int64_t last = kInitial;
      for (int64_t s = 0; s < call_.steps; ++s) {
        const uint8_t flags = flags_of(call_, s, b);
        predecessor_[s * batch_ + b] = flags & kFlagReset ? kZero : last;
        if (!(flags & kFlagPastEnd))
          last = s;
      }
    }
  }

  Elem *dz_slot(int64_t s, int64_t b) const {
    return dz_.get() + (s % (chunk_ + 1) * batch_ + b) * pixels_ * 4 * channels_;
  }
  // Cells are of type T with peepholes, which read them, else of type Io.
  const void *cell_image(const void *cells, int64_t image) const {
    const int64_t bytes = parameters_.has_peephole ? sizeof(T) : sizeof(Io);
    return static_cast<const char *>(cells) + image * pixels_ * channels_ * bytes;
  }
  const void *cells(int64_t s, int64_t b) const { return cell_image(call_.cells, time_of(call_, s) * batch_ + b); }
  Vec<T> load_cells(const void *cells, int64_t at, int lanes) const {
    return parameters_.has_peephole ? load_first(static_cast<const T *>(cells) + at, lanes)
                                    : load_first_as<T>(static_cast<const Io *>(cells) + at, lanes);
  }
  // c before step s of sample b; null: zeros
  const void *cells_before(int64_t s, int64_t b) const {
    const int64_t before = predecessor_[s * batch_ + b];
    if (before >= 0)
      return cells(before, b);
    return before == kInitial && call_.c_0 ? cell_image(c_0_rows_.get(), b) : nullptr;
  }
  bool has_h_before(int64_t s, int64_t b) const {
    const int64_t before = predecessor_[s * batch_ + b];
    return before >= 0 || (before == kInitial && call_.h_0);
  }

  void pack_grad_output(int64_t s, int thread, int threads) {
    if (call_.grad_output)
      pack_frames(grad_output_rows_.get() + s % 2 * batch_ * pixels_ * channels_, cell_row_, pixels_,
                  call_.grad_output.data, call_.dtype, call_.grad_output.stride + 2, width_, pixels_, batch_, thread,
                  threads,
                  [&](int64_t b) { return is_active(s, b) ? frame_of(call_.grad_output, time_of(call_, s), b) : -1; });
  }

  void run_thread(ThreadState &state, int thread, int threads) {
    const DType state_type = sizeof(T) == 8 ? DType::float64 : DType::float32;
    if (transform_weights_)
      winograd_weights_.allocate(state.winograd_weights, threads);
    with_type(call_.dtype, [&](auto from) {
      using From = decltype(from);
      to_h_.template pack<From>(call_.weight_hh, channels_, thread, threads);
      if (call_.grad_input)
        to_input_.template pack<From>(call_.weight_ih, channels_, thread, threads);
    });
    if (recompute_)
      gates_.pack(call_, thread, threads);
    if (thread == 0 && recompute_) {
      zero_last_rows(input_rows_.get(), chunk_ * batch_, input_rows_per_image_, input_row_.size());
      zero_last_rows(h_rows_.get(), chunk_ * batch_, h_rows_per_image_, h_row_.size());
    }
    const auto pack_state = [&](auto *rows, const Tensor &from, DType type) {
      if (from)
        pack_frames(rows, cell_row_, pixels_, from.data, type, from.stride + 1, width_, pixels_, batch_, thread,
                    threads, [&](int64_t b) { return frame_of(from, b); });
    };
    if (parameters_.has_peephole)
      pack_state(c_0_rows_.get(), call_.c_0, state_type);
    else
      pack_state(reinterpret_cast<Io *>(c_0_rows_.get()), call_.c_0, state_type);
    pack_state(dc_.get(), call_.grad_c_n, state_type);
    pack_state(grad_h_n_rows_.get(), call_.grad_h_n, call_.dtype);
    for (int64_t b = 0; b < batch_; ++b) {
      state.pending[b] = false;
      state.from_end[b] = bool(call_.grad_h_n);
      state.has_dc[b] = bool(call_.grad_c_n);
    }
    pack_grad_output(call_.steps - 1, thread, threads);
    for (int64_t end = call_.steps; end > 0;) {
      const int64_t begin = larger(0, end - chunk_);
      pack_chunk(begin, end, thread, threads);
#pragma omp barrier
      if (recompute_) {
        recompute_gates(state, begin, end, thread, threads);
#pragma omp barrier
      }
      for (int64_t s = end - 1; s >= begin; --s) {
        step(state, s, thread, threads);
        if (s > 0)
          pack_grad_output(s - 1, thread, threads);
#pragma omp barrier
      }
      finish_chunk(state, begin, end, thread, threads);
#pragma omp barrier
      end = begin;
    }
    finish(state, thread, threads);
  }

  // Input and previous h of each active step of a chunk, as rows.
  void pack_chunk(int64_t begin, int64_t end, int thread, int threads) {
    if (needs_input_rows_)
      pack_frames(
          input_rows_.get(), input_row_, input_rows_per_image_, call_.input.data, call_.dtype, call_.input.stride + 2,
          call_.input_conv->shape.width, call_.input_conv->in_pixels, (end - begin) * batch_, thread, threads,
          [&](int64_t k) {
            const int64_t s = begin + k / batch_, b = k % batch_;
            return is_active(s, b) ? frame_of(call_.input, time_of(call_, s), b) : -1;
          },
          partial_rows(*call_.input_conv));
    if (!needs_h_rows_)
      return;
    // The output is where every h of the sequence stands; the initial one comes from elsewhere.
    pack_frames(h_rows_.get(), h_row_, h_rows_per_image_, call_.output.data, call_.dtype, call_.output.stride + 2,
                width_, pixels_, (end - begin) * batch_, thread, threads, [&](int64_t k) -> int64_t {
                  const int64_t s = begin + k / batch_, b = k % batch_, before = predecessor_[s * batch_ + b];
                  return is_active(s, b) && before >= 0 ? frame_of(call_.output, time_of(call_, before), b) : -1;
                });
    if (call_.h_0)
      pack_frames(h_rows_.get(), h_row_, h_rows_per_image_, call_.h_0.data, call_.dtype, call_.h_0.stride + 1, width_,
                  pixels_, (end - begin) * batch_, thread, threads, [&](int64_t k) -> int64_t {
                    const int64_t s = begin + k / batch_, b = k % batch_;
                    return is_active(s, b) && predecessor_[s * batch_ + b] == kInitial ? frame_of(call_.h_0, b) : -1;
                  });
  }

  // The active steps and samples of a chunk, as (s - begin) * B + b.
  int64_t list_active(ThreadState &state, int64_t begin, int64_t end) const {
    int64_t count = 0;
    for (int64_t s = begin; s < end; ++s)
      for (int64_t b = 0; b < batch_; ++b)
        if (is_active(s, b))
          state.active[count++] = (s - begin) * batch_ + b;
    return count;
  }

  // Rows of input and previous h of each of them.
  void list_rows(ThreadState &state, int64_t count, int64_t begin) const {
    for (int64_t k = 0; k < count; ++k) {
      const int64_t index = state.active[k];
      state.images[k] = input_rows_.get() + index * input_rows_per_image_ * input_row_.size();
      state.h_images[k] = has_h_before(begin + index / batch_, index % batch_)
                              ? h_rows_.get() + index * h_rows_per_image_ * h_row_.size()
                              : nullptr;
    }
  }

  // All gates of a chunk, into the slots of its dz.
  void recompute_gates(ThreadState &state, int64_t begin, int64_t end, int thread, int threads) {
    const int64_t count = list_active(state, begin, end);
    list_rows(state, count, begin);
    const Activation activation = call_.activation;
    gates_.run(
        state.images.get(), state.h_images.get(), count, thread, threads, state.scratch, state.winograd,
        [&](int64_t block, int64_t first, int64_t last, const T *sums) {
          const int lanes = int(lanes_.channels(block));
          const int64_t channel = lanes_.group(block) * per_group_ + lanes_.first(block);
          for (int64_t k = first; k < last; ++k) {
            const int64_t index = state.active[k / pixels_], pixel = k % pixels_;
            const int64_t s = begin + index / batch_, b = index % batch_;
            const T *z = sums + (k - first) * 4 * L, *bias = parameters_.bias.get() + block * 4 * L;
            Vec<T> gate[4];
            for (int n = 0; n < 4; ++n)
              gate[n] = load(z + n * L) + load(bias + n * L);
            if (parameters_.has_peephole) {
              const T *weights = parameters_.peephole.get() + pixel * parameters_.peephole_pixel_stride + channel;
              const int64_t at = pixel * channels_ + channel;
              if (const void *before = cells_before(s, b)) {
                const Vec<T> c = load_cells(before, at, lanes);
                gate[0] = fma(load_first(weights, lanes), c, gate[0]);
                gate[1] = fma(load_first(weights + channels_, lanes), c, gate[1]);
              }
              gate[3] = fma(load_first(weights + 2 * channels_, lanes), load_cells(cells(s, b), at, lanes), gate[3]);
            }
            Elem *to =
                dz_slot(s, b) + pixel * 4 * channels_ + lanes_.group(block) * 4 * per_group_ + lanes_.first(block);
            for (int n = 0; n < 4; ++n)
              store_first_as<T>(to + n * per_group_,
                                n == 2 ? CellFunctions<N>::tanh(gate[n]) : open_gate<N>(activation, gate[n]), lanes);
          }
        });
  }

  void step(ThreadState &state, int64_t s, int thread, int threads) {
    int64_t count = 0;
    for (int64_t b = 0; b < batch_; ++b) {
      if (is_active(s, b)) {
        state.active[count] = b;
        state.images[count++] = state.pending[b] ? dz_slot(s + 1, b) : nullptr;
      } else if (state.pending[b] && b % threads == thread) { // the state passes through
        std::memcpy(dz_slot(s, b), dz_slot(s + 1, b), size_t(pixels_ * 4 * channels_) * sizeof(Elem));
      }
    }
    to_h_.run(state.images.get(), count, thread, threads, state.scratch, state.winograd,
              [&](int64_t block, int64_t begin, int64_t end, const T *sums) {
                cell_backward(state, s, block, begin, end, sums);
              });
    for (int64_t k = 0; k < count; ++k) {
      const int64_t b = state.active[k];
      const bool reset = flags_of(call_, s, b) & kFlagReset;
      state.pending[b] = state.has_dc[b] = !reset;
      state.from_end[b] = false;
    }
  }

  // From dh (the sums, grad_output, grad_h_n) and dc to dz and dc of the step before.
  __attribute__((noinline)) void cell_backward(const ThreadState &state, int64_t s, int64_t block, int64_t begin,
                                               int64_t end, const T *sums) {
    using V = Vec<T>;
    const Activation activation = call_.activation;
    const int64_t group = to_h_.blocks.group(block), width = to_h_.vectors(block) * L;
    const T *grad_output = call_.grad_output ? grad_output_rows_.get() + s % 2 * batch_ * pixels_ * channels_ : nullptr;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t b = state.active[k / pixels_], pixel = k % pixels_;
      const int64_t row = (b * pixels_ + pixel) * channels_;
      const void *before = cells_before(s, b);
      const Io *saved = recompute_ ? nullptr
                                   : static_cast<const Io *>(call_.gates) +
                                         ((time_of(call_, s) * batch_ + b) * pixels_ + pixel) * 4 * channels_;
      Elem *dz_row = dz_slot(s, b) + pixel * 4 * channels_;
      for (int64_t first = 0; first < to_h_.blocks.channels(block); first += L) {
        const int lanes = int(smaller(L, to_h_.blocks.channels(block) - first));
        const int64_t in_group = to_h_.blocks.first(block) + first, channel = group * per_group_ + in_group;
        const int64_t at = group * 4 * per_group_ + in_group;
        V dh = load(sums + (k - begin) * width + first);
        if (grad_output != nullptr)
          dh = dh + load_first(grad_output + row + channel, lanes);
        if (state.from_end[b])
          dh = dh + load_first(grad_h_n_rows_.get() + row + channel, lanes);
        V gate[4];
        for (int n = 0; n < 4; ++n)
          gate[n] = saved == nullptr ? load_first_as<T>(dz_row + at + n * per_group_, lanes)
                                     : load_first_as<T>(saved + at + n * per_group_, lanes);
        const V i = clamp_gate<T>(activation, gate[0]), f = clamp_gate<T>(activation, gate[1]);
        const V g = gate[2], o = clamp_gate<T>(activation, gate[3]);
        const V c = load_cells(cells(s, b), pixel * channels_ + channel, lanes);
        const V c_before = before == nullptr ? V{} : load_cells(before, pixel * channels_ + channel, lanes);
        const V tanh_c = CellFunctions<N>::tanh(c);
        const V dz_o = dh * tanh_c * gate_slope<T>(activation, gate[3]);
        V dc = dh * o * (T(1) - tanh_c * tanh_c);
        if (state.has_dc[b])
          dc = dc + load_first(dc_.get() + row + channel, lanes);
        const T *peephole = nullptr;
        if (parameters_.has_peephole) {
          peephole = parameters_.peephole.get() + pixel * parameters_.peephole_pixel_stride + channel;
          dc = fma(load_first(peephole + 2 * channels_, lanes), dz_o, dc);
        }
        const V dz_i = dc * g * gate_slope<T>(activation, gate[0]);
        const V dz_f = dc * c_before * gate_slope<T>(activation, gate[1]);
        const V dz_g = dc * i * (T(1) - g * g);
        V dc_before = dc * f;
        if (peephole != nullptr) {
          dc_before = fma(load_first(peephole, lanes), dz_i, dc_before);
          dc_before = fma(load_first(peephole + channels_, lanes), dz_f, dc_before);
        }
        store_first(dc_.get() + row + channel, dc_before, lanes);
        store_first_as<T>(dz_row + at, dz_i, lanes);
        store_first_as<T>(dz_row + at + per_group_, dz_f, lanes);
        store_first_as<T>(dz_row + at + 2 * per_group_, dz_g, lanes);
        store_first_as<T>(dz_row + at + 3 * per_group_, dz_o, lanes);
      }
    }
  }

  // Gradients that are summed over steps, and that of the input.
  void finish_chunk(ThreadState &state, int64_t begin, int64_t end, int thread, int threads) {
    const int64_t count = list_active(state, begin, end);
    if constexpr (kCanTransform) {
      if (transform_weights_) {
        list_rows(state, count, begin);
        for (int64_t k = 0; k < count; ++k)
          state.dz_images[k] = dz_slot(begin + state.active[k] / batch_, state.active[k] % batch_);
        const T *const *images[kWinogradInputs] = {state.images.get(), state.h_images.get()};
        winograd_weights_.add(state.dz_images.get(), images, count, state.winograd_weights, thread, threads);
      }
    }
    if ((call_.grad_weight_ih || call_.grad_weight_hh) && !transform_weights_) {
      const auto has_input = [&](int64_t k) { return is_active(begin + k / batch_, k % batch_); };
      const auto has_h = [&](int64_t k) { return has_input(k) && has_h_before(begin + k / batch_, k % batch_); };
      const int64_t images = (end - begin) * batch_;
      pack_panels(has_input, begin, images, thread, threads);
      const int64_t in_pixels = int64_t(call_.input_conv->in_pixels);
      if (G > 1 && call_.grad_weight_ih)
        pack_sets(input_sets_.get(), input_rows_.get(), input_rows_per_image_, in_pixels, input_row_, has_input, images,
                  thread, threads);
      if (G > 1 && call_.grad_weight_hh)
        pack_sets(h_sets_.get(), h_rows_.get(), h_rows_per_image_, pixels_, h_row_, has_h, images, thread, threads);
#pragma omp barrier
      const auto add = [&](const WeightGradient<N> &gradient, const Buffer<Elem> &rows, int64_t rows_per_image,
                           const Buffer<Elem> &in_sets, int64_t pixels, const Row &row, const auto &present) {
        for (int64_t set = 0; set < sets(end - begin); ++set) {
          const bool any = present(set * G) || (G > 1 && set * G + 1 < images && present(set * G + 1));
          state.inputs[set] = any ? set * (G > 1 ? G * pixels : rows_per_image) * row.size() : -1;
        }
        gradient.add(panels_.get(), G > 1 ? in_sets.get() : rows.get(), state.inputs.get(), sets(end - begin), row,
                     state.pairs.get(), thread, threads);
      };
      if (call_.grad_weight_ih)
        add(weight_ih_, input_rows_, input_rows_per_image_, input_sets_, in_pixels, input_row_, has_input);
      if (call_.grad_weight_hh)
        add(weight_hh_, h_rows_, h_rows_per_image_, h_sets_, pixels_, h_row_, has_h);
    }
    if (call_.grad_bias)
      add_bias(state, count, begin, thread, threads);
    if (call_.grad_peephole)
      add_peephole(state, count, begin, thread, threads);
    if (call_.grad_input)
      write_grad_input(state, count, begin, end, thread, threads);
  }

  // dz as [group][tile][pixel of all sets][kPanel][G], zeros behind the last gate and for images without dz.
  template <class Present>
  void pack_panels(const Present &present, int64_t begin, int64_t images, int thread, int threads) {
    const int64_t tiles = weight_hh_.tiles, count = (images + G - 1) / G;
    const int64_t panel_size = count * pixels_ * kPanel * G;
    const Range range = part_of(count * pixels_, thread, threads);
    for (int64_t k = range.begin; k < range.end; ++k) {
      const Elem *rows[G];
      for (int64_t r = 0; r < G; ++r) {
        const int64_t image = k / pixels_ * G + r;
        rows[r] = image < images && present(image)
                      ? dz_slot(begin + image / batch_, image % batch_) + k % pixels_ * 4 * channels_
                      : nullptr;
      }
      Elem *to = panels_.get() + k * kPanel * G;
      for (int64_t group = 0; group < call_.groups; ++group)
        for (int64_t tile = 0; tile < tiles; ++tile, to += panel_size) {
          const int64_t first = group * 4 * per_group_ + tile * kPanel;
          const int64_t n = smaller(kPanel, 4 * per_group_ - tile * kPanel);
          interleave<G>(to, rows, first, n);
          for (int64_t p = n * G; p < kPanel * G; ++p)
            to[p] = Elem{};
        }
    }
  }

  // Rows of sets of G images, [set][pixel][channel][G], from rows of images; zeros for images that are not there.
  template <class Present>
  static void pack_sets(Elem *to, const Elem *from, int64_t rows_per_image, int64_t pixels, const Row &row,
                        const Present &present, int64_t images, int thread, int threads) {
    const Range range = part_of((images + G - 1) / G * pixels, thread, threads);
    for (int64_t k = range.begin; k < range.end; ++k) {
      const Elem *rows[G];
      for (int64_t r = 0; r < G; ++r) {
        const int64_t image = k / pixels * G + r;
        rows[r] =
            image < images && present(image) ? from + (image * rows_per_image + k % pixels) * row.size() : nullptr;
      }
      interleave<G>(to + k * row.size() * G, rows, 0, row.size());
    }
  }

  // A thread sums its channels over all pixels: a float sum for each image, those in double.
  void add_bias(const ThreadState &state, int64_t count, int64_t begin, int thread, int threads) {
    const int64_t row = 4 * channels_;
    const Range range = part_of((row + L - 1) / L, thread, threads);
    for (int64_t unit = range.begin; unit < range.end; ++unit) {
      const int lanes = int(smaller(L, row - unit * L));
      for (int64_t k = 0; k < count; ++k) {
        const int64_t index = state.active[k];
        const Elem *dz = dz_slot(begin + index / batch_, index % batch_) + unit * L;
        Vec<T> sum{};
        for (int64_t pixel = 0; pixel < pixels_; ++pixel)
          sum = sum + load_first_as<T>(dz + pixel * row, lanes);
        for (int lane = 0; lane < lanes; ++lane)
          bias_sums_[unit * L + lane] += double(sum[lane]);
      }
    }
  }

  void add_peephole(const ThreadState &state, int64_t count, int64_t begin, int thread, int threads) {
    const int64_t units = call_.pixel_peephole ? pixels_ : channels_;
    const Range range = part_of(units, thread, threads);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t index = state.active[k], s = begin + index / batch_, b = index % batch_;
      const Elem *dz = dz_slot(s, b);
      const T *c = static_cast<const T *>(cells(s, b)), *before = static_cast<const T *>(cells_before(s, b));
      const auto add = [&](int64_t pixel, int64_t channel, double *to) {
        const Elem *z = dz + pixel * 4 * channels_ + channel / per_group_ * 4 * per_group_ + channel % per_group_;
        const int64_t at = pixel * channels_ + channel;
        if (before != nullptr) {
          to[0] += convert<double>(z[0]) * double(before[at]);
          to[channels_] += convert<double>(z[per_group_]) * double(before[at]);
        }
        to[2 * channels_] += convert<double>(z[3 * per_group_]) * double(c[at]);
      };
      if (call_.pixel_peephole) {
        for (int64_t pixel = range.begin; pixel < range.end; ++pixel)
          for (int64_t channel = 0; channel < channels_; ++channel)
            add(pixel, channel, peephole_sums_.get() + pixel * 3 * channels_ + channel);
      } else {
        for (int64_t pixel = 0; pixel < pixels_; ++pixel)
          for (int64_t channel = range.begin; channel < range.end; ++channel)
            add(pixel, channel, peephole_sums_.get() + channel);
      }
    }
  }

  void write_grad_input(ThreadState &state, int64_t count, int64_t begin, int64_t end, int thread, int threads) {
    const Tensor &grad = call_.grad_input;
    Io *data = static_cast<Io *>(grad.data);
    const int64_t in_pixels = call_.input_conv->in_pixels;
    const int64_t pixel_stride = grad.stride[4], channel_stride = grad.stride[2];
    for (int64_t k = thread; k < (end - begin) * batch_; k += threads) {
      const int64_t s = begin + k / batch_, b = k % batch_;
      if (is_active(s, b))
        continue;
      Io *to = data + frame_of(grad, time_of(call_, s), b);
      for (int64_t p = 0; p < in_pixels; ++p)
        for (int64_t c = 0; c < call_.in_channels; ++c)
          to[p * pixel_stride + c * channel_stride] = Io{};
    }
    for (int64_t k = 0; k < count; ++k)
      state.images[k] = dz_slot(begin + state.active[k] / batch_, state.active[k] % batch_);
    const Blocks &blocks = to_input_.blocks;
    to_input_.run(state.images.get(), count, thread, threads, state.scratch, state.winograd,
                  [&](int64_t block, int64_t first, int64_t last, const T *sums_of_pixels) {
                    const int64_t channel = blocks.group(block) * blocks.per_group + blocks.first(block);
                    const int64_t width = to_input_.vectors(block) * L;
                    for (int64_t k = first; k < last;) {
                      const int64_t index = state.active[k / in_pixels], pixel = k % in_pixels;
                      const int64_t run = smaller(last - k, in_pixels - pixel);
                      Io *to = data + frame_of(grad, time_of(call_, begin + index / batch_), index % batch_) +
                               pixel * pixel_stride + channel * channel_stride;
                      const T *sums = sums_of_pixels + (k - first) * width;
                      if (pixel_stride == 1) {
                        transpose(to, channel_stride, sums, width, run, blocks.channels(block));
                      } else {
                        for (int64_t p = 0; p < run; ++p)
                          for (int64_t c = 0; c < blocks.channels(block); ++c)
                            to[p * pixel_stride + c * channel_stride] = convert<Io>(sums[p * width + c]);
                      }
                      k += run;
                    }
                  });
  }

  // Gradients of the initial state, and what was summed over the chunks.
  void finish(ThreadState &state, int thread, int threads) {
    const DType state_type = sizeof(T) == 8 ? DType::float64 : DType::float32;
    if (call_.grad_h_0) {
      for (int64_t b = 0; b < batch_; ++b)
        state.images[b] = state.pending[b] ? dz_slot(0, b) : nullptr;
      to_h_.run(state.images.get(), batch_, thread, threads, state.scratch, state.winograd,
                [&](int64_t block, int64_t begin, int64_t end, const T *sums) {
                  const int64_t width = to_h_.vectors(block) * L;
                  const int64_t channel = to_h_.blocks.group(block) * per_group_ + to_h_.blocks.first(block);
                  for (int64_t k = begin; k < end; ++k)
                    for (int64_t c = 0; c < to_h_.blocks.channels(block); ++c) {
                      const int64_t at = k * channels_ + channel + c;
                      const T end_gradient = state.from_end[k / pixels_] ? grad_h_n_rows_[at] : T{};
                      dh_0_rows_[at] = sums[(k - begin) * width + c] + end_gradient;
                    }
                });
#pragma omp barrier
      unpack_frames<T>([&](int64_t b) { return dh_0_rows_.get() + b * pixels_ * channels_; }, cell_row_,
                       call_.grad_h_0.data, call_.dtype, call_.grad_h_0.stride + 1, width_, pixels_, batch_,
                       call_.grad_h_0.stride[0], thread, threads);
    }
    if (call_.grad_c_0)
      unpack_frames<T>([&](int64_t b) { return state.has_dc[b] ? dc_.get() + b * pixels_ * channels_ : nullptr; },
                       cell_row_, call_.grad_c_0.data, state_type, call_.grad_c_0.stride + 1, width_, pixels_, batch_,
                       call_.grad_c_0.stride[0], thread, threads);
    Io *grad_ih = static_cast<Io *>(call_.grad_weight_ih.data), *grad_hh = static_cast<Io *>(call_.grad_weight_hh.data);
    if (transform_weights_) {
      winograd_weights_.write(grad_ih, 0, call_.in_channels, thread, threads);
      winograd_weights_.write(grad_hh, call_.in_channels, channels_, thread, threads);
    } else {
      if (grad_ih != nullptr)
        weight_ih_.write(grad_ih, channels_, thread, threads);
      if (grad_hh != nullptr)
        weight_hh_.write(grad_hh, channels_, thread, threads);
    }
    if (thread != 0)
      return;
    if (call_.grad_bias) {
      Io *to = static_cast<Io *>(call_.grad_bias.data);
      for (int64_t gate = 0; gate < 4; ++gate)
        for (int64_t c = 0; c < channels_; ++c)
          to[gate * channels_ + c] =
              convert<Io>(bias_sums_[c / per_group_ * 4 * per_group_ + gate * per_group_ + c % per_group_]);
    }
    if (call_.grad_peephole) {
      Io *to = static_cast<Io *>(call_.grad_peephole.data);
      const int64_t count = call_.pixel_peephole ? pixels_ : 1;
      for (int64_t k = 0; k < 3 * channels_; ++k)
        for (int64_t pixel = 0; pixel < count; ++pixel)
          to[k * count + pixel] = convert<Io>(peephole_sums_[pixel * 3 * channels_ + k]);
    }
  }

  const ConvLSTM2dBackward &call_;
  int64_t batch_, channels_, per_group_, pixels_, width_;
  Row input_row_, h_row_, cell_row_;
  int64_t input_rows_per_image_, h_rows_per_image_;
  int64_t chunk_; // steps
  TransposedConvolution<N> to_h_, to_input_;
  WeightGradient<N> weight_ih_, weight_hh_;
  Blocks lanes_; // of hidden channels, one vector wide
  CellParameters<T> parameters_;
  bool recompute_, transform_weights_, needs_input_rows_, needs_h_rows_;
  WinogradWeightGradient<T> winograd_weights_; // empty unless transform_weights_
  union {                                      // there only if recompute_
    GateProduct<N> gates_;
  };
  Buffer<int64_t> predecessor_;              // (T, B)
  Buffer<Elem> input_rows_, h_rows_;         // (chunk, B, pixels, channels)
  Buffer<Elem> input_sets_, h_sets_;         // the same for the weight gradients, if they take several images at once
  Buffer<Elem> dz_;                          // (chunk + 1, B, pixels, 4 * C), step s in slot s modulo chunk + 1
  Buffer<Elem> panels_;                      // dz for the weight gradients
  Buffer<T> grad_output_rows_;               // (2, B, pixels, C), the step's and the next one's
  Buffer<T> grad_h_n_rows_, dc_, dh_0_rows_; // (B, pixels, C)
  Buffer<T> c_0_rows_;                       // (B, pixels, C), of the type of the cells
  Buffer<double> bias_sums_;                 // [group][gate][channel]
  Buffer<double> peephole_sums_;             // [pixel or one][i, f, o][channel]
};

} // namespace

void conv_lstm2d_backward(const ConvLSTM2dBackward &call) {
  switch (call.dtype) {
  case DType::float32:
    return Backward<F32, float>(call).run();
  case DType::bfloat16:
#ifdef FC_ISA_AVX512_BF16
    return Backward<BF16, bfloat16>(call).run();
#else
    return Backward<F32, bfloat16>(call).run();
#endif
  case DType::float64:
    return Backward<F64, double>(call).run();
  }
}

} // namespace FC_ISA
} // namespace fused_convlstm
