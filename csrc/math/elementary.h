// exp, log, log1p, tanh, atan, expm1, erf and erfc of scalars (from the platform's library) and of GCC/Clang vectors
// (branch-free here), and the sigmoid of both. Error bounds of the float vector forms, measured against float64 by
// tests/kernels/test_elementary.py: exp 1.5 ulp on [-87, 88], with gradual underflow below and inf above;
// log1p_unit 2.5 ulp on [0, 1]; log 2.5 ulp on normal numbers; tanh 2 ulp; atan 3 ulp; expm1_negative 2 ulp below zero;
// erf 3 ulp; erfc 7 ulp, 5 + x^2 from 1 on. The double forms: exp 1.5 ulp, log1p_unit 2.5 ulp, expm1_negative 2 ulp;
// the others are the library's, lane by lane, since double serves verification. NaN in gives NaN out.
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
PYGLOW_HD float expm1_negative(float x) { return ::expm1f(x); }
PYGLOW_HD double expm1_negative(double x) { return ::expm1(x); }
PYGLOW_HD float erf(float x) { return ::erff(x); }
PYGLOW_HD double erf(double x) { return ::erf(x); }
PYGLOW_HD float erfc(float x) { return ::erfcf(x); }
PYGLOW_HD double erfc(double x) { return ::erfc(x); }
PYGLOW_HD float exp_negative(float x) { return ::expf(x); }
PYGLOW_HD double exp_negative(double x) { return ::exp(x); }
PYGLOW_HD float square_root(float x) { return ::sqrtf(x); }
PYGLOW_HD double square_root(double x) { return ::sqrt(x); }

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

// x = k ln2 + r, |r| <= ln2 / 2.
template <class V, class I>
struct Reduced {
  V expm1;  // exp(r) - 1
  I whole;  // k
};

// Adding 1.5 * 2^23 rounds x / ln2 to the integer k, which then stands in the low bits.
PYGLOW_HD Reduced<VecF, VecI> reduced(VecF x) {
  const VecF magic = VecF{} + 12582912.f;
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
  return {p * (r * r) + r, to_bits(t) - to_bits(magic)};
}

// The same in double, with the Taylor polynomial of degree 13: its remainder is below 5e-18.
PYGLOW_HD Reduced<VecD, VecL> reduced(VecD x) {
  const VecD magic = VecD{} + 6755399441055744.0;
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
  return {p * (r * r) + r, to_bits(t) - to_bits(magic)};
}

