// What the module's entry registers, file by file.
#pragma once
#include <pybind11/pybind11.h>

namespace pyglow::bindings {

using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;

void register_step_ops(pybind11::module_& m);
void register_fused_ops(pybind11::module_& m);
void register_net_ops(pybind11::module_& m);
void register_statistics_ops(pybind11::module_& m);

}  // namespace pyglow::bindings
