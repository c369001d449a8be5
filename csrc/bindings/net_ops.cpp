// Coupling nets as matrix products, on the CPU: checks, and the arguments of their kernels.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "bindings/checks.h"
#include "bindings/device.h"
#include "bindings/extent.h"
#include "bindings/memory.h"
#include "bindings/ops.h"

namespace pyglow::bindings {
namespace {

// No recording and no autocast: the products are in the dtype of the tensors.
struct Plain {
  at::AutoDispatchBelowAutograd no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// A missing dimension has one element, for which any stride will do.
template <class T>
Image<T> image_of(T* data, const at::Tensor& x) {
  const auto stride = [&](int64_t dim) { return dim < 2 ? 0 : x.stride(dim); };
  const int64_t last = x.dim() - 1;
  return {data, x.stride(0), x.stride(1), stride(last - 2), stride(last - 1), stride(last)};
}
template <class T>
Image<const T> input_image(const at::Tensor& x) {
  return image_of(x.const_data_ptr<T>(), x);
}
template <class T>
Image<T> output_image(at::Tensor& x) {
  return image_of(x.mutable_data_ptr<T>(), x);
}

// Weights as the kernels read them: checked, contiguous, held for as long as the kernel runs.
class Net {
 public:
  Net(const at::Tensor& x, const Optional& cond, at::TensorList weights, at::TensorList biases,
      const Optional& log_gain, const ChainDescription& how)
      : how_(how) {
    check_state("x", x);
    extent_ = x.sizes().slice(2).vec();
    const int64_t dims = x.dim() - 2;
    TORCH_CHECK_VALUE((x.is_cpu() || x.is_meta()) && dims <= 3,
                      "x: expected (N, C, *spatial) on the CPU, up to three dimensions, found ", x.sizes(), " on ",
                      x.device());
    const std::size_t layers = weights.size();
    TORCH_CHECK_VALUE(layers >= 1 && layers <= max_net_layers, "weights: expected 1 to ", max_net_layers,
                      " layers, found ", layers);
    check_chain(how, layers, dims);
    int64_t channels = x.size(1);
    if (cond) {
      std::vector<int64_t> shape = x.sizes().vec();
      shape[1] = cond->dim() > 1 ? cond->size(1) : 1;
      check_shape("cond", *cond, shape);
      check_like("cond", *cond, "x", x);
      channels += shape[1];
    }
    for (std::size_t i = 0; i < layers; ++i) {
      const at::Tensor& weight = weights[i];
      check_like("weights", weight, "x", x);
      TORCH_CHECK_VALUE(weight.dim() == dims + 2 && weight.size(1) == channels && channels > 0 && weight.size(0) > 0,
                        "weights[", i, "]: expected (outputs, ", channels, ") with ", dims,
                        " kernel sizes and at least one channel each way, found ", weight.sizes());
      for (int64_t d = 0; d < dims; ++d)
        TORCH_CHECK_VALUE(weight.size(d + 2) % 2 == 1 && weight.size(d + 2) <= 7, "weights[", i,
                          "]: expected kernel sizes of 1, 3, 5 or 7, found ", weight.sizes());
      channels = weight.size(0);
      weights_.push_back(weight.contiguous());
    }
    TORCH_CHECK_VALUE(biases.empty() || biases.size() == layers, "biases: expected ", layers, ", found ",
                      biases.size());
    for (std::size_t i = 0; i < biases.size(); ++i) {
      check_shape("biases", biases[i], {weights[i].size(0)});
      check_like("biases", biases[i], "x", x);
      biases_.push_back(biases[i].contiguous());
    }
    if (log_gain) {  // of any shape
      TORCH_CHECK_VALUE(log_gain->numel() == channels, "log_gain: expected ", channels, " elements, found ",
                        log_gain->sizes());
      check_like("log_gain", *log_gain, "x", x);
      log_gain_ = log_gain->contiguous();
    }
    TORCH_CHECK_VALUE(!how.half || x.scalar_type() == at::kFloat, "half: expected a net in float32, found ",
                      name_of(x.scalar_type()));
  }

  int64_t out() const { return weights_.back().size(0); }
  const std::vector<at::Tensor>& weights() const { return weights_; }

