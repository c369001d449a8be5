// The coupling of one row of a tile, for every kernel that contains one.
#pragma once
#include "core.h"
#include "cpu/tiles.h"
#include "math/coupling.h"

namespace pyglow::cpu::PYGLOW_ISA {

// The map and the order become template arguments here and nowhere else: f.template operator()<Map, Order>().
template <Order O, class F>
void with_map(ScaleMap map, const F& f) {
  switch (map) {
    case ScaleMap::none:
      return f.template operator()<ScaleMap::none, O>();
    case ScaleMap::sigmoid:
      return f.template operator()<ScaleMap::sigmoid, O>();
    case ScaleMap::scaled_sigmoid:
      return f.template operator()<ScaleMap::scaled_sigmoid, O>();
    case ScaleMap::exp:
      return f.template operator()<ScaleMap::exp, O>();
    case ScaleMap::tanh:
      return f.template operator()<ScaleMap::tanh, O>();
    case ScaleMap::atan:
      return f.template operator()<ScaleMap::atan, O>();
  }
}

template <class F>
void with_kind(ScaleMap map, Order order, const F& f) {
  // Without a scale the orders are the same.
  if (order == Order::shift_scale || map == ScaleMap::none) return with_map<Order::shift_scale>(map, f);
  return with_map<Order::scale_shift>(map, f);
}

// A sum of log s: in T over a few vectors, in double across them. A lane that added hundreds of nearly equal values
// would round each of them to the same side.
template <class T>
class LogDetSum {
 public:
  void add(const Vec<T>& log_s) {
    sum_ += log_s;
    if (++vectors_ == 16) flush();
  }
  double total() {
    flush();
    return total_;
  }

 private:
  void flush() {
    total_ += static_cast<double>(sum_lanes<T>(sum_));
    sum_ = Vec<T>{};
    vectors_ = 0;
  }

  Vec<T> sum_{};
  int vectors_ = 0;
  double total_ = 0;
};

// One row of a tile; log s of its valid positions is added to log_det (not yet negated for the inverse).
// The parameters come by value: through a reference they would be read again after every store.
template <ScaleMap Map, Order O, bool Inverse, class T>
void couple_row(const T* in, const T* shift, const T* raw, T* out, const Tile& tile, ScaleParams<T> params,
                LogDetSum<T>& log_det) {
  for (int64_t i = 0; i < tile.padded; i += lanes<T>) {
    const Vec<T> value = load<T>(in + i), move = load<T>(shift + i);
    if constexpr (Map == ScaleMap::none) {
      store<T>(out + i, Inverse ? value - move : value + move);
    } else {
      const math::Scale<Vec<T>> scale = math::scale_of<Map>(load<T>(raw + i), params);
      store<T>(out + i, Inverse ? math::uncouple<O>(value, move, scale.s) : math::couple<O>(value, move, scale.s));
      const int64_t valid = tile.length - i;
      log_det.add(valid < lanes<T> ? first_lanes<T>(scale.log_s, valid) : scale.log_s);
    }
  }
}

template <class T>
struct BackwardRow {
  const T *out, *shift, *raw, *grad_out;
  T *in, *grad_in, *grad_shift, *grad_raw;  // in may be null
};

template <ScaleMap Map, Order O, bool Inverse, class T>
void couple_backward_row(const BackwardRow<T>& row, T grad_log_det, const Tile& tile, ScaleParams<T> params) {
  for (int64_t i = 0; i < tile.padded; i += lanes<T>) {
    const Vec<T> grad = load<T>(row.grad_out + i), value = load<T>(row.out + i), move = load<T>(row.shift + i);
    if constexpr (Map == ScaleMap::none) {
      store<T>(row.grad_in + i, grad);
      store<T>(row.grad_shift + i, Inverse ? -grad : grad);
      if (row.in != nullptr) store<T>(row.in + i, Inverse ? value + move : value - move);
    } else {
      const math::Scale<Vec<T>> scale = math::scale_of<Map>(load<T>(row.raw + i), params);
      const Vec<T> weight = broadcast<T>(grad_log_det);
      const math::CouplingGrad<Vec<T>> grads = Inverse ? math::uncouple_backward<O>(value, move, scale.s, grad, weight)
                                                       : math::couple_backward<O>(value, move, scale.s, grad, weight);
      store<T>(row.grad_in + i, grads.in);
      store<T>(row.grad_shift + i, grads.shift);
      store<T>(row.grad_raw + i, grads.log_s * scale.slope);
      if (row.in != nullptr)
        store<T>(row.in + i, Inverse ? math::couple<O>(value, move, scale.s) : math::uncouple<O>(value, move, scale.s));
    }
  }
}

}  // namespace pyglow::cpu::PYGLOW_ISA
