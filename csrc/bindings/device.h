// Running a kernel where its tensors are. Nothing here names a CUDA header of torch, so one module serves CPU-only and
// CUDA builds of torch.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "core.h"

namespace pyglow::bindings {

// torch's own threads: no second pool, and torch.set_num_threads is honoured.
inline cpu::Threads torch_threads() {
  return {[](int64_t tasks, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
    at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  }};
}

// Makes the device of x current and finds its stream.
class CudaScope {
 public:
  explicit CudaScope(const at::Tensor& x) : guard_(x.device()) {
#ifndef PYGLOW_WITH_CUDA
    TORCH_CHECK(false, "CUDA: pyglow_fast was built without its CUDA kernels; rebuild with nvcc (see the README)");
#endif
    const c10::impl::VirtualGuardImpl guard(x.device().type());
    stream_ = guard.getStream(x.device()).native_handle();
  }
  void* stream() const { return stream_; }

  // Device memory from torch's allocator: safe to drop after the launch, since the allocator orders reuse by stream.
  static at::Tensor scratch(const at::Tensor& x, int64_t bytes) {
    return at::empty({bytes}, x.options().dtype(at::kByte));
  }

  static void check(int error) {
#ifdef PYGLOW_WITH_CUDA
    TORCH_CHECK(error == 0, "CUDA: kernel launch failed: ", cuda::error_string(error));
#else
    (void)error;
#endif
  }

 private:
  c10::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace pyglow::bindings
