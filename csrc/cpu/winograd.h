// 3x3 convolutions by Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2016, "Fast Algorithms for Convolutional
// Neural Networks", section 4.1): windows of 4x4 inputs and the taps go to 16 transformed positions, where a tile of
// 2x2 outputs takes one product for each, 16 instead of 36. Sums over channels, and over several convolutions with the
// same outputs, are taken there; one inverse transform gives the outputs.
//
// As in gemm.h, every output is one chain of multiply-adds whatever else is computed with it.
#pragma once

#include "gemm.h"

namespace fused_convlstm {
namespace FC_ISA {

constexpr int kPositions = 16;  // of a transformed window
constexpr int kUnitTiles = 6;   // pieces are multiples of this, the height of the register tile, as far as possible
constexpr int kPieceTiles = 48; // tiles whose windows and transformed sums stay in the second-level cache
constexpr int kRunTiles = 8;    // tiles whose outputs stay in the first-level cache

// Transformed taps of L outputs: to[position * position_stride] from packed[tap * tap_stride].
template <class T>
static FC_INLINE void transform_taps(T *to, int64_t position_stride, const T *from, int64_t tap_stride, bool flipped) {
  using V = Vec<T>;
  V rows[4][3];
  for (int x = 0; x < 3; ++x) {
    V tap[3];
    for (int y = 0; y < 3; ++y)
      tap[y] = load(from + (flipped ? 8 - 3 * y - x : 3 * y + x) * tap_stride);
    const V even = (tap[0] + tap[2]) * T(0.5), odd = tap[1] * T(0.5);
    rows[0][x] = tap[0];
    rows[1][x] = even + odd;
    rows[2][x] = even - odd;
    rows[3][x] = tap[2];
  }
  for (int y = 0; y < 4; ++y, to += 4 * position_stride) {
    const V even = (rows[y][0] + rows[y][2]) * T(0.5), odd = rows[y][1] * T(0.5);
    store(to, rows[y][0]);
    store(to + position_stride, even + odd);
    store(to + 2 * position_stride, even - odd);
    store(to + 3 * position_stride, rows[y][2]);
  }
}

// Transformed window of the first `lanes` channels: to[position * position_stride + channel] from the 16 pixels.
template <class T>
static FC_INLINE void transform_channels(T *to, int64_t position_stride, const T *const *pixels, int64_t channel,
                                         int lanes) {
  using V = Vec<T>;
  V rows[4][4];
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    const V a = load_first(pixels[x] + channel, lanes), b = load_first(pixels[4 + x] + channel, lanes);
    const V d = load_first(pixels[8 + x] + channel, lanes), e = load_first(pixels[12 + x] + channel, lanes);
    rows[0][x] = a - d;
    rows[1][x] = b + d;
    rows[2][x] = d - b;
    rows[3][x] = b - e;
  }
  to += channel;
#pragma GCC unroll 4
  for (int y = 0; y < 4; ++y, to += 4 * position_stride) {
    store_first(to, rows[y][0] - rows[y][2], lanes);
    store_first(to + position_stride, rows[y][1] + rows[y][2], lanes);
    store_first(to + 2 * position_stride, rows[y][2] - rows[y][1], lanes);
    store_first(to + 3 * position_stride, rows[y][1] - rows[y][3], lanes);
  }
}
template <class T>
static __attribute__((noinline)) void transform_window(T *to, int64_t position_stride, const T *const *pixels,
                                                       int64_t channels) {
  int64_t channel = 0;
  for (; channel + kLanes<T> <= channels; channel += kLanes<T>)
    transform_channels(to, position_stride, pixels, channel, kLanes<T>);
  if (channel < channels)
    transform_channels(to, position_stride, pixels, channel, int(channels - channel));
}

// Outputs of a tile: top and bottom pixels, `width` apart, from 16 positions of `width` sums each.
template <class T, int NV> static FC_INLINE void inverse_transform(T *top, T *bottom, const T *sums) {
  using V = Vec<T>;
  constexpr int kWidth = NV * kLanes<T>;
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v, top += kLanes<T>, bottom += kLanes<T>, sums += kLanes<T>) {
    V upper[4], lower[4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const V b = load(sums + (4 + x) * kWidth), d = load(sums + (8 + x) * kWidth);
      upper[x] = load(sums + x * kWidth) + b + d;
      lower[x] = b - d - load(sums + (12 + x) * kWidth);
    }
    store(top, upper[0] + upper[1] + upper[2]);
    store(top + kWidth, upper[1] - upper[2] - upper[3]);
    store(bottom, lower[0] + lower[1] + lower[2]);
    store(bottom + kWidth, lower[1] - lower[2] - lower[3]);
  }
}

