// The C interface to the sums over values that emulator.py calls.
#include "interface.h"

using driver::Sizes;
using driver::Tensor;
using driver::view;

extern "C" {

const char* emulated_gaussian_log_prob(int is_double, unsigned seed, Sizes sizes, Tensor z, Tensor mean, Tensor log_sd,
                                       void* log_prob) {
  return driver::guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::GaussianArgs<T>{.z = view<const T>(z),
                                        .mean = view<const T>(mean),
                                        .log_sd = view<const T>(log_sd),
                                        .log_prob = static_cast<T*>(log_prob),
                                        .samples = sizes.samples,
                                        .channels = sizes.channels,
                                        .positions = sizes.positions});
  });
}

const char* emulated_gaussian_log_prob_backward(int is_double, unsigned seed, Sizes sizes, Tensor z, Tensor mean,
                                                Tensor log_sd, const void* grad_log_prob, Tensor grad_z,
                                                Tensor grad_mean, Tensor grad_log_sd) {
  return driver::guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::GaussianBackwardArgs<T>{.z = view<const T>(z),
                                                .mean = view<const T>(mean),
                                                .log_sd = view<const T>(log_sd),
                                                .grad_log_prob = static_cast<const T*>(grad_log_prob),
                                                .grad_z = view<T>(grad_z),
                                                .grad_mean = view<T>(grad_mean),
                                                .grad_log_sd = view<T>(grad_log_sd),
                                                .samples = sizes.samples,
                                                .channels = sizes.channels,
                                                .positions = sizes.positions});
  });
}

const char* emulated_gaussian_sample(int is_double, unsigned seed, Sizes sizes, Tensor noise, Tensor mean,
                                     Tensor log_sd, Tensor z) {
  return driver::guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::GaussianSampleArgs<T>{.noise = view<const T>(noise),
                                              .mean = view<const T>(mean),
                                              .log_sd = view<const T>(log_sd),
                                              .z = view<T>(z),
                                              .samples = sizes.samples,
                                              .channels = sizes.channels,
                                              .positions = sizes.positions});
  });
}

}  // extern "C"
