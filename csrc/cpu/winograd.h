// 3x3 convolutions by Winograd's minimal filtering F(2x2, 3x3) and F(4x4, 3x3) (Lavin & Gray 2016, "Fast Algorithms for
// Convolutional Neural Networks", section 4): windows of 4x4 or 6x6 inputs and the taps go to 16 or 36 transformed
// positions, where a tile of 2x2 or 4x4 outputs takes one product for each, 16 instead of 36 or 36 instead of 144. Sums
// over channels, and over several convolutions with the same outputs, are taken there; one inverse transform gives the
// outputs.
//
// As in gemm.h, every output is one chain of multiply-adds whatever else is computed with it.
#pragma once

#include <type_traits>

#include "gemm.h"

namespace fused_convlstm {
namespace FC_ISA {

constexpr int kMostTile = 4;
constexpr int64_t window_size(int tile) { return tile + 2; }
constexpr int64_t positions_of(int tile) { return window_size(tile) * window_size(tile); } // of a transformed window
constexpr int kMostPositions = int(positions_of(kMostTile));
constexpr int kUnitTiles = 6; // pieces are multiples of this, the height of the register tile, as far as possible
// Tiles whose windows and transformed sums stay in the second-level cache.
constexpr int64_t piece_tiles(int tile) { return tile == 2 ? 48 : 24; }
constexpr int64_t kRunPixels = 16; // of a row of outputs that stay in the first-level cache

// Calls f with the tile as a type.
template <class F> static FC_INLINE void with_tile(int tile, const F &f) {
  if (tile == 2)
    return f(std::integral_constant<int, 2>{});
  return f(std::integral_constant<int, 4>{});
}

// The transforms along one dimension, for M outputs: Y = A^T [(G w) . (B^T x)] of M + 2 inputs x and 3 taps w, and the
// transposes of A^T and G.
template <int M> struct Filter;

template <> struct Filter<2> { // at the points 0, 1, -1 and infinity
  template <class T, class V> static FC_INLINE void window(V (&x)[4]) {
    const V a = x[0] - x[2], b = x[1] + x[2], c = x[2] - x[1], d = x[1] - x[3];
    x[0] = a, x[1] = b, x[2] = c, x[3] = d;
  }
  template <class T, class V> static FC_INLINE void taps(V (&to)[4], const V (&w)[3]) {
    const V even = (w[0] + w[2]) * T(0.5), odd = w[1] * T(0.5);
    to[0] = w[0], to[1] = even + odd, to[2] = even - odd, to[3] = w[2];
  }
  template <class T, class V> static FC_INLINE void outputs(V (&y)[2], const V (&s)[4]) {
    y[0] = s[0] + s[1] + s[2], y[1] = s[1] - s[2] - s[3];
  }
  template <class T, class V> static FC_INLINE void outputs_transposed(V (&to)[4], const V (&y)[2]) {
    to[0] = y[0], to[1] = y[0] + y[1], to[2] = y[0] - y[1], to[3] = -y[1];
  }
  template <class T, class V> static FC_INLINE void taps_transposed(V (&w)[3], const V (&s)[4]) {
    const V even = (s[1] + s[2]) * T(0.5);
    w[0] = s[0] + even, w[1] = (s[1] - s[2]) * T(0.5), w[2] = even + s[3];
  }
};

// At the points 0, a, -a, b, -b and infinity. With 5/8 and 3/2 instead of the usual 1 and 2, or 1 and 1/2, the powers
// of the points are near 1, so that transformed values differ less in size, and all constants but those of the taps are
// exact.
template <> struct Filter<4> {
  static constexpr double a = 0.625, b = 1.5, a2 = a * a, b2 = b * b;
  static constexpr double n_0 = 1 / (a2 * b2), n_a = 1 / (2 * a2 * (a2 - b2)), n_b = 1 / (2 * b2 * (b2 - a2));

  template <class T, class V> static FC_INLINE void window(V (&x)[6]) {
    const auto less = [](V y, double c, V z) { return fma(splat<T>(T(-c)), z, y); }; // y - c * z
    const V even_a = less(x[4], b2, x[2]), odd_a = less(x[3], b2, x[1]);
    const V even_b = less(x[4], a2, x[2]), odd_b = less(x[3], a2, x[1]);
    const V first = less(less(x[4], a2 + b2, x[2]), -a2 * b2, x[0]);
    const V last = less(less(x[5], a2 + b2, x[3]), -a2 * b2, x[1]);
    x[0] = first, x[1] = less(even_a, -a, odd_a), x[2] = less(even_a, a, odd_a);
    x[3] = less(even_b, -b, odd_b), x[4] = less(even_b, b, odd_b), x[5] = last;
  }
  template <class T, class V> static FC_INLINE void taps(V (&to)[6], const V (&w)[3]) {
    const V even_a = (w[0] + w[2] * T(a2)) * T(n_a), odd_a = w[1] * T(a * n_a);
    const V even_b = (w[0] + w[2] * T(b2)) * T(n_b), odd_b = w[1] * T(b * n_b);
    to[0] = w[0] * T(n_0), to[1] = even_a + odd_a, to[2] = even_a - odd_a;
    to[3] = even_b + odd_b, to[4] = even_b - odd_b, to[5] = w[2];
  }
  template <class T, class V> static FC_INLINE void outputs(V (&y)[4], const V (&s)[6]) {
    const V even_a = s[1] + s[2], odd_a = s[1] - s[2], even_b = s[3] + s[4], odd_b = s[3] - s[4];
    const auto sum = [](V x, double c, V y, double d, V z) { // x + c * y + d * z
      return fma(splat<T>(T(d)), z, fma(splat<T>(T(c)), y, x));
    };
    y[0] = s[0] + even_a + even_b, y[1] = sum(V{}, a, odd_a, b, odd_b);
    y[2] = sum(V{}, a2, even_a, b2, even_b), y[3] = sum(s[5], a * a2, odd_a, b * b2, odd_b);
  }
  template <class T, class V> static FC_INLINE void outputs_transposed(V (&to)[6], const V (&y)[4]) {
    const V even_a = y[0] + y[2] * T(a2), odd_a = y[1] * T(a) + y[3] * T(a * a2);
    const V even_b = y[0] + y[2] * T(b2), odd_b = y[1] * T(b) + y[3] * T(b * b2);
    to[0] = y[0], to[1] = even_a + odd_a, to[2] = even_a - odd_a;
    to[3] = even_b + odd_b, to[4] = even_b - odd_b, to[5] = y[3];
  }
  template <class T, class V> static FC_INLINE void taps_transposed(V (&w)[3], const V (&s)[6]) {
    const V even_a = (s[1] + s[2]) * T(n_a), odd_a = (s[1] - s[2]) * T(a * n_a);
    const V even_b = (s[3] + s[4]) * T(n_b), odd_b = (s[3] - s[4]) * T(b * n_b);
    w[0] = s[0] * T(n_0) + even_a + even_b, w[1] = odd_a + odd_b;
    w[2] = even_a * T(a2) + even_b * T(b2) + s[5];
  }
};

// Transformed taps of L outputs: to[position * position_stride] from packed[tap * tap_stride].
template <class T, int M>
static __attribute__((noinline)) void transform_taps(T *to, int64_t position_stride, const T *from, int64_t tap_stride,
                                                     bool flipped) {
  using V = Vec<T>;
  constexpr int W = M + 2;
  V rows[W][3];
  for (int x = 0; x < 3; ++x) {
    V tap[3], column[W];
    for (int y = 0; y < 3; ++y)
      tap[y] = load(from + (flipped ? 8 - 3 * y - x : 3 * y + x) * tap_stride);
    Filter<M>::template taps<T>(column, tap);
    for (int y = 0; y < W; ++y)
      rows[y][x] = column[y];
  }
  for (int y = 0; y < W; ++y) {
    V row[W];
    Filter<M>::template taps<T>(row, rows[y]);
    for (int x = 0; x < W; ++x, to += position_stride)
      store(to, row[x]);
  }
}

// Transformed window of the first `lanes` channels: to[position * position_stride + channel] from its pixels.
template <class T, int M>
static FC_INLINE void transform_channels(T *to, int64_t position_stride, const T *const *pixels, int64_t channel,
                                         int lanes) {
  using V = Vec<T>;
  constexpr int W = M + 2;
  V rows[W][W];
#pragma GCC unroll 6
  for (int x = 0; x < W; ++x) {
    V column[W];
#pragma GCC unroll 6
    for (int y = 0; y < W; ++y)
      column[y] = load_first(pixels[W * y + x] + channel, lanes);
    Filter<M>::template window<T>(column);
#pragma GCC unroll 6
    for (int y = 0; y < W; ++y)
      rows[y][x] = column[y];
  }
  to += channel;
#pragma GCC unroll 6
  for (int y = 0; y < W; ++y) {
    Filter<M>::template window<T>(rows[y]);
#pragma GCC unroll 6
    for (int x = 0; x < W; ++x, to += position_stride)
      store_first(to, rows[y][x], lanes);
  }
}
template <class T, int M>
static __attribute__((noinline)) void transform_window(T *to, int64_t position_stride, const T *const *pixels,
                                                       int64_t channels) {
  int64_t channel = 0;
  for (; channel + kLanes<T> <= channels; channel += kLanes<T>)
    transform_channels<T, M>(to, position_stride, pixels, channel, kLanes<T>);
  if (channel < channels)
    transform_channels<T, M>(to, position_stride, pixels, channel, int(channels - channel));
}

// Outputs of a tile: M rows of M pixels, `row_stride` from one row to the next, from positions of `NV` vectors of sums.
template <class T, int M, int NV> static FC_INLINE void inverse_transform(T *to, int64_t row_stride, const T *sums) {
  using V = Vec<T>;
  constexpr int W = M + 2, kWidth = NV * kLanes<T>;
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v, to += kLanes<T>, sums += kLanes<T>) {
    V rows[M][W];
#pragma GCC unroll 6
    for (int x = 0; x < W; ++x) {
      V column[W], outputs[M];
#pragma GCC unroll 6
      for (int y = 0; y < W; ++y)
        column[y] = load(sums + (W * y + x) * kWidth);
      Filter<M>::template outputs<T>(outputs, column);
#pragma GCC unroll 4
      for (int y = 0; y < M; ++y)
        rows[y][x] = outputs[y];
    }
#pragma GCC unroll 4
    for (int y = 0; y < M; ++y) {
      V outputs[M];
      Filter<M>::template outputs<T>(outputs, rows[y]);
#pragma GCC unroll 4
      for (int x = 0; x < M; ++x)
        store(to + y * row_stride + x * kWidth, outputs[x]);
    }
  }
}

// The transpose of inverse_transform: to[position * position_stride + channel] from a tile's pixels.
template <class T, int M>
static __attribute__((noinline)) void transform_outputs(T *to, int64_t position_stride, const T *const *pixels,
                                                        int64_t channels) {
  using V = Vec<T>;
  constexpr int W = M + 2;
  for (int64_t c = 0; c < channels; c += kLanes<T>, to += kLanes<T>) {
    const int lanes = int(smaller(kLanes<T>, channels - c));
    V rows[W][M];
#pragma GCC unroll 4
    for (int x = 0; x < M; ++x) {
      V column[M], transformed[W];
#pragma GCC unroll 4
      for (int y = 0; y < M; ++y)
        column[y] = load_first(pixels[M * y + x] + c, lanes);
      Filter<M>::template outputs_transposed<T>(transformed, column);
#pragma GCC unroll 6
      for (int y = 0; y < W; ++y)
        rows[y][x] = transformed[y];
    }
    T *at = to;
#pragma GCC unroll 6
    for (int y = 0; y < W; ++y) {
      V transformed[W];
      Filter<M>::template outputs_transposed<T>(transformed, rows[y]);
#pragma GCC unroll 6
      for (int x = 0; x < W; ++x, at += position_stride)
        store_first(at, transformed[x], lanes);
    }
  }
}

// The transpose of transform_taps: taps of the weights of L channels from positions[position * position_stride].
template <class T, int M>
static FC_INLINE void inverse_transform_taps(Vec<T> (&taps)[9], const T *positions, int64_t position_stride) {
  using V = Vec<T>;
  constexpr int W = M + 2;
  V rows[3][W];
  for (int x = 0; x < W; ++x) {
    V column[W], tap[3];
    for (int y = 0; y < W; ++y)
      column[y] = load(positions + (W * y + x) * position_stride);
    Filter<M>::template taps_transposed<T>(tap, column);
    for (int y = 0; y < 3; ++y)
      rows[y][x] = tap[y];
  }
  for (int y = 0; y < 3; ++y) {
    V tap[3];
    Filter<M>::template taps_transposed<T>(tap, rows[y]);
    for (int x = 0; x < 3; ++x)
      taps[3 * y + x] = tap[x];
  }
}

// sums[p][v] = sum over k of windows[p][k] * weights[k][v], P tiles at one position
template <class T, int P, int NV>
static __attribute__((noinline)) void position_tile(T *sums, int64_t sums_stride, const T *windows, int64_t row,
                                                    const T *weights, int64_t count) {
  T *at[P];
  const T *window[P];
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p) {
    at[p] = sums + p * sums_stride;
    window[p] = windows + p * row;
  }
  for (int64_t first = 0; first < count; first += kChain) {
    const int length = int(smaller(kChain, count - first));
    Vec<T> sum[P][NV];
    clear_sums<Plain<T>, P, NV>(sum);
    accumulate<Plain<T>, P, NV>(sum, window, weights, length);
    if (first == 0)
      store_sums<Plain<T>, P, NV>(sum, at);
    else
      add_sums<Plain<T>, P, NV>(sum, at);
    weights += int64_t(length) * NV * kLanes<T>;
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p)
      window[p] += length;
  }
}
template <class T, int P, int NV, class... Args> static FC_INLINE void position_tail(int left, T *sums, Args... args) {
  if (left == P)
    return position_tile<T, P, NV>(sums, args...);
  if constexpr (P > 1)
    position_tail<T, P - 1, NV>(left, sums, args...);
}

