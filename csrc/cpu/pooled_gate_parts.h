// What the forward and the backward kernels of the pooled-gate ConvLSTM share: frames with the channels innermost,
// depthwise convolutions on them, and small matrix products.
#pragma once

#include "cell.h"
#include "pooled_gate.h"
#include "threads.h"

namespace fused_convlstm {
namespace FC_ISA {

#define FC_LAMBDA_INLINE __attribute__((always_inline))

constexpr int64_t kChunk = 64;                            // channels of an operand that lie side by side
constexpr int64_t kBlockSize = 96;                        // most pixels that are worked on at once
constexpr int64_t kComputeSize = 56, kTransferSize = 288; // pixels of a block, to be computed, to be copied
constexpr int64_t kGroup = 8;                             // most samples that go through a step together
constexpr int kTileVectors = 2;
#if defined(FC_WIDE)
constexpr int kTileRows = 14; // 28 accumulators, 2 vectors of the right operand, 2 spare
#else
constexpr int kTileRows = 6; // 12 accumulators, 2 vectors of the right operand, 2 spare
#endif

// --- storage types ---------------------------------------------------------------------------------------------------

template <class T> struct AccumulatorOf {
  using Type = T;
};
template <> struct AccumulatorOf<bfloat16> {
  using Type = float;
};
template <class T> using Accumulator = typename AccumulatorOf<T>::Type;

// The number type of the products of tensors of T.
template <class T> struct ProductOf {
  using Type = Plain<Accumulator<T>>;
};
#ifdef FC_ISA_AVX512_BF16
template <> struct ProductOf<bfloat16> {
  using Type = BF16;
};
#endif
template <class T> using Product = typename ProductOf<T>::Type;

// A number as a type.
template <int k> struct Constant {
  static constexpr int kValue = k;
};

// Whole vectors, converted from or to another type in memory.
template <class A, class M> static FC_INLINE Vec<A> load_as(const M *p) { return load_first_as<A>(p, kLanes<A>); }
template <class A, class M> static FC_INLINE void store_as(M *p, Vec<A> v) { store_first_as<A>(p, v, kLanes<A>); }

// --- sizes -----------------------------------------------------------------------------------------------------------

static inline int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }
template <class A> static inline int64_t whole_vectors(int64_t channels) { return round_up(channels, kLanes<A>); }

// Memory in pieces that start at cache lines. Without a base it only counts.
struct Carver {
  char *base = nullptr;
  int64_t used = 0;
  template <class X> X *take(int64_t count) {
    X *piece = base ? reinterpret_cast<X *>(base + used) : nullptr;
    used += round_up(count * int64_t(sizeof(X)), 64);
    return piece;
  }
};

// The threads that work on one group of samples.
struct Team {
  int rank, size;
  Range share(int64_t items) const { return part_of(items, rank, size); }
  void wait() const;
};

static inline void wait_for_all(int threads) {
  if (threads > 1) {
#pragma omp barrier
  }
}
inline void Team::wait() const { wait_for_all(size); } // a team of several threads is the only one

// Who does what: either each thread has samples of its own, or all threads share every step.
struct Plan {
  bool alone;
  int teams;
  int64_t batch, group; // samples that go through a step together

