// Whether tensors and the modules around them are what they were: see pyglow_fast/layers/kept_values.py.
#pragma once
#include <torch/csrc/utils/pybind.h>

namespace pyglow::bindings {

void define_kept(pybind11::module& m);

}  // namespace pyglow::bindings