// The transpose of inverse_transform: to[position * position_stride + channel] from a tile's 2x2 pixels.
template <class T>
static __attribute__((noinline)) void transform_outputs(T *to, int64_t position_stride, const T *const *pixels,
                                                        int64_t channels) {
  using V = Vec<T>;
  for (int64_t c = 0; c < channels; c += kLanes<T>, to += kLanes<T>) {
    const int lanes = int(smaller(kLanes<T>, channels - c));
    V rows[4][2];
    for (int x = 0; x < 2; ++x) {
      const V top = load_first(pixels[x] + c, lanes), bottom = load_first(pixels[2 + x] + c, lanes);
      rows[0][x] = top;
      rows[1][x] = top + bottom;
      rows[2][x] = top - bottom;
      rows[3][x] = -bottom;
    }
    T *at = to;
    for (int y = 0; y < 4; ++y, at += 4 * position_stride) {
      store_first(at, rows[y][0], lanes);
      store_first(at + position_stride, rows[y][0] + rows[y][1], lanes);
      store_first(at + 2 * position_stride, rows[y][0] - rows[y][1], lanes);
      store_first(at + 3 * position_stride, -rows[y][1], lanes);
    }
  }
}

// The transpose of transform_taps, for one weight: 9 taps from 16 positions.
template <class T> static FC_INLINE void inverse_transform_taps(T *taps, const T *positions) {
  T rows[3][4];
  for (int x = 0; x < 4; ++x) {
    const T even = (positions[4 + x] + positions[8 + x]) * T(0.5);
    rows[0][x] = positions[x] + even;
    rows[1][x] = (positions[4 + x] - positions[8 + x]) * T(0.5);
    rows[2][x] = even + positions[12 + x];
  }
  for (int y = 0; y < 3; ++y) {
    const T even = (rows[y][1] + rows[y][2]) * T(0.5);
    taps[3 * y] = rows[y][0] + even;
    taps[3 * y + 1] = (rows[y][1] - rows[y][2]) * T(0.5);
    taps[3 * y + 2] = even + rows[y][3];
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

// A thread's scratch memory.
template <class T> struct WinogradScratch {
  // From one tile's sums to the next; they begin in different sets of the cache.
  static constexpr int64_t kTile = (kPositions * kVectors + 1) * kLanes<T>;
  Buffer<T> windows; // [position][tile][depth]
  Buffer<T> sums;    // [tile][position][vectors * lanes]
  Buffer<T> outputs; // [2][pixel][vectors * lanes]

  // From one position's windows to the next; likewise.
  static int64_t plane(int64_t depth) { return kPieceTiles * depth + kLanes<T>; }
  void allocate(int64_t depth) {
    windows.allocate(kPositions * plane(depth));
    sums.allocate(kPieceTiles * kTile);
    outputs.allocate(4 * kRunTiles * kVectors * kLanes<T>);
  }
};

// The windows of 4x4 inputs of tiles of 2x2 outputs, over all channels (`depth`) of one or two inputs, whose rows have
// no padding.
template <class T> struct WinogradWindows {
  int64_t height, width, rows, columns; // of the outputs, in pixels and in tiles
  int64_t depth;
  int input_count;
  WinogradInput inputs[kWinogradInputs];
  Buffer<int32_t> pixels[kWinogradInputs]; // [tile][4 * 4]: the pixels that a window reads, -1 for a zero
  Buffer<T> zeros;                         // (depth)

  template <int kCount> void allocate(int64_t height_, int64_t width_, const WinogradInput (&inputs_)[kCount]) {
    height = height_;
    width = width_;
    rows = (height + 1) / 2;
    columns = (width + 1) / 2;
    depth = 0;
    input_count = kCount;
    for (int n = 0; n < kCount; ++n) {
      const WinogradInput &input = inputs[n] = inputs_[n];
      depth += input.channels;
      pixels[n].allocate(tiles() * kPositions);
      for (int64_t k = 0; k < tiles() * kPositions; ++k) {
        const int64_t tile = k / kPositions, position = k % kPositions;
        const int64_t y = tile / columns * 2 + position / 4 - input.pad_top;
        const int64_t x = tile % columns * 2 + position % 4 - input.pad_left;
        const bool inside = y >= 0 && y < input.height && x >= 0 && x < input.width;
        pixels[n][k] = inside ? int32_t(y * input.width + x) : -1;
      }
    }
    zeros.allocate(depth);
    zeros.fill_zero();
  }

  int64_t tiles() const { return rows * columns; } // of an image

  // Tile `tile` of the images laid end to end, position by position. images[n]: rows of each image of input n, null for
  // zeros.
  void transform(const T *const *const *images, int64_t tile, T *to, int64_t position_stride) const {
    const int64_t image = tile / tiles(), in_image = tile % tiles();
    for (int n = 0; n < input_count; ++n) {
      const int64_t channels = inputs[n].channels;
      if (const T *data = images[n][image]) {
        const T *window[kPositions];
        for (int j = 0; j < kPositions; ++j) {
          const int32_t pixel = pixels[n][in_image * kPositions + j];
          window[j] = pixel < 0 ? zeros.get() : data + pixel * channels;
        }
        transform_window(to, position_stride, window, channels);
      } else {
        for (int j = 0; j < kPositions; ++j)
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
  void allocate(int64_t height, int64_t width, int64_t blocks_, const WinogradInput (&inputs)[kCount]) {
    windows.allocate(height, width, inputs);
    blocks = blocks_;
    depth = windows.depth;
    weights.allocate(blocks * block_stride());
  }

  int64_t block_stride() const { return kPositions * depth * kVectors * L; }

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
        transform_taps(to + v, depth * lanes, from + v, channels * lanes, flipped);
    }
  }

  // This thread's part of the outputs of `count` images, in pieces of up to kPieceTiles tiles of the images laid end to
  // end and one block: body(block, begin, end), with the windows of the tiles in the scratch memory. images[n]: rows
  // of each image of input n, null for zeros.
  template <class Body>
  void for_pieces(const T *const *const *images, int64_t count, int thread, int threads,
                  const WinogradScratch<T> &scratch, const Body &body) const {
    const int64_t total = count * windows.tiles(), units = (total + kUnitTiles - 1) / kUnitTiles;
    const int64_t pieces = (total + kPieceTiles - 1) / kPieceTiles;
    const Range range = part_of(pieces * blocks, thread, threads);
    for (int64_t k = range.begin; k < range.end;) {
      const int64_t piece = k / blocks;
      const int64_t begin = units * piece / pieces * kUnitTiles;
      const int64_t end = smaller(total, units * (piece + 1) / pieces * kUnitTiles);
      for (int64_t tile = begin; tile < end; ++tile)
        windows.transform(images, tile, scratch.windows.get() + (tile - begin) * depth, scratch.plane(depth));
      for (; k < smaller(range.end, (piece + 1) * blocks); ++k)
        body(k - piece * blocks, begin, end);
    }
  }

  // Outputs of a piece that for_pieces gave. Calls body(sums, begin, end) with each run of neighbouring pixels.
  template <int NV, class Body>
  void run(int64_t block, int64_t begin, int64_t end, const WinogradScratch<T> &scratch, const Body &body) const {
    constexpr int64_t kWidth = NV * L;
    constexpr int P = kTilePixels<NV>;
    const T *panel = weights.get() + block * block_stride(), *window = scratch.windows.get();
    for (int position = 0; position < kPositions; ++position, panel += depth * kWidth, window += scratch.plane(depth)) {
      T *sums = scratch.sums.get() + position * kWidth;
      int64_t k = 0;
      for (; k + P <= end - begin; k += P)
        position_tile<T, P, NV>(sums + k * scratch.kTile, scratch.kTile, window + k * depth, depth, panel, depth);
      if (k < end - begin)
        position_tail<T, P - 1, NV>(int(end - begin - k), sums + k * scratch.kTile, scratch.kTile, window + k * depth,
                                    depth, panel, depth);
    }
    T *top = scratch.outputs.get(), *bottom = top + 2 * kRunTiles * kWidth;
    const int64_t tiles = windows.tiles(), columns = windows.columns, height = windows.height, width = windows.width;
    for (int64_t k = begin; k < end;) {
      const int64_t image = k / tiles, y = k % tiles / columns * 2, x = k % columns;
      const int64_t count = smaller(smaller(columns - x, kRunTiles), end - k);
      for (int64_t n = 0; n < count; ++n)
        inverse_transform<T, NV>(top + 2 * n * kWidth, bottom + 2 * n * kWidth,
                                 scratch.sums.get() + (k - begin + n) * scratch.kTile);
      const int64_t pixel = (image * height + y) * width + 2 * x, pixels = smaller(2 * count, width - 2 * x);
      body(top, pixel, pixel + pixels);
      if (y + 1 < height)
        body(bottom, pixel + width, pixel + width + pixels);
      k += count;
    }
  }
};

} // namespace FC_ISA
} // namespace fused_convlstm
