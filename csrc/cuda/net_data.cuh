// Loads and stores of what the coupling net gives and of the gradient for it: elements of T, or 16-bit ones for T =
// float. The type is the same for a whole launch, so that a branch on it costs little, while a kernel for each would
// triple their number. A 16-bit unit is 8 bytes where a unit of T is 16.
#pragma once
#include <type_traits>

#include "cuda/device.cuh"
#include "math/half.h"

namespace pyglow::cuda {

template <class T>
struct Single {
  T v[1];
};
template <class T, bool Vector>
using Unit = std::conditional_t<Vector, Vec<T>, Single<T>>;
template <class T, bool Vector>
constexpr int unit_width = Vector ? width<T> : 1;

// The positions at p that a thread handles at a time: `width` in the vector path, else one.
template <bool Vector, class T>
__device__ __forceinline__ Unit<T, Vector> load_unit(const T* p) {
  if constexpr (Vector)
    return load_vector(p);
  else
    return {{*p}};
}
// The same at p of a tensor without vector columns, such as a channels-last one beside a state that has them: a number
// at a time. The others of their sectors are other rows', and wait in the L1.
template <bool Vector, class T>
__device__ __forceinline__ Unit<T, Vector> load_any(const Strided<const T>& x, bool columns, const T* p) {
  if (!Vector || columns) return load_unit<Vector>(p);
  Unit<T, Vector> unit = {};
#pragma unroll
  for (int i = 0; i < unit_width<T, Vector>; ++i) unit.v[i] = p[i * x.position];
  return unit;
}
template <bool Vector, class T>
__device__ __forceinline__ void store_unit(T* p, const Unit<T, Vector>& unit) {
  if constexpr (Vector)
    store_vector(p, unit);
  else
    *p = unit.v[0];
}

struct alignas(8) Bits64 {
  uint32_t low, high;
};

// What lies at element `at`, to be widened after the loads of other tensors have been issued too. 16-bit elements stand
// as bits in the first places of the unit.
template <class T, bool Vector>
__device__ __forceinline__ Unit<T, Vector> fetch_net(const void* data, NetType type, int64_t at) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (type != NetType::state) {
      const uint16_t* const p = static_cast<const uint16_t*>(data) + at;
      Unit<T, Vector> unit = {};
      if constexpr (Vector) {
        const Bits64 bits = *static_cast<const Bits64*>(__builtin_assume_aligned(p, 8));
        unit.v[0] = math::float_of(bits.low);
        unit.v[1] = math::float_of(bits.high);
      } else {
        unit.v[0] = math::float_of(*p);
      }
      return unit;
    }
  }
  const T* const p = static_cast<const T*>(data) + at;
  if constexpr (Vector)
    return load_vector(p);
  else
    return {{*p}};
}

template <class Half, int N>
__device__ __forceinline__ void widen_bits(float (&v)[N]) {
  if constexpr (N == 1) {
    v[0] = math::widen(Half{static_cast<uint16_t>(math::float_bits(v[0]))});
  } else {
    const uint32_t low = math::float_bits(v[0]), high = math::float_bits(v[1]);
    v[0] = math::widen(Half{static_cast<uint16_t>(low)});
    v[1] = math::widen(Half{static_cast<uint16_t>(low >> 16)});
    v[2] = math::widen(Half{static_cast<uint16_t>(high)});
    v[3] = math::widen(Half{static_cast<uint16_t>(high >> 16)});
  }
}

// The numbers of units that fetch_net gave.
template <class... Units>
__device__ __forceinline__ void widen_net(NetType type, Units&... units) {
  if constexpr ((std::is_same_v<std::remove_reference_t<decltype(units.v[0])>, float> && ...)) {
    if (type == NetType::bfloat16)
      (widen_bits<BFloat16>(units.v), ...);
    else if (type == NetType::float16)
      (widen_bits<Float16>(units.v), ...);
  }
}

__device__ __forceinline__ uint32_t narrow_bits(float x, NetType type) {
  BFloat16 b;
  Float16 f;
  math::narrow(x, b);
  math::narrow(x, f);
  return type == NetType::bfloat16 ? b.bits : f.bits;
}

template <bool Vector, class U>
__device__ __forceinline__ void store_net(void* data, NetType type, int64_t at, const U& unit) {
  using T = std::remove_cv_t<std::remove_reference_t<decltype(unit.v[0])>>;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (type != NetType::state) {
      uint16_t* const p = static_cast<uint16_t*>(data) + at;
      if constexpr (Vector) {
        const uint2 bits = make_uint2(narrow_bits(unit.v[0], type) | narrow_bits(unit.v[1], type) << 16,
                                      narrow_bits(unit.v[2], type) | narrow_bits(unit.v[3], type) << 16);
        store_whole(reinterpret_cast<uint2*>(p), bits);
      } else {
        *p = static_cast<uint16_t>(narrow_bits(unit.v[0], type));
      }
      return;
    }
  }
  T* const p = static_cast<T*>(data) + at;
  if constexpr (Vector)
    store_vector(p, unit);
  else
    *p = unit.v[0];
}

template <class T>
int64_t net_bytes(NetType type) {
  return type == NetType::state ? sizeof(T) : sizeof(uint16_t);
}

// Whether units of `width` elements may begin at multiples of `width` from there.
template <class T>
bool aligned_net(const void* data, NetType type) {
  return reinterpret_cast<uintptr_t>(data) % (width<T> * net_bytes<T>(type)) == 0;
}

// has_vector_columns of tile.cuh, for the net's output.
template <class T, class Data>
bool has_vector_net(const NetTensor<Data>& x, int64_t positions) {
  return x.position == 1 && positions % width<T> == 0 && x.sample % width<T> == 0 && x.channel % width<T> == 0 &&
         aligned_net<T>(x.data, x.type);
}

}  // namespace pyglow::cuda