  // `sample_bytes`: of a sample's images; those of a group should stay in the cache. `weight_bytes`: of the weights of
  // the gates, which each group reads once a step.
  Plan(int64_t batch, int threads, int64_t sample_bytes, int64_t weight_bytes)
      : alone(batch * 10 >= parts(batch, threads) * threads * 9), teams(alone ? threads : 1), batch(batch),
        group(alone ? larger(1, smaller(smaller(kGroup, parts(batch, threads)),
                                        larger(640 << 10, weight_bytes) / larger(sample_bytes, 1)))
                    : kGroup) {}
  Team team(int thread, int threads) const { return alone ? Team{0, 1} : Team{thread, threads}; }
  Range samples(int thread, int threads) const { return alone ? part_of(batch, thread, threads) : Range{0, batch}; }
};

// --- frames ----------------------------------------------------------------------------------------------------------

// A rectangle of pixels. The division of an image into blocks depends on its size alone, so sums by block do not depend
// on the number of threads.
struct Block {
  int64_t row, rows, column, columns;
  int64_t pixels() const { return rows * columns; }
};

struct Tiling {
  int64_t height, width, rows, columns, across, count;
  // Blocks of whole rows, of about `pixels` pixels; rows wider than kBlockSize are split.
  Tiling(int64_t h, int64_t w, int64_t pixels) : height(h), width(w) {
    if (w > kBlockSize) {
      across = parts(w, 64);
      rows = 1;
    } else {
      across = 1;
      rows = smaller(h, larger(1, pixels / w));
    }
    columns = parts(w, across);
    across = parts(w, columns);
    count = parts(h, rows) * across;
  }
  Block operator[](int64_t k) const {
    const int64_t row = k / across * rows, column = k % across * columns;
    return {row, smaller(rows, height - row), column, smaller(columns, width - column)};
  }
};

// A padded image as (chunk of kChunk channels, height, width, channels of the chunk): a pixel's neighbours in a chunk
// are near, whatever the number of channels.
struct Image {
  int64_t channels, height, width; // with padding
  int64_t top, left;               // padding

  int64_t size() const { return channels * height * width; }
  // Channels of the chunk that holds channel c: the distance of its pixels.
  int64_t pixel(int64_t c) const { return smaller(kChunk, channels - c / kChunk * kChunk); }
  int64_t row(int64_t c) const { return width * pixel(c); }
  int64_t at(int64_t c, int64_t y, int64_t x) const {
    return c / kChunk * kChunk * height * width + ((y + top) * width + x + left) * pixel(c) + c % kChunk;
  }
};

// Offsets of the pixels of a block, in row-major order.
struct PixelOffsets {
  int64_t at[kTransferSize];
  PixelOffsets(const Block &block, int64_t row, int64_t column) {
    int64_t k = 0;
    for (int64_t y = 0; y < block.rows; ++y) {
      for (int64_t x = 0; x < block.columns; ++x)
        at[k++] = y * row + x * column;
    }
  }
};

template <class A, int kStep> static FC_INLINE void exchange(Vec<A> *v) {
  IntVec<A> low, high;
  for (int k = 0; k < kLanes<A>; ++k) {
    low[k] = k & kStep ? kLanes<A> + k - kStep : k;
    high[k] = k & kStep ? kLanes<A> + k : k + kStep;
  }
#pragma GCC unroll 16
  for (int k = 0; k < kLanes<A>; ++k) {
    if (!(k & kStep)) {
      const Vec<A> a = v[k], b = v[k + kStep];
      v[k] = __builtin_shuffle(a, b, low);
      v[k + kStep] = __builtin_shuffle(a, b, high);
    }
  }
}

#ifdef FC_ISA_AVX512_BF16
// Lane k: element k of the first row and, above it, of the second, which may be null for zeros; zeros from n on.
static FC_INLINE Vec<float> load_pairs(const bfloat16 *first, const bfloat16 *second, int n) {
  return (Vec<float>)(load_halves(first, n) | (second ? load_halves(second, n) << 16 : BitVec{}));
}
static FC_INLINE void store_pairs(bfloat16 *first, bfloat16 *second, Vec<float> pairs) {
  *reinterpret_cast<UnalignedHalfVec *>(first) = __builtin_convertvector((BitVec)pairs, HalfVec);
  *reinterpret_cast<UnalignedHalfVec *>(second) = __builtin_convertvector((BitVec)pairs >> 16, HalfVec);
}
#endif

// Rows become columns.
template <class A> static FC_INLINE void transpose(Vec<A> *v) {
  exchange<A, 1>(v);
  if constexpr (kLanes<A> > 2)
    exchange<A, 2>(v);
  if constexpr (kLanes<A> > 4)
    exchange<A, 4>(v);
  if constexpr (kLanes<A> > 8)
    exchange<A, 8>(v);
}

// Calls tile(c, j) for tiles of kChannels channels from c on and as many pixels from j on as a vector has lanes, of a
// block whose pixels are adjacent in `frames`; tiles may overlap. Returns the first channel that is left, at least
// `first`.
template <class A, int kChannels, class Tile>
static FC_INLINE int64_t for_tiles(const Frames &frames, const Block &block, int64_t first, int64_t channels,
                                   const Tile &tile) {
  constexpr int64_t n = kLanes<A>;
  const bool one_run = block.rows == 1 || frames.row == block.columns;
  const int64_t runs = one_run ? 1 : block.rows, length = one_run ? block.pixels() : block.columns;
  if (frames.column != 1 || length < n)
    return first;
  int64_t c = first;
  for (; c + kChannels <= channels; c += kChannels) {
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t begin = run * length, end = begin + length;
      for (int64_t j = begin; j < end; j += n)
        tile(c, smaller(j, end - n));
    }
  }
  return c;
}

