// Matrices whose columns are pixels, and their products.
#pragma once
#include "core.h"
#include "cpu/simd.h"
#include "math/half.h"

namespace pyglow::cpu::PYGLOW_ISA {

constexpr int64_t pixel_block = 32;

// A matrix (rows, pixels), by rows or in blocks of pixels: what a product reads and writes at a time then lies
// together. Element (r, p) is data[p / 32 * block + r * row + p % 32]; from pixel `tail` on, the last and incomplete
// block, rows are tail_row apart. As long a vector as a product reads may be read from everywhere.
template <class T>
struct Matrix {
  T* data = nullptr;
  int64_t row = 0, block = 0, tail = 0, tail_row = 0;
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

// Rows `stride` apart.
template <class T>
PYGLOW_HD Matrix<T> by_rows(T* data, int64_t stride) {
  return {data, stride, pixel_block, 0, stride};
}
// (rows, pixels) in blocks of pixels, without a gap.
template <class T>
PYGLOW_HD Matrix<T> in_blocks(T* data, int64_t rows, int64_t pixels) {
  const int64_t rest = pixels % pixel_block;
  return {data, pixel_block, pixel_block * rows, pixels - rest, rest};
}
// The same in whole blocks.
template <class T>
PYGLOW_HD Matrix<T> in_whole_blocks(T* data, int64_t rows) {
  return {data, pixel_block, pixel_block * rows, INT64_MAX, 0};
}
template <class T>
PYGLOW_HD Matrix<const T> read_only(const Matrix<T>& m) {
  return {m.data, m.row, m.block, m.tail, m.tail_row};
}

// The numbers that a product multiplies, S, and those that it adds up.
template <class S>
struct Numbers {
  using Sum = S;
};
template <>
struct Numbers<BFloat16> {
  using Sum = float;
};
template <class S>
using Sum = typename Numbers<S>::Sum;

// How 16-bit numbers are multiplied: in pairs by an instruction for it, or each as the float that it is.
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
constexpr bool has_pairs = true;
using PackedHalf = BFloat16;
#else
constexpr bool has_pairs = false;
using PackedHalf = float;
#endif
template <class S>
struct PackedAs {
  using Type = S;
};
template <>
struct PackedAs<BFloat16> {
  using Type = PackedHalf;
};
template <class S>
using Packed = typename PackedAs<S>::Type;
template <class S>
constexpr bool in_pairs = sizeof(Packed<S>) == 2;

class Shifts;

// The right matrix of a product, (inner, columns): a matrix as it is; or a convolution's input, by rows, as its taps
// see it: row c * taps + t is channel c at the pixels that tap t sees, zero outside of the image. `first` is the pixel
// of column 0, a multiple of pixel_block. transposed: as the taps see it from the other side.
template <class S>
struct Right {
  Matrix<const S> matrix;
  const Shifts* shifts = nullptr;
  bool transposed = false;
  int64_t first = 0;
};

// The left matrix of a product, (rows, inner): packed, or activations in whole blocks of pixels, with memory that may
// be read for some rows more. Where numbers are multiplied in pairs the last block must end with zeros.
template <class S>
struct Left {
  const Packed<S>* data = nullptr;
  int64_t block = 0;  // 0: packed as pack_left does it; else elements from one block of 32 to the next
};

// What a layer's result C becomes before it is written: a(C + bias); in the backward, C times a'.
template <class S>
struct After {
  const Sum<S>* bias = nullptr;  // (rows,)
  Activation activation = Activation::none;
  Sum<S> parameter = 0;
  Matrix<S> argument;          // where C + bias is kept
  Matrix<const S> derivative;  // (rows, columns), what the forward kept: C is multiplied by the derivative there
};

// C = A B, or C + A B, and what is done to it; B is (inner, columns), or where it is turned its transpose.
template <class S, class Out>
struct ProductArgs {
  Left<S> a;
  Right<S> b;
  bool turned = false;
  Matrix<Out> c;
  int64_t rows, columns, inner;
  bool accumulate = false;
  After<S> after = {};
  Matrix<const S> summed = {};  // A where it is activations, (rows, inner):
  Sum<S>* row_sums = nullptr;   // (rows,) or null: the sums of its rows are added
};

// Elements of a packed left matrix (rows, inner).
template <class S>
int64_t packed_size(int64_t rows, int64_t inner);
// Packs a matrix that lies by rows, or where it is turned its transpose.
template <class S>
Left<S> pack_left(const Sum<S>* a, bool turned, int64_t rows, int64_t inner, Packed<S>* packed, const Threads& threads);
// Activations in whole blocks as a left matrix: where they lie, or packed if they must be.
template <class S>
constexpr bool packs_activations = sizeof(Packed<S>) != sizeof(S);
template <class S>
Left<S> left_of(const Matrix<const S>& a, int64_t rows, int64_t inner, Packed<S>* packed, const Threads& threads);
template <class S, class Out>
void matrix_products(const ProductArgs<S, Out>* products, int64_t count, const Threads& threads);

}  // namespace pyglow::cpu::PYGLOW_ISA
