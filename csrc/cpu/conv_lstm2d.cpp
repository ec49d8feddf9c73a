// Binding of the ConvLSTM kernels: from tuples of integers to the call's description.
#include "conv_lstm2d.h"

#include <string>

#include "bindings.h"
#include "pages.h"

namespace py = pybind11;

namespace fused_convlstm {

namespace {

// A tensor comes as None or (address, stride, ...).
Tensor tensor(const py::handle &object) {
  Tensor result;
  if (object.is_none())
    return result;
  const auto tuple = py::reinterpret_borrow<py::tuple>(object);
  result.data = reinterpret_cast<void *>(tuple[0].cast<uintptr_t>());
  for (size_t k = 1; k < tuple.size(); ++k)
    result.stride[k - 1] = tuple[k].cast<int64_t>();
  return result;
}

void fill(ConvLSTM2dCall &call, const std::vector<int64_t> &sizes, const py::tuple &inputs) {
  const int64_t *n = sizes.data();
  const auto next = [&n] { return *n++; };
  call.steps = next();
  call.batch = next();
  call.in_channels = next();
  call.channels = next();
  call.groups = next();
  call.dtype = DType(next());
  call.activation = Activation(next());
  call.reverse = next() != 0;
  call.pixel_peephole = next() != 0;
  call.threads = int(next());
  const auto mode = PaddingMode(next());
  const auto convolution = [&] {
    ConvolutionShape shape;
    for (int64_t *field :
         {&shape.height, &shape.width, &shape.out_height, &shape.out_width, &shape.kernel_h, &shape.kernel_w,
          &shape.stride_h, &shape.stride_w, &shape.pad_top, &shape.pad_left, &shape.dilation_h, &shape.dilation_w})
      *field = next();
    shape.mode = mode;
    return geometry_of(shape);
  };
  call.input_conv = convolution();
  call.recurrent_conv = convolution();
  for (int *field : {&call.winograd.gates, &call.winograd.to_h, &call.winograd.to_input, &call.winograd.to_weights})
    *field = int(next());
  size_t k = 0;
  for (Tensor *field : {&call.input, &call.h_0, &call.c_0, &call.weight_ih, &call.weight_hh, &call.bias, &call.peephole,
                        &call.step_flags, &call.output})
    *field = tensor(inputs[k++]);
}

void forward(const std::vector<int64_t> &sizes, const py::tuple &inputs, const py::tuple &state, uintptr_t gates,
             uintptr_t cells, int save) {
  ConvLSTM2dForward call;
  fill(call, sizes, inputs);
  call.gates = reinterpret_cast<void *>(gates);
  call.cells = reinterpret_cast<void *>(cells);
  call.save = Save(save);
  call.h_n = tensor(state[0]);
  call.c_n = tensor(state[1]);
  const size_t elements = size_t(call.steps * call.batch * call.channels) * size_t(call.recurrent_conv->out_pixels);
  const size_t bytes = call.dtype == DType::float32 ? 4 : call.dtype == DType::bfloat16 ? 2 : 8;
  prefer_large_pages(call.output.data, elements * bytes);
  if (call.save == Save::gates)
    prefer_large_pages(call.gates, 4 * elements * bytes);
  if (call.save != Save::nothing)
    prefer_large_pages(call.cells, elements * (call.peephole && bytes == 2 ? 4 : bytes));
  const py::gil_scoped_release release;
  FC_DISPATCH(conv_lstm2d_forward(call))
}

void backward(const std::vector<int64_t> &sizes, const py::tuple &inputs, uintptr_t gates, uintptr_t cells,
              const py::tuple &given, const py::tuple &wanted) {
  ConvLSTM2dBackward call;
  fill(call, sizes, inputs);
  call.gates = reinterpret_cast<void *>(gates);
  call.cells = reinterpret_cast<void *>(cells);
  call.grad_output = tensor(given[0]);
  call.grad_h_n = tensor(given[1]);
  call.grad_c_n = tensor(given[2]);
  size_t k = 0;
  for (Tensor *field : {&call.grad_input, &call.grad_h_0, &call.grad_c_0, &call.grad_weight_ih, &call.grad_weight_hh,
                        &call.grad_bias, &call.grad_peephole})
    *field = tensor(wanted[k++]);
  const py::gil_scoped_release release;
  FC_DISPATCH(conv_lstm2d_backward(call))
}

} // namespace

void bind_conv_lstm2d(py::module_ &m) {
  m.def("conv_lstm2d", forward, py::arg("sizes"), py::arg("inputs"), py::arg("state"), py::arg("gates"),
        py::arg("cells"), py::arg("save"));
  m.def("conv_lstm2d_backward", backward, py::arg("sizes"), py::arg("inputs"), py::arg("gates"), py::arg("cells"),
        py::arg("given"), py::arg("wanted"));
}

} // namespace fused_convlstm
