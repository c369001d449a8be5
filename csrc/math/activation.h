// The activation of a coupling net's hidden layers: leaky relu, x above zero and leak x below, with leak in [0, 1].
#pragma once
#include "math/host_device.h"

PYGLOW_MATH_BEGIN

// NaN is kept. Without Leaky the leak is zero, which is relu: zero below, also of -inf, where the product would be NaN.
template <bool Leaky, class V, class T>
PYGLOW_HD V leaky_relu(V x, T leak) {
  if constexpr (Leaky) return x < T(0) ? x * leak : x;
  return x < T(0) ? V{} : x;
}

// The gradient of x from that of y = leaky_relu(x). The sign of y tells: y <= 0 exactly where x <= 0, also where leak x
// underflows. Where y is NaN the gradient is kept.
template <bool Leaky, class V, class T>
PYGLOW_HD V leaky_relu_backward(V grad_y, V y, T leak) {
  if constexpr (Leaky) return y <= T(0) ? grad_y * leak : grad_y;
  return y <= T(0) ? V{} : grad_y;
}

PYGLOW_MATH_END
