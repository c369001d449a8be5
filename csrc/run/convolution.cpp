#include "run/convolution.h"

#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

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

}  // namespace pyglow::run
