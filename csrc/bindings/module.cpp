// The Python module: what it was built from and for, and the kernels of torch's ops, registered when it is loaded.
// Schemas and shape functions are in pyglow_fast/functional/ops.py.
#include <ATen/ops/empty_like.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/checks.h"
#include "bindings/device.h"
#include "bindings/dry.h"
#include "bindings/ops.h"
#include "core.h"

namespace pyglow::bindings {
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

// The place of a name, which is its enumerator.
template <class E, std::size_t Count>
E enumerator(const char* const (&names)[Count], const std::string& name) {
  const auto found = std::find(std::begin(names), std::end(names), name);
  TORCH_CHECK_VALUE(found != std::end(names), "name: expected one of ", c10::ArrayRef<const char*>(names), ", found ",
                    name);
  return static_cast<E>(found - std::begin(names));
}

at::Tensor checked_array(const char* name, const at::Tensor& x) {
  check_dtype(name, x);
  TORCH_CHECK_VALUE(x.is_cpu(), name, ": expected a CPU tensor, found device ", x.device());
  return x.contiguous();
}

// A vector function of the CPU kernels on an array.
at::Tensor elementary(const std::string& name, const at::Tensor& x_in) {
  static const char* const names[] = {"exp", "log", "log1p_unit", "tanh", "atan", "expm1_negative", "erf", "erfc"};
  const auto function = enumerator<Elementary>(names, name);
  const at::Tensor x = checked_array("x", x_in);
  at::Tensor y = at::empty_like(x);
  with_dtype(x, [&]<class T>(T) {
    const ElementaryArgs<T> args{
        .function = function, .x = x.const_data_ptr<T>(), .y = y.mutable_data_ptr<T>(), .count = x.numel()};
    cpu::elementary(args, torch_threads());
  });
  return y;
}

// An activation of the CPU kernels on an array or, with a gradient, its backward from what is kept of it.
at::Tensor activation(const std::string& name, const at::Tensor& x_in, double parameter,
                      const std::optional<at::Tensor>& grad_in) {
  static const char* const names[] = {"none",      "relu", "leaky_relu", "silu",   "gelu",
                                      "gelu_tanh", "elu",  "tanh",       "sigmoid"};
  const auto kind = enumerator<Activation>(names, name);
  const at::Tensor x = checked_array("x", x_in), grad = grad_in ? checked_array("grad", *grad_in) : at::Tensor();
  if (grad_in) {
    check_shape("grad", grad, x.sizes());
    check_like("grad", grad, "x", x);
  }
  at::Tensor y = at::empty_like(x);
  with_dtype(x, [&]<class T>(T) {
    const ActivationArgs<T> args{.kind = kind,
                                 .parameter = static_cast<T>(parameter),
                                 .x = x.const_data_ptr<T>(),
                                 .grad = grad_in ? grad.const_data_ptr<T>() : nullptr,
                                 .y = y.mutable_data_ptr<T>(),
                                 .count = x.numel()};
    cpu::activation(args, torch_threads());
  });
  return y;
}

// Not by TORCH_LIBRARY_IMPL, which registers as the module is loaded: a schema of pyglow_fast/functional/ops.py that is
// not that of a kernel would end the process there, and the module may belong to another torch, which nothing has
// checked yet.
void register_kernels() {
  static std::vector<torch::Library> registered;
  if (!registered.empty()) return;
  std::vector<torch::Library> libraries;  // which take their kernels back if one is refused
  const auto begin = [&](c10::DispatchKey key) -> torch::Library& {
    torch::Library& m = libraries.emplace_back(torch::Library::IMPL, "pyglow_fast", key, __FILE__, __LINE__);
    register_spline_ops(m);
    register_step_ops(m);
    register_fused_ops(m);
    register_statistics_ops(m);
    register_window_ops(m);
    return m;
  };
  torch::Library& on_cpu = begin(c10::DispatchKey::CPU);
  register_net_ops(on_cpu);
  register_checkerboard_ops(on_cpu);
#ifdef PYGLOW_WITH_CUDA
  begin(c10::DispatchKey::CUDA);
#endif
  registered = std::move(libraries);
}

}  // namespace
}  // namespace pyglow::bindings

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace pyglow::bindings;
  m.doc() = "The compiled kernels of pyglow_fast.";
  m.def("register_kernels", &register_kernels, "Make the kernels those of torch.ops.pyglow_fast; once.");
  m.def("build_info", &build_info, "What the module was built with, as strings.");
  m.def("instruction_set", &pyglow::cpu::instruction_set,
        "The CPU kernels in use: portable, avx2, avx512, avx512_bf16 or amx.");
  m.def("idle_bytes", &pyglow::cpu::idle_bytes, "Bytes of CPU memory that wait for another use.");
  m.def("release_idle", &pyglow::cpu::release_idle, "Return those bytes to the system.");
  m.def(
      "on_launch", [](Told call) { on_launch = std::move(call); },
      "Have each kernel on the CPU told before it runs, or None: for tests of captures.", pybind11::arg("call").none());
  m.def("elementary", &elementary, "A vector function of the CPU kernels, for tests of its error bound.");
  m.def("activation", &activation, "An activation of the CPU kernels, or its backward, for tests of its error bound.",
        pybind11::arg("name"), pybind11::arg("x"), pybind11::arg("parameter"), pybind11::arg("grad") = std::nullopt);
  define_run(m);
  define_dry(m);
}
