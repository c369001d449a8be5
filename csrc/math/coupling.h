// The coupling of one value and its gradients. u: input of the forward direction, y: its output.
#pragma once
#include "math/scale_map.h"

PYGLOW_MATH_BEGIN

// y = (u + shift) s, or u s + shift.
template <Order O, class V>
PYGLOW_HD V couple(V u, V shift, V s) {
  if constexpr (O == Order::shift_scale) return (u + shift) * s;
  return u * s + shift;
}

// u = y / s - shift, or (y - shift) / s.
template <Order O, class V>
PYGLOW_HD V uncouple(V y, V shift, V s) {
  if constexpr (O == Order::shift_scale) return y / s - shift;
  return (y - shift) / s;
}

template <class V>
struct CouplingGrad {
  V in;     // gradient of the value that was transformed
  V shift;  // of the net's shift
  V log_s;  // of log s, to be multiplied by d log_s / d raw
};

// Gradients of couple() from its output y; grad_log_det is that of log_det = sum log s.
template <Order O, class V>
PYGLOW_HD CouplingGrad<V> couple_backward(V y, V shift, V s, V grad_y, V grad_log_det) {
  const V grad_u = grad_y * s;
  if constexpr (O == Order::shift_scale) return {grad_u, grad_u, grad_y * y + grad_log_det};
  return {grad_u, grad_y, grad_y * (y - shift) + grad_log_det};
}

// Gradients of uncouple() from its output u; grad_log_det is that of log_det = -sum log s.
template <Order O, class V>
PYGLOW_HD CouplingGrad<V> uncouple_backward(V u, V shift, V s, V grad_u, V grad_log_det) {
  const V grad_y = grad_u / s;
  if constexpr (O == Order::shift_scale) return {grad_y, -grad_u, -grad_u * (u + shift) - grad_log_det};
  return {grad_y, -grad_y, -grad_u * u - grad_log_det};
}

PYGLOW_MATH_END
