// How the coupling's variants become template arguments: all of them for the kernels of the coupling alone, which are
// bound by memory and instructions alike; the map alone, inside the kernel, for those that a matrix product fills.
//
// With PYGLOW_FEW_MAPS only the first two maps are compiled, for a quick look with a sanitizer: the maps differ in
// their arithmetic, not in what they touch.
#pragma once
#include <type_traits>

#include "cuda/device.cuh"
#include "math/coupling.h"

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
#ifndef PYGLOW_FEW_MAPS
    case ScaleMap::scaled_sigmoid:
      return with_map<ScaleMap::scaled_sigmoid>(kind.order, kind.inverse, f);
    case ScaleMap::exp:
      return with_map<ScaleMap::exp>(kind.order, kind.inverse, f);
    case ScaleMap::tanh:
      return with_map<ScaleMap::tanh>(kind.order, kind.inverse, f);
    case ScaleMap::atan:
      return with_map<ScaleMap::atan>(kind.order, kind.inverse, f);
#else
    default:
      break;
#endif
  }
  return cudaErrorInvalidValue;
}

// Within a kernel: calls f(std::integral_constant<ScaleMap, map>()). All threads of a launch take the same branch.
template <class F>
__device__ __forceinline__ void with_scale_map(ScaleMap map, const F& f) {
  switch (map) {
    case ScaleMap::none:
      return f(std::integral_constant<ScaleMap, ScaleMap::none>());
    case ScaleMap::sigmoid:
      return f(std::integral_constant<ScaleMap, ScaleMap::sigmoid>());
#ifndef PYGLOW_FEW_MAPS
    case ScaleMap::scaled_sigmoid:
      return f(std::integral_constant<ScaleMap, ScaleMap::scaled_sigmoid>());
    case ScaleMap::exp:
      return f(std::integral_constant<ScaleMap, ScaleMap::exp>());
    case ScaleMap::tanh:
      return f(std::integral_constant<ScaleMap, ScaleMap::tanh>());
    case ScaleMap::atan:
      return f(std::integral_constant<ScaleMap, ScaleMap::atan>());
#else
    default:
      break;
#endif
  }
}

template <ScaleMap Map, class T>
__device__ __forceinline__ math::Scale<T> scale_at(T raw, const ScaleParams<T>& params) {
  if constexpr (Map == ScaleMap::none)
    return {T(1), T(0), T(0)};
  else
    return math::scale_of<Map>(raw, params);
}

// couple, uncouple and couple_backward with an order, and a direction, that are known at run time.
template <class T>
__device__ __forceinline__ T couple_in(Order order, T u, T shift, T s) {
  return order == Order::shift_scale ? math::couple<Order::shift_scale>(u, shift, s)
                                     : math::couple<Order::scale_shift>(u, shift, s);
}
template <class T>
__device__ __forceinline__ T uncouple_in(Order order, T y, T shift, T s) {
  return order == Order::shift_scale ? math::uncouple<Order::shift_scale>(y, shift, s)
                                     : math::uncouple<Order::scale_shift>(y, shift, s);
}
template <class T>
__device__ __forceinline__ math::CouplingGrad<T> couple_backward_in(Order order, T y, T shift, T s, T grad_y,
                                                                    T grad_log_det) {
  return order == Order::shift_scale ? math::couple_backward<Order::shift_scale>(y, shift, s, grad_y, grad_log_det)
                                     : math::couple_backward<Order::scale_shift>(y, shift, s, grad_y, grad_log_det);
}

}  // namespace pyglow::cuda
