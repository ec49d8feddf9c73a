// Arguments of the launchers: plain data, filled in by module.cpp and read by the kernels as it is.
//
// Shapes: T steps, B images, C hidden channels, Ho x Wo pixels of the state. Inside, channels are innermost, and the
// four gates of a channel are neighbours. A chunk is 16 bytes, the unit of asynchronous copies: where frames are read
// as the operand of a product, each pixel has a whole number of them, the rest filled with zeros.
#pragma once

#include <cstdint>

namespace fused_convlstm {

enum class Number : int { half = 0, bfloat16 = 1, tf32 = 2, float32 = 3 };

// Where a step's state comes from (`source`) or its gradient (`sink`): the number of a step, or one of these.
enum StepCode : int {
  OUTSIDE = -1,  // the initial state; the gradient of the final one
  NOTHING = -2,  // zero, because of a reset
  PAST_END = -3, // the step is none: state and gradient pass it by
};

// A convolution's input, gathered as the left operand of a product.
struct Gather {
  const void *frames;                // (steps, B, height, width, chunks); null: this product is left out
  int64_t step_stride, image_stride; // in bytes
  int height, width, chunks;
  int kernel_h, kernel_w;
  int stride_h, stride_w;
  int dilation_h, dilation_w;
  int pad_top, pad_left;
};

struct Sequence {
  int device;
  uint64_t stream;
  int steps, batch, channels, height, width; // T, B, C, Ho, Wo
  int reverse;
  int gate_activation;
  int tile;             // 0: chosen here; else 1 + the number of the tile
  const void *peephole; // (3, C) or null
  const float *c_0;     // (B, Ho, Wo, C) or null: zeros
  const int *source;    // (T, B) StepCode or null: one step after the other
};

// The blocks that share images in a launch over all steps; set by the launcher but for the counters.
struct Group {
  unsigned *counters;  // scratch: a word an image
  int images, blocks;  // of a group
  int resident_stages; // of the weights, that a block keeps in shared memory
};

struct ConvLSTMForward {
  Sequence s;
  int step;           // first of the steps that one launch computes
  int parallel_steps; // how many: 1, or more where all of h and c are known
  Gather input;       // convolved in the kernel; or null, then `gates` holds its convolution on entry
  Gather hidden;      // h of all steps, written here
  const void *h_0;    // (B, Ho, Wo, hidden.chunks) or null: zeros
  const void *weight; // packed (k chunks of input, then of hidden; columns; 16 bytes)
  int columns;        // of the packed weight
  const void *bias;   // (4 * C) gate-major, with `input`
  void *gates;        // (T - gates_first, B, Ho, Wo, C, 4) or null
  int gates_first;
  int store_gates;
  float *c;    // (B, Ho, Wo, C): that of the step before, updated; null: only the gates are wanted, h and c are known
  void *cells; // (T, B, Ho, Wo, C): c of each step, to be kept or as it was kept, float with peepholes; or null
  Group group;
};

struct ConvLSTMBackward {
  Sequence s;
  int step;           // the first one in time
  int step_count;     // of a launch over many
  Gather grad;        // gradient of the gates before their activations, written here, (.., B, Ho, Wo, chunks)
  int grad_first;     // the step that `grad` begins with
  const void *weight; // packed (k chunks; columns; 16 bytes)
  int columns;
  const int *sink;   // (T + 1, B) StepCode, the last row that of h_0; or null: one step after the other
  const void *gates; // (.., B, Ho, Wo, C, 4)
  int gates_first;
  const void *cells;       // (T, B, Ho, Wo, C), float with peepholes
  const void *grad_output; // (.., B, Ho, Wo, C) or null
  int grad_output_first;
  int64_t grad_output_step_stride, grad_output_image_stride; // in elements
  const void *grad_h_n;                                      // (B, Ho, Wo, C) or null
  float *grad_c; // (B, Ho, Wo, C): on entry that of the step after, on exit of the one before
  Group group;
  void *grad_h_0; // (B, Ho, Wo, C): for step == T alone
};

constexpr int GROUP_BLOCKS = 16; // the most blocks that share an image

struct PooledGateForward {
  Sequence s;
  Gather hidden;           // depthwise convolution over h of all steps, which is written here
  const void *h_0;         // (B, Ho, Wo, hidden.chunks) or null: zeros
  const float *gate_part;  // (T, B, 3 * C): the input's part of the gates, with the bias
  const void *gate_weight; // (3 * C, C)
  const void *depthwise;   // (taps, hidden.chunks)
  const void *weight;      // pointwise, packed (k chunks; columns; 16 bytes)
  int columns;
  void *candidate; // (T, B, Ho, Wo, C): the input's part on entry; the candidate on exit, if it is stored
  int store_candidate;
  float *gates;              // (T, B, 3 * C), or (B, 3 * C) if gates_step_stride is 0
  int64_t gates_step_stride; // in elements
  float *c;                  // (B, Ho, Wo, C): that of the step before, updated
  void *cells;               // (T, B, Ho, Wo, C): c of each step, to be kept; or null
  float *partial;            // scratch: (B, GROUP_BLOCKS, stored channels)
  unsigned *counters;        // scratch: (B,)
  int blocks;                // of a group; set by the launcher
};

struct PooledGateBackward {
  Sequence s;
  Gather hidden;           // transposed depthwise convolution, over scratch frames (2, B, Ho, Wo, chunks)
  const void *gate_weight; // (C, 3 * C), transposed
  const void *depthwise;   // (taps in reverse, hidden.chunks)
  const void *weight;      // pointwise, packed
  int columns;
  const int *sink;                                           // (T + 1, B) StepCode or null
  const void *candidate;                                     // (T, B, Ho, Wo, C)
  const float *gates;                                        // (T, B, 3 * C)
  const void *cells;                                         // (T, B, Ho, Wo, C)
  const void *grad_output;                                   // (T, B, Ho, Wo, C) or null
  int64_t grad_output_step_stride, grad_output_image_stride; // in elements
  const void *grad_h_n;                                      // (B, Ho, Wo, C) or null
  float *grad_c;                                             // (B, Ho, Wo, C): on entry that of c_n, on exit of c_0
  void *grad_h_0;                                            // (B, Ho, Wo, C) or null
  void *grad_candidate;                                      // (T, B, Ho, Wo, C), before the activation
  float *grad_gates;                                         // (T, B, 3 * C), before the activation
  float *partial;                                            // scratch: (B, GROUP_BLOCKS, 3, stored channels)
  float *grad_pooled;                                        // scratch: (B, C)
  unsigned *counters;                                        // scratch: (B,)
  int blocks;
};

// Number formats are instantiated in a source file each.
template <class Math> struct ConvLSTMLaunchers {
  static void forward(ConvLSTMForward p);                               // the whole sequence
  static void gates(ConvLSTMForward p, int first_step, int step_count); // all steps at once
  static void backward(ConvLSTMBackward p, int first_step, int step_count);
  static void initial(ConvLSTMBackward p); // the gradient of h_0
};

template <class Math> struct PooledGateLaunchers {
  static void forward(const PooledGateForward &p);
  static void backward(const PooledGateBackward &p);
  static int64_t shared_bytes(int channels);  // that a block needs
  static int device_shared_bytes(int device); // that a block may have; throws if the device cannot run the kernels
};

} // namespace fused_convlstm
