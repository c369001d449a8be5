// A coupling net, 3x3 - relu - 1x1 - relu - 3x3, as three matrix products over pixels on the CPU, and their gradients.
//
// The products are torch's; what lies around them (shifts, bias, relu, sums) is ours. Pixels are handled in cuts whose
// hidden activations stay in the second-level cache. Nothing is padded at a cut: the first convolution gathers from the
// image, and the last keeps two rows of its product until the next cut brings their neighbours.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "bindings/checks.h"
#include "bindings/device.h"
#include "bindings/ops.h"

namespace pyglow::bindings {
namespace {

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

std::vector<Cut> cuts_of(const Shape& shape, int64_t element_size) {
  const int64_t plane = shape.height * shape.width;
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

void check_weight(const char* name, const at::Tensor& weight, at::IntArrayRef shape, const at::Tensor& x) {
  check_shape(name, weight, shape);
  check_like(name, weight, "x", x);
}

Shape check_net(const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2, const at::Tensor& w3) {
  check_state("x", x);
  TORCH_CHECK_VALUE(x.is_cpu() && x.dim() == 4, "x: expected CPU images (N, C, H, W), found ", x.sizes(), " on ",
                    x.device());
  TORCH_CHECK_VALUE(w1.dim() == 4 && w2.dim() == 4 && w3.dim() == 4,
                    "w1, w2, w3: expected weights of 2-d convolutions, found ", w1.sizes(), ", ", w2.sizes(), ", ",
                    w3.sizes());
  const Shape shape{x.size(0), x.size(1), w1.size(0), w2.size(0), w3.size(0), x.size(2), x.size(3)};
  check_weight("w1", w1, {shape.hidden1, shape.in, 3, 3}, x);
  check_weight("w2", w2, {shape.hidden2, shape.hidden1, 1, 1}, x);
  check_weight("w3", w3, {shape.out, shape.hidden2, 3, 3}, x);
  return shape;
}

constexpr int64_t line = 64;  // bytes; every matrix starts on one, as the library rounds otherwise where it does not

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
  Workspace(const at::TensorOptions& options, std::initializer_list<int64_t> sizes) : options_(options) {
    int64_t elements = 0;
    for (const int64_t size : sizes) elements += whole_lines<T>(size);
    next_ = static_cast<T*>(cpu::net_workspace(elements * sizeof(T)));
  }

  T* take(int64_t elements) {
    T* const taken = next_;
    next_ += whole_lines<T>(elements);
    return taken;
  }
  at::Tensor matrix(T* data, int64_t rows, int64_t columns, int64_t stride) const {
    return at::from_blob(data, {rows, columns}, {stride, 1}, options_);
  }

 private:
  at::TensorOptions options_;
  T* next_;
};

// No recording and no autocast: the products are in the dtype of the tensors.
struct Plain {
  at::AutoDispatchBelowAutograd no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

template <class T>
Image<const T> image_of(const at::Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}
template <class T>
Image<T> image_of(at::Tensor& x) {
  return {x.mutable_data_ptr<T>(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

template <class T>
void columns_of(const at::Tensor& x, const Cut& cut, bool transposed, T* columns) {
  cpu::shift_columns<T>({image_of<T>(x), columns, cut.count, x.size(1), x.size(2), x.size(3), cut.first_sample,
                         cut.samples, cut.first_row, cut.rows, transposed},
                        torch_threads());
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

  // Where the product for a cut goes: (9 C, count).
  at::Tensor product(const Workspace<T>& work, const Cut& cut) const {
    return work.matrix(columns_ + carried(), 9 * image_.size(1), cut.count, stride_);
  }

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
    return cuts[0].count + (cuts[0].rows != shape.height ? 2 * shape.width : 0);
  }

  const Shape& shape_;
  int64_t stride_;
  bool by_rows_;
  T* columns_;
  const T* bias_;
  bool transposed_;
  at::Tensor& image_;
};

// (9 C, hidden): the weight of a convolution whose nine shifts are summed after the product.
at::Tensor by_shift(const at::Tensor& w3) { return w3.permute({0, 2, 3, 1}).reshape({9 * w3.size(0), w3.size(1)}); }

bool starts_a_line(const void* data) { return data != nullptr && reinterpret_cast<std::uintptr_t>(data) % line == 0; }

// net_out (N, C, H, W) and, if kept, both hidden layers after relu: one (hidden, pixels) matrix per cut, one behind the
// other.
std::tuple<at::Tensor, at::Tensor, at::Tensor> coupling_net(const at::Tensor& x, const at::Tensor& w1,
                                                            const at::Tensor& b1_in, const at::Tensor& w2,
                                                            const at::Tensor& b2_in, const at::Tensor& w3,
                                                            const at::Tensor& b3_in, bool keep) {
  const Plain plain;
  const Shape shape = check_net(x, w1, w2, w3);
  check_weight("b1", b1_in, {shape.hidden1}, x);
  check_weight("b2", b2_in, {shape.hidden2}, x);
  check_weight("b3", b3_in, {shape.out}, x);
  const at::Tensor b1 = b1_in.contiguous(), b2 = b2_in.contiguous(), b3 = b3_in.contiguous();
  const at::Tensor m1 = w1.reshape({shape.hidden1, 9 * shape.in}).contiguous();
  const at::Tensor m2 = w2.reshape({shape.hidden2, shape.hidden1}).contiguous(), m3 = by_shift(w3).contiguous();
  at::Tensor out =
      at::empty({shape.samples, shape.out, shape.height, shape.width}, x.options(), x.suggest_memory_format());
  at::Tensor h1 = at::empty({keep ? shape.hidden1 * shape.pixels() : 0}, x.options());
  at::Tensor h2 = at::empty({keep ? shape.hidden2 * shape.pixels() : 0}, x.options());
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<Cut> cuts = cuts_of(shape, sizeof(T));
    if (cuts.empty() || shape.samples == 0) return;
    const int64_t most = cuts[0].count, sum_room = ShiftedSum<T>::elements(shape, shape.out, cuts);
    Workspace<T> work(x.options(), {9 * shape.in * most, shape.hidden1 * most, shape.hidden2 * most, sum_room});
    T* const columns = work.take(9 * shape.in * most);
    T* const room1 = work.take(shape.hidden1 * most);
    T* const room2 = work.take(shape.hidden2 * most);
    ShiftedSum<T> sum(shape, cuts, work.take(sum_room), b3.const_data_ptr<T>(), false, out);
    for (const Cut& cut : cuts) {
      T* const kept1 = keep ? h1.mutable_data_ptr<T>() + shape.hidden1 * cut.begin : nullptr;
      T* const kept2 = keep ? h2.mutable_data_ptr<T>() + shape.hidden2 * cut.begin : nullptr;
      T* const data1 = starts_a_line(kept1) ? kept1 : room1;
      T* const data2 = starts_a_line(kept2) ? kept2 : room2;
      at::Tensor a1 = work.matrix(data1, shape.hidden1, cut.count, cut.count);
      at::Tensor a2 = work.matrix(data2, shape.hidden2, cut.count, cut.count);
      at::Tensor last = sum.product(work, cut);
      columns_of(x, cut, false, columns);
      at::mm_out(a1, m1, work.matrix(columns, 9 * shape.in, cut.count, cut.count));
      cpu::bias_relu(data1, b1.const_data_ptr<T>(), shape.hidden1, cut.count, torch_threads());
      at::mm_out(a2, m2, a1);
      cpu::bias_relu(data2, b2.const_data_ptr<T>(), shape.hidden2, cut.count, torch_threads());
      at::mm_out(last, m3, a2);
      sum.add(cut);
      if (keep && data1 != kept1) std::copy(data1, data1 + shape.hidden1 * cut.count, kept1);
      if (keep && data2 != kept2) std::copy(data2, data2 + shape.hidden2 * cut.count, kept2);
    }
  });
  return {out, h1, h2};
}

// total (=|+=) a b^T
void add_product(at::Tensor& total, const at::Tensor& a, const at::Tensor& b, bool first) {
  if (first) {
    at::mm_out(total, a, b.t());
  } else {
    at::addmm_out(total, total, a, b.t());
  }
}

// Gradients of x, w1, b1, w2, b2, w3, b3, given what coupling_net kept; without want_weights all but the first are
// empty.
std::vector<at::Tensor> coupling_net_backward(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& h1,
                                              const at::Tensor& h2, const at::Tensor& w1, const at::Tensor& w2,
                                              const at::Tensor& w3, bool want_weights) {
  const Plain plain;
  const Shape shape = check_net(x, w1, w2, w3);
  check_weight("grad_out", grad_out, {shape.samples, shape.out, shape.height, shape.width}, x);
  check_weight("h1", h1, {shape.hidden1 * shape.pixels()}, x);
  check_weight("h2", h2, {shape.hidden2 * shape.pixels()}, x);
  const at::Tensor m1 = w1.reshape({shape.hidden1, 9 * shape.in}).contiguous();
  const at::Tensor m2 = w2.reshape({shape.hidden2, shape.hidden1}).contiguous(), m3 = by_shift(w3).contiguous();
  at::Tensor grad_x = at::empty(x.sizes(), x.options(), x.suggest_memory_format());
  at::Tensor g1 = at::zeros(m1.sizes(), x.options()), g2 = at::zeros(m2.sizes(), x.options());
  at::Tensor g3 = at::zeros(m3.sizes(), x.options());
  at::Tensor gb1 = at::zeros({shape.hidden1}, x.options()), gb2 = at::zeros({shape.hidden2}, x.options());
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const std::vector<Cut> cuts = cuts_of(shape, sizeof(T));
    if (cuts.empty() || shape.samples == 0) return;
    const int64_t most = cuts[0].count, sum_room = ShiftedSum<T>::elements(shape, shape.in, cuts);
    Workspace<T> work(
        x.options(), {9 * shape.in * most, 9 * shape.out * most, shape.hidden1 * most, shape.hidden2 * most, sum_room});
    T* const columns = work.take(9 * shape.in * most);
    T* const grad_columns = work.take(9 * shape.out * most);
    T* const grad1 = work.take(shape.hidden1 * most);
    T* const grad2 = work.take(shape.hidden2 * most);
    ShiftedSum<T> sum(shape, cuts, work.take(sum_room), nullptr, true, grad_x);
    bool first = true;
    for (const Cut& cut : cuts) {
      const T* const data1 = h1.const_data_ptr<T>() + shape.hidden1 * cut.begin;
      const T* const data2 = h2.const_data_ptr<T>() + shape.hidden2 * cut.begin;
      const auto matrix = [&](const T* data, int64_t count) {
        return work.matrix(const_cast<T*>(data), count, cut.count, cut.count);
      };
      at::Tensor d1 = matrix(grad1, shape.hidden1), d2 = matrix(grad2, shape.hidden2);
      columns_of(grad_out, cut, true, grad_columns);
      const at::Tensor d3 = matrix(grad_columns, 9 * shape.out);
      at::mm_out(d2, m3.t(), d3);
      cpu::relu_backward(grad2, data2, gb2.mutable_data_ptr<T>(), shape.hidden2, cut.count, torch_threads());
      at::mm_out(d1, m2.t(), d2);
      cpu::relu_backward(grad1, data1, gb1.mutable_data_ptr<T>(), shape.hidden1, cut.count, torch_threads());
      at::Tensor last = sum.product(work, cut);
      at::mm_out(last, m1.t(), d1);
      sum.add(cut);
      if (want_weights) {
        columns_of(x, cut, false, columns);
        add_product(g3, d3, matrix(data2, shape.hidden2), first);
        add_product(g2, d2, matrix(data1, shape.hidden1), first);
        add_product(g1, d1, matrix(columns, 9 * shape.in), first);
      }
      first = false;
    }
  });
  if (!want_weights) return {grad_x};
  at::Tensor g3_by_channel = at::empty(w3.sizes(), w3.options(), at::MemoryFormat::Contiguous);
  g3_by_channel.copy_(g3.view({shape.out, 3, 3, shape.hidden2}).permute({0, 3, 1, 2}));
  return {grad_x, g1.view(w1.sizes()), gb1, g2.view(w2.sizes()), gb2, g3_by_channel, grad_out.sum({0, 2, 3})};
}

}  // namespace

void register_net_ops(pybind11::module_& m) {
  m.def("coupling_net", &coupling_net, NoGil());
  m.def("coupling_net_backward", &coupling_net_backward, NoGil());
}

}  // namespace pyglow::bindings
