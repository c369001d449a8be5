// What a GPU computes coupling nets with besides matrix products (csrc/run/rows.h).
#include <ATen/ops/empty.h>

#include <algorithm>

#include "bindings/coupling_kind.h"
#include "bindings/device.h"
#include "bindings/extent.h"
#include "bindings/ops.h"

namespace pyglow::bindings {
namespace {

bool has_type(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16;
}

// Numbers of float64 stay such, those of other types become each other.
void check_types(const char* name, const at::Tensor& x, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(has_type(x.scalar_type()), name, ": expected dtype float32, float64, bfloat16 or float16, found ",
                    name_of(x.scalar_type()));
  TORCH_CHECK_VALUE(has_type(dtype) && (dtype == at::kDouble) == (x.scalar_type() == at::kDouble),
                    "dtype: expected one that goes with ", name_of(x.scalar_type()), ", found ", name_of(dtype));
  TORCH_CHECK_VALUE(x.is_cpu() || x.is_cuda() || x.is_meta(), name, ": expected a CPU or CUDA tensor, found device ",
                    x.device());
}

at::ScalarType sum_type(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

Window checked_window(at::IntArrayRef sizes, at::IntArrayRef kernel, at::IntArrayRef dilations) {
  TORCH_CHECK_VALUE(kernel.size() + 2 == sizes.size() && kernel.size() <= 3, "kernel: expected a size for each of ",
                    sizes.size() - 2, " spatial dimensions, at most 3, found ", kernel);
  constexpr int64_t most = int64_t{1} << 26;  // of which 31, a kernel's half, are counted in 32 bits
  TORCH_CHECK_VALUE(c10::multiply_integers(sizes.slice(2)) < most, "sizes: expected less than ", most,
                    " positions, found ", sizes);
  TORCH_CHECK_VALUE(dilations.size() == kernel.size(), "dilations: expected ", kernel.size(), ", found ", dilations);
  for (std::size_t d = 0; d < kernel.size(); ++d)
    TORCH_CHECK_VALUE(kernel[d] % 2 == 1 && kernel[d] > 0 && kernel[d] <= 63 && dilations[d] > 0,
                      "kernel, dilations: expected odd sizes up to 63, and numbers above 0, found ", kernel, " and ",
                      dilations);
  return window_of(sizes.slice(2), kernel, dilations);
}

}  // namespace

// Rows begin at multiples of 16 bytes, as matrix products like it.
int64_t row_length(int64_t used, at::ScalarType dtype) {
  const int64_t unit = 16 / static_cast<int64_t>(c10::elementSize(dtype));
  return (used + unit - 1) / unit * unit;
}

// Rows (N P, length) of what each position of x (N, C, *spatial) sees. Backward: the gradient of the rows that tap_sums
// takes from that of what it gives, and sums of this (shares, C), which are to be summed.
std::tuple<at::Tensor, at::Tensor> patches(const at::Tensor& x_in, at::IntArrayRef kernel, at::IntArrayRef dilations,
                                           bool backward, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(x_in.dim() >= 2, "x: expected shape (N, C, *spatial), found ", x_in.sizes());
  check_types("x", x_in, dtype);
  check_extent("x", x_in);
  const Window window = checked_window(x_in.sizes(), kernel, dilations);
  const at::Tensor x = with_position_stride(x_in);
  const int64_t channels = x.size(1), count = x.size(0) * positions_of(x);
  at::Tensor rows = at::empty({count, row_length(window.taps() * channels, dtype)}, x.options().dtype(dtype));
  const int64_t shares = backward ? (count + summed_positions - 1) / summed_positions : 0;
  at::Tensor sums = at::empty({shares, channels}, x.options().dtype(sum_type(dtype)));
  if (rows.numel() == 0) return {rows, sums};
  with_dtype(x, [&]<class T>(T) {
    run(x, PatchesArgs<T>{.x = net_input(x),
                          .rows = {rows.mutable_data_ptr(), net_type(rows), rows.size(1)},
                          .sums = backward ? sums.mutable_data_ptr<T>() : nullptr,
                          .samples = x.size(0),
                          .channels = channels,
                          .extent = extent_of(x.sizes()),
                          .window = window,
                          .mirrored = backward});
  });
  return {rows, sums};
}

// (N, C, *spatial) of the given sizes, the sums of what rows have for each position, and a bias. Backward: the gradient
// of what patches takes from that of the rows.
at::Tensor tap_sums(const at::Tensor& rows_in, const Optional& bias_in, at::IntArrayRef sizes, at::IntArrayRef kernel,
                    at::IntArrayRef dilations, bool backward, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(sizes.size() >= 2, "sizes: expected (N, C, *spatial), found ", sizes);
  check_types("rows", rows_in, dtype);
  const Window window = checked_window(sizes, kernel, dilations);
  at::Tensor y = at::empty(sizes, rows_in.options().dtype(dtype));
  const int64_t channels = sizes[1], count = sizes[0] * positions_of(y);
  TORCH_CHECK_VALUE(
      rows_in.dim() == 2 && (rows_in.size(0) == count || y.numel() == 0) && rows_in.size(1) >= window.taps() * channels,
      "rows: expected (", count, ", at least ", window.taps() * channels, "), found ", rows_in.sizes());
  const bool in_place = rows_in.stride(1) == 1 && rows_in.stride(0) >= rows_in.size(1);
  const at::Tensor rows = in_place ? rows_in : rows_in.contiguous();
  at::Tensor bias;
  if (bias_in) {
    check_shape("bias", *bias_in, {channels});
    check_like("bias", *bias_in, "rows", rows);
    bias = bias_in->contiguous();
  }
  if (y.numel() == 0) return y;
  with_dtype(rows, [&]<class T>(T) {
    run(rows, TapSumsArgs<T>{.rows = {rows.const_data_ptr(), net_type(rows), rows.stride(0)},
                             .bias = bias.defined() ? bias.const_data_ptr() : nullptr,
                             .y = net_grad(y),
                             .samples = y.size(0),
                             .channels = channels,
                             .extent = extent_of(y.sizes()),
                             .window = window,
                             .mirrored = backward});
  });
  return y;
}

// The gradient before a relu, in the place of the one behind it, both (rows, columns) like h, which the relu gave;
// gives the sums of shares of its rows (shares, columns), which are to be summed.
at::Tensor relu_backward(const at::Tensor& grad, const at::Tensor& h) {
  check_types("grad", grad, grad.scalar_type());
  TORCH_CHECK_VALUE(grad.dim() == 2 && grad.is_contiguous(), "grad: expected a contiguous matrix, found ", grad.sizes(),
                    " with strides ", grad.strides());
  check_shape("h", h, grad.sizes());
  check_like("h", h, "grad", grad);
  TORCH_CHECK_VALUE(h.is_contiguous(), "h: expected a contiguous matrix, found strides ", h.strides());
  constexpr int64_t most_shares = 128, least_rows = 64;  // which give work to a large GPU, and not too little each
  const int64_t shares = std::min(most_shares, (grad.size(0) + least_rows - 1) / least_rows);
  at::Tensor sums = at::empty({shares, grad.size(1)}, grad.options().dtype(sum_type(grad.scalar_type())));
  if (sums.numel() == 0) return sums;
  with_dtype(sums, [&]<class T>(T) {
    run(grad, ReluBackwardArgs<T>{.grad = grad.mutable_data_ptr(),
                                  .h = h.const_data_ptr(),
                                  .type = net_type(grad),
                                  .sums = sums.mutable_data_ptr<T>(),
                                  .rows = grad.size(0),
                                  .columns = grad.size(1),
                                  .shares = shares});
  });
  return sums;
}

void register_window_ops(torch::Library& m) {
  m.impl("patches", &patches);
  m.impl("tap_sums", &tap_sums);
  m.impl("relu_backward", &relu_backward);
}

}  // namespace pyglow::bindings
