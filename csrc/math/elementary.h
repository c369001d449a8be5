// exp, log, log1p, tanh and atan of scalars (from the platform's library) and of GCC/Clang vectors (branch-free here).
// Error bounds of the float vector forms, measured against float64 by tests/test_elementary.py: exp 1.5 ulp on [-87,
// 88], with gradual underflow below and inf above; log1p_unit 2.5 ulp on [0, 1]; log 2.5 ulp on normal numbers; tanh 2
// ulp; atan 3 ulp. The double forms: exp 1.5 ulp, log1p_unit 2.5 ulp; log, tanh and atan are the library's, lane by
// lane, since double serves verification. NaN in gives NaN out.
#pragma once
#include <math.h>
#include <stdint.h>

#include "math/host_device.h"

PYGLOW_MATH_BEGIN

PYGLOW_HD float exp(float x) { return ::expf(x); }
PYGLOW_HD double exp(double x) { return ::exp(x); }
PYGLOW_HD float log(float x) { return ::logf(x); }
PYGLOW_HD double log(double x) { return ::log(x); }
PYGLOW_HD float log1p_unit(float x) { return ::log1pf(x); }
PYGLOW_HD double log1p_unit(double x) { return ::log1p(x); }
PYGLOW_HD float tanh(float x) { return ::tanhf(x); }
PYGLOW_HD double tanh(double x) { return ::tanh(x); }
PYGLOW_HD float atan(float x) { return ::atanf(x); }
PYGLOW_HD double atan(double x) { return ::atan(x); }

#ifdef PYGLOW_VECTOR_BYTES
// V is T __attribute__((vector_size(PYGLOW_VECTOR_BYTES))); M the integer vector that comparisons of V give.
using VecF = float __attribute__((vector_size(PYGLOW_VECTOR_BYTES)));
using VecD = double __attribute__((vector_size(PYGLOW_VECTOR_BYTES)));
using VecI = int32_t __attribute__((vector_size(PYGLOW_VECTOR_BYTES)));
using VecL = int64_t __attribute__((vector_size(PYGLOW_VECTOR_BYTES)));