// Copies a block of frame (step, sample) to an image.
template <class T, class I>
static void load_block(const Frames &frames, int64_t step, int64_t sample, int64_t channels, const Block &block, I *to,
                       const Image &image) {
  using A = Accumulator<T>;
  constexpr int64_t n = kLanes<A>;
  const T *from = static_cast<const T *>(frames.data) + step * frames.step + sample * frames.sample +
                  block.row * frames.row + block.column * frames.column;
  const PixelOffsets source(block, frames.row, frames.column), target(block, image.width, 1);
  if (frames.channel == 1 && frames.column != 1) {
    for (int64_t c = 0; c < channels; c += n) {
      I *first = to + image.at(c, block.row, block.column);
      for (int64_t j = 0; j < block.pixels(); ++j)
        store_as<A>(first + target.at[j] * image.pixel(c),
                    load_first_as<A>(from + source.at[j] + c, int(smaller(n, channels - c))));
    }
    return;
  }
  int64_t c = 0;
#ifdef FC_ISA_AVX512_BF16
  if constexpr (sizeof(T) == 2 && sizeof(I) == 2) // channels in pairs, so that nothing is converted
    c = for_tiles<A, 2 * n>(frames, block, c, channels, [&](int64_t c, int64_t j) FC_LAMBDA_INLINE {
      A *first = reinterpret_cast<A *>(to + image.at(c, block.row, block.column));
      const T *plane = from + source.at[j] + c * frames.channel;
      Vec<A> v[n];
      for (int64_t k = 0; k < n; ++k, plane += 2 * frames.channel)
        v[k] = load_pairs(plane, plane + frames.channel, n);
      transpose<A>(v);
      for (int64_t k = 0; k < n; ++k)
        store(first + target.at[j + k] * image.pixel(c) / 2, v[k]);
    });
#endif
  c = for_tiles<A, n>(frames, block, c, channels, [&](int64_t c, int64_t j) FC_LAMBDA_INLINE {
    I *first = to + image.at(c, block.row, block.column);
    const T *plane = from + source.at[j] + c * frames.channel;
    Vec<A> v[n];
    for (int64_t k = 0; k < n; ++k)
      v[k] = load_as<A>(plane + k * frames.channel);
    transpose<A>(v);
    for (int64_t k = 0; k < n; ++k)
      store_as<A>(first + target.at[j + k] * image.pixel(c), v[k]);
  });
  for (; c < channels; ++c) {
    for (int64_t j = 0; j < block.pixels(); ++j)
      to[image.at(c, block.row, block.column) + target.at[j] * image.pixel(c)] =
          convert<I>(from[source.at[j] + c * frames.channel]);
  }
}