  template <class T>
  NetChain<T> as(const Optional& last_bias) const {
    NetChain<T> net{};
    net.count = static_cast<int64_t>(weights_.size());
    const int64_t dims = weights_[0].dim() - 2;
    for (int64_t i = 0; i < net.count; ++i) {
      NetLayer<T>& layer = net.layers[i];
      const at::Tensor& weight = weights_[i];
      layer = {.weight = weight.const_data_ptr<T>(),
               .bias = biases_.empty() ? nullptr : biases_[i].const_data_ptr<T>(),
               .in = weight.size(1),
               .out = weight.size(0),
               .window = window_of(extent_, weight.sizes().slice(2), how_.dilations.slice(i * dims, dims)),
               .activation = Activation::none,
               .parameter = 0};
      if (i + 1 == net.count) continue;
      layer.activation = static_cast<Activation>(how_.activations[i]);
      layer.parameter = static_cast<T>(how_.parameters[i]);
    }
    if (last_bias) net.layers[net.count - 1].bias = last_bias->const_data_ptr<T>();
    net.log_gain = log_gain_ ? log_gain_->const_data_ptr<T>() : nullptr;
    net.half = how_.half;
    return net;
  }

 private:
  std::vector<at::Tensor> weights_, biases_;
  Optional log_gain_;
  ChainDescription how_;
  std::vector<int64_t> extent_;  // the spatial sizes of x
};

at::TensorOptions kept_options(const at::Tensor& x, bool half) {
  return half ? x.options().dtype(at::kBFloat16) : x.options();
}

int64_t kept_elements(const Net& net, const at::Tensor& x) {
  int64_t found = 0;
  with_dtype(x, [&](auto zero) { found = net.as<decltype(zero)>({}).kept(extent_of(x.sizes()), x.size(0)); });
  return found;
}

}  // namespace

void check_chain(const ChainDescription& how, std::size_t layers, int64_t dims) {
  TORCH_CHECK_VALUE(how.activations.size() + 1 == layers && how.parameters.size() + 1 == layers,
                    "activations, parameters: expected ", layers - 1, " of each, found ", how.activations.size(),
                    " and ", how.parameters.size());
  TORCH_CHECK_VALUE(how.dilations.size() == layers * static_cast<std::size_t>(dims), "dilations: expected ",
                    layers * static_cast<std::size_t>(dims), " numbers, found ", how.dilations.size());
  for (const int64_t dilation : how.dilations)
    TORCH_CHECK_VALUE(dilation >= 1, "dilations: expected numbers of at least 1, found ", how.dilations);
  for (std::size_t i = 0; i + 1 < layers; ++i) {
    const int64_t kind = how.activations[i];
    const double parameter = how.parameters[i];
    TORCH_CHECK_VALUE(kind >= 0 && kind <= static_cast<int64_t>(Activation::sigmoid),
                      "activations: expected codes from 0 to ", static_cast<int>(Activation::sigmoid), ", found ",
                      kind);
    if (kind == static_cast<int64_t>(Activation::leaky_relu))
      TORCH_CHECK_VALUE(0 <= parameter && parameter <= 1, "parameters: expected a slope from 0 to 1, found ",
                        parameter);
    if (kind == static_cast<int64_t>(Activation::elu))
      TORCH_CHECK_VALUE(0 < parameter && parameter <= std::numeric_limits<double>::max(),
                        "parameters: expected an alpha above 0, found ", parameter);
  }
}

// net_out (N, C, *spatial) and what is kept, if it is.
std::tuple<at::Tensor, at::Tensor> net_chain(const at::Tensor& x, const Optional& cond, at::TensorList weights,
                                             at::TensorList biases, const Optional& log_gain,
                                             at::IntArrayRef activations, at::ArrayRef<double> parameters,
                                             at::IntArrayRef dilations, bool half, bool keep) {
  const Plain plain;
  TORCH_CHECK_VALUE(!biases.empty(), "biases: expected one for each layer, found none");
  const Net net(x, cond, weights, biases, log_gain, {activations, parameters, dilations, half});
  std::vector<int64_t> shape = x.sizes().vec();
  shape[1] = net.out();
  at::Tensor y = empty_reused(shape, x.options(), x.suggest_memory_format());
  at::Tensor kept = empty_reused({keep ? kept_elements(net, x) : 0}, kept_options(x, half));
  with_dtype(x, [&]<class T>(T) {
    const NetArgs<T> args{.x = input_image<T>(x),
                          .cond = cond ? input_image<T>(*cond) : Image<const T>{},
                          .cond_channels = cond ? cond->size(1) : 0,
                          .net = net.as<T>({}),
                          .y = output_image<T>(y),
                          .kept = keep ? kept.mutable_data_ptr() : nullptr,
                          .samples = x.size(0),
                          .extent = extent_of(x.sizes())};
    if (x.is_cpu()) launch_on_cpu([args] { cpu::net_chain(args, torch_threads()); });
  });
  return {y, kept};
}

// Gradients of x, of cond if there is one, of the weights, of the biases and of log_gain if there is one, given what
// net_chain of that description kept; without want_weights of x and cond alone. last_bias is needed beside log_gain
// only.
std::vector<at::Tensor> net_chain_backward(const at::Tensor& grad_out, const at::Tensor& x, const Optional& cond,
                                           const at::Tensor& kept_in, at::TensorList weights, const Optional& last_bias,
                                           const Optional& log_gain, at::IntArrayRef activations,
                                           at::ArrayRef<double> parameters, at::IntArrayRef dilations, bool half,
                                           bool want_weights) {
  const Plain plain;
  const Net net(x, cond, weights, {}, log_gain, {activations, parameters, dilations, half});
  std::vector<int64_t> shape = x.sizes().vec();
  shape[1] = net.out();
  check_shape("grad_out", grad_out, shape);
  check_like("grad_out", grad_out, "x", x);
  check_shape("kept", kept_in, {kept_elements(net, x)});
  TORCH_CHECK_VALUE(kept_in.options().type_equal(kept_options(x, half)), "kept: expected what net_chain kept, found ",
                    name_of(kept_in.scalar_type()), " on ", kept_in.device());
  const at::Tensor kept = kept_in.contiguous();
  TORCH_CHECK_VALUE(!log_gain || last_bias, "last_bias: expected a bias beside log_gain, found none");
  if (last_bias) {
    check_shape("last_bias", *last_bias, {net.out()});
    check_like("last_bias", *last_bias, "x", x);
  }
  const Optional bias = last_bias ? Optional(last_bias->contiguous()) : Optional();
  std::vector<at::Tensor> grads = {empty_reused(x.sizes(), x.options(), x.suggest_memory_format())};
  if (cond) grads.push_back(empty_reused(cond->sizes(), cond->options(), x.suggest_memory_format()));
  const std::size_t inputs = grads.size(), layers = weights.size();
  if (want_weights) {
    for (const at::Tensor& weight : net.weights()) grads.push_back(empty_reused(weight.sizes(), x.options()));
    for (const at::Tensor& weight : net.weights()) grads.push_back(empty_reused({weight.size(0)}, x.options()));
    if (log_gain) grads.push_back(empty_reused(log_gain->sizes(), x.options()));
  }
  with_dtype(x, [&]<class T>(T) {
    NetBackwardArgs<T> args{.grad_y = input_image<T>(grad_out),
                            .x = input_image<T>(x),
                            .cond = cond ? input_image<T>(*cond) : Image<const T>{},
                            .cond_channels = cond ? cond->size(1) : 0,
                            .net = net.as<T>(bias),
                            .kept = kept.const_data_ptr(),
                            .grad_x = output_image<T>(grads[0]),
                            .grad_cond = cond ? output_image<T>(grads[1]) : Image<T>{},
                            .grad_weight = {},
                            .grad_bias = {},
                            .grad_log_gain = nullptr,
                            .samples = x.size(0),
                            .extent = extent_of(x.sizes())};
    if (want_weights) {
      for (std::size_t i = 0; i < layers; ++i) {
        args.grad_weight[i] = grads[inputs + i].mutable_data_ptr<T>();
        args.grad_bias[i] = grads[inputs + layers + i].mutable_data_ptr<T>();
      }
      if (log_gain) args.grad_log_gain = grads.back().mutable_data_ptr<T>();
    }
    if (x.is_cpu()) launch_on_cpu([args] { cpu::net_chain_backward(args, torch_threads()); });
  });
  return grads;
}

void register_net_ops(torch::Library& m) {
  m.impl("net_chain", &net_chain);
  m.impl("net_chain_backward", &net_chain_backward);
}

}  // namespace pyglow::bindings
