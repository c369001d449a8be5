// Matrices whose columns are pixels, and their products.
#pragma once
#include "core.h"
#include "cpu/simd.h"

namespace pyglow::cpu::PYGLOW_ISA {

constexpr int64_t pixel_block = 32;

// A matrix (rows, pixels), by rows or in blocks of pixels: what a product reads and writes at a time then lies
// together. Element (r, p) is data[p / 32 * block + r * row + p % 32]; from pixel `tail` on, the last and incomplete
// block, rows are tail_row apart.
template <class T>
struct Matrix {
  T* data;
  int64_t row, block, tail, tail_row;
};

// How far apart the rows of a matrix are at a pixel, and where its elements are.
template <class T>
PYGLOW_HD int64_t row_at(const Matrix<T>& m, int64_t pixel) {
  return pixel < m.tail ? m.row : m.tail_row;
}
template <class T>
PYGLOW_HD T* at(const Matrix<T>& m, int64_t row, int64_t pixel) {
  return m.data + pixel / pixel_block * m.block + row * row_at(m, pixel) + pixel % pixel_block;
}

// C = A B, or C + A B. A (rows, inner) is what pack_left has made of it, or in whole blocks of pixels, with memory that
// may be read for some rows more; B is (inner, columns), or its transpose where it is turned.
template <class T>
struct ProductArgs {
  const T* packed_a = nullptr;  // or null
  Matrix<const T> a = {};       // or its data null
  Matrix<const T> b;
  bool turned = false;
  Matrix<T> c;
  int64_t rows, columns, inner;
  bool accumulate = false;
  const T* bias = nullptr;  // (rows,) or null: C becomes leaky_relu(C + bias)
  Matrix<const T> mask =
      {};                 // (rows, columns), or its data null: a leaky_relu's result; C becomes its input's gradient
  T leak = T(0);          // what leaky_relu multiplies by below zero; 0: relu
  T* row_sums = nullptr;  // (rows,) or null: the sums of the rows of `a` are added
};

// A takes packed_size elements when packed; stored by rows it may be turned. Defined for float and double in
// matmul.cpp.
template <class T>
int64_t packed_size(int64_t rows, int64_t inner);
template <class T>
void pack_left(const Matrix<const T>& a, bool turned, int64_t rows, int64_t inner, T* packed, const Threads& threads);
template <class T>
void matrix_products(const ProductArgs<T>* products, int64_t count, const Threads& threads);

}  // namespace pyglow::cpu::PYGLOW_ISA
