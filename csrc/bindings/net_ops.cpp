// The coupling net as matrix products, on the CPU: checks, and the arguments of its kernels.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bindings/checks.h"
#include "bindings/device.h"
#include "bindings/memory.h"
#include "bindings/ops.h"

namespace pyglow::bindings {
namespace {

using Optional = std::optional<at::Tensor>;

// No recording and no autocast: the products are in the dtype of the tensors.
struct Plain {
  at::AutoDispatchBelowAutograd no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

void check_weight(const char* name, const at::Tensor& weight, at::IntArrayRef shape, const at::Tensor& x) {
  check_shape(name, weight, shape);
  check_like(name, weight, "x", x);
}

// Weights as the kernels read them: checked, contiguous, held for as long as the kernel runs. Biases may be left out.
struct Net {
  int64_t in, hidden1, hidden2, out;
  at::Tensor w1, w2, w3;
  Optional b1, b2, b3, log_gain;
  double leak;

  Net(const at::Tensor& x, const at::Tensor& w1_in, const Optional& b1_in, const at::Tensor& w2_in,
      const Optional& b2_in, const at::Tensor& w3_in, const Optional& b3_in, const Optional& log_gain_in,
      double leak_in)
      : leak(leak_in) {
    check_state("x", x);
    TORCH_CHECK_VALUE(x.is_cpu() && x.dim() == 4, "x: expected CPU images (N, C, H, W), found ", x.sizes(), " on ",
                      x.device());
    TORCH_CHECK_VALUE(w1_in.dim() == 4 && w2_in.dim() == 4 && w3_in.dim() == 4,
                      "w1, w2, w3: expected weights of 2-d convolutions, found ", w1_in.sizes(), ", ", w2_in.sizes(),
                      ", ", w3_in.sizes());
    in = x.size(1), hidden1 = w1_in.size(0), hidden2 = w2_in.size(0), out = w3_in.size(0);
    TORCH_CHECK_VALUE(in > 0 && hidden1 > 0 && hidden2 > 0 && out > 0,
                      "w1, w2, w3: expected at least one channel each way, found ", w1_in.sizes(), ", ", w2_in.sizes(),
                      ", ", w3_in.sizes(), " for x of ", x.sizes());
    check_weight("w1", w1_in, {hidden1, in, 3, 3}, x);
    check_weight("w2", w2_in, {hidden2, hidden1, 1, 1}, x);
    check_weight("w3", w3_in, {out, hidden2, 3, 3}, x);
    if (b1_in) check_weight("b1", *b1_in, {hidden1}, x);
    if (b2_in) check_weight("b2", *b2_in, {hidden2}, x);
    if (b3_in) check_weight("b3", *b3_in, {out}, x);
    if (log_gain_in) {  // of any shape
      TORCH_CHECK_VALUE(log_gain_in->numel() == out, "log_gain: expected ", out, " elements, found ",
                        log_gain_in->sizes());
      check_like("log_gain", *log_gain_in, "x", x);
    }
    TORCH_CHECK_VALUE(0 <= leak && leak <= 1, "leak: expected a slope from 0 to 1, found ", leak);
    w1 = w1_in.contiguous(), w2 = w2_in.contiguous(), w3 = w3_in.contiguous();
    b1 = contiguous(b1_in), b2 = contiguous(b2_in), b3 = contiguous(b3_in), log_gain = contiguous(log_gain_in);
  }

  template <class T>
  NetWeights<T> as() const {
    return {.in = in,
            .hidden1 = hidden1,
            .hidden2 = hidden2,
            .out = out,
            .w1 = w1.const_data_ptr<T>(),
            .b1 = data<T>(b1),
            .w2 = w2.const_data_ptr<T>(),
            .b2 = data<T>(b2),
            .w3 = w3.const_data_ptr<T>(),
            .b3 = data<T>(b3),
            .log_gain = data<T>(log_gain),
            .leak = static_cast<T>(leak)};
  }

