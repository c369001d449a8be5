// The diagonal normal distribution, one value at a time.
#pragma once
#include "math/elementary.h"

PYGLOW_MATH_BEGIN

constexpr double half_log_2pi = 0.91893853320467274178;

// log N(z; mean, exp(log_sd)) but for the constant -half_log_2pi.
template <class V>
PYGLOW_HD V gaussian_log_density(V z, V mean, V log_sd) {
  const V d = (z - mean) * exp(-log_sd);
  return d * d * -0.5f - log_sd;
}

template <class V>
struct GaussianGrad {
  V z, mean, log_sd;
};

// Its gradients, times grad.
template <class V>
PYGLOW_HD GaussianGrad<V> gaussian_backward(V z, V mean, V log_sd, V grad) {
  const V inverse_sd = exp(-log_sd);
  const V d = (z - mean) * inverse_sd;
  const V grad_mean = grad * d * inverse_sd;
  return {-grad_mean, grad_mean, grad * (d * d - 1.0f)};
}

// z = mean + exp(log_sd) noise.
template <class V>
PYGLOW_HD V gaussian_value(V noise, V mean, V log_sd) {
  return mean + exp(log_sd) * noise;
}

PYGLOW_MATH_END