// The inverse of load_block.
template <class T, class I>
static void store_block(const I *from, const Image &image, int64_t channels, const Block &block, const Frames &frames,
                        int64_t step, int64_t sample) {
  using A = Accumulator<T>;
  constexpr int64_t n = kLanes<A>;
  T *to = static_cast<T *>(frames.data) + step * frames.step + sample * frames.sample + block.row * frames.row +
          block.column * frames.column;
  const PixelOffsets source(block, image.width, 1), target(block, frames.row, frames.column);
  if (frames.channel == 1 && frames.column != 1) {
    for (int64_t c = 0; c < channels; c += n) {
      const I *first = from + image.at(c, block.row, block.column);
      for (int64_t j = 0; j < block.pixels(); ++j)
        store_first_as<A>(to + target.at[j] + c, load_as<A>(first + source.at[j] * image.pixel(c)),
                          int(smaller(n, channels - c)));
    }
    return;
  }
  int64_t c = 0;
#ifdef FC_ISA_AVX512_BF16
  if constexpr (sizeof(T) == 2 && sizeof(I) == 2)
    c = for_tiles<A, 2 * n>(frames, block, c, channels, [&](int64_t c, int64_t j) FC_LAMBDA_INLINE {
      const A *first = reinterpret_cast<const A *>(from + image.at(c, block.row, block.column));
      T *plane = to + target.at[j] + c * frames.channel;
      Vec<A> v[n];
      for (int64_t k = 0; k < n; ++k)
        v[k] = load(first + source.at[j + k] * image.pixel(c) / 2);
      transpose<A>(v);
      for (int64_t k = 0; k < n; ++k, plane += 2 * frames.channel)
        store_pairs(plane, plane + frames.channel, v[k]);
    });
#endif
  c = for_tiles<A, n>(frames, block, c, channels, [&](int64_t c, int64_t j) FC_LAMBDA_INLINE {
    const I *first = from + image.at(c, block.row, block.column);
    T *plane = to + target.at[j] + c * frames.channel;
    Vec<A> v[n];
    for (int64_t k = 0; k < n; ++k)
      v[k] = load_as<A>(first + source.at[j + k] * image.pixel(c));
    transpose<A>(v);
    for (int64_t k = 0; k < n; ++k)
      store_as<A>(plane + k * frames.channel, v[k]);
  });
  for (; c < channels; ++c) {
    for (int64_t j = 0; j < block.pixels(); ++j)
      to[target.at[j] + c * frames.channel] =
          convert<T>(from[image.at(c, block.row, block.column) + source.at[j] * image.pixel(c)]);
  }
}

// Asks for bytes that will be read soon. Inline: GCC takes calls to a function that does nothing else for useless.
static FC_INLINE void prefetch(const void *begin, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64)
    __builtin_prefetch(static_cast<const char *>(begin) + at, 0, 2);
}

// Asks for part k of `parts` of frame (step, sample), if it lies in one piece.
template <class T>
static FC_INLINE void prefetch_frame(const Frames &frames, int64_t step, int64_t sample, int64_t channels,
                                     const Tiling &image, int64_t k, int64_t parts) {
  const int64_t pixels = image.height * image.width;
  if (!frames.data || frames.column * frames.channel != (frames.column == 1 ? pixels : channels))
    return;
  const Range part = part_of(channels * pixels, int(k), int(parts));
  prefetch(static_cast<const T *>(frames.data) + step * frames.step + sample * frames.sample + part.begin,
           (part.end - part.begin) * int64_t(sizeof(T)));
}

template <class T>
static void fill_zero(const Frames &frames, int64_t step, int64_t sample, int64_t channels, const Block &block) {
  T *to = static_cast<T *>(frames.data) + step * frames.step + sample * frames.sample;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t y = block.row; y < block.row + block.rows; ++y) {
      for (int64_t x = block.column; x < block.column + block.columns; ++x)
        to[c * frames.channel + y * frames.row + x * frames.column] = convert<T>(Accumulator<T>(0));
    }
  }
}

// sums[c] = the sum over the block.
template <class A, class I> static void sum_block(const I *from, const Image &image, const Block &block, A *sums) {
  for (int64_t c = 0; c < image.channels; c += kLanes<A>) {
    Vec<A> sum{};
    for (int64_t y = 0; y < block.rows; ++y) {
      const I *p = from + image.at(c, block.row + y, block.column);
      for (int64_t x = 0; x < block.columns; ++x)
        sum += load_as<A>(p + x * image.pixel(c));
    }
    store(sums + c, sum);
  }
}

template <class I> static void zero_block(I *to, const Image &image, const Block &block) {
  for (int64_t c = 0; c < image.channels; c += kChunk) {
    for (int64_t y = 0; y < block.rows; ++y)
      std::memset(to + image.at(c, block.row + y, block.column), 0, size_t(block.columns * image.pixel(c)) * sizeof(I));
  }
}

