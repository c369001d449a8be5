// The C interface to the coupling that emulator.py calls.
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

const char* emulated_coupling(int is_double, unsigned seed, Sizes sizes, Variant variant, Tensor in, Net net_out,
                              Tensor out, void* log_det) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(driver::coupling_args<T>(sizes, variant, in, net_out, out, log_det));
  });
}

const char* emulated_coupling_backward(int is_double, unsigned seed, Sizes sizes, Variant variant, Tensor out,
                                       Net net_out, Tensor grad_out, const void* grad_log_det, Tensor in,
                                       Tensor grad_in, Net grad_net_out) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::CouplingBackwardArgs<T>{.out = view<const T>(out),
                                                .net_out = net_view<const void>(net_out),
                                                .grad_out = view<const T>(grad_out),
                                                .grad_log_det = static_cast<const T*>(grad_log_det),
                                                .in = view<T>(in),
                                                .grad_in = view<T>(grad_in),
                                                .grad_net_out = net_view<void>(grad_net_out),
                                                .samples = sizes.samples,
                                                .channels = sizes.channels,
                                                .transformed = sizes.transformed,
                                                .positions = sizes.positions,
                                                .kind = kind_of<T>(variant)});
  });
}

}  // extern "C"
