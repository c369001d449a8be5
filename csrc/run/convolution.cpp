#include "run/convolution.h"

#include <ATen/Context.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/cudnn_convolution_relu.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <string>

#include "bindings/dry.h"

namespace pyglow::run {

static Tensor scratch_of(const Tensor& h, const Tensor& weight) {
  return bindings::convolution_scratch(h, weight.size(0), weight.numel() / (weight.size(0) * weight.size(1)));
}

Tensor convolution(const Tensor& h, const Tensor& weight, const Tensor& bias, const Window& window) {
  if (h.is_meta()) {
    const Tensor scratch = scratch_of(h, weight);
    std::vector<int64_t> shape = h.sizes().vec();
    shape[1] = weight.size(0);
    return at::empty(shape, h.options(), h.suggest_memory_format());
  }
  return at::convolution(h, weight, bias, window.ones, window.sides, window.dilation, false, window.zeros, 1);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& h, const Tensor& weight,
                                                        const Window& window, const std::array<bool, 3>& mask) {
  const std::vector<int64_t> bias_sizes{weight.size(0)};
  if (h.is_meta()) {
    const Tensor scratch = scratch_of(h, weight);
    const auto given = [](bool wanted, const Tensor& like) { return wanted ? at::empty_like(like) : Tensor(); };
    return {given(mask[0], h), given(mask[1], weight), mask[2] ? grad.new_empty(bias_sizes) : Tensor()};
  }
  return at::convolution_backward(grad, h, weight, at::OptionalIntArrayRef(bias_sizes), window.ones, window.sides,
                                  window.dilation, false, window.zeros, 1, mask);
}

namespace {

// Whether cuDNN is to compute a convolution and its relu as one. Not where its algorithms are to be deterministic,
// which that op does not see to, nor beyond what it counts with 32 bits.
bool cudnn_fuses(const Tensor& h, const Tensor& weight) {
  const auto& context = at::globalContext();
  const auto dtype = h.scalar_type();
  const bool known = dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16;
  if (!h.is_cuda() || h.dim() != 4 || !known || at::Context::hasHIP()) return false;
  if (!context.userEnabledCuDNN() || !at::Context::hasCuDNN()) return false;
  if (context.deterministicCuDNN() || context.deterministicAlgorithms()) return false;
  const int64_t per_channel = h.numel() / std::max<int64_t>(1, h.size(1));
  return std::max(h.numel(), per_channel * weight.size(0)) <= std::numeric_limits<int32_t>::max();
}

Tensor fused(const Tensor& h, const Tensor& weight, const Tensor& bias, const Window& window) {
  return at::cudnn_convolution_relu(h, weight, bias, window.ones, window.sides, window.dilation, 1);
}

// Whether cuDNN finds an engine for both, and one that is right, which is tried once: the op passes its output's fresh
// memory as an addend, times zero, and an engine that reads it keeps a NaN of whatever was there. So the allocator gets
// an output full of NaN back just before. The host reads what comes of it; a CUDA graph is warmed up first anyway.
bool fuses(const Tensor& h, const Tensor& weight, const Tensor& bias, const Window& window) {
  static std::mutex mutex;
  static std::map<std::string, bool> tried;
  if (!cudnn_fuses(h, weight)) return false;
  std::string key = std::to_string(static_cast<int>(h.scalar_type()));
  for (const auto& sizes : {h.sizes(), weight.sizes(), at::IntArrayRef(window.dilation)})
    for (const int64_t size : sizes) key += "," + std::to_string(size);
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = tried.find(key); found != tried.end()) return found->second;
  try {
    convolution(h, weight, bias, window).fill_(NAN);
    return tried[key] = !fused(h, weight, bias, window).isnan().any().item<bool>();
  } catch (const c10::Error& error) {
    if (std::string(error.what()).find("unable to find an engine") == std::string::npos) throw;
    return tried[key] = false;
  }
}

}  // namespace

Tensor relu_convolution(const Tensor& h, const Tensor& weight, const Tensor& bias, const Window& window) {
  return fuses(h, weight, bias, window) ? fused(h, weight, bias, window) : convolution(h, weight, bias, window).relu_();
}

}  // namespace pyglow::run
