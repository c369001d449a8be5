// Vectors of the instruction set being compiled. Everything here is inlined or lives in that set's own namespace.
#pragma once
#include <cstdint>

#include "math/elementary.h"

namespace pyglow::cpu::PYGLOW_ISA {

template <class T>
struct Simd;
template <>
struct Simd<float> {
  using Vec = math::VecF;
};
template <>
struct Simd<double> {
  using Vec = math::VecD;
};
template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
constexpr int64_t lanes = PYGLOW_VECTOR_BYTES / sizeof(T);

// Rows of the register block of the C x C product, times two vectors of positions: 24 of 32 registers, or 12 of 16.
constexpr int block_rows = PYGLOW_VECTOR_BYTES == 64 ? 12 : 6;

template <class T>
PYGLOW_HD Vec<T> load(const T* from) {
  Vec<T> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
PYGLOW_HD void store(T* to, Vec<T> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

template <class T>
PYGLOW_HD Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // x - 0 is x for every x, which the compiler knows; -0 + 0 is not -0
}

// The sum of the lanes, in the order of a binary tree: always the same.
template <class T>
PYGLOW_HD T sum_lanes(Vec<T> v) {
  T values[lanes<T>];
  __builtin_memcpy(values, &v, sizeof v);
  for (int64_t half = lanes<T> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) values[i] += values[i + half];
  return values[0];
}

// Lane i of the result is lane index[i] of a and b side by side.
template <class T, class Mask>
PYGLOW_HD Vec<T> shuffle(Vec<T> a, Vec<T> b, Mask index) {
#ifdef __clang__
  Vec<T> out{};
  for (int i = 0; i < static_cast<int>(lanes<T>); ++i)
    out[i] = index[i] < lanes<T> ? a[index[i]] : b[index[i] - lanes<T>];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// v with the lanes from `count` on set to zero.
template <class T>
PYGLOW_HD Vec<T> first_lanes(Vec<T> v, int64_t count) {
  for (int64_t i = count; i < lanes<T>; ++i) v[i] = T(0);
  return v;
}

PYGLOW_HD int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
PYGLOW_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYGLOW_HD int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace pyglow::cpu::PYGLOW_ISA
