// What the C interfaces of the drivers share: plain numbers and pointers in, null or what went wrong out.
#pragma once
#include <cuda_runtime.h>

#include <cmath>

#include "driver.h"

namespace driver {

struct Tensor {
  void* data;
  int64_t sample, channel, position;  // strides
};
struct Image {
  Tensor tensor;
  int64_t width, row;  // as Squeezed
};
struct Net {
  Tensor tensor;
  int type;  // as NetType
};
struct Variant {
  int map, order, inverse;
  double bias, eps, clamp, factor;
};
struct Sizes {
  int64_t samples, channels, transformed, positions;
};

template <class T>
pyglow::Strided<T> view(const Tensor& x) {
  return {static_cast<T*>(x.data), x.sample, x.channel, x.position};
}
template <class T>
pyglow::Squeezed<T> view(const Image& x) {
  return {view<T>(x.tensor), x.width, x.row};
}

template <class Data>
pyglow::NetTensor<Data> net_view(const Net& x) {
  return {x.tensor.data, static_cast<pyglow::NetType>(x.type), x.tensor.sample, x.tensor.channel, x.tensor.position};
}
template <class T>
pyglow::CouplingKind<T> kind_of(const Variant& v) {
  return {static_cast<pyglow::ScaleMap>(v.map),
          static_cast<pyglow::Order>(v.order),
          v.inverse != 0,
          {static_cast<T>(v.bias), static_cast<T>(v.eps), static_cast<T>(v.clamp), static_cast<T>(v.factor),
           static_cast<T>(std::log(v.factor))}};
}

template <class T>
pyglow::CouplingArgs<T> coupling_args(const Sizes& sizes, const Variant& variant, const Tensor& in, const Net& net_out,
                                      const Tensor& out, void* log_det) {
  return {.in = view<const T>(in),
          .net_out = net_view<const void>(net_out),
          .out = view<T>(out),
          .log_det = static_cast<T*>(log_det),
          .samples = sizes.samples,
          .channels = sizes.channels,
          .transformed = sizes.transformed,
          .positions = sizes.positions,
          .kind = kind_of<T>(variant)};
}

// Calls f(T()) for float or double.
template <class F>
const char* guarded(int is_double, unsigned seed, const F& f) {
  thread_local std::string message;
  emu::schedule_seed = seed;
  emu::launched.clear();
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

}  // namespace driver