// One of the convolutions that are summed, by its input. Stride 1; the padding is zeros, and may be negative.
struct WinogradInput {
  int64_t channels, height, width, pad_top, pad_left;
};
constexpr int kWinogradInputs = 2; // at most

// A thread's scratch memory, for tiles of up to `tile` x `tile` outputs and windows of up to `depth` channels.
template <class T> struct WinogradScratch {
  Buffer<T> windows; // [position][tile][depth]
  Buffer<T> sums;    // [tile][position][vectors * lanes]
  Buffer<T> outputs; // [row][pixel][vectors * lanes]

  // From one position's windows to the next, and from one tile's sums to the next; each begin in different sets of the
  // cache.
  static int64_t plane(int tile, int64_t depth) { return piece_tiles(tile) * depth + kLanes<T>; }
  static int64_t tile_sums(int tile) { return (positions_of(tile) * kVectors + 1) * kLanes<T>; }
  void allocate(int tile, int64_t depth) {
    windows.allocate(positions_of(tile) * plane(tile, depth));
    sums.allocate(piece_tiles(tile) * tile_sums(tile));
    outputs.allocate(tile * kRunPixels * kVectors * kLanes<T>);
  }
};

// The windows of tiles of `tile` x `tile` outputs, over all channels (`depth`) of one or two inputs, whose rows have no
// padding.
template <class T> struct WinogradWindows {
  int tile;
  int64_t height, width, rows, columns; // of the outputs, in pixels and in tiles
  int64_t depth;
  int input_count;
  WinogradInput inputs[kWinogradInputs];
  Buffer<int32_t> pixels[kWinogradInputs]; // [tile][position]: the pixels that a window reads, -1 for a zero
  Buffer<T> zeros;                         // (depth)

  template <int kCount>
  void allocate(int tile_, int64_t height_, int64_t width_, const WinogradInput (&inputs_)[kCount]) {
    tile = tile_;
    height = height_;
    width = width_;
    rows = (height + tile - 1) / tile;
    columns = (width + tile - 1) / tile;
    depth = 0;
    input_count = kCount;
    const int64_t size = window_size(tile);
    for (int n = 0; n < kCount; ++n) {
      const WinogradInput &input = inputs[n] = inputs_[n];
      depth += input.channels;
      pixels[n].allocate(tiles() * positions());
      for (int64_t k = 0; k < tiles() * positions(); ++k) {
        const int64_t in_image = k / positions(), position = k % positions();
        const int64_t y = in_image / columns * tile + position / size - input.pad_top;
        const int64_t x = in_image % columns * tile + position % size - input.pad_left;
        const bool inside = y >= 0 && y < input.height && x >= 0 && x < input.width;
        pixels[n][k] = inside ? int32_t(y * input.width + x) : -1;
      }
    }
    zeros.allocate(depth);
    zeros.fill_zero();
  }

  int64_t tiles() const { return rows * columns; } // of an image
  int64_t positions() const { return positions_of(tile); }

  // Window `k` of the images laid end to end, position by position. images[n]: rows of each image of input n, null for
  // zeros.
  void transform(const T *const *const *images, int64_t k, T *to, int64_t position_stride) const {
    const int64_t image = k / tiles(), in_image = k % tiles();
    for (int n = 0; n < input_count; ++n) {
      const int64_t channels = inputs[n].channels;
      if (const T *data = images[n][image]) {
        const T *window[kMostPositions];
        for (int64_t j = 0; j < positions(); ++j) {
          const int32_t pixel = pixels[n][in_image * positions() + j];
          window[j] = pixel < 0 ? zeros.get() : data + pixel * channels;
        }
        with_tile(tile, [&](auto m) { transform_window<T, m()>(to, position_stride, window, channels); });
      } else {
        for (int64_t j = 0; j < positions(); ++j)
          std::memset(static_cast<void *>(to + j * position_stride), 0, size_t(channels) * sizeof(T));
      }
      to += channels;
    }
  }
};

