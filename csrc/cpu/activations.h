// exp, sigmoid and tanh on vectors: Cody-Waite reduction and the Taylor polynomial, within about 2 ulp. NaN goes
// through.
#pragma once

#include "vec.h"

namespace fused_convlstm {
namespace FC_ISA {

template <class T> struct ExpConstants;
template <> struct ExpConstants<float> {
  // ln 2 = kHigh + kLow, kHigh with few enough bits that n * kHigh is exact.
  static constexpr float kLog2e = 1.44269504f, kHigh = 0.693359375f, kLow = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  static constexpr float kLimit = 87.0f;       // 2^n stays normal
  static constexpr int kMantissa = 23, kBias = 127, kTerms = 7;
};
template <> struct ExpConstants<double> {
  static constexpr double kLog2e = 1.4426950408889634074, kHigh = 6.93145751953125e-1, kLow = 1.42860682030941723212e-6;
  static constexpr double kRound = 6755399441055744.0; // 1.5 * 2^52
  static constexpr double kLimit = 708.0;
  static constexpr int kMantissa = 52, kBias = 1023, kTerms = 13;
};

// 1 / k!, k = 0 .. 13
template <class T> struct Taylor {
  static constexpr T kInverse[14] = {T(1),
                                     T(1),
                                     T(1) / T(2),
                                     T(1) / T(6),
                                     T(1) / T(24),
                                     T(1) / T(120),
                                     T(1) / T(720),
                                     T(1) / T(5040),
                                     T(1) / T(40320),
                                     T(1) / T(362880),
                                     T(1) / T(3628800),
                                     T(1) / T(39916800),
                                     T(1) / T(479001600),
                                     T(1) / T(6227020800.0)};
};

// exp(x) - 1 = scale * (1 + p) - 1 with |p| < 0.42; |x| at most kLimit.
template <class T> static FC_INLINE void reduced_exp(Vec<T> x, Vec<T> &scale, Vec<T> &p) {
  using C = ExpConstants<T>;
  const Vec<T> shifted = fma(x, splat<T>(C::kLog2e), splat<T>(C::kRound));
  const Vec<T> n = shifted - C::kRound;
  Vec<T> r = fma(n, splat<T>(-C::kHigh), x);
  r = fma(n, splat<T>(-C::kLow), r);
  Vec<T> q = splat<T>(Taylor<T>::kInverse[C::kTerms]);
  for (int k = C::kTerms - 1; k >= 2; --k)
    q = fma(q, r, splat<T>(Taylor<T>::kInverse[k]));
  p = fma(q * r, r, r);
  scale = (Vec<T>)(((IntVec<T>)shifted + C::kBias) << C::kMantissa);
}

template <class T> static FC_INLINE Vec<T> exp(Vec<T> x) {
  Vec<T> scale, p;
  reduced_exp<T>(clamp<T>(x, -ExpConstants<T>::kLimit, ExpConstants<T>::kLimit), scale, p);
  return fma(scale, p, scale);
}

template <class T> static FC_INLINE Vec<T> sigmoid(Vec<T> x) { return T(1) / (T(1) + exp<T>(-x)); }

// Through exp(2x) - 1, which keeps the relative accuracy of small results.
template <class T> static FC_INLINE Vec<T> tanh(Vec<T> x) {
  Vec<T> scale, p;
  x = clamp<T>(x, T(-22), T(22)); // 1 from there on in every precision
  reduced_exp<T>(x + x, scale, p);
  const Vec<T> e = fma(scale, p, scale - T(1));
  return e / (e + T(2));
}

#ifdef FC_ISA_AVX512_BF16
// For results that are rounded to bfloat16, within 2^-17: half the instructions. NaN goes through here, too.
//
// 2^t = scale * (1 + p); |t| at most 126.
static FC_INLINE void short_exp2(Vec<float> t, Vec<float> &scale, Vec<float> &p) {
  const __m512 n = _mm512_maskz_roundscale_ps(__mmask16(-1), (__m512)t, 0);
  const Vec<float> r = t - (Vec<float>)n;
  Vec<float> q = fma(splat(1.3333558e-3f), r, splat(9.6181291e-3f)); // (ln 2)^k / k!
  q = fma(q, r, splat(5.5504109e-2f));
  q = fma(q, r, splat(2.4022651e-1f));
  p = fma(q, r, splat(6.9314718e-1f)) * r;
  scale = (Vec<float>)_mm512_maskz_scalef_ps(__mmask16(-1), _mm512_set1_ps(1.0f), n);
}

// a / b by an estimate and one Newton step.
static FC_INLINE Vec<float> short_quotient(Vec<float> a, Vec<float> b) {
  const Vec<float> inverse = (Vec<float>)_mm512_maskz_rcp14_ps(__mmask16(-1), (__m512)b), q = a * inverse;
  return fma(fma(-q, b, a), inverse, q);
}

static FC_INLINE Vec<float> short_sigmoid(Vec<float> x) {
  Vec<float> scale, p;
  short_exp2(clamp(x * -1.44269504f, -126.0f, 126.0f), scale, p);
  return short_quotient(splat(1.0f), fma(scale, p, scale + 1.0f));
}

static FC_INLINE Vec<float> short_tanh(Vec<float> x) {
  Vec<float> scale, p;
  short_exp2(clamp(x * 2.88539008f, -64.0f, 64.0f), scale, p);
  const Vec<float> e = fma(scale, p, scale - 1.0f);
  return short_quotient(e, e + 2.0f);
}
#endif

} // namespace FC_ISA
} // namespace fused_convlstm
