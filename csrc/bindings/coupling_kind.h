// The checks and the arguments that the ops with a coupling or a channel mixing share.
#pragma once
#include <ATen/core/Tensor.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "bindings/checks.h"
#include "core.h"

namespace pyglow::bindings {

// A (C, C) matrix or a (C,) vector that goes with x.
inline void check_matrix(const char* name, const at::Tensor& matrix, const char* x_name, const at::Tensor& x,
                         int64_t channels) {
  check_shape(name, matrix, {channels, channels});
  check_like(name, matrix, x_name, x);
}
inline void check_vector(const char* name, const at::Tensor& vector, const char* x_name, const at::Tensor& x,
                         int64_t channels) {
  check_shape(name, vector, {channels});
  check_like(name, vector, x_name, x);
}

// The channel map of an op: a matrix (C, C), or with an index (C,) of int64 the scales (C,) of a gather. Where reading
// it does not stop a stream, the index is checked to be a permutation; elsewhere the kernels read nothing for an index
// that names no channel.
class MapTensors {
 public:
  MapTensors(const char* name, const at::Tensor& matrix, const std::optional<at::Tensor>& index, const char* x_name,
             const at::Tensor& x, int64_t channels)
      : matrix(checked(name, matrix, index.has_value(), x_name, x, channels).contiguous()) {
    if (!index) return;
    check_shape("index", *index, {channels});
    TORCH_CHECK_VALUE(index->scalar_type() == at::kLong, "index: expected dtype int64, found ",
                      name_of(index->scalar_type()));
    TORCH_CHECK_VALUE(index->device() == x.device(), "index: expected device ", x.device(), " like ", x_name,
                      ", found ", index->device());
    index_ = index->contiguous();
    if (index_.is_cpu()) check_permutation();
  }

  bool gathers() const { return index_.defined(); }

  template <class T>
  Gather<T> gather(const at::Tensor& offset, const at::Tensor& center) const {
    return {.scale = matrix.const_data_ptr<T>(),
            .offset = offset.defined() ? offset.const_data_ptr<T>() : nullptr,
            .center = center.defined() ? center.const_data_ptr<T>() : nullptr,
            .index = index_.const_data_ptr<int64_t>()};
  }

  const at::Tensor matrix;  // or the scales, contiguous

 private:
  // Checked before contiguous(), which may copy.
  static const at::Tensor& checked(const char* name, const at::Tensor& matrix, bool gathers, const char* x_name,
                                   const at::Tensor& x, int64_t channels) {
    gathers ? check_vector(name, matrix, x_name, x, channels) : check_matrix(name, matrix, x_name, x, channels);
    return matrix;
  }

  void check_permutation() const {
    const int64_t channels = index_.numel();
    const int64_t* const index = index_.const_data_ptr<int64_t>();
    std::vector<bool> seen(channels);
    for (int64_t i = 0; i < channels; ++i) {
      const bool fits = index[i] >= 0 && index[i] < channels && !seen[index[i]];
      TORCH_CHECK_VALUE(fits, "index: expected a permutation of 0 to ", channels - 1, ", found ", index[i],
                        " at place ", i);
      seen[index[i]] = true;
    }
  }

  at::Tensor index_;
};

template <class T>
bool is_normal(double value) {
  return value >= std::numeric_limits<T>::min() && value <= std::numeric_limits<T>::max();
}

struct Kind {
  int64_t map, order;
  bool inverse;
  double bias, eps, clamp, factor;

  // A clamp within which exp does not overflow; the exp map is checked by its results.
  void check(at::ScalarType dtype) const {
    const double largest = dtype == at::kDouble ? 709.0 : 88.0;
    const bool clamps = map == static_cast<int64_t>(ScaleMap::tanh) || map == static_cast<int64_t>(ScaleMap::atan);
    TORCH_CHECK_VALUE(!clamps || (clamp > 0 && clamp <= largest), "clamp: expected a positive number, at most ",
                      largest, " in ", name_of(dtype), ", found ", clamp);
    TORCH_CHECK_VALUE(eps >= 0, "eps: expected 0 or more, found ", eps);
    TORCH_CHECK_VALUE(map >= 0 && map <= static_cast<int64_t>(ScaleMap::atan), "map: expected a ScaleMap, found ", map);
    const bool in_range = dtype == at::kDouble ? is_normal<double>(factor) : is_normal<float>(factor);
    const bool scales = map == static_cast<int64_t>(ScaleMap::scaled_sigmoid);
    TORCH_CHECK_VALUE(factor == 1 || (scales && in_range),
                      "factor: expected 1, or with the scaled sigmoid map a positive normal number of ", name_of(dtype),
                      ", found ", factor);
    TORCH_CHECK_VALUE(order == 0 || order == 1, "order: expected 0 or 1, found ", order);
  }

