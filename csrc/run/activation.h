// Activations between a net's layers, as torch's ops compute them where convolutions are the library's.
#pragma once
#include <ATen/ops/elu.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>

#include "math/kinds.h"
#include "run/net.h"

namespace pyglow::run {

// Apply a layer's activation to the output of a convolution.
struct Through {
  Activation kind;
  double parameter;

  bool is_relu() const { return kind == Activation::relu || (kind == Activation::leaky_relu && parameter == 0); }
  // Its derivative takes the argument, not the value.
  bool keeps_argument() const {
    return kind == Activation::silu || kind == Activation::gelu || kind == Activation::gelu_tanh;
  }

  Tensor value(Tensor h) const {
    switch (kind) {
      case Activation::none:
        return h;
      case Activation::relu:
        return h.relu_();
      case Activation::leaky_relu:
        return at::leaky_relu_(h, parameter);
      case Activation::silu:
        return at::silu(h);
      case Activation::gelu:
        return at::gelu(h, "none");
      case Activation::gelu_tanh:
        return at::gelu(h, "tanh");
      case Activation::elu:
        return at::elu_(h, parameter);
      case Activation::tanh:
        return h.tanh_();
      case Activation::sigmoid:
        return h.sigmoid_();
    }
    TORCH_INTERNAL_ASSERT(false, "no such activation");
  }

  // The gradient before it, from the one behind it, which a relu writes over; `kept` is the value or the argument.
  Tensor gradient(Tensor grad, const Tensor& kept) const {
    if (is_relu()) {
      at::threshold_backward_out(grad, grad, kept, 0);
      return grad;
    }
    switch (kind) {
      case Activation::leaky_relu:
        return at::leaky_relu_backward(grad, kept, parameter, true);
      case Activation::silu:
        return at::silu_backward(grad, kept);
      case Activation::gelu:
        return at::gelu_backward(grad, kept, "none");
      case Activation::gelu_tanh:
        return at::gelu_backward(grad, kept, "tanh");
      case Activation::elu:
        return at::elu_backward(grad, parameter, 1, 1, true, kept);
      case Activation::tanh:
        return at::tanh_backward(grad, kept);
      case Activation::sigmoid:
        return at::sigmoid_backward(grad, kept);
      default:
        return grad;
    }
  }
};

inline Through through(const NetForm& form, std::size_t layer) {
  return {static_cast<Activation>(form.activations[layer]), form.parameters[layer]};
}

}  // namespace pyglow::run
