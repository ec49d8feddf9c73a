// Convolutions as implicit matrix products: tiles of P pixels times NV vectors of output channels in registers.
//
// Every output is one chain of multiply-adds in a fixed order (operand, tap, channel), whatever the tile it falls in,
// and sums that leave the registers lose no bits. So results do not depend on threads or on the rest of the batch.
#pragma once

#include "geometry.h"
#include "memory.h"
#include "threads.h"

namespace fused_convlstm {
namespace FC_ISA {

// Number types of a product. Elem: pixels and packed weights; Acc: sums; kGroup: channels that one multiply-add takes.
template <class T> struct Plain {
  using Elem = T;
  using Acc = T;
  static constexpr int kGroup = 1;
  static FC_INLINE Vec<T> multiply_add(Vec<T> sum, const T *pixel, Vec<T> weights) {
    return fma(splat<T>(*pixel), weights, sum);
  }
  static FC_INLINE Vec<T> load_weights(const T *p) { return load(p); }
};
using F32 = Plain<float>;
using F64 = Plain<double>;

#ifdef FC_ISA_AVX512_BF16
// Two bfloat16 channels at a time, summed in float.
struct BF16 {
  using Elem = bfloat16;
  using Acc = float;
  static constexpr int kGroup = 2;
  static FC_INLINE Vec<float> multiply_add(Vec<float> sum, const bfloat16 *pixel, Vec<float> weights) {
    int32_t pair;
    std::memcpy(&pair, pixel, 4);
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)weights);
  }
  static FC_INLINE Vec<float> load_weights(const bfloat16 *p) { return load(reinterpret_cast<const float *>(p)); }
};
#endif

// Shape of the register tile for NV vectors of outputs: as many pixels as the registers hold.
#ifdef FC_WIDE
template <int NV> constexpr int kTilePixels = NV <= 2 ? 12 : NV == 3 ? 8 : 6;
#else
template <int NV> constexpr int kTilePixels = NV == 1 ? 6 : NV == 2 ? 6 : NV == 3 ? 4 : 3;
#endif
constexpr int kMaxTilePixels = 12;
constexpr int kVectors = 4; // vectors of outputs in a full tile

// sum[p][v] += pixel[p][k] * weights[k][v] for k in 0 .. count
template <class N, int P, int NV>
static FC_INLINE void accumulate(Vec<typename N::Acc> (&sum)[P][NV], const typename N::Elem *const (&pixel)[P],
                                 const typename N::Elem *weights, int count) {
  using V = Vec<typename N::Acc>;
  constexpr int kStep = kLanes<typename N::Acc> * N::kGroup;
  for (int k = 0; k < count; ++k) {
    V w[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      w[v] = N::load_weights(weights + v * kStep);
    weights += NV * kStep;
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        sum[p][v] = N::multiply_add(sum[p][v], pixel[p] + k * N::kGroup, w[v]);
  }
}

template <class N, int P, int NV>
static FC_INLINE void store_sums(Vec<typename N::Acc> (&sum)[P][NV], typename N::Acc *const *at) {
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      store(at[p] + v * kLanes<typename N::Acc>, sum[p][v]);
}

template <class N, int P, int NV>
static FC_INLINE void add_sums(Vec<typename N::Acc> (&sum)[P][NV], typename N::Acc *const *at) {
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      store(at[p] + v * kLanes<typename N::Acc>, load(at[p] + v * kLanes<typename N::Acc>) + sum[p][v]);
}

template <class N, int P, int NV> static FC_INLINE void clear_sums(Vec<typename N::Acc> (&sum)[P][NV]) {
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      sum[p][v] = Vec<typename N::Acc>{};
}

constexpr int kChain = 256; // multiply-adds in a row at one tap

// One tap for P pixels: sums[p] += pixels[p] * weights.
template <class N, int P, int NV>
static __attribute__((noinline)) void tap_tile(typename N::Acc *const *sums, const typename N::Elem *const *pixels,
                                               const typename N::Elem *weights, int count) {
  const typename N::Elem *pixel[P];
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p)
    pixel[p] = pixels[p];
  for (int first = 0; first < count; first += kChain) {
    Vec<typename N::Acc> sum[P][NV];
    clear_sums<N, P, NV>(sum);
    const int length = count - first < kChain ? count - first : kChain;
    accumulate<N, P, NV>(sum, pixel, weights, length);
    add_sums<N, P, NV>(sum, sums);
    weights += int64_t(length) * NV * kLanes<typename N::Acc> * N::kGroup;
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p)
      pixel[p] += length * N::kGroup;
  }
}

