// A monotone rational-quadratic spline (Durkan et al. 2019, "Neural Spline Flows") of one element, its inverse and
// gradients. With theta = (x - x_k) / w_k in bin k, s = h_k / w_k, t = theta (1 - theta), D = s + (d_k + d_(k+1) - 2 s)
// t:
//
//   y = y_k + h_k (s theta^2 + d_k t) / D,   dy/dx = s^2 A / D^2,   A = d_(k+1) theta^2 + 2 s t + d_k (1 - theta)^2
//
// V is a scalar, or a vector whose lanes are elements. `Numbers` gives the numbers of an element, and has two sides,
// those of the widths and of the heights: raw(side, k) is a number, raw(row) any of them by its place, give(row, grad)
// takes its gradient. weight(side, k) is what keep(side, k, weight) was given: a CPU stores it; a thread of a GPU,
// which needs no array so, forms it again from the number and from most[side].
#pragma once
#include "math/elementary.h"
#include "math/kinds.h"

PYGLOW_MATH_BEGIN

constexpr int widths = 0, heights = 1;

template <class V, class T>
PYGLOW_HD V clip_divisor(V raw, T rate) {
  return T(1) + (raw < T(0) ? -raw : raw) * rate;
}

// What the softmax of widths or heights is of, and its slope.
template <SplineForm F, class V, class T>
PYGLOW_HD V spline_logit(V raw, const SplineParams<T>& params) {
  if constexpr (F == SplineForm::softmax) return raw * params.gain;
  return raw / clip_divisor(raw, T(2) * params.rate);
}
template <SplineForm F, class V, class T>
PYGLOW_HD V spline_logit_slope(V raw, const SplineParams<T>& params) {
  if constexpr (F == SplineForm::softmax) return V{} + params.gain;
  const V divisor = clip_divisor(raw, T(2) * params.rate);
  return T(1) / (divisor * divisor);
}

template <class V>
struct KnotDerivative {
  V value, slope;  // the derivative at a knot, and its own by its number
};

// Above 20 softplus is its argument, as torch has it.
template <SplineForm F, class V, class T>
PYGLOW_HD KnotDerivative<V> knot_derivative(V raw, const SplineParams<T>& params) {
  if constexpr (F == SplineForm::softmax) {
    const V z = raw + params.derivative_offset;
    const auto [value, complement, e] = sigmoid(z);
    const V softplus = (z < T(0) ? V{} : z) + log1p_unit(e);
    return {params.min_derivative + (z > T(20) ? z : softplus), z > T(20) ? V{} + T(1) : value};
  } else {
    const V divisor = clip_divisor(raw, params.rate), value = exp(raw / divisor);
    return {value, value / (divisor * divisor)};
  }
}

template <class V>
struct SplineBin {
  V width, height;  // w_k, h_k
  V lower, upper;   // d_k, d_(k+1)
};

template <class V>
struct SplineTerms {
  V s, q, t, d, a;  // s; d_k + d_(k+1) - 2 s; t; D; A
};

template <class V>
PYGLOW_HD SplineTerms<V> spline_terms(V theta, const SplineBin<V>& bin) {
  const V rest = 1.f - theta, t = theta * rest, s = bin.height / bin.width;
  const V q = bin.lower + bin.upper - 2.f * s;
  return {s, q, t, s + q * t, bin.upper * theta * theta + 2.f * s * t + bin.lower * rest * rest};
}

// (y - y_k) D / h_k, and dA / d theta.
template <class V>
PYGLOW_HD V spline_rise(V theta, const SplineTerms<V>& of, const SplineBin<V>& bin) {
  return of.s * theta * theta + bin.lower * of.t;
}
template <class V>
PYGLOW_HD V a_by_theta(V theta, const SplineTerms<V>& of, const SplineBin<V>& bin) {
  return 2.f * (bin.upper * theta + of.s * (1.f - 2.f * theta) - bin.lower * (1.f - theta));
}
template <class V>
PYGLOW_HD V spline_slope(const SplineTerms<V>& of) {
  const V ratio = of.s / of.d;
  return of.a * ratio * ratio;
}

// theta of v = y - y_k: the root of a theta^2 + b theta + c in the form in which nothing cancels, whichever sign b has.
template <class V>
PYGLOW_HD V spline_theta(V v, const SplineBin<V>& bin) {
  const V s = bin.height / bin.width, vq = v * (bin.lower + bin.upper - 2.f * s);
  const V a = bin.height * (s - bin.lower) + vq, b = bin.height * bin.lower - vq, c = -s * v;
  const V square = b * b - 4.f * a * c;
  const V root = square_root(square < 0.f ? V{} : square);
  const auto falls = b < 0.f;
  return (falls ? root - b : 2.f * c) / (falls ? 2.f * a : -b - root);
}