// The sum of convolutions over all channels of their inputs.
template <class T> struct WinogradProduct {
  static constexpr int L = kLanes<T>;
  WinogradWindows<T> windows;
  int64_t blocks, depth;
  Buffer<T> weights; // [block][position][depth][vectors * L]

  template <int kCount>
  void allocate(int tile, int64_t height, int64_t width, int64_t blocks_, const WinogradInput (&inputs)[kCount]) {
    windows.allocate(tile, height, width, inputs);
    blocks = blocks_;
    depth = windows.depth;
    weights.allocate(blocks * block_stride());
  }

  int64_t block_stride() const { return windows.positions() * depth * kVectors * L; }

  // This thread's part of the weights of an input whose channels begin at `first`, from [block][tap][channel]
  // [vectors * L]. vectors(block): how many there are. `flipped`: for the transposed convolution.
  template <class Vectors>
  void pack(const T *packed, int64_t packed_block_stride, const Vectors &vectors, int64_t first, int64_t channels,
            bool flipped, int thread, int threads) const {
    const Range range = part_of(blocks * channels, thread, threads);
    for (int64_t k = range.begin; k < range.end; ++k) {
      const int64_t block = k / channels, channel = k % channels, lanes = vectors(block) * L;
      const T *from = packed + block * packed_block_stride + channel * lanes;
      T *to = weights.get() + block * block_stride() + (first + channel) * lanes;
      for (int64_t v = 0; v < lanes; v += L)
        with_tile(windows.tile,
                  [&](auto m) { transform_taps<T, m()>(to + v, depth * lanes, from + v, channels * lanes, flipped); });
    }
  }

  // This thread's part of the outputs of `count` images, in pieces of some tiles of the images laid end to end and one
  // block: body(block, begin, end), with the windows of the tiles in the scratch memory. images[n]: rows of each image
  // of input n, null for zeros.
  template <class Body>
  void for_pieces(const T *const *const *images, int64_t count, int thread, int threads,
                  const WinogradScratch<T> &scratch, const Body &body) const {
    const int64_t most = piece_tiles(windows.tile), plane = scratch.plane(windows.tile, depth);
    const int64_t total = count * windows.tiles(), units = (total + kUnitTiles - 1) / kUnitTiles;
    int64_t pieces = (total + most - 1) / most;
    if (pieces * blocks < 4 * threads && pieces * blocks % threads != 0) // few: as many for each thread
      pieces = smaller(units, round_up(pieces, threads));
    const Range range = part_of(pieces * blocks, thread, threads);
    for (int64_t k = range.begin; k < range.end;) {
      const int64_t piece = k / blocks;
      const int64_t begin = units * piece / pieces * kUnitTiles;
      const int64_t end = smaller(total, units * (piece + 1) / pieces * kUnitTiles);
      for (int64_t tile = begin; tile < end; ++tile)
        windows.transform(images, tile, scratch.windows.get() + (tile - begin) * depth, plane);
      for (; k < smaller(range.end, (piece + 1) * blocks); ++k)
        body(k - piece * blocks, begin, end);
    }
  }

  // Outputs of a piece that for_pieces gave. Calls body(sums, begin, end) with each run of neighbouring pixels.
  template <int NV, class Body>
  void run(int64_t block, int64_t begin, int64_t end, const WinogradScratch<T> &scratch, const Body &body) const {
    constexpr int64_t kWidth = NV * L;
    constexpr int P = kTilePixels<NV>;
    const int64_t tile_sums = scratch.tile_sums(windows.tile), plane = scratch.plane(windows.tile, depth);
    const T *panel = weights.get() + block * block_stride(), *window = scratch.windows.get();
    for (int64_t position = 0; position < windows.positions(); ++position, panel += depth * kWidth, window += plane) {
      T *sums = scratch.sums.get() + position * kWidth;
      int64_t k = 0;
      for (; k + P <= end - begin; k += P)
        position_tile<T, P, NV>(sums + k * tile_sums, tile_sums, window + k * depth, depth, panel, depth);
      if (k < end - begin)
        position_tail<T, P - 1, NV>(int(end - begin - k), sums + k * tile_sums, tile_sums, window + k * depth, depth,
                                    panel, depth);
    }
    with_tile(windows.tile, [&](auto m) { write<m(), NV>(begin, end, scratch, body); });
  }

private:
  template <int M, int NV, class Body>
  void write(int64_t begin, int64_t end, const WinogradScratch<T> &scratch, const Body &body) const {
    constexpr int64_t kWidth = NV * L, kRow = kRunPixels * kWidth;
    const int64_t tiles = windows.tiles(), columns = windows.columns, height = windows.height, width = windows.width;
    for (int64_t k = begin; k < end;) {
      const int64_t image = k / tiles, y = k % tiles / columns * M, x = k % columns;
      const int64_t count = smaller(smaller(columns - x, kRunPixels / M), end - k);
      for (int64_t n = 0; n < count; ++n)
        inverse_transform<T, M, NV>(scratch.outputs.get() + M * n * kWidth, kRow,
                                    scratch.sums.get() + (k - begin + n) * scratch.tile_sums(M));
      const int64_t pixel = (image * height + y) * width + M * x, pixels = smaller(M * count, width - M * x);
      for (int64_t row = 0; row < smaller(M, height - y); ++row)
        body(scratch.outputs.get() + row * kRow, pixel + row * width, pixel + row * width + pixels);
      k += count;
    }
  }
};

} // namespace FC_ISA
} // namespace fused_convlstm
