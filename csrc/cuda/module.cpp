// Python binding: parameter blocks with settable fields, addresses as integers, and one function a launcher. Needs
// neither torch nor CUDA headers.
#include <pybind11/pybind11.h>

#include "params.h"

#ifdef FUSED_CONVLSTM_HOST_SHIM
#include "host_shim/bindings.h"
#endif

namespace py = pybind11;

namespace fused_convlstm {

struct MathHalf;
struct MathBfloat16;
struct MathTf32;
struct MathFloat;

namespace {

template <class Class, class Owner, class Field> void field(Class &c, const char *name, Field Owner::*member) {
  if constexpr (std::is_pointer_v<Field>) {
    c.def_property(
        name, [member](const Owner &o) { return reinterpret_cast<uintptr_t>(o.*member); },
        [member](Owner &o, uintptr_t address) { o.*member = reinterpret_cast<Field>(address); });
  } else {
    c.def_readwrite(name, member);
  }
}

// Calls f with a value of the launchers' type for this number format.
template <template <class> class Launchers, class F> void dispatch(int number, F f) {
  switch (static_cast<Number>(number)) {
  case Number::half:
    return f(Launchers<MathHalf>{});
  case Number::bfloat16:
    return f(Launchers<MathBfloat16>{});
  case Number::tf32:
    return f(Launchers<MathTf32>{});
  case Number::float32:
    return f(Launchers<MathFloat>{});
  }
  throw py::value_error("number: expected 0 to 3, got " + std::to_string(number));
}

#define FIELD(name) field(c, #name, &Params::name)

void bind_parameters(py::module_ &m) {
  {
    using Params = Group;
    py::class_<Params> c(m, "Group", py::module_local());
    FIELD(counters);
  }
  {
    using Params = Gather;
    py::class_<Params> c(m, "Gather", py::module_local());
    c.def(py::init([] { return Params{}; }));
    FIELD(frames), FIELD(step_stride), FIELD(image_stride), FIELD(height), FIELD(width), FIELD(chunks);
    FIELD(kernel_h), FIELD(kernel_w), FIELD(stride_h), FIELD(stride_w), FIELD(dilation_h), FIELD(dilation_w);
    FIELD(pad_top), FIELD(pad_left);
  }
  {
    using Params = Sequence;
    py::class_<Params> c(m, "Sequence", py::module_local());
    c.def(py::init([] { return Params{}; }));
    FIELD(device), FIELD(stream), FIELD(steps), FIELD(batch), FIELD(channels), FIELD(height), FIELD(width);
    FIELD(reverse), FIELD(gate_activation), FIELD(tile), FIELD(peephole), FIELD(c_0), FIELD(source);
  }
  {
    using Params = ConvLSTMForward;
    py::class_<Params> c(m, "ConvLSTMForward", py::module_local());
    c.def(py::init([] { return Params{}; }));
    FIELD(s), FIELD(input), FIELD(hidden), FIELD(h_0), FIELD(weight), FIELD(columns), FIELD(bias), FIELD(gates);
    FIELD(gates_first), FIELD(store_gates), FIELD(group), FIELD(c), FIELD(cells);
  }
  {
    using Params = ConvLSTMBackward;
    py::class_<Params> c(m, "ConvLSTMBackward", py::module_local());
    c.def(py::init([] { return Params{}; }));
    FIELD(s), FIELD(grad), FIELD(grad_first), FIELD(weight), FIELD(columns), FIELD(sink), FIELD(gates);
    FIELD(gates_first), FIELD(group), FIELD(cells), FIELD(grad_output), FIELD(grad_output_first);
    FIELD(grad_output_step_stride), FIELD(grad_output_image_stride), FIELD(grad_h_n), FIELD(grad_c);
    FIELD(grad_h_0);
  }
}

void bind_pooled_gate_parameters(py::module_ &m) {
  {
    using Params = PooledGateForward;
    py::class_<Params> c(m, "PooledGateForward", py::module_local());
    c.def(py::init([] { return Params{}; }));
    FIELD(s), FIELD(hidden), FIELD(h_0), FIELD(gate_part), FIELD(gate_weight), FIELD(depthwise), FIELD(weight);
    FIELD(columns), FIELD(candidate), FIELD(store_candidate), FIELD(gates), FIELD(gates_step_stride), FIELD(c);
    FIELD(cells), FIELD(partial), FIELD(counters);
  }
  {
    using Params = PooledGateBackward;
    py::class_<Params> c(m, "PooledGateBackward", py::module_local());
    c.def(py::init([] { return Params{}; }));
    FIELD(s), FIELD(hidden), FIELD(gate_weight), FIELD(depthwise), FIELD(weight), FIELD(columns), FIELD(sink);
    FIELD(candidate), FIELD(gates), FIELD(cells), FIELD(grad_output), FIELD(grad_output_step_stride);
    FIELD(grad_output_image_stride), FIELD(grad_h_n), FIELD(grad_c), FIELD(grad_h_0), FIELD(grad_candidate);
    FIELD(grad_gates), FIELD(partial), FIELD(grad_pooled), FIELD(counters);
  }
}

// A launch waits while the stream's queue is full; other Python threads go on.
using WithoutGil = py::call_guard<py::gil_scoped_release>;

void bind_pooled_gate(py::module_ &m) {
  m.attr("group_blocks") = GROUP_BLOCKS;
  m.def(
      "pooled_gate_forward",
      [](int number, const PooledGateForward &p) {
        dispatch<PooledGateLaunchers>(number, [&](auto l) { l.forward(p); });
      },
      WithoutGil(), "Runs the whole sequence in one launch.");
  m.def(
      "pooled_gate_backward",
      [](int number, const PooledGateBackward &p) {
        dispatch<PooledGateLaunchers>(number, [&](auto l) { l.backward(p); });
      },
      WithoutGil(), "Runs the backward of the whole sequence in one launch.");
  m.def(
      "pooled_gate_shared_bytes",
      [](int number, int channels) {
        int64_t bytes = 0;
        dispatch<PooledGateLaunchers>(number, [&](auto l) { bytes = l.shared_bytes(channels); });
        return bytes;
      },
      "Shared memory that a block needs.");
  m.def("shared_bytes_per_block", &PooledGateLaunchers<MathHalf>::device_shared_bytes,
        "Shared memory that it may have; raises RuntimeError if the device cannot run the kernels.");
}

void bind_conv_lstm(py::module_ &m) {
  m.def(
      "conv_lstm_forward",
      [](int number, const ConvLSTMForward &p) { dispatch<ConvLSTMLaunchers>(number, [&](auto l) { l.forward(p); }); },
      WithoutGil(), "Runs the whole sequence.");
  m.def(
      "conv_lstm_gates",
      [](int number, const ConvLSTMForward &p, int first_step, int step_count) {
        dispatch<ConvLSTMLaunchers>(number, [&](auto l) { l.gates(p, first_step, step_count); });
      },
      WithoutGil(), "Computes the gates of these steps at once, from the h and c of all steps.");
  m.def(
      "conv_lstm_backward",
      [](int number, const ConvLSTMBackward &p, int first_step, int step_count) {
        dispatch<ConvLSTMLaunchers>(number, [&](auto l) { l.backward(p, first_step, step_count); });
      },
      WithoutGil(),
      "Runs the backward of steps [first_step, first_step + step_count), against the order of the sequence.");
  m.def(
      "conv_lstm_backward_initial",
      [](int number, const ConvLSTMBackward &p) { dispatch<ConvLSTMLaunchers>(number, [&](auto l) { l.initial(p); }); },
      WithoutGil(), "Computes the gradient of h_0.");
}

} // namespace

} // namespace fused_convlstm

PYBIND11_MODULE(FCL_MODULE_NAME, m) {
  fused_convlstm::bind_parameters(m);
  fused_convlstm::bind_conv_lstm(m);
  fused_convlstm::bind_pooled_gate_parameters(m);
  fused_convlstm::bind_pooled_gate(m);
  m.attr("SOURCES") = FCL_SOURCES;
  m.attr("architectures") = FCL_ARCHITECTURES;
#ifdef FUSED_CONVLSTM_HOST_SHIM
  fused_convlstm::host::bind_settings(m);
#endif
}