template <class V>
struct SplineGrads {
  V x, left, width, bottom, height, lower, upper;
};

// Gradients of y and of log dy/dx, as a function of all that defines a bin.
template <class V>
PYGLOW_HD SplineGrads<V> spline_grads(V theta, const SplineTerms<V>& of, const SplineBin<V>& bin, V grad_y,
                                      V grad_log_slope) {
  const V rest = 1.f - theta, turn = 1.f - 2.f * theta, over_d = 1.f / of.d, over_a = 1.f / of.a;
  const V r = spline_rise(theta, of, bin) * over_d;  // (y - y_k) / h_k
  const V grad_r = grad_y * bin.height * over_d;
  const V by_d = 2.f * over_d;
  const V r_theta = 2.f * of.s * theta + bin.lower * turn - r * of.q * turn;
  const V a_theta = a_by_theta(theta, of, bin);
  const V grad_theta = grad_r * r_theta + grad_log_slope * (a_theta * over_a - by_d * of.q * turn);
  const V grad_s = grad_r * (theta * theta - r * (1.f - 2.f * of.t)) +
                   grad_log_slope * (2.f / of.s + 2.f * of.t * over_a - by_d * (1.f - 2.f * of.t));
  const V over_width = 1.f / bin.width, grad_x = grad_theta * over_width;
  return {grad_x,
          -grad_x,
          -(grad_theta * theta + grad_s * of.s) * over_width,
          grad_y,
          grad_y * r + grad_s * over_width,
          grad_r * (of.t - r * of.t) + grad_log_slope * (rest * rest * over_a - by_d * of.t),
          -grad_r * r * of.t + grad_log_slope * (theta * theta * over_a - by_d * of.t)};
}

// d log(dy/dx) / dx.
template <class V>
PYGLOW_HD V spline_curvature(V theta, const SplineTerms<V>& of, const SplineBin<V>& bin) {
  return (a_by_theta(theta, of, bin) / of.a - 2.f * of.q * (1.f - 2.f * theta) / of.d) / bin.width;
}

// A sum and, beside it, that of its roundings (Knuth's two-sum), so that many small terms cost one. A term waits for
// one addition of the term before, where Kahan's sum waits for four.
template <class V>
struct LongSum {
  V value, rest;  // value + rest is the sum

  PYGLOW_HD void add(V term) {
    const V next = value + term, taken = next - value;
    rest += (value - (next - taken)) + (term - taken);
    value = next;
  }
};

// Which share of the interval the bin takes: of K weights, whose sum is `sum`, its own, and that of the bins before.
template <class V>
struct BinShare {
  V low, rest;  // its lower edge is low + rest
  V size;       // how wide or high it is
  V weight, before, sum;

  PYGLOW_HD V beyond(V value) const { return (value - low) - rest; }  // the lower edge
  PYGLOW_HD V at(V beyond) const { return low + (beyond + rest); }
};

// The bin of a value, with all that a gradient of the numbers takes.
template <class V>
struct SplinePlace {
  SplineBin<V> bin;
  V index;  // k
  BinShare<V> shares[2];
  V lower_slope, upper_slope;  // of bin.lower and bin.upper by their numbers
  V bad;                       // 0, or NaN where a number is not finite
};

// The sum of a side's weights exp(logit - largest logit), each of which is kept.
template <SplineForm F, class V, class T, class Numbers>
PYGLOW_HD V weigh(Numbers& numbers, int side, const SplineParams<T>& params, V& bad) {
  V most = spline_logit<F>(numbers.raw(side, 0), params);
  for (int k = 1; k < params.bins; ++k) {
    const V logit = spline_logit<F>(numbers.raw(side, k), params);
    most = logit > most ? logit : most;
  }
  numbers.most[side] = most;
  LongSum<V> sum{};
  for (int k = 0; k < params.bins; ++k) {
    const V raw = numbers.raw(side, k), weight = exp_negative(spline_logit<F>(raw, params) - most);
    numbers.keep(side, k, weight);
    sum.add(weight);
    bad += raw * T(0);
  }
  return sum.value + sum.rest;
}

// The least share of the interval that a bin takes, and how much of it is shared out by a weight of 1.
template <SplineForm F, class T>
PYGLOW_HD T least_share(int side, const SplineParams<T>& params) {
  if constexpr (F == SplineForm::softclip) return T(0);
  return side == widths ? params.min_width : params.min_height;
}
template <SplineForm F, class V, class T>
PYGLOW_HD V weight_unit(int side, V sum, const SplineParams<T>& params) {
  const T least = least_share<F>(side, params);
  return (params.high - params.low) * (T(1) - least * static_cast<T>(params.bins)) / sum;
}

