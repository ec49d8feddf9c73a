// Vectors of the instruction set that the file is compiled for: Vec<float>, Vec<double>.
//
// GCC's vector types carry arithmetic, comparison and selection; only what they lack is written per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(FC_ISA_AVX2) || defined(FC_ISA_AVX512) || defined(FC_ISA_AVX512_BF16)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define FC_INLINE inline __attribute__((always_inline))

namespace fused_convlstm {
namespace FC_ISA {

#if defined(FC_ISA_AVX512) || defined(FC_ISA_AVX512_BF16)
#define FC_WIDE 1 // AVX-512
constexpr int kVectorBytes = 64;
#elif defined(FC_ISA_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Storage-only type: the upper half of a float.
struct bfloat16 {
  uint16_t bits;
};

template <class T> struct VecTraits;
template <> struct VecTraits<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <> struct VecTraits<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

template <class T> using Vec = typename VecTraits<T>::Vector;
template <class T> using IntVec = typename VecTraits<T>::Int;
template <class T> constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T> static FC_INLINE Vec<T> splat(T x) { return x - Vec<T>{}; }
template <class T> static FC_INLINE Vec<T> load(const T *p) {
  return *reinterpret_cast<const typename VecTraits<T>::Unaligned *>(p);
}
template <class T> static FC_INLINE void store(T *p, Vec<T> v) {
  *reinterpret_cast<typename VecTraits<T>::Unaligned *>(p) = v;
}

// The first n lanes, 0 <= n <= kLanes<T>; the others are zero when loaded and left alone when stored.
template <class T> static FC_INLINE Vec<T> load_first(const T *p, int n) {
  if (n == kLanes<T>)
    return load(p);
#ifdef FC_WIDE
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  else
    return (Vec<T>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
#endif
  Vec<T> v{};
  for (int k = 0; k < n; ++k)
    v[k] = p[k];
  return v;
}
template <class T> static FC_INLINE void store_first(T *p, Vec<T> v, int n) {
  if (n == kLanes<T>)
    return store(p, v);
#ifdef FC_WIDE
  if constexpr (sizeof(T) == 4)
    return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  else
    return _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
#endif
  for (int k = 0; k < n; ++k)
    p[k] = v[k];
}

// a * b + c, rounded once where the instruction set can.
static FC_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(FC_WIDE)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(FC_ISA_AVX2)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
static FC_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(FC_WIDE)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(FC_ISA_AVX2)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// x between low and high; NaN stays NaN.
template <class T> static FC_INLINE Vec<T> clamp(Vec<T> x, T low, T high) {
#if defined(FC_WIDE) // min and max return their second operand if one is NaN; the forms without mask make GCC 12 warn
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_max_ps(__mmask16(-1), _mm512_set1_ps(low),
                                       _mm512_maskz_min_ps(__mmask16(-1), _mm512_set1_ps(high), (__m512)x));
  else
    return (Vec<T>)_mm512_maskz_max_pd(__mmask8(-1), _mm512_set1_pd(low),
                                       _mm512_maskz_min_pd(__mmask8(-1), _mm512_set1_pd(high), (__m512d)x));
#elif defined(FC_ISA_AVX2)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_max_ps(_mm256_set1_ps(low), _mm256_min_ps(_mm256_set1_ps(high), (__m256)x));
  else
    return (Vec<T>)_mm256_max_pd(_mm256_set1_pd(low), _mm256_min_pd(_mm256_set1_pd(high), (__m256d)x));
#else
  x = x > high ? splat<T>(high) : x;
  return x < low ? splat<T>(low) : x;
#endif
}

// To the nearest bfloat16, ties to even; NaN stays NaN.
static FC_INLINE bfloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x)
    return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
static FC_INLINE float to_float(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

typedef uint16_t HalfVec __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t UnalignedHalfVec __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint16_t UnalignedPairVec __attribute__((vector_size(kVectorBytes), aligned(2), may_alias)); // two in a lane
typedef uint32_t BitVec __attribute__((vector_size(kVectorBytes)));

// Each lane to the nearest bfloat16, still as a float.
static FC_INLINE Vec<float> round_to_bfloat16(Vec<float> v) {
  BitVec bits = (BitVec)v;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  return v == v ? (Vec<float>)bits : v;
}

#ifdef FC_ISA_AVX512_BF16
// The first n numbers, one a lane, in its lower half; zeros behind them.
static FC_INLINE BitVec load_halves(const bfloat16 *p, int n) {
  return (BitVec)_mm512_maskz_cvtepu16_epi32(__mmask16(-1), _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
}

// row[j][i] = row[i][j]: four times, rows k and k + 8 are interleaved.
static FC_INLINE void turn(Vec<float> (&row)[16]) {
  const IntVec<float> low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, high = low + 8;
  for (int stage = 0; stage < 4; ++stage) {
    Vec<float> next[16];
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      next[2 * k] = __builtin_shuffle(row[k], row[k + 8], low);
      next[2 * k + 1] = __builtin_shuffle(row[k], row[k + 8], high);
    }
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k)
      row[k] = next[k];
  }
}
#endif

// The first n lanes, converted to or from another type in memory.
template <class T, class Memory> static FC_INLINE void store_first_as(Memory *p, Vec<T> v, int n) {
  if constexpr (sizeof(Memory) == sizeof(T)) {
    store_first(p, v, n);
  } else {
#ifdef FC_ISA_AVX512_BF16
    const __mmask16 lanes = __mmask16((1u << n) - 1);
    return _mm256_mask_storeu_epi16(p, lanes, (__m256i)_mm512_maskz_cvtneps_pbh(__mmask16(-1), (__m512)v));
#endif
    if (n < kLanes<T>) {
      for (int k = 0; k < n; ++k)
        p[k] = to_bfloat16(v[k]);
      return;
    }
    const BitVec bits = (BitVec)round_to_bfloat16(v) >> 16;
    *reinterpret_cast<UnalignedHalfVec *>(p) = __builtin_convertvector(bits, HalfVec);
  }
}
template <class T, class Memory> static FC_INLINE Vec<T> load_first_as(const Memory *p, int n) {
  if constexpr (sizeof(Memory) == sizeof(T)) {
    return load_first(p, n);
  } else {
#ifdef FC_ISA_AVX512_BF16
    return (Vec<T>)(load_halves(p, n) << 16);
#endif
    if (n == kLanes<T>)
      return (Vec<T>)(__builtin_convertvector(*reinterpret_cast<const UnalignedHalfVec *>(p), BitVec) << 16);
    Vec<T> v{};
    for (int k = 0; k < n; ++k)
      v[k] = to_float(p[k]);
    return v;
  }
}

} // namespace FC_ISA
} // namespace fused_convlstm