PYGLOW_HD VecF from_bits(VecI bits) {
  VecF x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
PYGLOW_HD VecD from_bits(VecL bits) {
  VecD x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
PYGLOW_HD VecI to_bits(VecF x) {
  VecI bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
PYGLOW_HD VecL to_bits(VecD x) {
  VecL bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

// exp(x) = 2^k exp(r), |r| <= ln2 / 2. Adding 1.5 * 2^23 rounds x / ln2 to the integer k, which then stands in the low
// bits. 2^k is applied as two factors, so that the result underflows gradually and overflows to inf.
PYGLOW_HD VecF exp(VecF x) {
  const VecF magic = VecF{} + 12582912.f;
  x = x < -110.f ? VecF{} - 110.f : x;
  x = x > 100.f ? VecF{} + 100.f : x;
  const VecF t = x * 1.44269504f + magic;
  const VecF k = t - magic;
  VecF r = x - k * 0.693145752f;
  r = r - k * 1.42860677e-6f;
  VecF p = VecF{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const VecI whole = to_bits(t) - to_bits(magic);
  const VecI half = whole >> 1;
  return p * from_bits((half + 127) << 23) * from_bits((whole - half + 127) << 23);
}

// The same in double, with the Taylor polynomial of degree 13: its remainder is below 5e-18.
PYGLOW_HD VecD exp(VecD x) {
  const VecD magic = VecD{} + 6755399441055744.0;
  x = x < -760.0 ? VecD{} - 760.0 : x;
  x = x > 720.0 ? VecD{} + 720.0 : x;
  const VecD t = x * 1.4426950408889634 + magic;
  const VecD k = t - magic;
  VecD r = x - k * 6.93145751953125e-1;
  r = r - k * 1.42860682030941723212e-6;
  VecD p = VecD{} + 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  const VecL whole = to_bits(t) - to_bits(magic);
  const VecL half = whole >> 1;
  return p * from_bits((half + 1023) << 52) * from_bits((whole - half + 1023) << 52);
}

// log(1 + e) = 2 atanh(q), q = e / (2 + e), for e in [0, 1]: q <= 1/3, so the odd series needs no range reduction and
// keeps its relative accuracy at small e.
template <class V, class T, int Terms>
PYGLOW_HD V log1p_series(V e) {
  const V q = e / (e + T(2));
  const V z = q * q;
  V p = V{} + T(1) / T(2 * Terms + 1);
#pragma GCC unroll 32
  for (int n = Terms - 1; n >= 1; --n) p = p * z + T(1) / T(2 * n + 1);
  return T(2) * (q + q * (z * p));
}
PYGLOW_HD VecF log1p_unit(VecF e) { return log1p_series<VecF, float, 7>(e); }
PYGLOW_HD VecD log1p_unit(VecD e) { return log1p_series<VecD, double, 17>(e); }

// log(x) = e ln2 + log(m), m in [sqrt(1/2), sqrt(2)), the latter as 2 atanh((m - 1) / (m + 1)).
PYGLOW_HD VecF log(VecF x) {
  VecI bits = to_bits(x);
  const VecI exponent = (bits - 0x3f3504f3) >> 23;
  const VecF m = from_bits(bits - (exponent << 23));
  const VecF q = (m - 1.f) / (m + 1.f);
  const VecF z = q * q;
  VecF p = VecF{} + 1.f / 9.f;
  p = p * z + 1.f / 7.f;
  p = p * z + 1.f / 5.f;
  p = p * z + 1.f / 3.f;
  const VecF e = __builtin_convertvector(exponent, VecF);
  const VecF normal = e * 0.693147181f + 2.f * (q + q * (z * p));
  return x > 0.f ? normal : (x == 0.f ? VecF{} - __builtin_inff() : VecF{} + __builtin_nanf(""));
}

// Cephes: a polynomial where 1 - exp(-2|x|) would cancel, the quotient of exponentials elsewhere.
PYGLOW_HD VecF tanh(VecF x) {
  const VecF a = x < 0.f ? -x : x;
  const VecF z = x * x;
  VecF p = VecF{} - 5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const VecF near = p * z * x + x;
  const VecF e = exp(-2.f * a);
  const VecF far = (1.f - e) / (1.f + e);
  return a < 0.625f ? near : (x < 0.f ? -far : far);
}

PYGLOW_HD VecF atan(VecF x) {
  const VecF a = x < 0.f ? -x : x;
  const VecI large = a > 2.414213562f, middle = a > 0.4142135624f;
  // pi/2 or pi/4, with what float cannot hold of them: t cancels against it.
  const VecF base = large ? VecF{} + 1.57079637f : (middle ? VecF{} + 0.785398185f : VecF{});
  const VecF rest = large ? VecF{} - 4.37113883e-8f : (middle ? VecF{} - 2.18556941e-8f : VecF{});
  const VecF t = large ? -1.f / a : (middle ? (a - 1.f) / (a + 1.f) : a);
  const VecF z = t * t;
  VecF p = VecF{} + 8.05374449538e-2f;
  p = p * z - 1.38776856032e-1f;
  p = p * z + 1.99777106478e-1f;
  p = p * z - 3.33329491539e-1f;
  const VecF y = base + (t + (p * z * t + rest));
  return x < 0.f ? -y : y;
}

PYGLOW_HD VecD log(VecD x) {
  for (unsigned i = 0; i < sizeof(VecD) / sizeof(double); ++i) x[i] = ::log(x[i]);
  return x;
}
PYGLOW_HD VecD tanh(VecD x) {
  for (unsigned i = 0; i < sizeof(VecD) / sizeof(double); ++i) x[i] = ::tanh(x[i]);
  return x;
}
PYGLOW_HD VecD atan(VecD x) {
  for (unsigned i = 0; i < sizeof(VecD) / sizeof(double); ++i) x[i] = ::atan(x[i]);
  return x;
}
#endif  // PYGLOW_VECTOR_BYTES

PYGLOW_MATH_END