// One tap for `left` pixels, the tail of a list: the tile shrinks until nothing is left.
template <class N, int P, int NV>
static FC_INLINE void tap_tail(typename N::Acc *const *sums, const typename N::Elem *const *pixels,
                               const typename N::Elem *weights, int count, int left) {
  if (left == P)
    return tap_tile<N, P, NV>(sums, pixels, weights, count);
  if constexpr (P > 1)
    tap_tail<N, P - 1, NV>(sums, pixels, weights, count, left);
}

template <class N, int NV>
static void tap_list(typename N::Acc *const *sums, const typename N::Elem *const *pixels,
                     const typename N::Elem *weights, int count, int64_t length) {
  constexpr int P = kTilePixels<NV>;
  int64_t k = 0;
  for (; k + P <= length; k += P)
    tap_tile<N, P, NV>(sums + k, pixels + k, weights, count);
  if (k < length)
    tap_tail<N, P - 1, NV>(sums + k, pixels + k, weights, count, int(length - k));
}

// One of the convolutions that make up a product.
template <class N> struct Operand {
  const typename N::Elem *const *images; // rows of each image; null: all zeros
  const typename N::Elem *weights;       // [block][tap][count][vector][lane][group]
  int64_t row;                           // elements of a pixel's row
  int64_t group_offset;                  // elements from one group's channels to the next
  int64_t block_stride;                  // weights of one block
  int taps;
  int count;              // steps of N::kGroup channels at each tap
  bool whole;             // all taps with the sums in registers, by `source`; else tap by tap, by `passes`
  const int32_t *offsets; // whole: (taps, pixels), where a row begins, in elements; zeros lie behind the last pixel
  const uint8_t *zeros;   // whole: (taps, pixels), how many pixels from this one on read zeros, at most kMaxTilePixels
  const Pass *passes;
  int pass_count;
};

// All taps of the `whole` operands for P neighbouring pixels of one image.
template <class N, int P, int NV>
static __attribute__((noinline)) void whole_tile(typename N::Acc *sums, bool add, const Operand<N> *operands,
                                                 int operand_count, int64_t image, int64_t block, int64_t group,
                                                 int64_t pixel, int64_t pixels) {
  using Elem = typename N::Elem;
  Vec<typename N::Acc> sum[P][NV];
  typename N::Acc *at[P];
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p)
    at[p] = sums + p * NV * kLanes<typename N::Acc>;
  clear_sums<N, P, NV>(sum);
  for (int k = 0; k < operand_count; ++k) {
    const Operand<N> &o = operands[k];
    if (!o.whole || o.images[image] == nullptr)
      continue;
    const Elem *base = o.images[image] + group * o.group_offset;
    const Elem *weights = o.weights + block * o.block_stride;
    const int32_t *offsets = o.offsets + pixel;
    const uint8_t *zeros = o.zeros + pixel;
    for (int tap = 0; tap < o.taps; ++tap) {
      if (*zeros < P) {
        const Elem *at_tap[P];
#pragma GCC unroll 12
        for (int p = 0; p < P; ++p)
          at_tap[p] = base + offsets[p];
        accumulate<N, P, NV>(sum, at_tap, weights, o.count);
      }
      weights += int64_t(o.count) * NV * kLanes<typename N::Acc> * N::kGroup;
      offsets += pixels;
      zeros += pixels;
    }
  }
  if (add)
    add_sums<N, P, NV>(sum, at);
  else
    store_sums<N, P, NV>(sum, at);
}

template <class N, int P, int NV, class... Args>
static FC_INLINE void whole_tail(int left, typename N::Acc *sums, Args... args) {
  if (left == P)
    return whole_tile<N, P, NV>(sums, args...);
  if constexpr (P > 1)
    whole_tail<N, P - 1, NV>(left, sums, args...);
}

// How many pixels are summed at once: the sums and the pixels that they read stay in the second-level cache.
constexpr int kBlockPixels = 192, kWholeBlockPixels = 24;

// A thread's scratch memory for `product`.
template <class N> struct ProductScratch {
  Buffer<typename N::Acc> sums{kBlockPixels * kVectors * kLanes<typename N::Acc>};
  Buffer<typename N::Acc *> sum_list{kBlockPixels};
  Buffer<const typename N::Elem *> pixel_list{kBlockPixels};
};

