// The scale of an affine coupling as a function of the net's raw output.
#pragma once
#include "math/elementary.h"
#include "math/kinds.h"

PYGLOW_MATH_BEGIN

PYGLOW_HD constexpr float largest(float) { return 3.40282347e+38f; }
PYGLOW_HD constexpr double largest(double) { return 1.7976931348623157e+308; }

template <class V>
struct Scale {
  V s;      // the scale
  V log_s;  // its logarithm, formed directly: never the log of an underflowed s
  V slope;  // d log_s / d raw
};

// V a scalar or a vector of T.
template <ScaleMap Map, class V, class T>
PYGLOW_HD Scale<V> scale_of(V raw, const ScaleParams<T>& params) {
  if constexpr (Map == ScaleMap::sigmoid || Map == ScaleMap::scaled_sigmoid) {
    // With e = exp(-|z|): log sigmoid(z) = min(z, 0) - log(1 + e).
    const V z = raw + params.bias;
    const auto [sig, complement, e] = sigmoid(z);
    if constexpr (Map == ScaleMap::sigmoid) {
      return {sig, (z < T(0) ? z : V{}) - log1p_unit(e), complement};
    } else {
      const V scaled = params.factor * sig, s = scaled + params.eps;
      if (params.eps > T(0)) return {s, log(s), scaled * complement / s};
      return {s, params.log_factor + ((z < T(0) ? z : V{}) - log1p_unit(e)), complement};
    }
  } else if constexpr (Map == ScaleMap::exp) {
    // Where s overflows log_s is infinite too, so that log_det, and with it the loss, shows it.
    const V s = exp(raw);
    return {s, s > largest(T(0)) ? s : raw, V{} + T(1)};
  } else if constexpr (Map == ScaleMap::tanh) {
    const V x = raw / params.clamp;
    const V log_s = params.clamp * tanh(x);
    // The slope 1 - tanh^2 cancels in the tails: with e = exp(-2 |x|) it is 4 e / (1 + e)^2.
    const V e = exp(x < T(0) ? x + x : -(x + x));
    return {exp(log_s), log_s, T(4) * e / ((T(1) + e) * (T(1) + e))};
  } else {
    static_assert(Map == ScaleMap::atan, "the additive coupling has no scale");
    constexpr T gain = T(0.636);  // about 2 / pi, so that log_s tends to +-clamp (FrEIA's soft clamp)
    const V log_s = params.clamp * gain * atan(raw);
    return {exp(log_s), log_s, params.clamp * gain / (T(1) + raw * raw)};
  }
}

PYGLOW_MATH_END
