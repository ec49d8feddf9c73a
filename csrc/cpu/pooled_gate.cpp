// Python's side of the pooled-gate ConvLSTM: arguments by name, tensors as None or (address, stride, ...).
#include "pooled_gate.h"
#include "bindings.h"
#include "pages.h"

#include <algorithm>
#include <array>
#include <vector>

namespace py = pybind11;

namespace fused_convlstm {

namespace {

struct Arguments {
  const py::kwargs &values;

  py::handle operator[](const char *name) const { return values[name]; }
  template <class X> X get(const char *name) const { return values[name].cast<X>(); }

  // A tensor (T, B, C, H, W), or (B, C, H, W).
  Frames frames(const char *name) const {
    Frames frames{};
    if (values[name].is_none())
      return frames;
    const auto view = get<std::vector<int64_t>>(name);
    const size_t n = view.size();
    frames.data = reinterpret_cast<void *>(view[0]);
    frames.step = n == 6 ? view[1] : 0;
    frames.sample = view[n - 4];
    frames.channel = view[n - 3];
    frames.row = view[n - 2];
    frames.column = view[n - 1];
    return frames;
  }
  // A contiguous tensor.
  void *data(const char *name) const {
    return values[name].is_none() ? nullptr : reinterpret_cast<void *>(get<py::tuple>(name)[0].cast<uintptr_t>());
  }
};

PooledGateProblem problem_of(const Arguments &a) {
  const auto input = a.get<std::array<int64_t, 5>>("input_shape"); // T, B, Cin, H, W
  const auto state = a.get<std::array<int64_t, 3>>("state_shape"); // C, Ho, Wo
  const auto kernel = a.get<std::array<int64_t, 2>>("kernel_size"), stride = a.get<std::array<int64_t, 2>>("stride"),
             dilation = a.get<std::array<int64_t, 2>>("dilation"),
             recurrent_kernel = a.get<std::array<int64_t, 2>>("recurrent_kernel_size"),
             recurrent_dilation = a.get<std::array<int64_t, 2>>("recurrent_dilation");
  const auto padding = a.get<std::array<int64_t, 4>>("padding"),
             recurrent_padding = a.get<std::array<int64_t, 4>>("recurrent_padding");
  PooledGateProblem p{};
  p.steps = input[0];
  p.batch = input[1];
  p.input = {input[2],  input[3],    input[4],    state[1],   state[2],   kernel[0],  kernel[1], stride[0],
             stride[1], dilation[0], dilation[1], padding[0], padding[1], padding[2], padding[3]};
  p.recurrent = {state[0],
                 state[1],
                 state[2],
                 state[1],
                 state[2],
                 recurrent_kernel[0],
                 recurrent_kernel[1],
                 1,
                 1,
                 recurrent_dilation[0],
                 recurrent_dilation[1],
                 recurrent_padding[0],
                 recurrent_padding[1],
                 recurrent_padding[2],
                 recurrent_padding[3]};
  p.padding = PaddingMode(a.get<int>("padding_mode"));
  p.activation = Activation(a.get<int>("gate_activation"));
  p.reverse = a.get<bool>("reverse");
  p.step_flags = static_cast<const uint8_t *>(a.data("step_flags"));
  p.x = a.frames("input");
  p.h_0 = a.frames("h_0");
  p.c_0 = a.frames("c_0");
  p.gate_weight_ih = a.data("gate_weight_ih");
  p.gate_weight_hh = a.data("gate_weight_hh");
  p.gate_bias = a.data("gate_bias");
  p.depthwise_ih = a.data("depthwise_ih");
  p.depthwise_hh = a.data("depthwise_hh");
  p.pointwise_ih = a.data("pointwise_ih");
  p.pointwise_hh = a.data("pointwise_hh");
  p.bias = a.data("bias");
  return p;
}

int threads_of(const Arguments &a) { return std::clamp(a.get<int>("threads"), 1, kMaxThreads); }

size_t element_size(DType type) { return type == DType::float32 ? 4 : type == DType::bfloat16 ? 2 : 8; }

// Bytes of a tensor (T, B, ...) of images of the convolution's output.
size_t image_bytes(const PooledGateProblem &p, const DepthwiseShape &shape, size_t element) {
  return size_t(p.steps * p.batch * shape.channels) * size_t(shape.out_height * shape.out_width) * element;
}

void dispatch_forward(const PooledGateForward &call, DType type, int threads) {
  FC_DISPATCH(pooled_gate_forward(call, type, threads))
}

void dispatch_backward(const PooledGateBackward &call, DType type, int threads) {
  FC_DISPATCH(pooled_gate_backward(call, type, threads))
}

void forward(const py::kwargs &kwargs) {
  const Arguments a{kwargs};
  PooledGateForward call{};
  call.problem = problem_of(a);
  call.output = a.frames("output");
  call.h_n = a.frames("h_n");
  call.c_n = a.frames("c_n");
  call.gates = a.data("gates");
  call.candidate = a.data("candidate");
  call.cells = a.data("cells");
  const auto type = DType(a.get<int>("dtype"));
  const int threads = threads_of(a);
  const py::gil_scoped_release release;
  prefer_large_pages(call.output.data, image_bytes(call.problem, call.problem.recurrent, element_size(type)));
  if (call.candidate)
    prefer_large_pages(call.candidate, image_bytes(call.problem, call.problem.recurrent, element_size(type)));
  if (call.cells)
    prefer_large_pages(call.cells, image_bytes(call.problem, call.problem.recurrent, element_size(type)));
  dispatch_forward(call, type, threads);
}

void backward(const py::kwargs &kwargs) {
  const Arguments a{kwargs};
  PooledGateBackward call{};
  call.problem = problem_of(a);
  call.output = a.frames("output");
  call.gates = a.data("gates");
  call.candidate = a.data("candidate");
  call.cells = a.data("cells");
  call.grad_output = a.frames("grad_output");
  call.grad_h_n = a.frames("grad_h_n");
  call.grad_c_n = a.frames("grad_c_n");
  call.grad_x = a.frames("grad_input");
  call.grad_h_0 = a.frames("grad_h_0");
  call.grad_c_0 = a.frames("grad_c_0");
  call.grad_depthwise_ih = a.data("grad_depthwise_ih");
  call.grad_depthwise_hh = a.data("grad_depthwise_hh");
  call.grad_pointwise_ih = a.data("grad_pointwise_ih");
  call.grad_pointwise_hh = a.data("grad_pointwise_hh");
  call.grad_bias = a.data("grad_bias");
  call.grad_gates = a.data("grad_gates");
  call.pooled_x = a.data("pooled_x");
  call.pooled_h = a.data("pooled_h");
  const auto type = DType(a.get<int>("dtype"));
  const int threads = threads_of(a);
  const py::gil_scoped_release release;
  dispatch_backward(call, type, threads);
}

} // namespace

void bind_pooled_gate(py::module_ &m) {
  m.def("pooled_gate_forward", forward, "Arguments by name: see backends/cpu/pooled_gate.py.");
  m.def("pooled_gate_backward", backward, "Arguments by name: see backends/cpu/pooled_gate.py.");
}

} // namespace fused_convlstm
