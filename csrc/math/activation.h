// The activations of a coupling net's hidden layers, and their derivatives, from what a layer keeps of them.
#pragma once
#include "math/elementary.h"
#include "math/kinds.h"

PYGLOW_MATH_BEGIN

// x above zero and leak x below, with leak in [0, 1]. NaN is kept. Without Leaky the leak is zero, which is relu: zero
// below, also of -inf, where the product would be NaN.
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

// Phi(x), the normal distribution function, without the cancellation of 1 + erf below zero.
template <class T, class V>
PYGLOW_HD V normal_cdf(V x) {
  return T(0.5) * erfc(T(-0.70710678118654752) * x);
}

template <class V>
struct TanhCdf {
  V value;    // (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3): torch's approximation of Phi(x)
  V x_slope;  // x times its derivative
};

// Beyond 32 the value is 0 or 1 and the derivative 0 in float and double: nothing overflows.
template <class T, class V>
PYGLOW_HD TanhCdf<V> tanh_cdf(V x) {
  constexpr T gain = T(1.5957691216057308), cubic = T(0.044715);
  x = x > T(32) ? V{} + T(32) : x;
  x = x < T(-32) ? V{} - T(32) : x;
  const V linear = gain * x, square = cubic * (x * x);
  const auto [value, complement, e] = sigmoid(linear * (T(1) + square));
  return {value, value * complement * (linear * (T(1) + T(3) * square))};
}

// V a scalar or a vector of T. The parameter is leaky_relu's leak or elu's alpha; the others have none. At -inf silu
// and both gelu are NaN, as torch's are.
template <Activation Kind, class V, class T>
PYGLOW_HD V activate(V x, T parameter) {
  if constexpr (Kind == Activation::none) {
    return x;
  } else if constexpr (Kind == Activation::relu || Kind == Activation::leaky_relu) {
    return leaky_relu<Kind == Activation::leaky_relu>(x, parameter);
  } else if constexpr (Kind == Activation::silu) {
    return x * sigmoid(x).value;
  } else if constexpr (Kind == Activation::gelu) {
    return x * normal_cdf<T>(x);
  } else if constexpr (Kind == Activation::gelu_tanh) {
    return x * tanh_cdf<T>(x).value;
  } else if constexpr (Kind == Activation::elu) {
    return x > T(0) ? x : parameter * expm1_negative(x);
  } else if constexpr (Kind == Activation::tanh) {
    return tanh(x);
  } else {
    static_assert(Kind == Activation::sigmoid, "an activation without a formula");
    return sigmoid(x).value;
  }
}

// The gradient of x from that of y = activate(x); `kept` is x where keeps_input says so, else y. What is formed from y
// has the error of y: near saturation that is absolute, of a rounding of 1 or alpha.
template <Activation Kind, class V, class T>
PYGLOW_HD V activate_backward(V grad, V kept, T parameter) {
  if constexpr (Kind == Activation::none) {
    return grad;
  } else if constexpr (Kind == Activation::relu || Kind == Activation::leaky_relu) {
    return leaky_relu_backward<Kind == Activation::leaky_relu>(grad, kept, parameter);
  } else if constexpr (Kind == Activation::silu) {
    const auto [value, complement, e] = sigmoid(kept);
    return grad * (value * (T(1) + kept * complement));
  } else if constexpr (Kind == Activation::gelu) {
    // The density's exponential is the one in erfc, to be computed once.
    const V z = T(-0.70710678118654752) * kept;
    return grad * (normal_cdf<T>(kept) + kept * (T(0.39894228040143268) * exp(-(z * z))));
  } else if constexpr (Kind == Activation::gelu_tanh) {
    const auto [value, x_slope] = tanh_cdf<T>(kept);
    return grad * (value + x_slope);
  } else if constexpr (Kind == Activation::elu) {
    return kept > T(0) ? grad : grad * (kept + parameter);
  } else if constexpr (Kind == Activation::tanh) {
    return grad * ((T(1) - kept) * (T(1) + kept));
  } else {
    static_assert(Kind == Activation::sigmoid, "an activation without a derivative");
    return grad * (kept * (T(1) - kept));
  }
}

template <Activation Kind>
struct ActivationOf {
  static constexpr Activation value = Kind;
};

// f(ActivationOf<kind>()): the one place where an activation becomes a template argument.
template <class F>
inline void with_activation(Activation kind, const F& f) {
  switch (kind) {
#define PYGLOW_CASE(Kind) \
  case Activation::Kind:  \
    return f(ActivationOf<Activation::Kind>());
    PYGLOW_CASE(none)
    PYGLOW_CASE(relu)
    PYGLOW_CASE(leaky_relu)
    PYGLOW_CASE(silu)
    PYGLOW_CASE(gelu)
    PYGLOW_CASE(gelu_tanh)
    PYGLOW_CASE(elu)
    PYGLOW_CASE(tanh)
    PYGLOW_CASE(sigmoid)
#undef PYGLOW_CASE
  }
}

PYGLOW_MATH_END