// The last bin of a side of which chosen(k, lower edge) holds; the first one need not be chosen. index is its number.
template <SplineForm F, class V, class T, class Numbers, class Chosen>
PYGLOW_HD BinShare<V> bin_share(const Numbers& numbers, int side, V sum, const SplineParams<T>& params, V& index,
                                const Chosen& chosen) {
  const T least = least_share<F>(side, params) * (params.high - params.low);
  const V unit = weight_unit<F>(side, sum, params);
  LongSum<V> edge{V{} + params.low, V{}}, before{};
  V low = edge.value, rest{}, own{}, behind{}, place{};
  for (int k = 0; k < params.bins; ++k) {
    const V weight = numbers.weight(side, k);
    if (k == 0) {
      own = weight;
    } else {
      const auto here = chosen(static_cast<T>(k), edge.value);
      low = here ? edge.value : low;
      rest = here ? edge.rest : rest;
      own = here ? weight : own;
      behind = here ? before.value : behind;
      place = here ? V{} + static_cast<T>(k) : place;
    }
    before.add(weight);
    edge.add(least + weight * unit);
  }
  index = place;
  // The last edge misses the end by roundings of the unit, which all bins share: they are given back.
  const V missing = ((params.high - edge.value) - edge.rest) / (params.high - params.low);
  const V size = least + own * unit;
  return {low, rest + ((low - params.low) + rest) * missing, size + size * missing, own, behind, sum};
}

// theta of a value, an x or a y, and what the spline or its inverse makes of it.
template <bool FromY, class V>
PYGLOW_HD V place_theta(V value, const SplinePlace<V>& place) {
  if constexpr (FromY) return spline_theta(place.shares[heights].beyond(value), place.bin);
  return place.shares[widths].beyond(value) / place.bin.width;
}
// A rounding must not lead out of the interval, where another slope, or none, goes with it.
template <bool FromY, class V, class T>
PYGLOW_HD V place_other(V theta, const SplineTerms<V>& of, const SplinePlace<V>& place, const SplineParams<T>& params) {
  const V found = FromY ? place.shares[widths].at(theta * place.bin.width)
                        : place.shares[heights].at(place.bin.height * spline_rise(theta, of, place.bin) / of.d);
  const V above = found < params.low ? V{} + params.low : found;
  return above > params.high ? V{} + params.high : above;
}

// The place of a value on one side, the widths' where it is an x and the heights' where it is a y.
template <SplineForm F, class V, class T, class Numbers>
PYGLOW_HD SplinePlace<V> spline_place(V value, int side, Numbers& numbers, const SplineParams<T>& params) {
  SplinePlace<V> place{};
  V sums[2] = {weigh<F>(numbers, widths, params, place.bad), weigh<F>(numbers, heights, params, place.bad)};
  place.shares[side] =
      bin_share<F>(numbers, side, sums[side], params, place.index, [&](T, const V& edge) { return value >= edge; });
  const V index = place.index;
  V same{};
  place.shares[1 - side] =
      bin_share<F>(numbers, 1 - side, sums[1 - side], params, same, [&](T k, const V&) { return index == k; });
  // Of the knots 0 .. K the first and the last have no number where the tails are linear, and share one on a circle.
  const bool linear = params.tails == SplineTails::linear;
  const int first = 2 * params.bins, count = spline_numbers(params.bins, params.tails) - first;
  V lower = numbers.raw(first), upper = lower;
  for (int j = 0; j < count; ++j) {
    const V raw = numbers.raw(first + j);
    const T knot = static_cast<T>(j + (linear ? 1 : 0));
    lower = index == knot ? raw : lower;
    upper = index + T(1) == knot ? raw : upper;
    place.bad += raw * T(0);
  }
  KnotDerivative<V> left = knot_derivative<F>(lower, params), right = knot_derivative<F>(upper, params);
  if (linear) {
    const auto begins = index == T(0), ends = index == static_cast<T>(params.bins - 1);
    left = {begins ? V{} + T(1) : left.value, begins ? V{} : left.slope};
    right = {ends ? V{} + T(1) : right.value, ends ? V{} : right.slope};
  }
  place.bin = {place.shares[widths].size, place.shares[heights].size, left.value, right.value};
  place.lower_slope = left.slope;
  place.upper_slope = right.slope;
  return place;
}

// Where the spline is, lanes of a mask; and the value, or one that is inside.
template <class V, class T>
PYGLOW_HD auto inside_spline(V value, const SplineParams<T>& params) {
  return (value >= params.low) & (value <= params.high);
}
template <class V, class T>
PYGLOW_HD V tail_value(V value, const SplineParams<T>& params) {
  return params.tails == SplineTails::none ? value * T(0) + T(::nanf("")) : value;
}

