// The ConvLSTM on CPUs: what one call of the kernels gets. T steps, B batch, Cin and C input and hidden channels, H x W
// input size, Ho x Wo state size. Gate order i, f, g, o.
#pragma once

#include <cstdint>

#include "geometry.h"
#include "isa.h"

namespace fused_convlstm {

enum class DType { float32 = 0, bfloat16 = 1, float64 = 2 };
enum class Activation { sigmoid = 0, hard_sigmoid = 1, hard_sigmoid_keras2 = 2 };
enum class Save { nothing = 0, cells = 1, gates = 2 };
constexpr uint8_t kFlagReset = 1, kFlagPastEnd = 2;

// A tensor of the caller's: address and strides, in elements. `data` is null for an absent one.
struct Tensor {
  void *data = nullptr;
  int64_t stride[5] = {};

  explicit operator bool() const { return data != nullptr; }
};

// Which products are transformed, and to which tiles (winograd.h): 2, 4, or 0 for direct ones. For float32, both
// convolutions 3x3, stride 1, dilation 1, one group, padded with zeros.
struct WinogradChoice {
  int gates, to_h, to_input, to_weights; // and in the backward, gradients of h, of the input, of both weights
};

struct ConvLSTM2dCall {
  int64_t steps, batch, in_channels, channels, groups;
  DType dtype; // of all but c_0, c_n and their gradients, which are float for bfloat16
  Activation activation;
  bool reverse, pixel_peephole;
  int threads;
  std::shared_ptr<const Geometry> input_conv, recurrent_conv;
  WinogradChoice winograd;

  Tensor input;      // (T, B, Cin, H, W)
  Tensor h_0, c_0;   // (B, C, Ho, Wo)
  Tensor weight_ih;  // (4 * C, Cin / groups, kh, kw)
  Tensor weight_hh;  // (4 * C, C / groups, rh, rw)
  Tensor bias;       // (4 * C)
  Tensor peephole;   // (3, C) or (3, C, Ho, Wo)
  Tensor step_flags; // (T, B), bytes
  Tensor output;     // (T, B, C, Ho, Wo)
  // Contiguous (T, B, Ho, Wo, 4 * C): a pixel's gates as [group][gate][channel of the group], after the activation, but
  // before the clamp of a hard sigmoid.
  void *gates;
  // Contiguous (T, B, Ho, Wo, C): c after each step, in `dtype`; with peepholes, which read it, in the type of c_0.
  void *cells;
};

struct ConvLSTM2dForward : ConvLSTM2dCall {
  Save save;
  Tensor h_n, c_n; // (B, C, Ho, Wo)
};

struct ConvLSTM2dBackward : ConvLSTM2dCall {
  Tensor grad_output, grad_h_n, grad_c_n; // given, or null
  // Wanted, or null. Like the forward's arguments; weights, bias and peephole contiguous.
  Tensor grad_input, grad_h_0, grad_c_0, grad_weight_ih, grad_weight_hh, grad_bias, grad_peephole;
};

FC_DECLARE(void conv_lstm2d_forward(const ConvLSTM2dForward &call))
FC_DECLARE(void conv_lstm2d_backward(const ConvLSTM2dBackward &call))

} // namespace fused_convlstm
