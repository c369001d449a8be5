// The normal log density and samples.
#include <ATen/core/Tensor.h>

#include <tuple>

#include "bindings/checks.h"
#include "bindings/device.h"
#include "bindings/ops.h"

namespace pyglow::bindings {
namespace {

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
  at::Tensor log_prob = empty_reused({z.size(0)}, z.options());
  with_dtype(z, [&]<class T>(T) {
    const GaussianArgs<T> args{.z = input<T>(normal.value),
                               .mean = input<T>(normal.mean),
                               .log_sd = input<T>(normal.log_sd),
                               .log_prob = log_prob.mutable_data_ptr<T>(),
                               .samples = z.size(0),
                               .channels = z.size(1),
                               .positions = positions_of(z)};
    run(z, args);
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
  with_dtype(z, [&]<class T>(T) {
    const GaussianBackwardArgs<T> args{.z = input<T>(normal.value),
                                       .mean = input<T>(normal.mean),
                                       .log_sd = input<T>(normal.log_sd),
                                       .grad_log_prob = grad_log_prob.const_data_ptr<T>(),
                                       .grad_z = output<T>(grad_z),
                                       .grad_mean = output<T>(grad_mean),
                                       .grad_log_sd = output<T>(grad_log_sd),
                                       .samples = z.size(0),
                                       .channels = z.size(1),
                                       .positions = positions_of(z)};
    run(z, args);
  });
  return {grad_z, grad_mean, grad_log_sd};
}

at::Tensor gaussian_sample(const at::Tensor& noise, const at::Tensor& mean, const at::Tensor& log_sd) {
  const Normal normal("noise", noise, mean, log_sd);
  at::Tensor z = empty_output(normal.value);
  with_dtype(noise, [&]<class T>(T) {
    const GaussianSampleArgs<T> args{.noise = input<T>(normal.value),
                                     .mean = input<T>(normal.mean),
                                     .log_sd = input<T>(normal.log_sd),
                                     .z = output<T>(z),
                                     .samples = noise.size(0),
                                     .channels = noise.size(1),
                                     .positions = positions_of(noise)};
    run(noise, args);
  });
  return z;
}

}  // namespace

void register_statistics_ops(torch::Library& m) {
  m.impl("gaussian_log_prob", &gaussian_log_prob);
  m.impl("gaussian_log_prob_backward", &gaussian_log_prob_backward);
  m.impl("gaussian_sample", &gaussian_sample);
}

}  // namespace pyglow::bindings
