// Channel moments, the normal log density, and the vector functions for tests.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <tuple>

#include "bindings/checks.h"
#include "bindings/device.h"
#include "bindings/ops.h"

namespace pyglow::bindings {
namespace {

// mean and sum of squared deviations per channel, float64 whatever the dtype of x.
std::tuple<at::Tensor, at::Tensor> channel_moments(const at::Tensor& x_in) {
  check_state("x", x_in);
  const at::Tensor x = with_position_stride(x_in);
  at::Tensor mean = at::empty({x.size(1)}, x.options().dtype(at::kDouble)), m2 = at::empty_like(mean);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const ChannelMomentsArgs<T> args{
        input<T>(x),    mean.mutable_data_ptr<double>(), m2.mutable_data_ptr<double>(), x.size(0), x.size(1),
        positions_of(x)};
    if (x.is_cpu()) return cpu::channel_moments(args, torch_threads());
    const CudaScope scope(x);
#ifdef PYGLOW_WITH_CUDA
    const at::Tensor scratch = CudaScope::scratch(x, cuda::channel_moments_scratch(args));
    CudaScope::check(cuda::channel_moments(args, scratch.mutable_data_ptr(), scope.stream()));
#endif
  });
  return {mean, m2};
}

// The three tensors of the normal distribution, of one shape; mean and log_sd may be expanded ones.
struct Normal {
  at::Tensor value, mean, log_sd;

  Normal(const char* name, const at::Tensor& value_in, const at::Tensor& mean_in, const at::Tensor& log_sd_in) {
    check_state(name, value_in);
    check_shape("mean", mean_in, value_in.sizes());
    check_shape("log_sd", log_sd_in, value_in.sizes());
    check_like("mean", mean_in, name, value_in);
    check_like("log_sd", log_sd_in, name, value_in);
    value = with_position_stride(value_in);
    mean = with_position_stride(mean_in);
    log_sd = with_position_stride(log_sd_in);
  }
};

at::Tensor gaussian_log_prob(const at::Tensor& z, const at::Tensor& mean, const at::Tensor& log_sd) {
  const Normal normal("z", z, mean, log_sd);
  at::Tensor log_prob = at::empty({z.size(0)}, z.options());
  with_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    const GaussianArgs<T> args{input<T>(normal.value),
                               input<T>(normal.mean),
                               input<T>(normal.log_sd),
                               log_prob.mutable_data_ptr<T>(),
                               z.size(0),
                               z.size(1),
                               positions_of(z)};
    if (z.is_cpu()) return cpu::gaussian_log_prob(args, torch_threads());
    const CudaScope scope(z);
#ifdef PYGLOW_WITH_CUDA
    const int64_t bytes = cuda::gaussian_log_prob_scratch(args.samples, args.channels, args.positions);
    const at::Tensor scratch = CudaScope::scratch(z, bytes);
    CudaScope::check(cuda::gaussian_log_prob(args, scratch.mutable_data_ptr(), scope.stream()));
#endif
  });
  return log_prob;
}

// Gradients of z, mean and log_sd, each of the full shape.
std::tuple<at::Tensor, at::Tensor, at::Tensor> gaussian_log_prob_backward(const at::Tensor& z, const at::Tensor& mean,
                                                                          const at::Tensor& log_sd,
                                                                          const at::Tensor& grad_log_prob_in) {
  const Normal normal("z", z, mean, log_sd);
  check_shape("grad_log_prob", grad_log_prob_in, {z.size(0)});
  check_like("grad_log_prob", grad_log_prob_in, "z", z);
  const at::Tensor grad_log_prob = grad_log_prob_in.contiguous();
  at::Tensor grad_z = empty_output(normal.value), grad_mean = empty_output(grad_z);
  at::Tensor grad_log_sd = empty_output(grad_z);
  with_dtype(z, [&](auto zero) {
    using T = decltype(zero);
    const GaussianBackwardArgs<T> args{input<T>(normal.value),
                                       input<T>(normal.mean),
                                       input<T>(normal.log_sd),
                                       grad_log_prob.const_data_ptr<T>(),
                                       output<T>(grad_z),
                                       output<T>(grad_mean),
                                       output<T>(grad_log_sd),
                                       z.size(0),
                                       z.size(1),
                                       positions_of(z)};
    if (z.is_cpu()) return cpu::gaussian_log_prob_backward(args, torch_threads());
    const CudaScope scope(z);
#ifdef PYGLOW_WITH_CUDA
    CudaScope::check(cuda::gaussian_log_prob_backward(args, scope.stream()));
#endif
  });
  return {grad_z, grad_mean, grad_log_sd};
}

at::Tensor gaussian_sample(const at::Tensor& noise, const at::Tensor& mean, const at::Tensor& log_sd) {
  const Normal normal("noise", noise, mean, log_sd);
  at::Tensor z = empty_output(normal.value);
  with_dtype(noise, [&](auto zero) {
    using T = decltype(zero);
    const GaussianSampleArgs<T> args{input<T>(normal.value), input<T>(normal.mean), input<T>(normal.log_sd),
                                     output<T>(z),           noise.size(0),         noise.size(1),
                                     positions_of(noise)};
    if (noise.is_cpu()) return cpu::gaussian_sample(args, torch_threads());
    const CudaScope scope(noise);
#ifdef PYGLOW_WITH_CUDA
    CudaScope::check(cuda::gaussian_sample(args, scope.stream()));
#endif
  });
  return z;
}

at::Tensor elementary(const std::string& name, const at::Tensor& x_in) {
  static const char* const names[] = {"exp", "log", "log1p_unit", "tanh", "atan"};
  const auto found = std::find(std::begin(names), std::end(names), name);
  TORCH_CHECK_VALUE(found != std::end(names), "name: expected exp, log, log1p_unit, tanh or atan, found ", name);
  check_dtype("x", x_in);
  TORCH_CHECK_VALUE(x_in.is_cpu(), "x: expected a CPU tensor, found device ", x_in.device());
  const at::Tensor x = x_in.contiguous();
  at::Tensor y = at::empty_like(x);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    cpu::elementary(static_cast<cpu::Elementary>(found - std::begin(names)), x.const_data_ptr<T>(),
                    y.mutable_data_ptr<T>(), x.numel());
  });
  return y;
}

}  // namespace

void register_statistics_ops(pybind11::module_& m) {
  m.def("channel_moments", &channel_moments, NoGil());
  m.def("gaussian_log_prob", &gaussian_log_prob, NoGil());
  m.def("gaussian_log_prob_backward", &gaussian_log_prob_backward, NoGil());
  m.def("gaussian_sample", &gaussian_sample, NoGil());
  m.def("elementary", &elementary, NoGil(), "A vector function of the CPU kernels, for tests of its error bound.");
}

}  // namespace pyglow::bindings
