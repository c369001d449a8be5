// The C interface to the sums over values that statistics_emulator.py calls.
#include "interface.h"

using driver::Sizes;
using driver::Tensor;
using driver::view;

extern "C" {

const char* emulated_channel_moments(int is_double, unsigned seed, Sizes sizes, Tensor x, double* mean, double* m2) {
  return driver::guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(
        pyglow::ChannelMomentsArgs<T>{view<const T>(x), mean, m2, sizes.samples, sizes.channels, sizes.positions});
  });
}

const char* emulated_gaussian_log_prob(int is_double, unsigned seed, Sizes sizes, Tensor z, Tensor mean, Tensor log_sd,
                                       void* log_prob) {
  return driver::guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::GaussianArgs<T>{view<const T>(z), view<const T>(mean), view<const T>(log_sd),
                                        static_cast<T*>(log_prob), sizes.samples, sizes.channels, sizes.positions});
  });
}

const char* emulated_gaussian_log_prob_backward(int is_double, unsigned seed, Sizes sizes, Tensor z, Tensor mean,
                                                Tensor log_sd, const void* grad_log_prob, Tensor grad_z,
                                                Tensor grad_mean, Tensor grad_log_sd) {
  return driver::guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::GaussianBackwardArgs<T>{
        view<const T>(z), view<const T>(mean), view<const T>(log_sd), static_cast<const T*>(grad_log_prob),
        view<T>(grad_z), view<T>(grad_mean), view<T>(grad_log_sd), sizes.samples, sizes.channels, sizes.positions});
  });
}

const char* emulated_gaussian_sample(int is_double, unsigned seed, Sizes sizes, Tensor noise, Tensor mean,
                                     Tensor log_sd, Tensor z) {
  return driver::guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::GaussianSampleArgs<T>{view<const T>(noise), view<const T>(mean), view<const T>(log_sd),
                                              view<T>(z), sizes.samples, sizes.channels, sizes.positions});
  });
}

}  // extern "C"
