// How a block of a product is written: added to what is there, with bias and activation, or times a derivative.
#pragma once
#include "cpu/net/packing.h"
#include "math/activation.h"

namespace pyglow::cpu::PYGLOW_ISA {

// A block of C in registers.
template <class T, int NumRows>
struct Block {
  Vec<T> sum[NumRows][column_vectors];
};

// Whether what follows a product is at most a relu, leaky or not: that is done as the block is written.
template <class S>
PYGLOW_HD bool is_simple(const After<S>& after) {
  const Activation kind = after.activation;
  const bool relu = kind == Activation::relu || kind == Activation::leaky_relu;
  return after.argument.data == nullptr && (relu || (kind == Activation::none && after.derivative.data == nullptr));
}

// Where a block of C goes, (rows, columns).
template <class S, class Out>
struct Target {
  const ProductArgs<S, Out>& args;
  int64_t row, rows, column, columns;
  bool add, is_last;  // to C; of the parts that are summed

  PYGLOW_HD const Sum<S>* bias() const {
    return is_last && args.after.bias != nullptr ? args.after.bias + row : nullptr;
  }
  PYGLOW_HD bool has_derivative() const { return is_last && args.after.derivative.data != nullptr; }
};

// What is done to one block of C in registers.
template <class T>
struct Epilogue {
  bool add;
  const T* bias;  // of the block's rows, or null
  const T* mask;  // at the block, or null: a relu's result, of which the block is the gradient
  int64_t mask_row;
  T leak;  // 1: no relu at all
};

template <bool Leaky, class T, int NumRows>
PYGLOW_HD void put(const Block<T, NumRows>& block, const Epilogue<T>& epilogue, int64_t rows, T* c, int64_t stride) {
#pragma GCC unroll 16
  for (int i = 0; i < NumRows; ++i) {
    if (i >= rows) return;
#pragma GCC unroll 2
    for (int v = 0; v < column_vectors; ++v) {
      T* const to = c + i * stride + v * lanes<T>;
      Vec<T> value = epilogue.add ? load<T>(to) + block.sum[i][v] : block.sum[i][v];
      if (epilogue.bias != nullptr)
        value = math::leaky_relu<Leaky>(value + broadcast<T>(epilogue.bias[i]), epilogue.leak);
      if (epilogue.mask != nullptr) {
        const Vec<T> result = load<T>(epilogue.mask + i * epilogue.mask_row + v * lanes<T>);
        value = math::leaky_relu_backward<Leaky>(value, result, epilogue.leak);
      }
      store<T>(to, value);
    }
  }
}

// A block of whole columns in registers, where what follows is simple.
template <class S, class Out, int NumRows>
PYGLOW_HD void put_block(const Target<S, Out>& target, const Block<Sum<S>, NumRows>& block, Sum<S> leak) {
  using T = Sum<S>;
  const ProductArgs<S, Out>& args = target.args;
  Epilogue<T> epilogue{.add = target.add, .bias = target.bias(), .mask = nullptr, .mask_row = 0, .leak = leak};
  if (target.has_derivative()) {
    epilogue.mask = at(args.after.derivative, target.row, target.column);
    epilogue.mask_row = row_at(args.after.derivative, target.column);
  }
  T* const c = at(args.c, target.row, target.column);
  const int64_t c_row = row_at(args.c, target.column);
  leak == T(0) ? put<false, T, NumRows>(block, epilogue, target.rows, c, c_row)
               : put<true, T, NumRows>(block, epilogue, target.rows, c, c_row);
}

// A block that lies in memory, (rows, block_columns), where what follows is simple, its columns are whole and nothing
// is added.
template <bool Leaky, class S, class Out>
void put_at_once(const Target<S, Out>& target, Sum<S> leak, const Sum<S>* block) {
  using T = Sum<S>;
  constexpr int64_t width = block_columns<T>;
  const ProductArgs<S, Out>& args = target.args;
  Out* to = at(args.c, target.row, target.column);
  const int64_t to_row = row_at(args.c, target.column);
  const T* const bias = target.bias();
  const S* mask = target.has_derivative() ? at(args.after.derivative, target.row, target.column) : nullptr;
  const int64_t mask_row = mask == nullptr ? 0 : row_at(args.after.derivative, target.column);
  for (int64_t i = 0; i < target.rows; ++i, block += width, to += to_row, mask += mask_row) {
    Vec<T> v[column_vectors] = {load<T>(block), load<T>(block + lanes<T>)};
    if (bias != nullptr)
      for (auto& value : v) value = math::leaky_relu<Leaky>(value + broadcast<T>(bias[i]), leak);
    if (mask != nullptr) {
      Vec<T> result[column_vectors];
      load_row(mask, result);
      for (int j = 0; j < column_vectors; ++j) v[j] = math::leaky_relu_backward<Leaky>(v[j], result[j], leak);
    }
    store_row(v, to);
  }
}

// Writes it whatever follows; `kept` is memory for another block. Both are spoiled.
template <class S, class Out>
void put_slowly(const Target<S, Out>& target, Sum<S>* block, Sum<S>* kept) {
  using T = Sum<S>;
  constexpr int64_t width = block_columns<T>;
  const ProductArgs<S, Out>& args = target.args;
  const After<S>& after = args.after;
  const int64_t elements = target.rows * width, columns = target.columns;
  const auto for_each_row = [&](const auto& matrix, const auto& f) {
    for (int64_t i = 0; i < target.rows; ++i) f(at(matrix, target.row + i, target.column), i * width);
  };
  if (target.add)
    for_each_row(args.c, [&](const Out* from, int64_t first) {
      for (int64_t j = 0; j < columns; ++j) block[first + j] += widen(from[j]);
    });
  if (const T* const bias = target.bias())
    for (int64_t i = 0; i < elements; i += lanes<T>)
      store<T>(block + i, load<T>(block + i) + broadcast<T>(bias[i / width]));
  if (target.has_derivative()) {
    for (int64_t i = 0; i < elements; ++i) kept[i] = T(0);
    for_each_row(after.derivative, [&](const S* from, int64_t first) {
      for (int64_t j = 0; j < columns; ++j) kept[first + j] = widen(from[j]);
    });
    math::with_activation(after.activation, [&](auto kind) {
      for (int64_t i = 0; i < elements; i += lanes<T>)
        store<T>(block + i,
                 math::activate_backward<kind.value>(load<T>(block + i), load<T>(kept + i), after.parameter));
    });
  } else if (target.is_last && after.activation != Activation::none) {
    if (after.argument.data != nullptr)
      for_each_row(after.argument, [&](S* to, int64_t first) {
        for (int64_t j = 0; j < columns; ++j) narrow(block[first + j], to[j]);
      });
    math::with_activation(after.activation, [&](auto kind) {
      for (int64_t i = 0; i < elements; i += lanes<T>)
        store<T>(block + i, math::activate<kind.value>(load<T>(block + i), after.parameter));
    });
  }
  for_each_row(args.c, [&](Out* to, int64_t first) {
    for (int64_t j = 0; j < columns; ++j) narrow(block[first + j], to[j]);
  });
}

// What a leaky relu multiplies by below zero, where what follows is simple; 1: there is none.
template <class S>
PYGLOW_HD Sum<S> leak_of(const After<S>& after) {
  return after.activation == Activation::none   ? Sum<S>(1)
         : after.activation == Activation::relu ? Sum<S>(0)
                                                : after.parameter;
}

}  // namespace pyglow::cpu::PYGLOW_ISA
