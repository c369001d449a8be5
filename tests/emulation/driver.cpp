// The C interface that emulator.py calls: plain numbers and pointers. Each function returns null, or what went wrong.
#include "driver.h"

#include <cuda_runtime.h>

namespace {

struct Tensor {
  void* data;
  int64_t sample, channel, position;  // strides
};
struct Sizes {
  int64_t samples, channels, transformed, positions;
};
struct Variant {
  int map, order, inverse;
  double bias, eps, clamp;
};

template <class T>
pyglow::Strided<T> view(const Tensor& x) {
  return {static_cast<T*>(x.data), x.sample, x.channel, x.position};
}

template <class T>
pyglow::CouplingKind<T> kind_of(const Variant& v) {
  return {static_cast<pyglow::ScaleMap>(v.map),
          static_cast<pyglow::Order>(v.order),
          v.inverse != 0,
          {static_cast<T>(v.bias), static_cast<T>(v.eps), static_cast<T>(v.clamp)}};
}

// Calls f(T()) for float or double.
template <class F>
const char* guarded(int is_double, unsigned seed, const F& f) {
  thread_local std::string message;
  emu::schedule_seed = seed;
  try {
    if (is_double) {
      f(double());
    } else {
      f(float());
    }
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" {

const char* emulated_channel_mix(int is_double, unsigned seed, Sizes sizes, Tensor x, const void* matrix,
                                 const void* offset, Tensor u, int subtract_first) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::ChannelMixArgs<T>{view<const T>(x), static_cast<const T*>(matrix),
                                          static_cast<const T*>(offset), view<T>(u), sizes.samples, sizes.channels,
                                          sizes.positions, subtract_first != 0});
  });
}

const char* emulated_channel_mix_backward(int is_double, unsigned seed, Sizes sizes, Tensor x, Tensor grad_u,
                                          const void* matrix, const void* center, Tensor grad_x, void* grad_matrix,
                                          void* grad_offset) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::ChannelMixBackwardArgs<T>{
        view<const T>(x), view<const T>(grad_u), static_cast<const T*>(matrix), static_cast<const T*>(center),
        view<T>(grad_x), static_cast<T*>(grad_matrix), static_cast<T*>(grad_offset), sizes.samples, sizes.channels,
        sizes.positions});
  });
}

const char* emulated_coupling(int is_double, unsigned seed, Sizes sizes, Variant variant, Tensor in, Tensor net_out,
                              Tensor out, void* log_det) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::CouplingArgs<T>{view<const T>(in), view<const T>(net_out), view<T>(out),
                                        static_cast<T*>(log_det), sizes.samples, sizes.channels, sizes.transformed,
                                        sizes.positions, kind_of<T>(variant)});
  });
}

const char* emulated_coupling_backward(int is_double, unsigned seed, Sizes sizes, Variant variant, Tensor out,
                                       Tensor net_out, Tensor grad_out, const void* grad_log_det, Tensor in,
                                       Tensor grad_in, Tensor grad_net_out) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::CouplingBackwardArgs<T>{view<const T>(out), view<const T>(net_out), view<const T>(grad_out),
                                                static_cast<const T*>(grad_log_det), view<T>(in), view<T>(grad_in),
                                                view<T>(grad_net_out), sizes.samples, sizes.channels, sizes.transformed,
                                                sizes.positions, kind_of<T>(variant)});
  });
}

}  // extern "C"
