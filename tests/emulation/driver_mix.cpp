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
    driver::run(pyglow::ChannelMixArgs<T>{.x = view<const T>(x),
                                          .matrix = static_cast<const T*>(matrix),
                                          .offset = static_cast<const T*>(offset),
                                          .u = view<T>(u),
                                          .samples = sizes.samples,
                                          .channels = sizes.channels,
                                          .positions = sizes.positions,
                                          .subtract_first = subtract_first != 0});
  });
}

const char* emulated_channel_mix_backward(int is_double, unsigned seed, Sizes sizes, Image x, Tensor grad_u,
                                          Tensor added, int64_t added_channels, const void* matrix, const void* center,
                                          Image grad_x, void* grad_matrix, void* grad_offset) {
  return driver::guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(
        pyglow::ChannelMixBackwardArgs<T>{.x = view<const T>(x),
                                          .grad_u = {view<const T>(grad_u), view<const T>(added), added_channels},
                                          .matrix = static_cast<const T*>(matrix),
                                          .center = static_cast<const T*>(center),
                                          .grad_x = view<T>(grad_x),
                                          .grad_matrix = static_cast<T*>(grad_matrix),
                                          .grad_offset = static_cast<T*>(grad_offset),
                                          .samples = sizes.samples,
                                          .channels = sizes.channels,
                                          .positions = sizes.positions});
  });
}

}  // extern "C"
