// The pooled-gate ConvLSTM ("variant (a)") on the CPU: what a call is, independent of type and instruction set.
//
// Zhang et al., "Attention in Convolutional LSTM for Gesture Recognition", eq. (8) to (16).
#pragma once

#include <cstdint>

#include "conv_lstm2d.h" // the types that both cells use

namespace fused_convlstm {

// A tensor of frames (T, B, C, H, W) with any strides, in elements. A state (B, C, H, W) has step = 0.
// data is null where the tensor is absent.
struct Frames {
  void *data;
  int64_t step, sample, channel, row, column;
};

// A depthwise convolution.
struct DepthwiseShape {
  int64_t channels;
  int64_t height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  int64_t top, bottom, left, right; // padding
};

constexpr int kMaxThreads = 256;

// Weights are contiguous, in the type of the input. Flags: bit 0 resets the state before the step, bit 1 says that
// the step lies past the end of the sample.
struct PooledGateProblem {
  int64_t steps, batch;
  DepthwiseShape input, recurrent;
  PaddingMode padding;
  Activation activation;
  bool reverse;
  const uint8_t *step_flags;                   // (T, B) or null
  Frames x, h_0, c_0;                          // c_0 in the type of the cell state
  const void *gate_weight_ih, *gate_weight_hh; // (3 * C, Cin), (3 * C, C)
  const void *gate_bias;                       // (3 * C,) or null
  const void *depthwise_ih, *depthwise_hh;     // (Cin, kh, kw), (C, rh, rw)
  const void *pointwise_ih, *pointwise_hh;     // (C, Cin), (C, C)
  const void *bias;                            // (C,) or null
};

struct PooledGateForward {
  PooledGateProblem problem;
  Frames output, h_n, c_n;
  void *gates;     // (T, B, 3 * C) as open_gate() returns them, in the type of the cell state; or null
  void *candidate; // (T, B, Ho, Wo, C), in the type of the input; or null
  void *cells;     // (T, B, Ho, Wo, C), in the type of the input; or null
};

// Gradients are null where they are not wanted. Those of the gate weights are products of three small matrices that
// the kernel returns instead.
struct PooledGateBackward {
  PooledGateProblem problem;
  Frames output;         // of the forward pass
  const void *gates;     // (T, B, 3 * C)
  const void *candidate; // (T, B, Ho, Wo, C), or null: computed again
  const void *cells;     // (T, B, Ho, Wo, C)
  Frames grad_output, grad_h_n, grad_c_n;
  Frames grad_x, grad_h_0, grad_c_0;
  void *grad_depthwise_ih, *grad_depthwise_hh, *grad_pointwise_ih, *grad_pointwise_hh, *grad_bias;
  void *grad_gates; // (T, B, 3 * C), before the activation; this and the next two in the type of the cell state
  void *pooled_x;   // (T, B, Cin)
  void *pooled_h;   // (T, B, C), of the state before the step
};

FC_DECLARE(void pooled_gate_forward(const PooledGateForward &call, DType type, int threads))
FC_DECLARE(void pooled_gate_backward(const PooledGateBackward &call, DType type, int threads))

} // namespace fused_convlstm
