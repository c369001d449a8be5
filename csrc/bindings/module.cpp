// The Python module: what it was built from and for, and the ops.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <map>
#include <string>

#include "bindings/memory.h"
#include "bindings/ops.h"
#include "core.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

// Facts of the build only: no device is touched and the processor is not looked at.
std::map<std::string, std::string> build_info() {
  return {
      {"version", PYGLOW_VERSION},
      {"torch", PYGLOW_TORCH_VERSION},
      {"compiler", compiler()},
      {"instruction_sets", PYGLOW_INSTRUCTION_SETS},
      {"parallel", PYGLOW_PARALLEL ? "yes" : "no"},
#ifdef PYGLOW_WITH_CUDA
      {"cuda", PYGLOW_NVCC_VERSION},
      {"cuda_archs", PYGLOW_CUDA_ARCHS},
#else
      {"cuda", ""},
      {"cuda_archs", ""},
#endif
  };
}

// The number of threads that take part in a parallel loop of this module. One although torch has more would mean that
// the OpenMP calls compiled in here did not find torch's runtime.
int parallel_threads() {
  std::atomic<int> threads{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { ++threads; });
  return threads.load();
}

// The number of GPUs that the CUDA runtime linked into the module sees; an error, in words, where it finds no driver.
int cuda_device_count() {
#ifdef PYGLOW_WITH_CUDA
  int count = 0;
  const int error = pyglow::cuda::device_count(&count);
  TORCH_CHECK(error == 0, "CUDA: ", pyglow::cuda::error_string(error));
  return count;
#else
  TORCH_CHECK(false, "CUDA: pyglow_fast was built without its CUDA kernels (no nvcc was found, or PYGLOW_CUDA=0)");
#endif
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled kernels of pyglow_fast.";
  m.def("build_info", &build_info, "What the module was built with, as strings.");
  m.def("instruction_set", &pyglow::cpu::instruction_set, "The CPU kernels in use: portable, avx2 or avx512.");
  m.def("parallel_threads", &parallel_threads, "The threads that share a loop of the CPU kernels.");
  m.def("idle_bytes", &pyglow::bindings::idle_bytes, "Bytes of large CPU outputs that wait for another use.");
  m.def("release_idle", &pyglow::bindings::release_idle, "Return those bytes to malloc.");
  m.def("cuda_device_count", &cuda_device_count, "The GPUs that the CUDA kernels can run on.");
  pyglow::bindings::register_step_ops(m);
  pyglow::bindings::register_fused_ops(m);
  pyglow::bindings::register_net_ops(m);
  pyglow::bindings::register_statistics_ops(m);
}
