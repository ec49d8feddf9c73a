// What the host build offers besides the launchers: the schedule, the pretended device, and the shim's own tests.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_convlstm::host {

void bind_settings(pybind11::module_ &m);

} // namespace fused_convlstm::host
