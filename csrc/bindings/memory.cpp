#include "bindings/memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/util/Exception.h>

#include "bindings/device.h"
#include "core.h"

namespace pyglow::bindings {
namespace {

class Blocks final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    auto* const block = new cpu::Block(cpu::take_block(static_cast<int64_t>(bytes)));
    void* const data = block->data;
    if (data == nullptr) delete block;
    TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr, "not enough memory: ", bytes, " bytes were asked for");
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, block, &take_back, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }

 private:
  static void take_back(void* context) {
    auto* const block = static_cast<cpu::Block*>(context);
    c10::profiledCPUMemoryReporter().Delete(block->data);
    cpu::give_back(*block);
    delete block;
  }
};

// Never destroyed: tensors may outlive everything static.
Blocks& blocks() {
  static Blocks* const all = new Blocks;
  return *all;
}

}  // namespace

at::Tensor empty_reused(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  const std::size_t element = options.dtype().itemsize();
  const std::size_t bytes = at::detail::computeStorageNbytesContiguous(sizes, element);
  const bool small = bytes < static_cast<std::size_t>(cpu::least_reused);
  if (options.device().type() != c10::kCPU || on_launch) return at::empty(sizes, options, format);  // which all see
  if (small)  // as at::empty, without the dispatcher, which takes longer than the allocation
    return at::Tensor(at::detail::empty_cpu(sizes, c10::typeMetaToScalarType(options.dtype()), false, format));
  return at::Tensor(at::detail::empty_generic(sizes, &blocks(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                              c10::typeMetaToScalarType(options.dtype()), format));
}

}  // namespace pyglow::bindings
