// The parts of the extension module; each cell binds its own functions.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace fused_convlstm {

void bind_conv_lstm2d(pybind11::module_ &m);
void bind_pooled_gate(pybind11::module_ &m);

} // namespace fused_convlstm
