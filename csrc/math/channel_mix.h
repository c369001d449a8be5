// The channel mixing at one position: u[o] = c[o] + sum_i M[o, i] x[i], added up in the order of i; or where M has one
// element in each row and column, u[o] = c[o] + scale[o] x[index[o]].
#pragma once
#include "math/host_device.h"

PYGLOW_MATH_BEGIN

// One term of the sum; V a scalar or a vector of T.
template <class V, class T>
PYGLOW_HD V mix_term(V sum, T weight, V x) {
  return sum + weight * x;
}

// What enters the product: x, or x - c for x = M^-1 (u - c), where c is taken off first so that a large c does not
// cancel.
template <class V, class T>
PYGLOW_HD V centred(V x, T center) {
  return x - center;
}

// A row of a matrix that has one element: what is gathered, scaled and moved.
template <class V, class T>
PYGLOW_HD V gathered(V x, T scale, T offset) {
  return x * scale + offset;
}

PYGLOW_MATH_END
