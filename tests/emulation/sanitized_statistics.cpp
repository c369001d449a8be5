#include "sanitized.h"

namespace sanitized {
namespace {

template <class T>
void run(const Shape& s, bool channels_last, bool repeats) {
  const Tensor<T> x(s.n, s.c, s.p, channels_last, 1), mean(s.n, s.c, s.p, channels_last, 2);
  const Tensor<T> log_sd(s.n, s.c, s.p, channels_last, 3), grad_log_prob(s.n, 1, 1, false, 4);
  const Tensor<T> log_prob(s.n, 1, 1, false, 0), z(s.n, s.c, s.p, channels_last, 0);
  const Tensor<T> grad_z(s.n, s.c, s.p, channels_last, 0), grad_mean(s.n, s.c, s.p, channels_last, 0);
  const Tensor<T> grad_log_sd(s.n, s.c, s.p, channels_last, 0);

  // The last channels' first values, for all samples and positions.
  const pyglow::Strided<const T> repeated = {mean.data() + s.n * s.c * s.p - s.c, 0, 1, 0};
  const pyglow::Strided<const T> given_mean = repeats ? repeated : mean.in(), given_sd = log_sd.in();
  driver::run(pyglow::GaussianArgs<T>{.z = x.in(),
                                      .mean = given_mean,
                                      .log_sd = given_sd,
                                      .log_prob = log_prob.data(),
                                      .samples = s.n,
                                      .channels = s.c,
                                      .positions = s.p});
  log_prob.expect_written("log_prob");
  driver::run(pyglow::GaussianBackwardArgs<T>{.z = x.in(),
                                              .mean = given_mean,
                                              .log_sd = given_sd,
                                              .grad_log_prob = grad_log_prob.data(),
                                              .grad_z = grad_z.out(),
                                              .grad_mean = grad_mean.out(),
                                              .grad_log_sd = grad_log_sd.out(),
                                              .samples = s.n,
                                              .channels = s.c,
                                              .positions = s.p});
  grad_z.expect_written("grad_z");
  grad_mean.expect_written("grad_mean");
  grad_log_sd.expect_written("grad_log_sd");
  driver::run(pyglow::GaussianSampleArgs<T>{.noise = x.in(),
                                            .mean = given_mean,
                                            .log_sd = given_sd,
                                            .z = z.out(),
                                            .samples = s.n,
                                            .channels = s.c,
                                            .positions = s.p});
  z.expect_written("gaussian_sample");
}

template <class T>
void all() {
  // Vector path and tail, one part or split and several, several groups of channels, more blocks than there are, of
  // samples in several parts too.
  for (const Shape& s :
       {Shape{1, 3, 5}, Shape{2, 4, 16}, Shape{1, 12, 180}, Shape{3, 37, 4}, Shape{3, 6, 601}, Shape{2, 8, 600}})
    for (const bool channels_last : {false, true})
      for (const bool repeats : {false, true}) run<T>(s, channels_last, repeats);
}

}  // namespace

void statistics() {
  all<float>();
  if constexpr (in_double) all<double>();
}

}  // namespace sanitized
