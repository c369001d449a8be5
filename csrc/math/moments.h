// Mean and sum of squared deviations of a set, and of the union of two sets.
#pragma once
#include "math/host_device.h"

PYGLOW_MATH_BEGIN

struct Moments {
  double count, mean, m2;  // m2: sum of (x - mean)^2
};

// Of `count` values whose deviations from `pivot`, their mean but for rounding, sum up to `rest` and their squares to
// `squares`. What rounding left goes into both results, so that m2 is about the mean that is returned.
template <class T>
PYGLOW_HD Moments moments_about(T pivot, T count, T rest, T squares) {
  const T shift = rest / count;
  return {static_cast<double>(count), static_cast<double>(pivot) + static_cast<double>(shift),
          static_cast<double>(squares - rest * shift)};
}

// Chan, Golub & LeVeque 1983: no cancellation, whatever the means.
PYGLOW_HD Moments merge(const Moments& a, const Moments& b) {
  if (b.count == 0) return a;
  if (a.count == 0) return b;
  const double count = a.count + b.count, delta = b.mean - a.mean;
  return {count, a.mean + delta * (b.count / count), a.m2 + b.m2 + delta * delta * (a.count * (b.count / count))};
}

PYGLOW_MATH_END
