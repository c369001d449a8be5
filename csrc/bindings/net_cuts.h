// What the products of a coupling net on the CPU are made of: cuts of pixels, their workspace, the last weight in the
// order of the shifts, and the sum of the shifts.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <vector>

#include "bindings/device.h"
#include "core.h"

namespace pyglow::bindings {

constexpr int64_t cut_bytes = 1 << 20;  // of one hidden layer: two of them and the columns in a cache of 2 MB or so
constexpr int64_t least_pixels = 256;   // of a cut: narrower products are slow

// Pixels that are handled at a time: whole samples, or some rows of one.
struct Cut {
  int64_t first_sample, samples, first_row, rows;
  int64_t begin, count;  // columns
};

struct Shape {
  int64_t samples, in, hidden1, hidden2, out, height, width;
  int64_t pixels() const { return samples * height * width; }
};

inline std::vector<Cut> cuts_of(const Shape& shape, int64_t element_size) {
  const int64_t plane = shape.height * shape.width;
  // Not the rows of the columns: cuts as small as that cost more in barriers than they save in cache.
  const int64_t hidden = std::max<int64_t>({shape.hidden1, shape.hidden2, 1});
  const int64_t most = std::max(least_pixels, cut_bytes / element_size / hidden);
  std::vector<Cut> cuts;
  if (plane == 0) return cuts;
  if (plane <= most) {
    const int64_t at_once = most / plane;
    for (int64_t n = 0; n < shape.samples; n += at_once) {
      const int64_t samples = std::min(at_once, shape.samples - n);
      cuts.push_back({n, samples, 0, shape.height, n * plane, samples * plane});
    }
    return cuts;
  }
  const int64_t at_once = std::max<int64_t>(1, most / shape.width);
  for (int64_t n = 0; n < shape.samples; ++n)
    for (int64_t r = 0; r < shape.height; r += at_once) {
      const int64_t rows = std::min(at_once, shape.height - r);
      cuts.push_back({n, 1, r, rows, n * plane + r * shape.width, rows * shape.width});
    }
  return cuts;
}

constexpr int64_t line = 64;  // bytes; every matrix starts on one

template <class T>
int64_t whole_lines(int64_t elements) {
  constexpr int64_t per_line = line / sizeof(T);
  return (elements + per_line - 1) / per_line * per_line;
}

// Matrices in a block of memory that this thread keeps between calls.
template <class T>
class Workspace {
 public:
  // Matrices of so many elements.
  explicit Workspace(std::initializer_list<int64_t> sizes) {
    int64_t elements = 0;
    for (const int64_t size : sizes) elements += whole_lines<T>(size);
    next_ = static_cast<T*>(cpu::net_workspace(elements * sizeof(T)));
  }

  T* take(int64_t elements) {
    T* const taken = next_;
    next_ += whole_lines<T>(elements);
    return taken;
  }

 private:
  T* next_;
};

// Rows `stride` apart.
template <class T>
Matrix<T> by_rows(T* data, int64_t stride) {
  return {data, stride, pixel_block, 0, stride};
}
// (rows, pixels of a cut) in blocks of pixels, without a gap.
template <class T>
Matrix<T> in_blocks(T* data, int64_t rows, const Cut& cut) {
  const int64_t rest = cut.count % pixel_block;
  return {data, pixel_block, pixel_block * rows, cut.count - rest, rest};
}
// The same in whole blocks.
template <class T>
Matrix<T> in_whole_blocks(T* data, int64_t rows) {
  return {data, pixel_block, pixel_block * rows, std::numeric_limits<int64_t>::max(), 0};
}
inline int64_t whole_blocks(int64_t pixels) { return (pixels + pixel_block - 1) / pixel_block * pixel_block; }

template <class T>
Matrix<const T> read_only(const Matrix<T>& m) {
  return {m.data, m.row, m.block, m.tail, m.tail_row};
}

// The left matrix (rows, inner) of a product.
template <class T>
struct Left {
  int64_t rows, inner;

