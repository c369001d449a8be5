// How the coupling's variants become template arguments.
#pragma once
#include "cuda/device.cuh"
#include "math/kinds.h"

namespace pyglow::cuda {

template <ScaleMap Map, Order O, bool Inverse>
struct Kind {
  static constexpr ScaleMap map = Map;
  static constexpr Order order = O;
  static constexpr bool inverse = Inverse;
  static constexpr bool affine = Map != ScaleMap::none;
};

// Calls f(Kind<...>()), which returns a cudaError_t: the one place where a variant is chosen.
template <ScaleMap Map, class F>
int with_map(Order order, bool inverse, const F& f) {
  if constexpr (Map != ScaleMap::none) {  // without a scale the orders are the same
    if (order == Order::scale_shift)
      return inverse ? f(Kind<Map, Order::scale_shift, true>()) : f(Kind<Map, Order::scale_shift, false>());
  }
  return inverse ? f(Kind<Map, Order::shift_scale, true>()) : f(Kind<Map, Order::shift_scale, false>());
}

template <class T, class F>
int with_kind(const CouplingKind<T>& kind, const F& f) {
  switch (kind.map) {
    case ScaleMap::none:
      return with_map<ScaleMap::none>(kind.order, kind.inverse, f);
    case ScaleMap::sigmoid:
      return with_map<ScaleMap::sigmoid>(kind.order, kind.inverse, f);
    case ScaleMap::sigmoid_eps:
      return with_map<ScaleMap::sigmoid_eps>(kind.order, kind.inverse, f);
    case ScaleMap::exp:
      return with_map<ScaleMap::exp>(kind.order, kind.inverse, f);
    case ScaleMap::tanh:
      return with_map<ScaleMap::tanh>(kind.order, kind.inverse, f);
    case ScaleMap::atan:
      return with_map<ScaleMap::atan>(kind.order, kind.inverse, f);
  }
  return cudaErrorInvalidValue;
}

}  // namespace pyglow::cuda
