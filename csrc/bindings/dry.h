// A dry run: the loops of csrc/run over tensors of torch's device "meta", which have no memory. Kernels do nothing with
// them, and an allocator counts the bytes that tensors anywhere else would take.
#pragma once
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

namespace pyglow::bindings {

bool stands_for_gpu();  // this thread's dry run

// What torch's convolution of x and its backward take besides on a CPU, to be held meanwhile: operands laid out in
// blocks of 16 channels or, where numbers are of 64 bits or the image is small, what each tap reads. On a GPU nothing
// is known.
at::Tensor convolution_scratch(const at::Tensor& x, int64_t outputs, int64_t taps);
void define_dry(pybind11::module& m);
void define_run(pybind11::module& m);  // the run's entries

}  // namespace pyglow::bindings