// The row or column of the image that padding position i (i < 0 or i >= n) repeats.
static inline int64_t repeated(int64_t i, int64_t n, PaddingMode padding) {
  switch (padding) {
  case PaddingMode::circular:
    return i < 0 ? i + n : i - n;
  case PaddingMode::reflect:
    return i < 0 ? -i : 2 * (n - 1) - i;
  default:
    return i < 0 ? 0 : n - 1;
  }
}

// --- depthwise convolution -------------------------------------------------------------------------------------------

// A depthwise convolution, its padded input image, and the image of its output gradient, spread over the grid of the
// padded input so that the gradient of the input is again a convolution with stride 1.
template <class A> struct Depthwise {
  DepthwiseShape s;
  PaddingMode padding;
  int64_t vectors; // channels in whole vectors
  int64_t taps;
  Image image, spread;
  int64_t *tap_offset;  // of the taps, in pixels of the image
  int64_t *back_offset; // of the taps from the last to the first, in pixels of `spread`, from the padded pixel at the
                        // same place
  A *weights, *back_weights; // (taps, vectors); from the last tap to the first

  Depthwise(const DepthwiseShape &shape, PaddingMode mode)
      : s(shape), padding(mode), vectors(whole_vectors<A>(shape.channels)), taps(shape.kernel_h * shape.kernel_w) {
    const int64_t reach_h = (s.kernel_h - 1) * s.dilation_h, reach_w = (s.kernel_w - 1) * s.dilation_w;
    image = {vectors, s.height + s.top + s.bottom, s.width + s.left + s.right, s.top, s.left};
    spread = {vectors, image.height + reach_h, image.width + reach_w, reach_h, reach_w};
  }
  bool threes() const { return s.kernel_w == 3 && s.dilation_w == 1; }
  bool folds() const { return padding != PaddingMode::zeros && (s.top || s.bottom || s.left || s.right); }

  void carve(Carver &carver) {
    tap_offset = carver.take<int64_t>(taps);
    back_offset = carver.take<int64_t>(taps);
    weights = carver.take<A>(taps * vectors);
    back_weights = carver.take<A>(taps * vectors);
  }
  template <class T> void prepare(const T *weight /* (channels, taps) */) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t y = tap / s.kernel_w * s.dilation_h, x = tap % s.kernel_w * s.dilation_w;
      tap_offset[tap] = y * image.width + x;
      back_offset[taps - 1 - tap] = (spread.top - y) * spread.width + spread.left - x;
      for (int64_t c = 0; c < vectors; ++c)
        weights[tap * vectors + c] = back_weights[(taps - 1 - tap) * vectors + c] =
            c < s.channels ? convert<A>(weight[c * taps + tap]) : A(0);
    }
  }

  // The outputs of a block, as chunks (kBlockSize, kChunk).
  template <class I, class Out> void convolve_block(const I *frame, const Block &block, Out *out) const;

  // Fills the padding of an image from its inside; zeros stay.
  template <class I> void pad(I *frame) const {
    for_padding([&](int64_t to, int64_t from,
                    int64_t count) { std::memcpy(frame + to, frame + from, size_t(count) * sizeof(I)); },
                true);
  }

  // The gradient of pad().
  void fold(A *frame) const {
    for_padding(
        [&](int64_t from, int64_t to, int64_t count) {
          for (int64_t k = 0; k < count; k += kLanes<A>)
            store(frame + to + k, load(frame + to + k) + load(frame + from + k));
        },
        false);
  }

private:
  // Calls action(padding, inside, count) for pieces of the padding and the piece of the inside that each repeats:
  // columns first, then whole rows, or the other way round.
  template <class Action> void for_padding(const Action &action, bool columns_first) const {
    if (!folds())
      return;
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t c = 0; c < image.channels; c += kChunk) {
        if ((pass == 0) == columns_first) {
          for (int64_t y = 0; y < s.height; ++y) {
            for (int64_t x = -s.left; x < s.width + s.right; ++x) {
              if (x < 0 || x >= s.width)
                action(image.at(c, y, x), image.at(c, y, repeated(x, s.width, padding)), image.pixel(c));
            }
          }
        } else {
          for (int64_t y = -s.top; y < s.height + s.bottom; ++y) {
            if (y < 0 || y >= s.height)
              action(image.at(c, y, -s.left), image.at(c, repeated(y, s.height, padding), -s.left), image.row(c));
          }
        }
      }
    }
  }
};