// First position in an ascending list whose value is not below x.
static FC_INLINE int lower_bound(const int32_t *list, int count, int64_t x) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (list[middle] < x)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// sums[k] = product for pixel begin + k of the images laid end to end, begin .. end at most kBlockPixels.
template <class N, int NV>
static void product(const Operand<N> *operands, int operand_count, int64_t block, int64_t group, int64_t pixels,
                    int64_t begin, int64_t end, const ProductScratch<N> &scratch) {
  using Acc = typename N::Acc;
  using Elem = typename N::Elem;
  constexpr int64_t kWidth = NV * kLanes<Acc>;
  Acc *sums = scratch.sums.get();
  bool empty = true;
  for (int first = 0; first < operand_count;) {
    if (NV == kVectors && operands[first].whole) { // this one, and its neighbours of the same kind
      int next = first + 1;
      while (next < operand_count && operands[next].whole)
        ++next;
      for (int64_t k = begin; k < end;) {
        const int64_t image = k / pixels, pixel = k % pixels;
        const int64_t run = smaller(end, (image + 1) * pixels) - k;
        constexpr int P = kTilePixels<kVectors>;
        int64_t p = 0;
        for (; p + P <= run; p += P)
          whole_tile<N, P, kVectors>(sums + (k - begin + p) * kWidth, !empty, operands + first, next - first, image,
                                     block, group, pixel + p, pixels);
        if (p < run)
          whole_tail<N, P - 1, kVectors>(int(run - p), sums + (k - begin + p) * kWidth, !empty, operands + first,
                                         next - first, image, block, group, pixel + p, pixels);
        k += run;
      }
      first = next;
      empty = false;
      continue;
    }
    if (empty) {
      std::memset(sums, 0, size_t((end - begin) * kWidth) * sizeof(Acc));
      empty = false;
    }
    const Operand<N> &o = operands[first++];
    const int64_t tap_weights = int64_t(o.count) * kWidth * N::kGroup;
    for (int n = 0; n < o.pass_count; ++n) {
      const Pass &pass = o.passes[n];
      int64_t length = 0;
      for (int64_t k = begin; k < end;) {
        const int64_t image = k / pixels, pixel = k % pixels;
        const int64_t run = smaller(end, (image + 1) * pixels) - k;
        if (const Elem *rows = o.images[image]) {
          rows += group * o.group_offset;
          const int stop = lower_bound(pass.dst, pass.count, pixel + run);
          for (int j = lower_bound(pass.dst, pass.count, pixel); j < stop; ++j, ++length) {
            scratch.sum_list[length] = sums + (k - begin + pass.dst[j] - pixel) * kWidth;
            scratch.pixel_list[length] = rows + pass.src[j] * o.row;
          }
        }
        k += run;
      }
      tap_list<N, NV>(scratch.sum_list.get(), scratch.pixel_list.get(),
                      o.weights + block * o.block_stride + pass.tap * tap_weights, o.count, length);
    }
  }
}

// Output channels in blocks: `per_group` channels of each group in blocks of `width`, the last of a group with fewer.
struct Blocks {
  int64_t groups, per_group, width, blocks_per_group;

  Blocks(int64_t groups_, int64_t per_group_, int64_t width_)
      : groups(groups_), per_group(per_group_), width(width_), blocks_per_group((per_group_ + width_ - 1) / width_) {}

  int64_t count() const { return groups * blocks_per_group; }
  int64_t group(int64_t block) const { return block / blocks_per_group; }
  // First channel of the block within its group, and how many there are.
  int64_t first(int64_t block) const { return block % blocks_per_group * width; }
  int64_t channels(int64_t block) const { return smaller(width, per_group - first(block)); }
};

// Calls body(block, begin, end) for this thread's part of (blocks x pixels of all images), in pieces of one block and
// at most `piece` pixels.
template <class Body>
static FC_INLINE void for_pieces(int64_t blocks, int64_t images, int64_t pixels, bool small, int thread, int threads,
                                 const Body &body) {
  // Work is divided in units of up to 24 pixels of one image.
  const int64_t units_per_image = (pixels + kWholeBlockPixels - 1) / kWholeBlockPixels;
  const int64_t units = images * units_per_image;
  const Range range = part_of(blocks * units, thread, threads);
  const auto first_pixel = [&](int64_t unit) {
    return unit / units_per_image * pixels + unit % units_per_image * kWholeBlockPixels;
  };
  for (int64_t unit = range.begin; unit < range.end;) {
    const int64_t block = unit / units;
    const int64_t begin = first_pixel(unit - block * units);
    int64_t next = unit + 1;
    const int64_t stop = smaller(range.end, (block + 1) * units);
    while (!small && next < stop && first_pixel(next + 1 - block * units) - begin <= kBlockPixels)
      ++next;
    body(block, begin, first_pixel(next - block * units));
    unit = next;
  }
}

} // namespace FC_ISA
} // namespace fused_convlstm
