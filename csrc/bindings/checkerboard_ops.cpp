// Checkerboards in two and together again: moves of values, for CPU tensors.
#include <ATen/core/Tensor.h>

#include <vector>

#include "bindings/checks.h"
#include "bindings/device.h"
#include "bindings/ops.h"

namespace pyglow::bindings {
namespace {

// Of a whole or a half (N, C, rows, *rest) with up to three spatial dimensions.
Board board_of(const at::Tensor& x, int64_t channels, int64_t row_pairs, int64_t parity) {
  const int64_t dims = x.dim() - 2;
  return {.samples = x.size(0),
          .channels = channels,
          .row_pairs = row_pairs,
          .middle = dims == 3 ? x.size(3) : 1,
          .width = dims == 1 ? 1 : x.size(dims + 1),
          .parity = parity};
}

void check_board(const char* name, const at::Tensor& x, int64_t parity) {
  check_state(name, x);
  TORCH_CHECK_VALUE(x.dim() >= 3 && x.dim() <= 5, name, ": expected 1 to 3 spatial dimensions, found ", x.sizes());
  TORCH_CHECK_VALUE(parity == 0 || parity == 1, "parity: expected 0 or 1, found ", parity);
}

// x itself if each channel's values lie one after another, else a copy.
at::Tensor with_planes(const at::Tensor& x) { return position_stride(x) == 1 ? x : x.contiguous(); }

template <class T>
Planes<const T> planes(const at::Tensor& x, int64_t first_channel) {
  return {x.const_data_ptr<T>() + first_channel * x.stride(1), x.stride(0), x.stride(1)};
}
template <class T>
Planes<T> written(at::Tensor& x, int64_t first_channel) {
  return {x.mutable_data_ptr<T>() + first_channel * x.stride(1), x.stride(0), x.stride(1)};
}

}  // namespace

// The positions of one parity, and behind them, with both, those of the other: (N, C or 2 C, rows / 2, *rest).
at::Tensor checkerboard_split(const at::Tensor& x_in, int64_t parity, bool both) {
  check_board("x", x_in, parity);
  TORCH_CHECK_VALUE(x_in.size(2) % 2 == 0, "x: expected an even first side, found ", x_in.sizes());
  const at::Tensor x = with_planes(x_in);
  const int64_t channels = x.size(1);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[1] = both ? 2 * channels : channels;
  sizes[2] /= 2;
  at::Tensor halves = empty_reused(sizes, x.options());
  if (halves.numel() == 0) return halves;  // there is no value to move, however many rows there are
  with_dtype(x, [&]<class T>(T) {
    const CheckerboardSplitArgs<T> args{.whole = planes<T>(x, 0),
                                        .kept = written<T>(halves, 0),
                                        .other = both ? written<T>(halves, channels) : Planes<T>{},
                                        .board = board_of(x, channels, sizes[2], parity)};
    if (x.is_cpu()) launch_on_cpu([args] { cpu::checkerboard_split(args, torch_threads()); });
  });
  return halves;
}

// The inverse; without both, zeros at the other parity.
at::Tensor checkerboard_merge(const at::Tensor& halves_in, int64_t parity, bool both) {
  check_board("halves", halves_in, parity);
  TORCH_CHECK_VALUE(!both || halves_in.size(1) % 2 == 0, "halves: expected an even number of channels, found ",
                    halves_in.sizes());
  const at::Tensor halves = with_planes(halves_in);
  const int64_t channels = both ? halves.size(1) / 2 : halves.size(1);
  std::vector<int64_t> sizes = halves.sizes().vec();
  sizes[1] = channels;
  sizes[2] *= 2;
  at::Tensor x = empty_reused(sizes, halves.options());
  if (x.numel() == 0) return x;  // there is no value to move, however many rows there are
  with_dtype(halves, [&]<class T>(T) {
    const CheckerboardMergeArgs<T> args{.kept = planes<T>(halves, 0),
                                        .other = both ? planes<T>(halves, channels) : Planes<const T>{},
                                        .whole = written<T>(x, 0),
                                        .board = board_of(halves, channels, halves.size(2), parity)};
    if (x.is_cpu()) launch_on_cpu([args] { cpu::checkerboard_merge(args, torch_threads()); });
  });
  return x;
}

void register_checkerboard_ops(torch::Library& m) {
  m.impl("checkerboard_split", &checkerboard_split);
  m.impl("checkerboard_merge", &checkerboard_merge);
}

}  // namespace pyglow::bindings
