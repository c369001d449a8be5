// The run's entry in the Python module.
#pragma once
#include <pybind11/pybind11.h>

namespace pyglow::bindings {

void define_run(pybind11::module& m);

}  // namespace pyglow::bindings