  int64_t size() const { return cpu::packed_size<T>(rows, inner); }
  const T* pack(const Matrix<const T>& a, bool turned, T* memory) const {
    cpu::pack_left<T>(a, turned, rows, inner, memory, torch_threads());
    return memory;
  }
  // The product of it, packed, with a right matrix of so many columns; bias, mask and leak as in ProductArgs.
  ProductArgs<T> times(const T* packed, const Matrix<T>& right, const Matrix<T>& product, int64_t columns,
                       const T* bias, const Matrix<const T>& mask, T leak) const {
    return {packed, {}, read_only(right), false, product, rows, columns, inner, false, bias, mask, leak, nullptr};
  }
};

template <class T>
void multiply(std::initializer_list<ProductArgs<T>> products) {
  cpu::matrix_products<T>(products.begin(), static_cast<int64_t>(products.size()), torch_threads());
}

template <class T>
Image<const T> image_of(const at::Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}
template <class T>
Image<T> image_of(at::Tensor& x) {
  return {x.mutable_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// The product of the last convolution, cut by cut, and the sum of its nine shifts. Of a sample that is cut into rows
// the last two are carried over, since the sum for a row wants the rows around it.
template <class T>
class ShiftedSum {
 public:
  // What it takes of a workspace.
  static int64_t elements(const Shape& shape, int64_t channels, const std::vector<Cut>& cuts) {
    return 9 * channels * stride_of(shape, cuts) + 2 * margin_of(shape);
  }

  ShiftedSum(const Shape& shape, const std::vector<Cut>& cuts, T* memory, const T* bias, bool transposed,
             at::Tensor& image)
      : shape_(shape),
        stride_(stride_of(shape, cuts)),
        by_rows_(cuts[0].rows != shape.height),
        columns_(memory + margin_of(shape)),
        bias_(bias),
        transposed_(transposed),
        image_(image) {}

  // Where the product for a cut goes, (9 C, count).
  Matrix<T> product() const { return by_rows(columns_ + carried(), stride_); }

  // The rows of the image that are known with this cut.
  void add(const Cut& cut) {
    const int64_t end = cut.first_row + cut.rows;
    const int64_t first = by_rows_ && cut.first_row > 0 ? cut.first_row - 1 : cut.first_row;
    const int64_t last = end == shape_.height ? end : end - 1;
    cpu::shift_sum<T>(
        {columns_, stride_, bias_, image_of<T>(image_), image_.size(1), shape_.height, shape_.width, cut.first_sample,
         cut.samples, first, last - first, by_rows_ ? cut.first_row - 2 : 0, transposed_},
        torch_threads());
    if (end == shape_.height) return;
    for (int64_t row = 0; row < 9 * image_.size(1); ++row) {
      T* const data = columns_ + row * stride_;
      std::copy(data + cut.count, data + cut.count + carried(), data);
    }
  }

 private:
  int64_t carried() const { return by_rows_ ? 2 * shape_.width : 0; }
  static int64_t margin_of(const Shape& shape) {  // what shift_sum may read around its columns
    return whole_lines<T>(shape.width + 1 + 64);
  }
  static int64_t stride_of(const Shape& shape, const std::vector<Cut>& cuts) {
    const int64_t needed = cuts[0].count + (cuts[0].rows != shape.height ? 2 * shape.width : 0);
    return whole_lines<T>(needed) + line / sizeof(T);  // no power of two: the rows would share one set of a cache
  }

  const Shape& shape_;
  int64_t stride_;
  bool by_rows_;
  T* columns_;
  const T* bias_;
  bool transposed_;
  at::Tensor& image_;
};

// Of the last convolution: exp(3 log_gain) per output channel, the weight (9 C, hidden) times that (its nine shifts are
// summed after the product) and the bias times that. The gradients of weight, bias and log_gain from those of the two.
template <class T>
class LastWeight {
 public:
  LastWeight(const Shape& shape, const at::Tensor& w3_in, const std::optional<at::Tensor>& log_gain)
      : shape_(shape), w3_(w3_in.contiguous()), gain_(shape.out, T(1)) {
    if (log_gain) {
      const at::Tensor values = log_gain->contiguous();
      const T* const logs = values.const_data_ptr<T>();
      for (int64_t k = 0; k < shape.out; ++k) gain_[k] = std::exp(T(3) * logs[k]);
    }
  }

  at::Tensor by_shift() const {
    at::Tensor matrix = at::empty({9 * shape_.out, shape_.hidden2}, w3_.options());
    T* to = matrix.mutable_data_ptr<T>();
    const T* from = w3_.const_data_ptr<T>();
    for (int64_t k = 0; k < shape_.out; ++k, to += 9 * shape_.hidden2)
      for (int64_t h = 0; h < shape_.hidden2; ++h, from += 9)
        for (int64_t s = 0; s < 9; ++s) to[s * shape_.hidden2 + h] = gain_[k] * from[s];
    return matrix;
  }

  std::vector<T> bias(const at::Tensor& b3) const {
    const at::Tensor values = b3.contiguous();
    std::vector<T> scaled(shape_.out);
    for (int64_t k = 0; k < shape_.out; ++k) scaled[k] = gain_[k] * values.const_data_ptr<T>()[k];
    return scaled;
  }

  // grad_w3, grad_b3 and, with a gain, grad_log_gain = 3 gain (sum grad_w w + grad_b b), from the gradient of
  // by_shift() and that of bias().
  std::vector<at::Tensor> gradients(const at::Tensor& grad_matrix, const at::Tensor& grad_bias,
                                    const std::optional<at::Tensor>& b3, const std::optional<at::Tensor>& log_gain) {
    at::Tensor grad_w3 = at::empty({shape_.out, shape_.hidden2, 3, 3}, w3_.options());
    at::Tensor grad_b3 = at::empty({shape_.out}, w3_.options());
    at::Tensor grad_gain = log_gain ? at::empty(log_gain->sizes(), w3_.options()) : at::Tensor();
    const T* from = grad_matrix.const_data_ptr<T>();
    const T* w = w3_.const_data_ptr<T>();
    T* to = grad_w3.mutable_data_ptr<T>();
    const at::Tensor bias = log_gain ? b3->contiguous() : at::Tensor();
    for (int64_t k = 0; k < shape_.out; ++k, from += 9 * shape_.hidden2) {
      double along = 0;
      for (int64_t h = 0; h < shape_.hidden2; ++h, to += 9, w += 9) {
        T sum{};
        for (int64_t s = 0; s < 9; ++s) {
          const T grad = from[s * shape_.hidden2 + h];
          to[s] = gain_[k] * grad;
          sum += grad * w[s];
        }
        along += sum;
      }
      const T grad = grad_bias.const_data_ptr<T>()[k];
      grad_b3.mutable_data_ptr<T>()[k] = gain_[k] * grad;
      if (log_gain)
        grad_gain.mutable_data_ptr<T>()[k] =
            static_cast<T>(3.0 * gain_[k] * (along + double(grad) * bias.const_data_ptr<T>()[k]));
    }
    if (log_gain) return {grad_w3, grad_b3, grad_gain};
    return {grad_w3, grad_b3};
  }

 private:
  const Shape& shape_;
  at::Tensor w3_;
  std::vector<T> gain_;
};

}  // namespace pyglow::bindings