// The taps of a convolution: where each lies in the input, in pixels, and its weights, `step` elements apart.
template <class A> struct Taps {
  const int64_t *offsets;
  int64_t count;
  const A *weights;
  int64_t step;
  bool threes; // rows of three pixels side by side, for outputs that are neighbours in the input, too
};

// One vector of channels of kPixels pixels; `start` is added if it is not null. Pixels of the input are in_pixel
// elements apart; neighbouring outputs read pixels `stride` elements apart.
template <class A, int kPixels, bool kThrees, class I, class Out>
static FC_INLINE void convolve_pixels(const I *in, int64_t in_pixel, int64_t stride, const Taps<A> &taps, int64_t c,
                                      const A *start, Out *out, int64_t out_pixel) {
  constexpr int kWidth = kThrees ? 3 : 1;
  Vec<A> sum[kPixels];
#pragma GCC unroll 8
  for (int k = 0; k < kPixels; ++k)
    sum[k] = start ? load(start + c) : Vec<A>{};
  const A *weights = taps.weights + c;
  for (int64_t tap = 0; tap < taps.count; tap += kWidth) {
    Vec<A> w[kWidth];
#pragma GCC unroll 3
    for (int k = 0; k < kWidth; ++k, weights += taps.step)
      w[k] = load(weights);
    const I *p = in + taps.offsets[tap] * in_pixel + c;
    // Each pixel of the input is read once for the outputs that it belongs to.
#pragma GCC unroll 10
    for (int x = 0; x < kPixels + kWidth - 1; ++x) {
      const Vec<A> pixel = load_as<A>(p + x * stride);
#pragma GCC unroll 3
      for (int k = 0; k < kWidth; ++k) {
        if (x - k >= 0 && x - k < kPixels)
          sum[x - k] = fma(pixel, w[k], sum[x - k]);
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kPixels; ++k)
    store_as<A>(out + k * out_pixel, sum[k]);
}

// A convolution of the channels of one chunk, in whole vectors; `in` and `out` are where the first output pixel stands,
// strides are those from output pixel to output pixel, in elements.
template <class A, bool kThrees, class I, class Out>
static FC_INLINE void convolve_as(int64_t rows, int64_t columns, int64_t channels, const I *in, int64_t in_pixel,
                                  int64_t row_stride, int64_t column_stride, const Taps<A> &taps, const A *start,
                                  Out *out, int64_t out_row, int64_t out_pixel) {
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t x = 0; x < columns;) {
      const int64_t left = columns - x, count = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      const I *p = in + y * row_stride + x * column_stride;
      Out *q = out + y * out_row + x * out_pixel;
      for (int64_t c = 0; c < channels; c += kLanes<A>) {
        if (count == 8)
          convolve_pixels<A, 8, kThrees>(p, in_pixel, column_stride, taps, c, start, q + c, out_pixel);
        else if (count == 4)
          convolve_pixels<A, 4, kThrees>(p, in_pixel, column_stride, taps, c, start, q + c, out_pixel);
        else if (count == 2)
          convolve_pixels<A, 2, kThrees>(p, in_pixel, column_stride, taps, c, start, q + c, out_pixel);
        else
          convolve_pixels<A, 1, kThrees>(p, in_pixel, column_stride, taps, c, start, q + c, out_pixel);
      }
      x += count;
    }
  }
}
template <class A, class I, class Out>
static void convolve(int64_t rows, int64_t columns, int64_t channels, const I *in, int64_t in_pixel, int64_t row_stride,
                     int64_t column_stride, const Taps<A> &taps, const A *start, Out *out, int64_t out_row,
                     int64_t out_pixel) {
  if (taps.threes)
    convolve_as<A, true>(rows, columns, channels, in, in_pixel, row_stride, column_stride, taps, start, out, out_row,
                         out_pixel);
  else
    convolve_as<A, false>(rows, columns, channels, in, in_pixel, row_stride, column_stride, taps, start, out, out_row,
                          out_pixel);
}