PYGLOW_HD VecF square_root(VecF x) {
  for (unsigned i = 0; i < sizeof(VecF) / sizeof(float); ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
PYGLOW_HD VecD square_root(VecD x) {
  for (unsigned i = 0; i < sizeof(VecD) / sizeof(double); ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

// exp(x) = 2^k exp(r). 2^k is applied as two factors, so that the result underflows gradually and overflows to inf.
PYGLOW_HD VecF exp(VecF x) {
  x = x < -110.f ? VecF{} - 110.f : x;
  x = x > 100.f ? VecF{} + 100.f : x;
  const auto [expm1, whole] = reduced(x);
  const VecI half = whole >> 1;
  return (expm1 + 1.f) * from_bits((half + 127) << 23) * from_bits((whole - half + 127) << 23);
}
PYGLOW_HD VecD exp(VecD x) {
  x = x < -760.0 ? VecD{} - 760.0 : x;
  x = x > 720.0 ? VecD{} + 720.0 : x;
  const auto [expm1, whole] = reduced(x);
  const VecL half = whole >> 1;
  return (expm1 + 1.0) * from_bits((half + 1023) << 52) * from_bits((whole - half + 1023) << 52);
}

// exp(x) for x <= 0 in fewer instructions; from -80 on it is exp(-80), 2e-35.
PYGLOW_HD VecF exp_negative(VecF x) {
  const auto [expm1, whole] = reduced(x < -80.f ? VecF{} - 80.f : x);
  const VecF power = from_bits((whole + 127) << 23);
  return power * expm1 + power;
}
PYGLOW_HD VecD exp_negative(VecD x) {
  const auto [expm1, whole] = reduced(x < -80.0 ? VecD{} - 80.0 : x);
  const VecD power = from_bits((whole + 1023) << 52);
  return power * expm1 + power;
}

// exp(x) - 1 for x <= 0 as 2^k (exp(r) - 1) + (2^k - 1). Near zero k is 0 and the second term too; elsewhere the first
// is less than half of it, so that nothing cancels. From the clamp on the result is -1.
PYGLOW_HD VecF expm1_negative(VecF x) {
  const auto [expm1, whole] = reduced(x < -80.f ? VecF{} - 80.f : x);
  const VecF power = from_bits((whole + 127) << 23);
  return power * expm1 + (power - 1.f);
}
PYGLOW_HD VecD expm1_negative(VecD x) {
  const auto [expm1, whole] = reduced(x < -80.0 ? VecD{} - 80.0 : x);
  const VecD power = from_bits((whole + 1023) << 52);
  return power * expm1 + (power - 1.0);
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

// erfc(a) / exp(-a^2) for a >= 0, to 10, where erfc underflows: (a + 3) times it is a polynomial in (a - 3) / (a + 3),
// fitted to a relative error of 2e-8.
PYGLOW_HD VecF erfcx(VecF a) {
  a = a > 16.f ? VecF{} + 16.f : a;  // inf / inf
  const VecF t = 1.f / (a + 3.f);
  const VecF q = (a - 3.f) * t;
  VecF p = VecF{} - 3.25952307e-4f;
  p = p * q - 4.84371965e-4f;
  p = p * q + 3.08006559e-3f;
  p = p * q - 1.22581946e-3f;
  p = p * q - 2.68395878e-2f;
  p = p * q + 1.19528964e-1f;
  p = p * q - 3.10466051e-1f;
  p = p * q + 5.90228319e-1f;
  p = p * q - 8.83394480e-1f;
  p = p * q + 1.07400692f;
  return p * t;
}

// The tail of erfc keeps its relative accuracy but for the rounding of x^2.
PYGLOW_HD VecF erfc(VecF x) {
  const VecF tail = exp(-(x * x)) * erfcx(x < 0.f ? -x : x);
  return x < 0.f ? 2.f - tail : tail;
}

// A polynomial where 1 - erfc would cancel, fitted to a relative error of 7e-8 of erf(x) / x - 1.
PYGLOW_HD VecF erf(VecF x) {
  const VecF z = x * x;
  VecF p = VecF{} - 6.53523603e-4f;
  p = p * z + 5.08513022e-3f;
  p = p * z - 2.68208068e-2f;
  p = p * z + 1.12831131e-1f;
  p = p * z - 3.76126021e-1f;
  p = p * z + 1.28379170e-1f;
  const VecF near = p * x + x;
  const VecF a = x < 0.f ? -x : x;
  const VecF far = 1.f - exp(-z) * erfcx(a);
  return a < 0.8f ? near : (x < 0.f ? -far : far);
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
PYGLOW_HD VecD erf(VecD x) {
  for (unsigned i = 0; i < sizeof(VecD) / sizeof(double); ++i) x[i] = ::erf(x[i]);
  return x;
}
PYGLOW_HD VecD erfc(VecD x) {
  for (unsigned i = 0; i < sizeof(VecD) / sizeof(double); ++i) x[i] = ::erfc(x[i]);
  return x;
}
#endif  // PYGLOW_VECTOR_BYTES

template <class V>
struct Sigmoid {
  V value;       // 1 / (1 + exp(-x))
  V complement;  // 1 - value, and no difference: accurate where it is small
  V e;           // exp(-|x|)
};

// With e = exp(-|x|) the sigmoid is 1 / (1 + e) or e / (1 + e), within 3 epsilon where exp is within 1.5 ulp.
template <class V>
PYGLOW_HD Sigmoid<V> sigmoid(V x) {
  const V e = exp(x < 0.f ? x : -x);
  const V near_one = 1.f / (1.f + e), near_zero = e * near_one;
  return {x < 0.f ? near_zero : near_one, x < 0.f ? near_one : near_zero, e};
}

PYGLOW_MATH_END
