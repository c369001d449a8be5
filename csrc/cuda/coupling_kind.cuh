// How the coupling's variants become template arguments, and how the two halves of the channels are walked.
#pragma once
#include "cuda/device.cuh"
#include "math/coupling.h"
#include "math/scale_map.h"

namespace pyglow::cuda {

template <ScaleMap Map, Order O, bool Inverse>
struct Kind {
  static constexpr ScaleMap map = Map;
  static constexpr Order order = O;
  static constexpr bool inverse = Inverse;
  static constexpr bool affine = Map != ScaleMap::none;
};

// Calls f(Kind<...>()), which returns a cudaError_t: the one place where a variant is chosen.
template <ScaleMap Map, class F>
int with_map(Order order, bool inverse, const F& f) {
  if constexpr (Map != ScaleMap::none) {  // without a scale the orders are the same
    if (order == Order::scale_shift)
      return inverse ? f(Kind<Map, Order::scale_shift, true>()) : f(Kind<Map, Order::scale_shift, false>());
  }
  return inverse ? f(Kind<Map, Order::shift_scale, true>()) : f(Kind<Map, Order::shift_scale, false>());
}
template <class T, class F>
int with_kind(const CouplingKind<T>& kind, const F& f) {
  switch (kind.map) {
    case ScaleMap::none:
      return with_map<ScaleMap::none>(kind.order, kind.inverse, f);
    case ScaleMap::sigmoid:
      return with_map<ScaleMap::sigmoid>(kind.order, kind.inverse, f);
    case ScaleMap::sigmoid_eps:
      return with_map<ScaleMap::sigmoid_eps>(kind.order, kind.inverse, f);
    case ScaleMap::exp:
      return with_map<ScaleMap::exp>(kind.order, kind.inverse, f);
    case ScaleMap::tanh:
      return with_map<ScaleMap::tanh>(kind.order, kind.inverse, f);
    case ScaleMap::atan:
      return with_map<ScaleMap::atan>(kind.order, kind.inverse, f);
  }
  return cudaErrorInvalidValue;
}

template <class V, class T, class K>
__device__ __forceinline__ math::Scale<V> scale_of(K, V raw, const ScaleParams<T>& params) {
  if constexpr (K::affine) return math::scale_of<K::map>(raw, params);
  return {V(1), V(0), V(0)};
}

// One sample's half of the channels is walked as rows of elements that are neighbours in memory: all of it as one row where
// the tensors allow, else a row for each channel, or for each position if channels are the neighbours.
enum class Rows : int { whole, channels, positions };

// A tensor's strides in these terms.
template <class T>
struct RowView {
  T* data;
  int64_t sample, row, element;
};

template <class T>
RowView<T> row_view(const Strided<T>& x, Rows rows, int64_t first_channel) {
  T* const data = x.data == nullptr ? nullptr : x.data + first_channel * x.channel;
  if (rows == Rows::positions) return {data, x.sample, x.position, x.channel};
  return {data, x.sample, x.channel, x.position};
}

// The parts of a sample that blocks share, and the units (elements or 16-byte vectors) of a part and of a row.
struct Walk {
  int64_t units, row_units, part_units;
};

inline Walk walk_of(Rows rows, int64_t channels, int64_t positions, int64_t parts, int unit) {
  const int64_t length =
      rows == Rows::whole ? channels * positions : rows == Rows::channels ? positions : channels;
  const int64_t units = channels * positions / unit;
  return {units, larger<int64_t>(length / unit, 1), divide_up(units, parts)};
}

// Calls f(row, first element of the unit) for the block's units of a part, in steps of the block.
template <int Unit, class F>
__device__ __forceinline__ void for_each_unit(const Walk& walk, int64_t part, const F& f) {
  const int64_t end = smaller((part + 1) * walk.part_units, walk.units);
  int64_t at = part * walk.part_units + threadIdx.x;
  if (at >= end) return;
  int64_t row = at / walk.row_units, unit = at - row * walk.row_units;
  const int64_t step_row = blockDim.x / walk.row_units, step_unit = blockDim.x - step_row * walk.row_units;
  for (; at < end; at += blockDim.x) {
    f(row, unit * Unit);
    row += step_row;
    unit += step_unit;
    if (unit >= walk.row_units) {
      unit -= walk.row_units;
      ++row;
    }
  }
}

// A unit: 16 bytes, or one element.
template <class T, bool Vector>
constexpr int unit_width = Vector ? width<T> : 1;

template <class T, bool Vector>
struct Unit {
  T v[unit_width<T, Vector>];
};

template <bool Vector, class T>
__device__ __forceinline__ auto load_unit(const RowView<T>& x, int64_t n, int64_t row, int64_t element) {
  if constexpr (Vector) {
    return load_vector(x.data + n * x.sample + row * x.row + element);
  } else {
    return Unit<std::remove_const_t<T>, false>{{x.data[n * x.sample + row * x.row + element * x.element]}};
  }
}
template <bool Vector, class T, class U>
__device__ __forceinline__ void store_unit(const RowView<T>& x, int64_t n, int64_t row, int64_t element, const U& unit) {
  if constexpr (Vector) {
    store_vector(x.data + n * x.sample + row * x.row + element, unit);
  } else {
    x.data[n * x.sample + row * x.row + element * x.element] = unit.v[0];
  }
}

}  // namespace pyglow::cuda
