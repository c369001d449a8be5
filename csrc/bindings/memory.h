// Memory of large CPU outputs: blocks that are used again (core.h).
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>
#include <c10/core/TensorOptions.h>

namespace pyglow::bindings {

// As at::empty, which it is where the tensor is small or not on the CPU.
at::Tensor empty_reused(at::IntArrayRef sizes, const at::TensorOptions& options,
                        at::MemoryFormat format = at::MemoryFormat::Contiguous);

}  // namespace pyglow::bindings
