// Monotone splines of elements: x of any shape, and behind each element its numbers.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/checks.h"
#include "bindings/coupling_kind.h"
#include "bindings/device.h"
#include "bindings/ops.h"

namespace pyglow::bindings {
namespace {

// The arguments of the op, in the order of SplineSpec in pyglow_fast/reference.py.
struct SplineKind {
  int64_t form, tails;
  bool inverse;
  at::ArrayRef<double> numbers;  // bound, gain, min_width, min_height, min_derivative, derivative_offset, slope

  void check() const {
    TORCH_CHECK_VALUE(form == 0 || form == 1, "form: expected 0 (softmax) or 1 (softclip), found ", form);
    TORCH_CHECK_VALUE(tails >= 0 && tails <= 2, "tails: expected 0 (linear), 1 (circular) or 2 (none), found ", tails);
    TORCH_CHECK_VALUE(numbers.size() == 7, "numbers: expected 7, found ", numbers.size());
    for (const double number : numbers)
      TORCH_CHECK_VALUE(std::isfinite(number), "numbers: expected finite ones, found ", numbers);
    TORCH_CHECK_VALUE(numbers[0] > 0, "bound: expected a number above 0, found ", numbers[0]);
    TORCH_CHECK_VALUE(numbers[6] > 0 && numbers[6] < 1, "slope: expected a number from 0 to 1, found ", numbers[6]);
  }

  // How many bins so many numbers are of.
  int64_t bins(int64_t count) const {
    const int64_t more = count - spline_numbers(0, static_cast<SplineTails>(tails));
    TORCH_CHECK_VALUE(more % 3 == 0 && more >= 6 && more <= 3 * max_spline_bins,
                      "raw: expected a last dimension of 3 K ",
                      tails == 0   ? "- 1"
                      : tails == 1 ? "+ 0"
                                   : "+ 1",
                      " for K from 2 to ", max_spline_bins, ", found ", count);
    for (const double least : {numbers[2], numbers[3]})
      TORCH_CHECK_VALUE(form == 1 || (least >= 0 && least * static_cast<double>(more) <= 3),
                        "min_width, min_height: expected 0 to 1 / K, found ", numbers[2], ", ", numbers[3]);
    return more / 3;
  }

  template <class T>
  SplineParams<T> as(int64_t bins) const {
    const bool whole = static_cast<SplineTails>(tails) == SplineTails::none;
    return {.bins = static_cast<int>(bins),
            .tails = static_cast<SplineTails>(tails),
            .low = whole ? T(0) : static_cast<T>(-numbers[0]),
            .high = whole ? T(1) : static_cast<T>(numbers[0]),
            .gain = static_cast<T>(numbers[1]),
            .min_width = static_cast<T>(numbers[2]),
            .min_height = static_cast<T>(numbers[3]),
            .min_derivative = static_cast<T>(numbers[4]),
            .derivative_offset = static_cast<T>(numbers[5]),
            .rate = static_cast<T>(-1.0 / std::log(numbers[6]))};
  }
};

// x and what has its shape, as (N, C, P) by strides: dimensions that follow one another in all tensors are one.
class Elements {
 public:
  explicit Elements(std::vector<at::Tensor> tensors) : tensors_(std::move(tensors)) {
    if (merge() <= 3) return;
    for (at::Tensor& tensor : tensors_) tensor = tensor.contiguous();
    merge();
  }

  int64_t size(int dim) const { return sizes_[dim]; }
  const at::Tensor& tensor(std::size_t i) const { return tensors_[i]; }
  template <class T>
  Strided<const T> in(std::size_t i) const {
    return {tensors_[i].const_data_ptr<T>(), strides_[i][0], strides_[i][1], strides_[i][2]};
  }
  template <class T>
  Strided<T> out(std::size_t i) const {
    return {tensors_[i].mutable_data_ptr<T>(), strides_[i][0], strides_[i][1], strides_[i][2]};
  }
  template <class Data>
  SplineNumbers<Data> numbers(std::size_t i, Data* data) const {
    return {{data, net_type(tensors_[i]), strides_[i][0], strides_[i][1], strides_[i][2]}, tensors_[i].stride(-1)};
  }

 private:
  int64_t merge() {
    const at::Tensor& x = tensors_.front();
    std::vector<int64_t> dims;  // the first one of each group, from the last to the first
    std::vector<int64_t> sizes;
    for (int64_t dim = x.dim() - 1; dim >= 0; --dim) {
      if (x.size(dim) == 1) continue;
      const auto follows = [&](const at::Tensor& t) { return t.stride(dim) == t.stride(dims.back()) * sizes.back(); };
      if (!dims.empty() && std::all_of(tensors_.begin(), tensors_.end(), follows)) {
        sizes.back() *= x.size(dim);
      } else {
        dims.push_back(dim);
        sizes.push_back(x.size(dim));
      }
    }
    if (dims.size() > 3) return static_cast<int64_t>(dims.size());
    // Positions are walked by vectors: those that lie one after the other in the numbers, else the most.
    const at::Tensor& raw = tensors_[1];
    std::size_t innermost = 0;
    for (std::size_t i = 1; i < dims.size(); ++i) {
      const bool dense = raw.stride(dims[i]) == 1, other = raw.stride(dims[innermost]) == 1;
      if (dense || (!other && sizes[i] > sizes[innermost])) innermost = i;
    }
    if (!dims.empty()) {
      std::swap(dims[0], dims[innermost]);
      std::swap(sizes[0], sizes[innermost]);
    }
    sizes_ = {1, 1, 1};
    strides_.assign(tensors_.size(), {0, 0, 1});
    for (std::size_t i = 0; i < dims.size(); ++i) {
      sizes_[2 - i] = sizes[i];
      for (std::size_t t = 0; t < tensors_.size(); ++t) strides_[t][2 - i] = tensors_[t].stride(dims[i]);
    }
    return static_cast<int64_t>(dims.size());
  }

