// The extension module fused_convlstm._cpu. Tensors come as raw pointers and sizes: nothing of torch is needed to
// build.
#include <string>

#include "bindings.h"
#include "isa.h"

namespace py = pybind11;
using namespace fused_convlstm;

namespace {

py::list names(bool (*which)(Isa)) {
  py::list result;
  for (int k = 0; k < kIsaCount; ++k) {
    if (which(Isa(k)))
      result.append(isa_name(Isa(k)));
  }
  return result;
}

void select_by_name(const std::string &name) {
  for (int k = 0; k < kIsaCount; ++k) {
    if (name == isa_name(Isa(k))) {
      if (select_isa(Isa(k)))
        return;
      throw py::value_error("instruction set '" + name + "' is not " +
                            (isa_compiled(Isa(k)) ? "supported by this machine" : "part of this build"));
    }
  }
  throw py::value_error("unknown instruction set '" + name + "'; choose one of portable, avx2, avx512, avx512_bf16");
}

} // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ kernels for CPUs. Use through fused_convlstm.backends.";
  m.def("compiled_instruction_sets", [] { return names(isa_compiled); });
  m.def("detected_instruction_sets", [] { return names(isa_detected); });
  m.def("instruction_set", [] { return isa_name(current_isa()); }, "The one in use.");
  m.def("select_instruction_set", select_by_name, py::arg("name"), "Uses another one from now on, for tests.");
  m.attr("SOURCES") = FC_SOURCES;
  bind_conv_lstm2d(m);
  bind_pooled_gate(m);
}
