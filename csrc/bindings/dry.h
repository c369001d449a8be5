// A dry run: the loops of csrc/run over tensors of torch's device "meta", which have no memory. Kernels do nothing with
// them, and an allocator counts the bytes that tensors anywhere else would take.
#pragma once
#include <pybind11/pybind11.h>

namespace pyglow::bindings {

bool stands_for_gpu();  // this thread's dry run
void define_dry(pybind11::module& m);

}  // namespace pyglow::bindings