template <class A>
template <class I, class Out>
void Depthwise<A>::convolve_block(const I *frame, const Block &block, Out *out) const {
  for (int64_t c = 0; c < vectors; c += kChunk, out += kBlockSize * kChunk) {
    const int64_t pixel = image.pixel(c);
    const I *first = frame + image.at(c, block.row * s.stride_h - s.top, block.column * s.stride_w - s.left);
    convolve<A>(block.rows, block.columns, pixel, first, pixel, s.stride_h * image.row(c), s.stride_w * pixel,
                {tap_offset, taps, weights + c, vectors, threes() && s.stride_w == 1}, nullptr, out,
                block.columns * kChunk, kChunk);
  }
}

// --- matrix products -------------------------------------------------------------------------------------------------

// How many terms a product sums. The left operand has its terms in chunks of kChunk, `first` and `rest` of them, so
// that the last chunk of each of two parts may be shorter.
struct Depth {
  int64_t first, rest;
};

// For numbers N that take several terms at once: those of a group are side by side in both operands, and what follows
// the last term up to a whole group is zero.
template <class N> constexpr int64_t groups(int64_t terms) { return parts(terms, N::kGroup); }

// Chunk k of the left operand starts at a + k * a_chunk; group k of row m of a chunk is at m * kRowStride + k *
// kGroupStride. The right operand has its groups one after another, b_group elements apart. The order of the summation
// depends on nothing but the depth.
template <class N, int kRows, int kVectors, int kRowStride, int kGroupStride>
static void multiply_tile(Depth depth, const typename N::Elem *a, int64_t a_chunk, const typename N::Elem *b,
                          int64_t b_group, typename N::Acc *c, int64_t c_row, bool add) {
  using A = typename N::Acc;
  Vec<A> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n)
      sum[m][n] = Vec<A>{};
  }
  int64_t left = depth.first;
  int64_t next = depth.rest;
  while (left > 0) {
    const int64_t terms = smaller(left, kChunk);
    const typename N::Elem *p = a;
    for (int64_t k = 0; k < groups<N>(terms); ++k, p += kGroupStride, b += b_group) {
      Vec<A> right[kVectors];
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n)
        right[n] = N::load_weights(b + n * kLanes<A> * N::kGroup);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n)
          sum[m][n] = N::multiply_add(sum[m][n], p + m * kRowStride, right[n]);
      }
    }
    a += a_chunk;
    left -= terms;
    if (left == 0) {
      left = next;
      next = 0;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) {
      A *to = c + m * c_row + n * kLanes<A>;
      store(to, add ? load(to) + sum[m][n] : sum[m][n]); // last: a sum of sums rounds less than one long chain
    }
  }
}

template <class N, int kRows, int kVectors, int kRowStride, int kGroupStride>
static FC_INLINE void multiply_rows(int64_t rows, Depth depth, const typename N::Elem *a, int64_t a_chunk,
                                    const typename N::Elem *b, int64_t b_group, typename N::Acc *c, int64_t c_row,
                                    bool add) {
  if (rows == kRows)
    return multiply_tile<N, kRows, kVectors, kRowStride, kGroupStride>(depth, a, a_chunk, b, b_group, c, c_row, add);
  if constexpr (kRows > 1)
    multiply_rows<N, kRows - 1, kVectors, kRowStride, kGroupStride>(rows, depth, a, a_chunk, b, b_group, c, c_row, add);
}

// c (rows, vectors) = [c +] a (rows, depth) * b (depth, vectors), vectors 1 or 2, in tiles of nearly equal height.
template <class N, int kRowStride, int kGroupStride>
static void multiply(int64_t rows, int64_t vectors, Depth depth, const typename N::Elem *a, int64_t a_chunk,
                     const typename N::Elem *b, int64_t b_group, typename N::Acc *c, int64_t c_row, bool add) {
  const int64_t tiles = parts(rows, kTileRows);
  for (int64_t k = 0; k < tiles; ++k) {
    const int64_t begin = k * rows / tiles, count = (k + 1) * rows / tiles - begin;
    const typename N::Elem *p = a + begin * kRowStride;
    typename N::Acc *q = c + begin * c_row;
    if (vectors == 2)
      multiply_rows<N, kTileRows, 2, kRowStride, kGroupStride>(count, depth, p, a_chunk, b, b_group, q, c_row, add);
    else
      multiply_rows<N, kTileRows, 1, kRowStride, kGroupStride>(count, depth, p, a_chunk, b, b_group, q, c_row, add);
  }
}