template <class V>
struct SplineResult {
  V y, log_slope;
};

template <SplineForm F, bool Inverse, class V, class T, class Numbers>
PYGLOW_HD SplineResult<V> spline_result(V value, Numbers& numbers, const SplineParams<T>& params) {
  const auto inside = inside_spline(value, params);
  const V at = inside ? value : V{} + params.low;
  const SplinePlace<V> place = spline_place<F>(at, Inverse ? heights : widths, numbers, params);
  const V theta = place_theta<Inverse>(at, place);
  const SplineTerms<V> terms = spline_terms(theta, place.bin);
  const V found = place_other<Inverse>(theta, terms, place, params);
  const V log_slope = log(spline_slope(terms));
  return {(inside ? found : tail_value(value, params)) + place.bad,
          (inside ? (Inverse ? -log_slope : log_slope) : V{}) + place.bad};
}

template <class V>
struct SplineBackward {
  V grad_value, recovered;
};

// Gradients of the result and its log-slope; those of the numbers are given to numbers.give(row, gradient). FromY: the
// value is a y, and x is found first. Of an inverse x(y) and l = -log dy/dx the gradients are, by the implicit
// function, those of y and log dy/dx, with -(grad_x - grad_l d log(dy/dx)/dx) / (dy/dx) and -grad_l.
template <SplineForm F, bool Inverse, bool FromY, class V, class T, class Numbers>
PYGLOW_HD SplineBackward<V> spline_backward(V value, V grad, V grad_log_slope, Numbers& numbers,
                                            const SplineParams<T>& params) {
  const auto inside = inside_spline(value, params);
  const V at = inside ? value : V{} + params.low;
  const SplinePlace<V> place = spline_place<F>(at, FromY ? heights : widths, numbers, params);
  const SplineBin<V>& bin = place.bin;
  const V theta = place_theta<FromY>(at, place);
  const SplineTerms<V> terms = spline_terms(theta, bin);
  const V other = place_other<FromY>(theta, terms, place, params);
  const V tail = tail_value(value, params);
  V grad_y = grad, grad_l = grad_log_slope;
  if constexpr (Inverse) {
    grad_y = (grad_l * spline_curvature(theta, terms, bin) - grad) / spline_slope(terms);
    grad_l = -grad_l;
  }
  const SplineGrads<V> of = spline_grads(theta, terms, bin, inside ? grad_y : V{}, inside ? grad_l : V{});
  const V edges[2] = {of.left, of.bottom}, sizes[2] = {of.width, of.height};
  const V index = place.index;
  for (int side = 0; side < 2; ++side) {
    const BinShare<V>& share = place.shares[side];
    const V unit = weight_unit<F>(side, share.sum, params);
    const V mean = (edges[side] * share.before + sizes[side] * share.weight) / share.sum;
    for (int k = 0; k < params.bins; ++k) {
      const V knot = V{} + static_cast<T>(k);
      const V own = knot < index ? edges[side] : (knot == index ? sizes[side] : V{});
      const V slope = spline_logit_slope<F>(numbers.raw(side, k), params);
      numbers.give(side * params.bins + k, numbers.weight(side, k) * unit * (own - mean) * slope);
    }
  }
  const bool linear = params.tails == SplineTails::linear, circular = params.tails == SplineTails::circular;
  const int first = 2 * params.bins, count = spline_numbers(params.bins, params.tails) - first;
  const V lower = of.lower * place.lower_slope, upper = of.upper * place.upper_slope;
  for (int j = 0; j < count; ++j) {
    const T knot = static_cast<T>(j + (linear ? 1 : 0));
    V own = index == knot ? lower : V{};
    own += index + T(1) == knot ? upper : V{};
    if (circular && j == 0) own += index == static_cast<T>(params.bins - 1) ? upper : V{};
    numbers.give(first + j, own);
  }
  const V inner = Inverse ? -grad_y : of.x, outer = params.tails == SplineTails::none ? tail : grad;
  return {(inside ? inner : outer) + place.bad, (inside ? other : tail) + place.bad};
}

template <SplineForm F, bool Inverse>
struct SplineVariant {
  static constexpr SplineForm form = F;
  static constexpr bool inverse = Inverse;
};

// Calls f(SplineVariant<...>()): the one place where the form and the direction become template arguments.
template <class F>
auto with_spline(SplineForm form, bool inverse, const F& f) {
  if (form == SplineForm::softmax)
    return inverse ? f(SplineVariant<SplineForm::softmax, true>()) : f(SplineVariant<SplineForm::softmax, false>());
  return inverse ? f(SplineVariant<SplineForm::softclip, true>()) : f(SplineVariant<SplineForm::softclip, false>());
}

PYGLOW_MATH_END
