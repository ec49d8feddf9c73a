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

} // namespace FC_ISA
} // namespace fused_convlstm