  template <class T>
  CouplingKind<T> as() const {
    return {.map = static_cast<ScaleMap>(map),
            .order = static_cast<Order>(order),
            .inverse = inverse,
            .params = {static_cast<T>(bias), static_cast<T>(eps), static_cast<T>(clamp), static_cast<T>(factor),
                       static_cast<T>(std::log(factor))}};
  }
};

inline NetType net_type(const at::Tensor& net_out) {
  if (net_out.scalar_type() == at::kBFloat16) return NetType::bfloat16;
  if (net_out.scalar_type() == at::kHalf) return NetType::float16;
  return NetType::state;
}

inline NetOutput net_input(const at::Tensor& net_out) {
  return {net_out.const_data_ptr(), net_type(net_out), net_out.stride(0), net_out.stride(1), position_stride(net_out)};
}
inline NetGrad net_grad(at::Tensor& grad) {
  return {grad.mutable_data_ptr(), net_type(grad), grad.stride(0), grad.stride(1), position_stride(grad)};
}

// What a coupling net's backward adds to the gradient of the first channels of x, or nothing.
inline at::Tensor check_added(const std::optional<at::Tensor>& added, const char* grad_name, const at::Tensor& grad) {
  if (!added) return {};
  TORCH_CHECK_VALUE(added->dim() == grad.dim() && added->size(1) <= grad.size(1), "added: expected (N, at most ",
                    grad.size(1), ", *spatial) like ", grad_name, ", found ", added->sizes());
  std::vector<int64_t> shape = grad.sizes().vec();
  shape[1] = added->size(1);
  check_shape("added", *added, shape);
  check_like("added", *added, grad_name, grad);
  return with_position_stride(*added);
}

template <class T>
SplitGrad<T> split_grad(const at::Tensor& all, const at::Tensor& added) {
  if (!added.defined()) return {input<T>(all), {nullptr, 0, 0, 0}, 0};
  return {input<T>(all), input<T>(added), added.size(1)};
}

// What a net gives has the dtype of the state, or 16 bits beside float32.
inline void check_net_dtype(const char* name, const at::Tensor& net_out, const char* x_name, const at::Tensor& x) {
  if (net_type(net_out) == NetType::state) return check_like(name, net_out, x_name, x);
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat, name, ": expected dtype ", name_of(x.scalar_type()), " like ",
                    x_name, " (16 bits go with float32), found ", name_of(net_out.scalar_type()));
  TORCH_CHECK_VALUE(net_out.device() == x.device(), name, ": expected device ", x.device(), " like ", x_name,
                    ", found ", net_out.device());
}

// C2, the number of transformed channels, from the net's output.
inline int64_t check_net_out(const at::Tensor& net_out, const char* x_name, const at::Tensor& x, const Kind& kind) {
  kind.check(x.scalar_type());
  check_net_dtype("net_out", net_out, x_name, x);
  const int64_t per_channel = kind.map == static_cast<int64_t>(ScaleMap::none) ? 1 : 2;
  TORCH_CHECK_VALUE(net_out.dim() == x.dim(), "net_out: expected ", x.dim(), " dimensions like ", x_name, ", found ",
                    net_out.sizes());
  const int64_t transformed = net_out.size(1) / per_channel;
  TORCH_CHECK_VALUE(net_out.size(1) % per_channel == 0 && transformed <= x.size(1), "net_out: expected ", per_channel,
                    " times at most ", x.size(1), " channels, found ", net_out.sizes());
  std::vector<int64_t> shape = x.sizes().vec();
  shape[1] = net_out.size(1);
  check_shape("net_out", net_out, shape);
  return transformed;
}

template <class T>
CouplingArgs<T> coupling_args(const at::Tensor& x, const at::Tensor& net_out, at::Tensor& out, at::Tensor& log_det,
                              int64_t transformed, const Kind& kind) {
  return {.in = input<T>(x),
          .net_out = net_input(net_out),
          .out = output<T>(out),
          .log_det = log_det.mutable_data_ptr<T>(),
          .samples = x.size(0),
          .channels = x.size(1),
          .transformed = transformed,
          .positions = positions_of(x),
          .kind = kind.as<T>()};
}

// exp(raw) may overflow; the kernel then makes log_det infinite. Raised where reading it does not stop a stream.
inline void check_overflow(const Kind& kind, const at::Tensor& log_det) {
  if (kind.map != static_cast<int64_t>(ScaleMap::exp) || !log_det.is_cpu()) return;
  const double overflowed = kind.inverse ? -INFINITY : INFINITY;
  with_dtype(log_det, [&]<class T>(T) {
    const T* values = log_det.const_data_ptr<T>();
    for (int64_t n = 0; n < log_det.numel(); ++n)
      TORCH_CHECK_VALUE(values[n] != overflowed, "net_out: expected raw scales whose exp is finite in ",
                        name_of(log_det.scalar_type()), ", found an overflow in sample ", n);
  });
}

// Gradients of the outputs: grad_<name> like x, and one of log_det per sample.
inline void check_output_grads(const char* grad_name, const at::Tensor& grad, const at::Tensor& grad_log_det,
                               const char* x_name, const at::Tensor& x) {
  check_shape(grad_name, grad, x.sizes());
  check_like(grad_name, grad, x_name, x);
  check_shape("grad_log_det", grad_log_det, {x.size(0)});
  check_like("grad_log_det", grad_log_det, x_name, x);
}

}  // namespace pyglow::bindings
