// What the products of a coupling net are made of: cuts of pixels, their workspace, the last weight in the order of the
// shifts, and the sum of the shifts.
#pragma once
#include "cpu/scratch.h"
#include "cpu/shifts.h"

namespace pyglow::cpu::PYGLOW_ISA {

constexpr int64_t cut_bytes = 1 << 20;  // of one hidden layer: two of them and the columns in a cache of 2 MB or so
constexpr int64_t least_pixels = 256;   // of a cut: narrower products are slow

// Pixels that are handled at a time: whole samples, or some rows of one.
struct Cut {
  int64_t first_sample, samples, first_row, rows;
  int64_t begin, count;  // columns
};

class Cuts {
 public:
  // Of N images H x W; `hidden` is the width of the net's widest hidden layer.
  Cuts(int64_t samples, int64_t height, int64_t width, int64_t hidden, int64_t element_size)
      : samples_(samples), height_(height), width_(width), plane_(height * width) {
    // Not the rows of the columns: cuts as small as that cost more in barriers than they save in cache.
    const int64_t most = larger(least_pixels, cut_bytes / element_size / larger(hidden, 1));
    if (plane_ == 0 || samples == 0) return;
    if (plane_ <= most) {
      samples_at_once_ = most / plane_;
      rows_at_once_ = height;
    } else {
      samples_at_once_ = 1;
      rows_at_once_ = larger(1, most / width);
    }
    per_turn_ = (height + rows_at_once_ - 1) / rows_at_once_;
    count_ = (samples + samples_at_once_ - 1) / samples_at_once_ * per_turn_;
  }

  int64_t count() const { return count_; }
  int64_t height() const { return height_; }
  int64_t width() const { return width_; }
  bool cuts_samples() const { return rows_at_once_ < height_; }
  // Pixels of the largest one, which is the first.
  int64_t most() const { return (*this)[0].count; }

  Cut operator[](int64_t i) const {
    const int64_t n = i / per_turn_ * samples_at_once_, row = i % per_turn_ * rows_at_once_;
    const int64_t samples = smaller(samples_at_once_, samples_ - n), rows = smaller(rows_at_once_, height_ - row);
    return {.first_sample = n,
            .samples = samples,
            .first_row = row,
            .rows = rows,
            .begin = n * plane_ + row * width_,
            .count = samples * rows * width_};
  }

 private:
  int64_t samples_, height_, width_, plane_;
  int64_t samples_at_once_ = 0, rows_at_once_ = 0, per_turn_ = 1, count_ = 0;
};

constexpr int64_t line = 64;  // bytes; every matrix starts on one

template <class T>
int64_t whole_lines(int64_t elements) {
  return round_up(elements, line / static_cast<int64_t>(sizeof(T)));
}

// Matrices in a block of memory that this thread keeps between calls: rooms are reserved, then all of them taken.
template <class T>
class Workspace {
 public:
  // The place of a matrix of so many elements.
  int64_t room(int64_t elements) {
    const int64_t place = size_;
    size_ += whole_lines<T>(elements);
    return place;
  }
  void take() { memory_ = static_cast<T*>(thread_scratch(Scratch::net, size_ * sizeof(T))); }
  T* operator[](int64_t place) const { return memory_ + place; }

 private:
  int64_t size_ = 0;
  T* memory_ = nullptr;
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
  return {data, pixel_block, pixel_block * rows, INT64_MAX, 0};
}

template <class T>
Matrix<const T> read_only(const Matrix<T>& m) {
  return {m.data, m.row, m.block, m.tail, m.tail_row};
}

// The left matrix (rows, inner) of a product.
template <class T>
struct Left {
  int64_t rows, inner;

  int64_t size() const { return packed_size<T>(rows, inner); }
  // It, or what it is the transpose of, from where it lies by rows.
  const T* pack(const T* matrix, bool turned, T* memory, const Threads& threads) const {
    pack_left<T>(by_rows(matrix, turned ? rows : inner), turned, rows, inner, memory, threads);
    return memory;
  }
  // The product of it, packed, with a right matrix of so many columns.
  ProductArgs<T> times(const T* packed, const Matrix<T>& right, const Matrix<T>& product, int64_t columns) const {
    return {.packed_a = packed, .b = read_only(right), .c = product, .rows = rows, .columns = columns, .inner = inner};
  }
};

template <class T>
void columns_of(const Image<const T>& image, int64_t channels, const Cuts& cuts, const Cut& cut, bool transposed,
                const Matrix<T>& columns, const Threads& threads) {
  shift_columns<T>({.image = image,
                    .columns = columns,
                    .channels = channels,
                    .height = cuts.height(),
                    .width = cuts.width(),
                    .first_sample = cut.first_sample,
                    .samples = cut.samples,
                    .first_row = cut.first_row,
                    .rows = cut.rows,
                    .transposed = transposed},
                   threads);
}

// The product of the last convolution, cut by cut, and the sum of its nine shifts into images of C channels. Of a
// sample that is cut into rows the last two are carried over, since the sum for a row wants the rows around it.
template <class T>
class ShiftedSum {
 public:
  // What it takes of a workspace.
  static int64_t elements(int64_t channels, const Cuts& cuts) {
    return 9 * channels * stride_of(cuts) + 2 * margin_of(cuts);
  }

