// The C interface to the channel mixing that emulator.py calls.
#include "interface.h"

using driver::Image;
using driver::Sizes;
using driver::Tensor;
using driver::view;

extern "C" {

const char* emulated_channel_mix(int is_double, unsigned seed, Sizes sizes, Image x, const void* matrix,
                                 const void* offset, Image u, int subtract_first) {
  return driver::guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::ChannelMixArgs<T>{view<const T>(x), static_cast<const T*>(matrix),
                                          static_cast<const T*>(offset), view<T>(u), sizes.samples, sizes.channels,
                                          sizes.positions, subtract_first != 0});
  });
}

const char* emulated_channel_mix_backward(int is_double, unsigned seed, Sizes sizes, Image x, Tensor grad_u,
                                          Tensor added, int64_t added_channels, const void* matrix, const void* center,
                                          Image grad_x, void* grad_matrix, void* grad_offset) {
  return driver::guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::ChannelMixBackwardArgs<T>{view<const T>(x),
                                                  {view<const T>(grad_u), view<const T>(added), added_channels},
                                                  static_cast<const T*>(matrix),
                                                  static_cast<const T*>(center),
                                                  view<T>(grad_x),
                                                  static_cast<T*>(grad_matrix),
                                                  static_cast<T*>(grad_offset),
                                                  sizes.samples,
                                                  sizes.channels,
                                                  sizes.positions});
  });
}

}  // extern "C"
