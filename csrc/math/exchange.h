// The inverse of a matrix by exchange steps (Gauss-Jordan elimination; Stiefel 1963). In y = A x one y_p and one x_k
// change places:
//
//   x_k = (y_p - sum_j a_pj x_j) / a_pk,   y_i = a_ik x_k + sum_j a_ij x_j.
//
// After a step for each column the table is that of x = A^-1 y, its rows and columns in the order of the pivots. p is
// the row, of those not yet exchanged, with the largest |a_pk|. Panels of columns are exchanged at a time, first within
// the panel, which then holds, with P the rows of its pivots and K its columns, A_PK^-1 and A_IK A_PK^-1; all other
// columns follow by one product each: A_Pj becomes -A_PK^-1 A_Pj, and A_Ij becomes A_Ij - A_IK A_PK^-1 A_Pj.
#pragma once
#include <math.h>

#include "math/host_device.h"

PYGLOW_MATH_BEGIN

constexpr int exchange_panel = 8;  // columns

// How large a value is as a pivot. NaN is the largest, so that it is met and not passed over.
PYGLOW_HD double pivot_size(double value) {
  const double size = ::fabs(value);
  return size >= 0 ? size : static_cast<double>(INFINITY);
}

// Whether a pivot of that size can be divided by; else the matrix is singular, or not finite, and so its inverse is
// NaN.
PYGLOW_HD bool is_pivot(double size) { return size > 0 && size < static_cast<double>(INFINITY); }

// log|det| of a matrix in which such a pivot was met.
PYGLOW_HD double log_det_without(double size) {
  return size == 0 ? -static_cast<double>(INFINITY) : static_cast<double>(NAN);
}

// What the pivot's own row becomes, by its reciprocal; in the column of the pivot it is the reciprocal itself.
PYGLOW_HD double exchanged_pivot_row(double value, double reciprocal) { return -value * reciprocal; }

PYGLOW_MATH_END
