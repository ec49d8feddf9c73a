// Scratch memory, and copies between the caller's layouts and the kernels' own (channels innermost).
#pragma once

#include <cstdlib>
#include <new>

#include "conv_lstm2d.h"
#include "pages.h"
#include "vec.h"

namespace fused_convlstm {
namespace FC_ISA {

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
static FC_INLINE int64_t smaller(int64_t a, int64_t b) { return b < a ? b : a; }
static FC_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// Uninitialised array, aligned to cache lines, with one vector of slack behind it that may be read.
template <class T> class Buffer {
public:
  Buffer() = default;
  explicit Buffer(int64_t count) { allocate(count); }
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  ~Buffer() { std::free(data_); }

  void allocate(int64_t count) {
    std::free(data_);
    const auto bytes = size_t(round_up(count * int64_t(sizeof(T)) + 256, 64));
    data_ = static_cast<T *>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr)
      throw std::bad_alloc();
    prefer_large_pages(data_, bytes);
    count_ = count;
  }
  void fill_zero() { std::memset(static_cast<void *>(data_), 0, size_t(count_) * sizeof(T)); }
  T *get() const { return data_; }
  T &operator[](int64_t k) const { return data_[k]; }

private:
  T *data_ = nullptr;
  int64_t count_ = 0;
};

template <class To, class From> static FC_INLINE To convert(From x) { return To(x); }
template <> FC_INLINE float convert<float, bfloat16>(bfloat16 x) { return to_float(x); }
template <> FC_INLINE bfloat16 convert<bfloat16, float>(float x) { return to_bfloat16(x); }
template <> FC_INLINE bfloat16 convert<bfloat16, bfloat16>(bfloat16 x) { return x; }
template <> FC_INLINE double convert<double, bfloat16>(bfloat16 x) { return to_float(x); }
template <> FC_INLINE bfloat16 convert<bfloat16, double>(double x) { return to_bfloat16(float(x)); }

// Calls f with a value of the element type.
template <class F> static FC_INLINE void with_type(DType type, const F &f) {
  switch (type) {
  case DType::float32:
    return f(float{});
  case DType::bfloat16:
    return f(bfloat16{});
  case DType::float64:
    return f(double{});
  }
}

// How a pixel's channels lie in the kernels' own memory: group by group, each padded to `padded` channels.
struct Row {
  int64_t groups, per_group, padded;

  int64_t size() const { return groups * padded; }
  int64_t channels() const { return groups * per_group; }
  // Position of a channel in the row.
  int64_t position(int64_t channel) const { return channel / per_group * padded + channel % per_group; }
};

typedef float Float4 __attribute__((vector_size(16)));
typedef float UnalignedFloat4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t UInt4 __attribute__((vector_size(16)));
typedef uint16_t Short4 __attribute__((vector_size(8)));
typedef uint16_t Short8 __attribute__((vector_size(16)));

template <class To> static FC_INLINE void store4(To *to, Float4 v) {
  if constexpr (sizeof(To) == 4) {
    *reinterpret_cast<UnalignedFloat4 *>(to) = v;
  } else { // as to_bfloat16
    const UInt4 bits = (UInt4)v;
    const UInt4 rounded = v == v ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40;
    const auto narrow = __builtin_convertvector(rounded, Short4);
    std::memcpy(to, &narrow, 8);
  }
}

// Four rows of four floats, turned.
static FC_INLINE void transpose4(const float *from, int64_t stride, Float4 (&column)[4]) {
  const Float4 a = *reinterpret_cast<const UnalignedFloat4 *>(from);
  const Float4 b = *reinterpret_cast<const UnalignedFloat4 *>(from + stride);
  const Float4 c = *reinterpret_cast<const UnalignedFloat4 *>(from + 2 * stride);
  const Float4 d = *reinterpret_cast<const UnalignedFloat4 *>(from + 3 * stride);
  const Float4 ab_low = __builtin_shuffle(a, b, Int4{0, 4, 1, 5}), ab_high = __builtin_shuffle(a, b, Int4{2, 6, 3, 7});
  const Float4 cd_low = __builtin_shuffle(c, d, Int4{0, 4, 1, 5}), cd_high = __builtin_shuffle(c, d, Int4{2, 6, 3, 7});
  column[0] = __builtin_shuffle(ab_low, cd_low, Int4{0, 1, 4, 5});
  column[1] = __builtin_shuffle(ab_low, cd_low, Int4{2, 3, 6, 7});
  column[2] = __builtin_shuffle(ab_high, cd_high, Int4{0, 1, 4, 5});
  column[3] = __builtin_shuffle(ab_high, cd_high, Int4{2, 3, 6, 7});
}

// to[j * to_stride + i] = from[i * from_stride + j], i and j < 4
template <class To>
static FC_INLINE void transpose_block(To *to, int64_t to_stride, const float *from, int64_t from_stride) {
  Float4 column[4];
  transpose4(from, from_stride, column);
  for (int64_t k = 0; k < 4; ++k)
    store4(to + k * to_stride, column[k]);
}

// The same with i and j < 8: three times, rows k and k + 4 are interleaved.
static FC_INLINE void transpose_block(bfloat16 *to, int64_t to_stride, const bfloat16 *from, int64_t from_stride) {
  Short8 row[8], next[8];
  for (int k = 0; k < 8; ++k)
    std::memcpy(&row[k], from + k * from_stride, 16);
  const Short8 low = {0, 8, 1, 9, 2, 10, 3, 11}, high = {4, 12, 5, 13, 6, 14, 7, 15};
#pragma GCC unroll 3
  for (int stage = 0; stage < 3; ++stage) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      next[2 * k] = __builtin_shuffle(row[k], row[k + 4], low);
      next[2 * k + 1] = __builtin_shuffle(row[k], row[k + 4], high);
    }
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k)
      row[k] = next[k];
  }
  for (int k = 0; k < 8; ++k)
    std::memcpy(to + k * to_stride, &row[k], 16);
}

