// The variants of the coupling and of its net, as plain values that cross every boundary.
#pragma once
#include "math/host_device.h"

namespace pyglow {

// none: additive coupling. scaled_sigmoid is sigmoid with a factor other than 1, or with eps > 0: a map of its own, so
// that the plain sigmoid is as fast as it can be.
enum class ScaleMap : int { none = 0, sigmoid = 1, scaled_sigmoid = 2, exp = 3, tanh = 4, atan = 5 };

template <class T>
struct ScaleParams {
  T bias;               // factor sigmoid(raw + bias) + eps
  T eps;                //
  T clamp;              // exp(clamp tanh(raw / clamp)), exp(clamp 0.636 atan(raw))
  T factor = T(1);      // of the sigmoid maps
  T log_factor = T(0);  // its logarithm
};

// Elements of the coupling net's output: the flow state's own, or 16-bit.
enum class NetType : int { state = 0, bfloat16 = 1, float16 = 2 };

enum class Order : int { shift_scale = 0, scale_shift = 1 };

// How the numbers of a spline become its knots, and what is outside of them; in the order of SPLINE_FORMS and TAILS in
// pyglow_fast/reference.py.
enum class SplineForm : int { softmax = 0, softclip = 1 };
enum class SplineTails : int { linear = 0, circular = 1, none = 2 };

// An element has so many numbers: K of the widths, K of the heights, then those of the derivatives.
PYGLOW_HD constexpr int spline_numbers(int bins, SplineTails tails) {
  return 3 * bins + (tails == SplineTails::linear ? -1 : tails == SplineTails::circular ? 0 : 1);
}

template <class T>
struct SplineParams {
  int bins;  // 2 to max_spline_bins
  SplineTails tails;
  T low, high;                          // the spline maps [low, high] to itself
  T gain;                               // softmax: of the numbers of widths and heights
  T min_width, min_height;              // softmax: shares of the whole
  T min_derivative, derivative_offset;  // softmax: min_derivative + softplus(number + derivative_offset)
  T rate;                               // softclip: numbers a become a / (1 + rate |a|), of widths with twice the rate
};
constexpr int max_spline_bins = 64;

// Of a coupling net's hidden layers, in the order of ACTIVATIONS in pyglow_fast/reference.py.
enum class Activation : int {
  none = 0,
  relu = 1,
  leaky_relu = 2,
  silu = 3,
  gelu = 4,
  gelu_tanh = 5,
  elu = 6,
  tanh = 7,
  sigmoid = 8
};

// Whether the derivative takes the argument. That of the others is a function of the result.
PYGLOW_HD constexpr bool keeps_input(Activation kind) {
  return kind == Activation::silu || kind == Activation::gelu || kind == Activation::gelu_tanh;
}

}  // namespace pyglow
