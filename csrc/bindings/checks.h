// What the ops require of their tensors. Each check names the argument, what it must be and what it is, and runs before
// any memory is touched. The Python layer turns TORCH_CHECK_VALUE into a ValueError.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <vector>

#include "bindings/memory.h"
#include "core.h"

namespace pyglow::bindings {

inline const char* name_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    default:
      return c10::toString(dtype);
  }
}

inline void check_dtype(const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, name,
                    ": expected dtype float32 or float64, found ", name_of(x.scalar_type()));
}

inline void check_like(const char* name, const at::Tensor& x, const char* other_name, const at::Tensor& other) {
  TORCH_CHECK_VALUE(x.scalar_type() == other.scalar_type(), name, ": expected dtype ", name_of(other.scalar_type()),
                    " like ", other_name, ", found ", name_of(x.scalar_type()));
  TORCH_CHECK_VALUE(x.device() == other.device(), name, ": expected device ", other.device(), " like ", other_name,
                    ", found ", x.device());
}

// Beside a size of 0 the others may be anything: no count that is made of them overflows.
inline void check_extent(const char* name, const at::Tensor& x) {
  constexpr int64_t most = int64_t{1} << 48;  // elements, more than any memory has
  int64_t extent = 1;
  for (const int64_t size : x.sizes()) {
    const int64_t counted = size == 0 ? 1 : size;
    TORCH_CHECK_VALUE(counted <= most / extent, name, ": expected sizes above 0 of a product of at most ", most,
                      ", found ", x.sizes());
    extent *= counted;
  }
}

// (N, C, *spatial) on a device that has kernels.
inline void check_state(const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 2, name, ": expected shape (N, C, *spatial), found ", x.sizes());
  check_dtype(name, x);
  TORCH_CHECK_VALUE(x.is_cpu() || x.is_cuda() || x.is_meta(), name, ": expected a CPU or CUDA tensor, found device ",
                    x.device());
  check_extent(name, x);
}

inline void check_shape(const char* name, const at::Tensor& x, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(x.sizes() == shape, name, ": expected shape ", shape, ", found ", x.sizes());
}

// None where x is empty: then there is nothing at them to walk over.
inline int64_t positions_of(const at::Tensor& x) {
  if (x.numel() == 0) return 0;
  int64_t positions = 1;
  for (int64_t i = 2; i < x.dim(); ++i) positions *= x.size(i);
  return positions;
}

// The stride from one position to the next, or -1 if the spatial dimensions cannot be walked with a single one.
inline int64_t position_stride(const at::Tensor& x) {
  if (x.numel() == 0) return 1;  // torch gives the strides around a size of 0 as if it were 1
  int64_t stride = -1, next = 0;
  for (int64_t i = x.dim() - 1; i >= 2; --i) {
    if (x.size(i) == 1) continue;
    if (stride == -1) {
      stride = x.stride(i);
    } else if (x.stride(i) != next) {
      return -1;
    }
    next = x.stride(i) * x.size(i);
  }
  return stride == -1 ? 1 : stride;  // a single position: any stride will do
}

// x itself if one stride serves all positions (contiguous, channels-last, channel slices), else a contiguous copy.
inline at::Tensor with_position_stride(const at::Tensor& x) { return position_stride(x) == -1 ? x.contiguous() : x; }

template <class T>
Strided<const T> input(const at::Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1), position_stride(x)};
}

// An output that goes with x: channels-last if x is that, else contiguous. Never the strides of x themselves, which an
// expanded or overlapping tensor may have in an order that no single position stride can walk. ops.py has the same
// rule.
inline at::Tensor empty_output(const at::Tensor& x, at::IntArrayRef sizes) {
  auto format = at::MemoryFormat::Contiguous;
  if (!x.is_contiguous()) {
    if (x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast)) format = at::MemoryFormat::ChannelsLast;
    if (x.dim() == 5 && x.is_contiguous(at::MemoryFormat::ChannelsLast3d)) format = at::MemoryFormat::ChannelsLast3d;
  }
  return empty_reused(sizes, x.options(), format);
}
inline at::Tensor empty_output(const at::Tensor& x) { return empty_output(x, x.sizes()); }

template <class T>
Strided<T> output(at::Tensor& x) {
  TORCH_INTERNAL_ASSERT(position_stride(x) != -1);
  return {x.mutable_data_ptr<T>(), x.stride(0), x.stride(1), position_stride(x)};
}

// Where an op squeezes or unsqueezes by its indexing; ops.py has the same codes.
enum class Squeeze : int64_t { none = 0, input = 1, output = 2 };

inline Squeeze check_squeeze(int64_t squeeze, const at::Tensor& x) {
  TORCH_CHECK_VALUE(squeeze >= 0 && squeeze <= 2, "squeeze: expected 0 (none), 1 (input) or 2 (output), found ",
                    squeeze);
  if (squeeze == 0) return Squeeze::none;
  TORCH_CHECK_VALUE(x.dim() == 4, "x: expected images (N, C, H, W) to squeeze, found ", x.sizes());
  if (squeeze == 1)
    TORCH_CHECK_VALUE(x.size(2) % 2 == 0 && x.size(3) % 2 == 0, "x: expected even sides to squeeze, found ", x.sizes());
  if (squeeze == 2)
    TORCH_CHECK_VALUE(x.size(1) % 4 == 0, "x: expected channels in fours to unsqueeze, found ", x.sizes());
  return static_cast<Squeeze>(squeeze);
}

// The shape of images after squeezing them, and before.
inline std::vector<int64_t> squeezed_sizes(const at::Tensor& x) {
  return {x.size(0), x.size(1) * 4, x.size(2) / 2, x.size(3) / 2};
}
inline std::vector<int64_t> unsqueezed_sizes(const at::Tensor& x) {
  return {x.size(0), x.size(1) / 4, x.size(2) * 2, x.size(3) * 2};
}

// Images (N, C / 4, 2 H, 2 W) that the op sees squeezed, by index; every stride will do.
template <class T>
Squeezed<const T> squeezed_input(const at::Tensor& x) {
  return {{x.const_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(3)}, x.size(3) / 2, x.stride(2)};
}
template <class T>
Squeezed<T> squeezed_output(at::Tensor& x) {
  return {{x.mutable_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(3)}, x.size(3) / 2, x.stride(2)};
}

// f(zero of the dtype), for float32 and float64.
template <class F>
void with_dtype(const at::Tensor& x, const F& f) {
  if (x.scalar_type() == at::kDouble) return f(double{});
  return f(float{});
}

}  // namespace pyglow::bindings