  std::vector<at::Tensor> tensors_;
  std::array<int64_t, 3> sizes_{};
  std::vector<std::array<int64_t, 3>> strides_;
};

int64_t check_numbers(const char* x_name, const at::Tensor& x, const at::Tensor& raw, const SplineKind& kind) {
  check_dtype(x_name, x);
  TORCH_CHECK_VALUE(x.is_cpu() || x.is_cuda() || x.is_meta(), x_name, ": expected a CPU or CUDA tensor, found device ",
                    x.device());
  check_extent(x_name, x);
  kind.check();
  check_net_dtype("raw", raw, x_name, x);
  TORCH_CHECK_VALUE(raw.dim() == x.dim() + 1 && raw.sizes().slice(0, x.dim()) == x.sizes(), "raw: expected shape ",
                    x.sizes(), " and the numbers of each element, found ", raw.sizes());
  check_extent("raw", raw);
  return kind.bins(raw.size(-1));
}

// Like raw, from the memory that waits: its 3 K numbers an element are most of what a backward writes.
at::Tensor like_numbers(const at::Tensor& raw) {
  if (!raw.is_non_overlapping_and_dense() || raw.is_meta()) return empty_reused(raw.sizes(), raw.options());
  at::Tensor made = empty_reused({raw.numel()}, raw.options());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(raw.sizes(), raw.strides());
  return made;
}

std::tuple<at::Tensor, at::Tensor> spline(const at::Tensor& x, const at::Tensor& raw, const SplineKind& kind) {
  const int64_t bins = check_numbers("x", x, raw, kind);
  at::Tensor y = empty_reused(x.sizes(), x.options()), log_slope = empty_reused(x.sizes(), x.options());
  if (x.numel() == 0) return {y, log_slope};
  const Elements all({x, raw, y, log_slope});
  with_dtype(x, [&]<class T>(T) {
    const SplineArgs<T> args{.x = all.in<T>(0),
                             .raw = all.numbers(1, all.tensor(1).const_data_ptr()),
                             .y = all.out<T>(2),
                             .log_slope = all.out<T>(3),
                             .samples = all.size(0),
                             .channels = all.size(1),
                             .positions = all.size(2),
                             .form = static_cast<SplineForm>(kind.form),
                             .inverse = kind.inverse,
                             .params = kind.as<T>(bins)};
    run(x, args);
  });
  return {y, log_slope};
}

// Gradients of x and raw from the input or from the output of the op, and the other one of these if that is wanted.
std::tuple<at::Tensor, at::Tensor, at::Tensor> spline_backward(const at::Tensor& value, const at::Tensor& raw,
                                                               const at::Tensor& grad_y,
                                                               const at::Tensor& grad_log_slope, const SplineKind& kind,
                                                               bool from_output, bool want_other) {
  const int64_t bins = check_numbers("value", value, raw, kind);
  for (const auto& [name, grad] : {std::pair{"grad_y", grad_y}, std::pair{"grad_log_slope", grad_log_slope}}) {
    check_shape(name, grad, value.sizes());
    check_like(name, grad, "value", value);
  }
  at::Tensor grad_x = empty_reused(value.sizes(), value.options()), grad_raw = like_numbers(raw);
  at::Tensor other = want_other ? empty_reused(value.sizes(), value.options()) : at::Tensor();
  if (value.numel() != 0) {
    const Elements all({value, raw, grad_y, grad_log_slope, grad_x, grad_raw, want_other ? other : grad_x});
    with_dtype(value, [&]<class T>(T) {
      const SplineBackwardArgs<T> args{.value = all.in<T>(0),
                                       .raw = all.numbers(1, all.tensor(1).const_data_ptr()),
                                       .grad_y = all.in<T>(2),
                                       .grad_log_slope = all.in<T>(3),
                                       .grad_x = all.out<T>(4),
                                       .grad_raw = all.numbers(5, all.tensor(5).mutable_data_ptr()),
                                       .recovered = want_other ? all.out<T>(6) : Strided<T>{},
                                       .samples = all.size(0),
                                       .channels = all.size(1),
                                       .positions = all.size(2),
                                       .form = static_cast<SplineForm>(kind.form),
                                       .inverse = kind.inverse,
                                       .from_output = from_output,
                                       .params = kind.as<T>(bins)};
      run(value, args);
    });
    if (!all.tensor(5).is_same(grad_raw)) grad_raw.copy_(all.tensor(5));
  }
  return {grad_x, grad_raw, want_other ? other : empty_reused({0}, value.options())};
}

}  // namespace

void register_spline_ops(torch::Library& m) {
  m.impl("spline", [](const at::Tensor& x, const at::Tensor& raw, int64_t form, int64_t tails, bool inverse,
                      at::ArrayRef<double> numbers) { return spline(x, raw, {form, tails, inverse, numbers}); });
  m.impl("spline_backward", [](const at::Tensor& value, const at::Tensor& raw, const at::Tensor& grad_y,
                               const at::Tensor& grad_log_slope, int64_t form, int64_t tails, bool inverse,
                               at::ArrayRef<double> numbers, bool from_output, bool want_other) {
    const SplineKind kind{form, tails, inverse, numbers};
    return spline_backward(value, raw, grad_y, grad_log_slope, kind, from_output, want_other);
  });
}

}  // namespace pyglow::bindings