  ShiftedSum(const Image<T>& image, int64_t channels, const T* bias, bool transposed, const Cuts& cuts, T* memory)
      : image_(image),
        channels_(channels),
        bias_(bias),
        transposed_(transposed),
        cuts_(cuts),
        stride_(stride_of(cuts)),
        columns_(memory + margin_of(cuts)) {}

  // Where the product for a cut goes, (9 C, count).
  Matrix<T> product() const { return by_rows(columns_ + carried(), stride_); }

  // The rows of the image that are known with this cut.
  void add(const Cut& cut, const Threads& threads) {
    const int64_t end = cut.first_row + cut.rows;
    const int64_t first = cuts_.cuts_samples() && cut.first_row > 0 ? cut.first_row - 1 : cut.first_row;
    const int64_t last = end == cuts_.height() ? end : end - 1;
    shift_sum<T>({.columns = columns_,
                  .stride = stride_,
                  .bias = bias_,
                  .image = image_,
                  .channels = channels_,
                  .height = cuts_.height(),
                  .width = cuts_.width(),
                  .first_sample = cut.first_sample,
                  .samples = cut.samples,
                  .first_row = first,
                  .rows = last - first,
                  .columns_row = cuts_.cuts_samples() ? cut.first_row - 2 : 0,
                  .transposed = transposed_},
                 threads);
    if (end == cuts_.height()) return;
    for (int64_t row = 0; row < 9 * channels_; ++row) {
      T* const data = columns_ + row * stride_;
      for (int64_t p = 0; p < carried(); ++p) data[p] = data[cut.count + p];
    }
  }

 private:
  int64_t carried() const { return carried_of(cuts_); }
  static int64_t carried_of(const Cuts& cuts) { return cuts.cuts_samples() ? 2 * cuts.width() : 0; }
  static int64_t margin_of(const Cuts& cuts) {  // what shift_sum may read around its columns
    return whole_lines<T>(cuts.width() + 1 + 64);
  }
  static int64_t stride_of(const Cuts& cuts) {
    // No power of two: the rows would share one set of a cache.
    return whole_lines<T>(cuts.most() + carried_of(cuts)) + line / static_cast<int64_t>(sizeof(T));
  }

  Image<T> image_;
  int64_t channels_;
  const T* bias_;
  bool transposed_;
  const Cuts& cuts_;
  int64_t stride_;
  T* columns_;
};

PYGLOW_HD float exp_of(float x) { return __builtin_expf(x); }
PYGLOW_HD double exp_of(double x) { return __builtin_exp(x); }

// Of the last convolution: exp(3 log_gain) per output channel, the weight (9 C, hidden) times that (its nine shifts are
// summed after the product) and the bias times that. The gradients of weight, bias and log_gain from those of the two.
template <class T>
class LastWeight {
 public:
  LastWeight(const NetWeights<T>& net, T* gain) : net_(net), gain_(gain) {
    for (int64_t k = 0; k < net.out; ++k) gain[k] = net.log_gain == nullptr ? T(1) : exp_of(T(3) * net.log_gain[k]);
  }

  T* by_shift(T* matrix) const {
    T* to = matrix;
    const T* from = net_.w3;
    for (int64_t k = 0; k < net_.out; ++k, to += 9 * net_.hidden2)
      for (int64_t h = 0; h < net_.hidden2; ++h, from += 9)
        for (int64_t s = 0; s < 9; ++s) to[s * net_.hidden2 + h] = gain_[k] * from[s];
    return matrix;
  }

  T* bias(T* scaled) const {
    for (int64_t k = 0; k < net_.out; ++k) scaled[k] = gain_[k] * net_.b3[k];
    return scaled;
  }

  // grad_w3, grad_b3 and, with a gain, grad_log_gain = 3 gain (sum grad_w w + grad_b b), from the gradients of
  // by_shift() and of bias().
  void gradients(const T* grad_matrix, const double* grad_bias, const CouplingNetBackwardArgs<T>& args) const {
    const T* from = grad_matrix;
    const T* w = net_.w3;
    T* to = args.grad_w3;
    for (int64_t k = 0; k < net_.out; ++k, from += 9 * net_.hidden2) {
      double along = 0;
      for (int64_t h = 0; h < net_.hidden2; ++h, to += 9, w += 9) {
        T sum{};
        for (int64_t s = 0; s < 9; ++s) {
          const T grad = from[s * net_.hidden2 + h];
          to[s] = gain_[k] * grad;
          sum += grad * w[s];
        }
        along += sum;
      }
      args.grad_b3[k] = static_cast<T>(gain_[k] * grad_bias[k]);
      if (args.grad_log_gain != nullptr)
        args.grad_log_gain[k] = static_cast<T>(3.0 * gain_[k] * (along + grad_bias[k] * net_.b3[k]));
    }
  }

 private:
  const NetWeights<T>& net_;
  T* gain_;
};

}  // namespace pyglow::cpu::PYGLOW_ISA
