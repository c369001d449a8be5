// The C interface to the passes that join a coupling with a channel mixing, which emulator.py calls.
#include "interface.h"

using driver::guarded;
using driver::kind_of;
using driver::Net;
using driver::net_view;
using driver::Sizes;
using driver::Tensor;
using driver::Variant;
using driver::view;

extern "C" {

const char* emulated_coupling_mix(int is_double, unsigned seed, Sizes sizes, Variant variant, Tensor in, Net net_out,
                                  const void* matrix, const void* offset, Tensor out, void* log_det) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(
        pyglow::CouplingMixArgs<T>{.coupling = driver::coupling_args<T>(sizes, variant, in, net_out, out, log_det),
                                   .matrix = static_cast<const T*>(matrix),
                                   .offset = static_cast<const T*>(offset)});
  });
}

const char* emulated_coupling_mix_backward(int is_double, unsigned seed, Sizes sizes, Variant variant, Tensor in,
                                           Net net_out, Tensor grad_out, Tensor added, int64_t added_channels,
                                           const void* grad_log_det, const void* matrix, Tensor grad_in,
                                           Net grad_net_out, void* grad_matrix, void* grad_offset) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(
        pyglow::CouplingMixBackwardArgs<T>{.in = view<const T>(in),
                                           .net_out = net_view<const void>(net_out),
                                           .grad_out = {view<const T>(grad_out), view<const T>(added), added_channels},
                                           .grad_log_det = static_cast<const T*>(grad_log_det),
                                           .matrix = static_cast<const T*>(matrix),
                                           .grad_in = view<T>(grad_in),
                                           .grad_net_out = net_view<void>(grad_net_out),
                                           .grad_matrix = static_cast<T*>(grad_matrix),
                                           .grad_offset = static_cast<T*>(grad_offset),
                                           .samples = sizes.samples,
                                           .channels = sizes.channels,
                                           .transformed = sizes.transformed,
                                           .positions = sizes.positions,
                                           .kind = kind_of<T>(variant)});
  });
}

const char* emulated_step_backward(int is_double, unsigned seed, Sizes sizes, Variant variant, Tensor y, Net net_out,
                                   Tensor grad_y, const void* grad_log_det, const void* inverse_matrix,
                                   const void* offset, Tensor x, Tensor grad_u, Net grad_net_out) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::StepBackwardArgs<T>{.y = view<const T>(y),
                                            .net_out = net_view<const void>(net_out),
                                            .grad_y = view<const T>(grad_y),
                                            .grad_log_det = static_cast<const T*>(grad_log_det),
                                            .inverse_matrix = static_cast<const T*>(inverse_matrix),
                                            .offset = static_cast<const T*>(offset),
                                            .x = view<T>(x),
                                            .grad_u = view<T>(grad_u),
                                            .grad_net_out = net_view<void>(grad_net_out),
                                            .samples = sizes.samples,
                                            .channels = sizes.channels,
                                            .transformed = sizes.transformed,
                                            .positions = sizes.positions,
                                            .kind = kind_of<T>(variant)});
  });
}

}  // extern "C"
