// Running a kernel where its tensors are. Nothing here names a CUDA header of torch, so one module serves CPU-only and
// CUDA builds of torch.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstddef>
#include <functional>

#include "core.h"

namespace pyglow::bindings {

// torch's own threads: no second pool, and torch.set_num_threads is honoured.
inline cpu::Threads torch_threads() {
  return {[](int64_t tasks, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
    at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  }};
}

// Told of each kernel that runs on the CPU, with what runs it again on the same memory, as a CUDA graph would: for
// tests of captures, whose recordings see torch's operations alone. It changes only while no kernel runs, and is never
// destroyed, since it may hold an object of Python's.
using Told = std::function<void(const std::function<void()>&)>;
inline Told& on_launch = *new Told;

// call() runs a kernel; what its arguments point to, but tensors, it holds.
template <class F>
void launch_on_cpu(const F& call) {
  if (on_launch) on_launch(call);
  call();
}

#ifdef PYGLOW_WITH_CUDA
// The device of x made current, its stream, and memory of torch's allocator: safe to drop after the launch, since the
// allocator orders reuse by stream.
class CudaScope {
 public:
  explicit CudaScope(const at::Tensor& x) : guard_(x.device()), options_(x.options().dtype(at::kByte)) {
    const c10::impl::VirtualGuardImpl guard(x.device().type());
    stream_ = guard.getStream(x.device()).native_handle();
  }
  cuda::Queue queue() { return {.stream = stream_, .allocate = &allocate, .context = this}; }

 private:
  static void* allocate(int64_t bytes, void* context) {
    CudaScope& scope = *static_cast<CudaScope*>(context);
    TORCH_INTERNAL_ASSERT(!scope.scratch_.defined());  // one piece a call: a second would free the first
    scope.scratch_ = at::empty({bytes}, scope.options_);
    return scope.scratch_.mutable_data_ptr();
  }

  c10::DeviceGuard guard_;
  at::TensorOptions options_;
  void* stream_ = nullptr;
  at::Tensor scratch_;
};
#endif

// run(x, args): the kernel that takes such args, on the device of x, seen by torch's profiler; nothing in a dry run
// (dry.h). held: what args point to besides tensors.
#ifdef PYGLOW_WITH_CUDA
#define PYGLOW_RUN_ELSEWHERE(kernel)                   \
  CudaScope scope(x);                                  \
  const int error = cuda::kernel(args, scope.queue()); \
  TORCH_CHECK(error == 0, "CUDA: kernel launch failed: ", cuda::error_string(error));
#else
#define PYGLOW_RUN_ELSEWHERE(kernel) TORCH_INTERNAL_ASSERT(false, "registered for CPU tensors alone");
#endif
#define PYGLOW_RUN(kernel, Args)                                                                \
  template <class T, class Held = std::nullptr_t>                                               \
  void run(const at::Tensor& x, const Args<T>& args, const Held& held = {}) {                   \
    if (x.is_meta()) return;                                                                    \
    RECORD_FUNCTION("pyglow_fast::" #kernel, {});                                               \
    if (x.is_cpu()) return launch_on_cpu([args, held] { cpu::kernel(args, torch_threads()); }); \
    PYGLOW_RUN_ELSEWHERE(kernel)                                                                \
  }
PYGLOW_KERNELS(PYGLOW_RUN)
#undef PYGLOW_RUN
#undef PYGLOW_RUN_ELSEWHERE

}  // namespace pyglow::bindings