// to[j * to_stride + i] = from[i * from_stride + j], i < rows, j < columns
template <class To, class From>
static void transpose(To *to, int64_t to_stride, const From *from, int64_t from_stride, int64_t rows, int64_t columns) {
  constexpr bool kHalves = sizeof(To) == 2 && sizeof(From) == 2;
  constexpr int64_t kBlock = kHalves ? 8 : sizeof(To) <= 4 && sizeof(From) == 4 ? 4 : 0;
  int64_t done = 0;
  if constexpr (kBlock != 0) {
    const int64_t whole_columns = columns / kBlock * kBlock;
    for (; done + kBlock <= rows; done += kBlock) {
      for (int64_t j = 0; j < whole_columns; j += kBlock)
        transpose_block(to + j * to_stride + done, to_stride, from + done * from_stride + j, from_stride);
      for (int64_t j = whole_columns; j < columns; ++j)
        for (int64_t k = 0; k < kBlock; ++k)
          to[j * to_stride + done + k] = convert<To>(from[(done + k) * from_stride + j]);
    }
  }
  for (int64_t i = done; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      to[j * to_stride + i] = convert<To>(from[i * from_stride + j]);
}

// rows[k] = pixels begin .. end of a frame (C, H, W) with strides s_c, s_y, s_x, in elements.
template <class To, class From>
static void pack_pixels(To *rows, const Row &row, const From *frame, int64_t s_c, int64_t s_y, int64_t s_x,
                        int64_t width, int64_t begin, int64_t end) {
  const int64_t channels = row.channels(), size = row.size();
  const bool padded = row.per_group != row.padded;
  if (padded) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t g = 0; g < row.groups; ++g)
        for (int64_t c = row.per_group; c < row.padded; ++c)
          rows[k * size + g * row.padded + c] = To{};
  }
  if (s_y == width * s_x) { // rows of the frame follow each other
    width = end;
    s_y = 0;
  }
  constexpr int64_t kBlock = 16; // pixels whose rows stay in the first-level cache
  for (int64_t k = begin; k < end;) {
    const int64_t y = k / width, x = k % width, n = smaller(smaller(width - x, end - k), kBlock);
    const From *from = frame + y * s_y + x * s_x;
    if (s_c == 1 && !padded) {
      for (int64_t p = 0; p < n; ++p)
        for (int64_t c = 0; c < channels; ++c)
          rows[(k + p) * size + c] = convert<To>(from[p * s_x + c]);
    } else if (s_x == 1 && !padded) {
      transpose(rows + k * size, size, from, s_c, channels, n);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t position = row.position(c);
        for (int64_t p = 0; p < n; ++p)
          rows[(k + p) * size + position] = convert<To>(from[c * s_c + p * s_x]);
      }
    }
    k += n;
  }
}

// The inverse of pack_pixels.
template <class To, class From>
static void unpack_pixels(To *frame, int64_t s_c, int64_t s_y, int64_t s_x, const From *rows, const Row &row,
                          int64_t width, int64_t begin, int64_t end) {
  const int64_t channels = row.channels(), size = row.size();
  if (s_x == 1 && s_y == width && row.per_group == row.padded)
    return transpose(frame + begin, s_c, rows + begin * size, size, end - begin, channels);
  for (int64_t k = begin; k < end; ++k) {
    To *to = frame + k / width * s_y + k % width * s_x;
    for (int64_t c = 0; c < channels; ++c)
      to[c * s_c] = convert<To>(rows[k * size + row.position(c)]);
  }
}

} // namespace FC_ISA
} // namespace fused_convlstm
