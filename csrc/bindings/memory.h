// Memory of large CPU outputs. It is taken back when a tensor dies and given to the next of about its size: fresh pages
// cost more than what most ops do with them, and malloc by default returns large blocks to the system at once.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>
#include <c10/core/TensorOptions.h>

#include <cstddef>

namespace pyglow::bindings {

constexpr std::size_t least_reused = std::size_t(1) << 17;  // bytes; malloc keeps what is smaller by itself
constexpr std::size_t most_idle = std::size_t(1) << 26;     // bytes that wait for another use, at most

// As at::empty, which it is where the tensor is small or not on the CPU.
at::Tensor empty_reused(at::IntArrayRef sizes, const at::TensorOptions& options,
                        at::MemoryFormat format = at::MemoryFormat::Contiguous);

// Bytes that wait for another use, and their return to malloc.
std::size_t idle_bytes();
void release_idle();

}  // namespace pyglow::bindings