 private:
  static Optional contiguous(const Optional& x) { return x ? Optional(x->contiguous()) : Optional(); }
  template <class T>
  static const T* data(const Optional& x) {
    return x ? x->const_data_ptr<T>() : nullptr;
  }
};

template <class T>
Image<const T> image_of(const at::Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}
template <class T>
Image<T> image_of(at::Tensor& x) {
  return {x.mutable_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// net_out (N, C, H, W) and, if kept, both hidden layers.
std::tuple<at::Tensor, at::Tensor, at::Tensor> coupling_net(const at::Tensor& x, const at::Tensor& w1,
                                                            const at::Tensor& b1, const at::Tensor& w2,
                                                            const at::Tensor& b2, const at::Tensor& w3,
                                                            const at::Tensor& b3, const Optional& log_gain, bool keep,
                                                            double leak) {
  const Plain plain;
  const Net net(x, w1, b1, w2, b2, w3, b3, log_gain, leak);
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3);
  at::Tensor y = empty_reused({x.size(0), net.out, x.size(2), x.size(3)}, x.options(), x.suggest_memory_format());
  at::Tensor h1 = empty_reused({keep ? net.hidden1 * pixels : 0}, x.options());
  at::Tensor h2 = empty_reused({keep ? net.hidden2 * pixels : 0}, x.options());
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const CouplingNetArgs<T> args{.x = image_of<T>(x),
                                  .net = net.as<T>(),
                                  .y = image_of<T>(y),
                                  .h1 = keep ? h1.mutable_data_ptr<T>() : nullptr,
                                  .h2 = keep ? h2.mutable_data_ptr<T>() : nullptr,
                                  .samples = x.size(0),
                                  .height = x.size(2),
                                  .width = x.size(3)};
    cpu::coupling_net(args, torch_threads());
  });
  return {y, h1, h2};
}

// Gradients of x, w1, b1, w2, b2, w3, b3 and log_gain (if there is one), given what coupling_net of that leak kept;
// without want_weights that of x alone. b3 is needed beside log_gain only.
std::vector<at::Tensor> coupling_net_backward(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& h1,
                                              const at::Tensor& h2, const at::Tensor& w1, const at::Tensor& w2,
                                              const at::Tensor& w3, const Optional& b3, const Optional& log_gain,
                                              bool want_weights, double leak) {
  const Plain plain;
  const Net net(x, w1, {}, w2, {}, w3, b3, log_gain, leak);
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3);
  check_weight("grad_out", grad_out, {x.size(0), net.out, x.size(2), x.size(3)}, x);
  check_weight("h1", h1, {net.hidden1 * pixels}, x);
  check_weight("h2", h2, {net.hidden2 * pixels}, x);
  TORCH_CHECK_VALUE(!log_gain || b3, "b3: expected a bias beside log_gain, found none");
  std::vector<at::Tensor> grads = {empty_reused(x.sizes(), x.options(), x.suggest_memory_format())};
  if (want_weights) {
    for (const at::Tensor* weight : {&w1, &w2, &w3}) {
      grads.push_back(at::empty(weight->sizes(), x.options()));
      grads.push_back(at::empty({weight->size(0)}, x.options()));
    }
    if (log_gain) grads.push_back(at::empty(log_gain->sizes(), x.options()));
  }
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const auto room = [&](std::size_t i) { return i < grads.size() ? grads[i].mutable_data_ptr<T>() : nullptr; };
    const CouplingNetBackwardArgs<T> args{.grad_y = image_of<T>(grad_out),
                                          .x = image_of<T>(x),
                                          .net = net.as<T>(),
                                          .h1 = h1.const_data_ptr<T>(),
                                          .h2 = h2.const_data_ptr<T>(),
                                          .grad_x = image_of<T>(grads[0]),
                                          .grad_w1 = room(1),
                                          .grad_b1 = room(2),
                                          .grad_w2 = room(3),
                                          .grad_b2 = room(4),
                                          .grad_w3 = room(5),
                                          .grad_b3 = room(6),
                                          .grad_log_gain = room(7),
                                          .samples = x.size(0),
                                          .height = x.size(2),
                                          .width = x.size(3)};
    cpu::coupling_net_backward(args, torch_threads());
  });
  return grads;
}

}  // namespace

void register_net_ops(torch::Library& m) {
  m.impl("coupling_net", &coupling_net);
  m.impl("coupling_net_backward", &coupling_net_backward);
}

}  // namespace pyglow::bindings