// The right operand of a product (rows, depth) x (depth, outputs), packed for it: panels of two vectors of outputs (the
// last may be one vector), the groups of a panel one after another.
template <class N> struct Packed {
  using A = typename N::Acc;
  using Elem = typename N::Elem;
  int64_t outputs;
  Depth depth;
  Elem *data;
  static constexpr int64_t kPanel = kTileVectors * kLanes<A>;

  int64_t panels() const { return parts(outputs, kPanel); }
  int64_t vectors(int64_t panel) const { return smaller(kTileVectors, parts(outputs - panel * kPanel, kLanes<A>)); }
  int64_t group(int64_t panel) const { return vectors(panel) * kLanes<A> * N::kGroup; } // elements of one
  int64_t terms() const { return (groups<N>(depth.first) + groups<N>(depth.rest)) * N::kGroup; }
  const Elem *panel(int64_t k) const { return data + k * kPanel * terms(); }
  void carve(Carver &carver) { data = carver.take<Elem>(whole_vectors<A>(outputs) * terms()); }

  // z (rows, vectors of the panel) = a * this panel; the rows of a chunk of `a` are kChunk elements apart, those of z
  // kPanel.
  void multiply(int64_t k, int64_t rows, const Elem *a, int64_t a_chunk, A *z) const {
    FC_ISA::multiply<N, kChunk, N::kGroup>(rows, vectors(k), depth, a, a_chunk, panel(k), group(k), z, kPanel, false);
  }

  // All terms of the first part of one panel, or of the rest, from a matrix with element (output, term) at output *
  // output_stride + term * term_stride; one of the strides is 1.
  template <class T>
  void fill(int64_t panel, bool rest, const T *weight, int64_t output_stride, int64_t term_stride) const {
    constexpr int64_t n = kLanes<A>, g = N::kGroup;
    const int64_t terms = rest ? depth.rest : depth.first, width = group(panel);
    Elem *first = data + panel * kPanel * this->terms() + (rest ? groups<N>(depth.first) * width : 0);
    for (int64_t v = 0; v < vectors(panel); ++v) {
      const int64_t output = panel * kPanel + v * n, count = smaller(n, outputs - output);
      Elem *to = first + v * n * g;
      const T *from = weight + output * output_stride;
      int64_t k = 0;
      if (term_stride == 1 && count == n) {
        for (; k + n * g <= terms; k += n * g) {
          Vec<A> tile[n];
          for (int64_t j = 0; j < n; ++j)
            tile[j] = load_groups(from + j * output_stride + k);
          transpose<A>(tile);
          for (int64_t j = 0; j < n; ++j)
            store(reinterpret_cast<A *>(to + (k / g + j) * width), tile[j]);
        }
      }
      for (; k < terms; k += g) {
        Elem *at = to + k / g * width;
        const T *term = from + k * term_stride;
        if (output_stride == 1) {
          if constexpr (g == 1)
            store(at, load_first_as<A>(term, int(count)));
          else
            store(reinterpret_cast<A *>(at),
                  load_pairs(term, k + 1 < terms ? term + term_stride : nullptr, int(count)));
          continue;
        }
        for (int64_t j = 0; j < n; ++j) {
          for (int64_t i = 0; i < g; ++i)
            at[j * g + i] =
                j < count && k + i < terms ? convert<Elem>(term[j * output_stride + i * term_stride]) : Elem{};
        }
      }
    }
  }

private:
  // A group for each lane.
  template <class T> static FC_INLINE Vec<A> load_groups(const T *p) {
    if constexpr (N::kGroup == 1)
      return load_as<A>(p);
    else
      return (Vec<A>)*reinterpret_cast<const UnalignedPairVec *>(p);
  }
};

} // namespace FC_ISA
} // namespace fused_convlstm
