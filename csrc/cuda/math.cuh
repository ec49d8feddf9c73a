// Number formats, activations and vector access.
#pragma once

#include "platform.cuh"

namespace fused_convlstm {

// How a kernel multiplies: what it stores (T), and how a warp accumulates a 16 x K by K x 8 product in float32, where
// the K values of a row are 32 bytes.
struct MathHalf {
  using T = Half;
  static constexpr bool tensor_cores = true;
  static constexpr bool exact = false;
  static constexpr float below_one = 1.0f - 0x1p-11f; // the largest number below 1
  static constexpr float above_zero = 0x1p-14f;       // a small one above 0
  static FCL_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_half(d, a, b); }
  static FCL_DEVICE void round_operand(uint32_t (&)[4]) {}
};

struct MathBfloat16 {
  using T = Bfloat16;
  static constexpr bool tensor_cores = true;
  static constexpr bool exact = false;
  static constexpr float below_one = 1.0f - 0x1p-8f;
  static constexpr float above_zero = 0x1p-100f;
  static FCL_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bfloat16(d, a, b);
  }
  static FCL_DEVICE void round_operand(uint32_t (&)[4]) {}
};

// float32 with the products in tf32: the weights are rounded when they are packed, the frames as they are read.
struct MathTf32 {
  using T = float;
  static constexpr bool tensor_cores = true;
  static constexpr bool exact = true;
  static constexpr float below_one = 1.0f - 0x1p-24f;
  static constexpr float above_zero = 0x1p-100f;
  static FCL_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_tf32(d, a, b); }
  static FCL_DEVICE void round_operand(uint32_t (&a)[4]) {
    for (uint32_t &word : a) {
      word = round_to_tf32(word);
    }
  }
};

// float32 with float32 products: ordinary multiply-adds.
struct MathFloat {
  using T = float;
  static constexpr bool tensor_cores = false;
  static constexpr bool exact = true;
  static constexpr float below_one = 1.0f - 0x1p-24f;
  static constexpr float above_zero = 0x1p-100f;
};

enum GateActivation : int { SIGMOID = 0, HARD_SIGMOID = 1, HARD_SIGMOID_KERAS2 = 2 };

template <class Math> FCL_DEVICE float tanh_of(float x) {
  if constexpr (Math::exact) {
    return tanhf(x);
  } else { // absolute error below 1e-6, far below the rounding of what is stored
    // exp may become infinite: fast_divide by it, and by what comes close to it, is 0. NaN stays NaN.
    return fast_divide(2.0f, 1.0f + fast_exp(-2.0f * x)) - 1.0f;
  }
}

template <class Math> FCL_DEVICE float gate_of(float z, int activation) {
  if (activation == SIGMOID) {
    if constexpr (Math::exact) {
      return 1.0f / (1.0f + expf(-z));
    } else {
      return fast_divide(1.0f, 1.0f + fast_exp(-z));
    }
  }
  const float a = activation == HARD_SIGMOID ? (z + 3.0f) / 6.0f : 0.2f * z + 0.5f;
  // Not fmin and fmax, which would turn NaN into a number.
  return a < 0.0f ? 0.0f : (a > 1.0f ? 1.0f : a);
}

// The gate as it is kept for backward, which reads off it whether the pre-activation lay in the sloped part of a hard
// sigmoid: inside, it may not round to 0 or 1.
template <class Math> FCL_DEVICE float gate_to_keep(float gate, float z, int activation) {
  const bool sloped = activation == HARD_SIGMOID
                          ? (z > -3.0f && z < 3.0f)
                          : activation == HARD_SIGMOID_KERAS2 && (0.2f * z + 0.5f >= 0.0f && 0.2f * z + 0.5f <= 1.0f);
  return sloped ? fminf(fmaxf(gate, Math::above_zero), Math::below_one) : gate;
}

FCL_DEVICE float gate_slope(float gate, int activation) {
  if (activation == SIGMOID) {
    return gate * (1.0f - gate);
  }
  return gate > 0.0f && gate < 1.0f ? (activation == HARD_SIGMOID ? 1.0f / 6.0f : 0.2f) : 0.0f;
}

template <class T> struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

// Four neighbours in memory, `count` of which exist (the rest reads as 0); `aligned` to their common size, if all do.
template <class T> FCL_DEVICE void load4(const T *from, float (&to)[4], int count, bool aligned) {
  if (aligned && count == 4) {
    const Four<T> four = *reinterpret_cast<const Four<T> *>(from);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      to[k] = to_float(four.value[k]);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    to[k] = k < count ? to_float(from[k]) : 0.0f;
  }
}

template <class T> FCL_DEVICE void store4(T *to, const float (&from)[4], int count, bool aligned) {
  if (aligned && count == 4) {
    Four<T> four;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      four.value[k] = from_float<T>(from[k]);
    }
    *reinterpret_cast<Four<T> *>(to) = four;
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (k < count) {
      to[k] = from_float<T>(from[k]);
    }
  }
}

// Any multiple of four neighbours.
template <class T, int elements>
FCL_DEVICE void load_elements(const T *from, float (&to)[elements], int count, bool aligned) {
#pragma unroll
  for (int k = 0; k < elements; k += 4) {
    float four[4];
    const int left = count - k < 0 ? 0 : (count - k > 4 ? 4 : count - k);
    load4(from + k, four, left, aligned);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      to[k + j] = four[j];
    }
  }
}

template <class T, int elements>
FCL_DEVICE void store_elements(T *to, const float (&from)[elements], int count, bool aligned) {
#pragma unroll
  for (int k = 0; k < elements; k += 4) {
    const float four[4] = {from[k], from[k + 1], from[k + 2], from[k + 3]};
    const int left = count - k < 0 ? 0 : (count - k > 4 ? 4 : count - k);
    store4(to + k, four, left, aligned);
  }
}

} // namespace fused_convlstm
