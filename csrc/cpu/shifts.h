// The nine shifts of a 3x3 convolution: images as columns of a product, and the sum of a product's rows as images.
#pragma once
#include "cpu/matrix.h"

namespace pyglow::cpu::PYGLOW_ISA {

// The nine shifts of images, as the rows of a matrix: row 9 k + 3 i + j holds image[n, k, h + i - 1, w + j - 1] for the
// pixels of some samples (or of some rows of one sample), zero outside the image. transposed: h + 1 - i, w + 1 - j.
template <class T>
struct ColumnsArgs {
  Image<const T> image;
  Matrix<T> columns;  // (9 K, samples * rows * W)
  int64_t channels, height, width;
  int64_t first_sample, samples, first_row, rows;  // rows < height: one sample
  bool transposed;
};

// image[n, k, h, w] = bias[k] + the sum over i, j of columns[9 k + 3 i + j] at pixel (h + i - 1, w + j - 1) of sample
// n, where that is in the image; transposed: at (h + 1 - i, w + 1 - j). For some samples, or for some rows of one: then
// the columns begin with another row of the image, and reach as far as the rows and their neighbours in it.
template <class T>
struct ShiftSumArgs {
  const T* columns;  // (9 K, at least samples (rows + neighbours) W), rows of `stride`
  int64_t stride;
  const T* bias;  // (K,) or null
  Image<T> image;
  int64_t channels, height, width;
  int64_t first_sample, samples, first_row, rows;
  int64_t columns_row;  // 0 unless only some rows are summed
  bool transposed;
};

// Defined for float and double in shifts.cpp.
template <class T>
void shift_columns(const ColumnsArgs<T>& args, const Threads& threads);
template <class T>
void shift_sum(const ShiftSumArgs<T>& args, const Threads& threads);

}  // namespace pyglow::cpu::PYGLOW_ISA
