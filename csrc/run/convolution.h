// The library's convolutions of a net. For tensors of a dry run they allocate the output and compute nothing.
#pragma once
#include "run/net.h"

namespace pyglow::run {

// The arguments of a convolution that keeps the size.
struct Window {
  std::vector<int64_t> ones, sides, dilation, zeros;

  Window(const NetForm& form, std::size_t layer, const Tensor& weight) {
    const auto dims = static_cast<std::size_t>(weight.dim() - 2);
    ones.assign(dims, 1);
    zeros.assign(dims, 0);
    for (std::size_t i = 0; i < dims; ++i) {
      dilation.push_back(form.dilations[layer * dims + i]);
      sides.push_back(dilation[i] * (weight.size(static_cast<int64_t>(i) + 2) / 2));
    }
  }
};

Tensor convolution(const Tensor& h, const Tensor& weight, const Tensor& bias, const Window& window);
std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& h, const Tensor& weight,
                                                        const Window& window, const std::array<bool, 3>& mask);

}  // namespace pyglow::run
