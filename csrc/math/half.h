// The 16-bit formats of a coupling net in lower precision, as bits: conversions without branches, which the compiler
// vectorises on the CPU. Rounding is to nearest, ties to even; infinities, signs and NaN (as some quiet NaN) are kept.
#pragma once
#include <stdint.h>

#include "math/host_device.h"
#include "math/kinds.h"

namespace pyglow {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace pyglow

PYGLOW_MATH_BEGIN

PYGLOW_HD uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
PYGLOW_HD float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// bfloat16 is the upper half of a float.
PYGLOW_HD float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

// A normal number's exponent is moved to the float's upper range, so that infinity and NaN become those of float, and
// multiplied back; a subnormal one is the last digits of a number in [0.5, 0.5 + 2^-14).
PYGLOW_HD float widen(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const float normal = float_of((magnitude << 13) + (224u << 23)) * 1.92592994e-34f;  // 2^-112
  const float subnormal = float_of(magnitude | 0x3f000000u) - 0.5f;
  return float_of(float_bits(magnitude < 0x0400u ? subnormal : normal) | sign);
}

PYGLOW_HD void narrow(float x, BFloat16& y) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, nan = bits >> 16 | 0x0040u;
  y.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

// Adding a power of two that stands 2^13 above the last kept digit (2^-14 at least: subnormal results) makes float's
// own rounding the wanted one. What is too large for float16 becomes infinite in the first product.
PYGLOW_HD void narrow(float x, Float16& y) {
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
  const float scaled = float_of(magnitude) * 5.19229686e+33f * 7.70371978e-34f;  // |x| 2^112 2^-110
  const uint32_t exponent = magnitude & 0x7f800000u;
  const uint32_t power = (exponent > 0x38800000u ? exponent : 0x38800000u) + 0x07800000u;
  const uint32_t sum = float_bits(float_of(power) + scaled);
  const uint32_t rounded = (sum >> 13 & 0x7c00u) + (sum & 0x0fffu);
  y.bits = static_cast<uint16_t>((magnitude > 0x7f800000u ? 0x7e00u : rounded) | (bits >> 16 & 0x8000u));
}

PYGLOW_MATH_END
