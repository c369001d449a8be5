// A coupling net, 3x3 - relu - 1x1 - relu - 3x3 - exp(3 log_gain), as three matrix products over pixels on the CPU, and
// their gradients. With a leak the relus are leaky.
//
// Bias and relu ride in the products, the shifts of the 3x3 convolutions lie around them. Pixels are handled in cuts
// whose hidden activations stay in the second-level cache. Nothing is padded at a cut: the first convolution gathers
// from the image, and the last keeps two rows of its product until the next cut brings their neighbours.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/checks.h"
#include "bindings/device.h"
#include "bindings/memory.h"
#include "bindings/net_cuts.h"
#include "bindings/ops.h"

namespace pyglow::bindings {
namespace {

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

// No recording and no autocast: the products are in the dtype of the tensors.
struct Plain {
  at::AutoDispatchBelowAutograd no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

template <class T>
void columns_of(const at::Tensor& x, const Cut& cut, bool transposed, const Matrix<T>& columns) {
  cpu::shift_columns<T>({image_of<T>(x), columns, x.size(1), x.size(2), x.size(3), cut.first_sample, cut.samples,
                         cut.first_row, cut.rows, transposed},
                        torch_threads());
}

// log_gain has one element per output channel, and any shape.
void check_gain(const std::optional<at::Tensor>& log_gain, const Shape& shape, const at::Tensor& x) {
  if (!log_gain) return;
  TORCH_CHECK_VALUE(log_gain->numel() == shape.out, "log_gain: expected ", shape.out, " elements, found ",
                    log_gain->sizes());
  check_like("log_gain", *log_gain, "x", x);
}

void check_leak(double leak) {
  TORCH_CHECK_VALUE(0 <= leak && leak <= 1, "leak: expected a slope from 0 to 1, found ", leak);
}

template <class T>
Matrix<const T> weight_of(const at::Tensor& m) {
  return by_rows(m.const_data_ptr<T>(), m.size(1));
}

// net_out (N, C, H, W) and, if kept, both hidden layers after relu: one (hidden, pixels) matrix in blocks per cut, one
// behind the other.
std::tuple<at::Tensor, at::Tensor, at::Tensor> coupling_net(
    const at::Tensor& x, const at::Tensor& w1, const at::Tensor& b1_in, const at::Tensor& w2, const at::Tensor& b2_in,
    const at::Tensor& w3, const at::Tensor& b3, const std::optional<at::Tensor>& log_gain, bool keep, double leak) {
  const Plain plain;
  const Shape shape = check_net(x, w1, w2, w3);
  check_weight("b1", b1_in, {shape.hidden1}, x);
  check_weight("b2", b2_in, {shape.hidden2}, x);
  check_weight("b3", b3, {shape.out}, x);
  check_gain(log_gain, shape, x);
  check_leak(leak);
  const at::Tensor b1 = b1_in.contiguous(), b2 = b2_in.contiguous();
  const at::Tensor m1 = w1.reshape({shape.hidden1, 9 * shape.in}).contiguous();
  const at::Tensor m2 = w2.reshape({shape.hidden2, shape.hidden1}).contiguous();
  at::Tensor out =
      empty_reused({shape.samples, shape.out, shape.height, shape.width}, x.options(), x.suggest_memory_format());
  at::Tensor h1 = empty_reused({keep ? shape.hidden1 * shape.pixels() : 0}, x.options());
  at::Tensor h2 = empty_reused({keep ? shape.hidden2 * shape.pixels() : 0}, x.options());
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const T slope = static_cast<T>(leak);
    const std::vector<Cut> cuts = cuts_of(shape, sizeof(T));
    if (cuts.empty() || shape.samples == 0) return;
    const int64_t most = cuts[0].count, sum_room = ShiftedSum<T>::elements(shape, shape.out, cuts);
    const LastWeight<T> weight(shape, w3, log_gain);
    const at::Tensor m3 = weight.by_shift();
    const std::vector<T> bias = weight.bias(b3);
    const Left<T> first{shape.hidden1, 9 * shape.in}, second{shape.hidden2, shape.hidden1},
        third{9 * shape.out, shape.hidden2};
    Workspace<T> work({9 * shape.in * most, shape.hidden1 * most, shape.hidden2 * most, sum_room, first.size(),
                       second.size(), third.size()});
    T* const columns_room = work.take(9 * shape.in * most);
    T* const room1 = work.take(shape.hidden1 * most);
    T* const room2 = work.take(shape.hidden2 * most);
    ShiftedSum<T> sum(shape, cuts, work.take(sum_room), bias.data(), false, out);
    const T* const packed1 = first.pack(weight_of<T>(m1), false, work.take(first.size()));
    const T* const packed2 = second.pack(weight_of<T>(m2), false, work.take(second.size()));
    const T* const packed3 = third.pack(weight_of<T>(m3), false, work.take(third.size()));
    for (const Cut& cut : cuts) {
      const auto columns = in_blocks(columns_room, 9 * shape.in, cut);
      const auto layer1 =
          in_blocks(keep ? h1.mutable_data_ptr<T>() + shape.hidden1 * cut.begin : room1, shape.hidden1, cut);
      const auto layer2 =
          in_blocks(keep ? h2.mutable_data_ptr<T>() + shape.hidden2 * cut.begin : room2, shape.hidden2, cut);
      columns_of(x, cut, false, columns);
      multiply<T>({first.times(packed1, columns, layer1, cut.count, b1.const_data_ptr<T>(), {}, slope)});
      multiply<T>({second.times(packed2, layer1, layer2, cut.count, b2.const_data_ptr<T>(), {}, slope)});
      multiply<T>({third.times(packed3, layer2, sum.product(), cut.count, nullptr, {}, slope)});
      sum.add(cut);
    }
  });
  return {out, h1, h2};
}

// Gradients of x, w1, b1, w2, b2, w3, b3 and log_gain (if there is one), given what coupling_net of that leak kept;
// without want_weights that of x alone. b3 is needed beside log_gain only.
std::vector<at::Tensor> coupling_net_backward(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& h1,
                                              const at::Tensor& h2, const at::Tensor& w1, const at::Tensor& w2,
                                              const at::Tensor& w3, const std::optional<at::Tensor>& b3,
                                              const std::optional<at::Tensor>& log_gain, bool want_weights,
                                              double leak) {
  const Plain plain;
  const Shape shape = check_net(x, w1, w2, w3);
  check_weight("grad_out", grad_out, {shape.samples, shape.out, shape.height, shape.width}, x);
  check_weight("h1", h1, {shape.hidden1 * shape.pixels()}, x);
  check_weight("h2", h2, {shape.hidden2 * shape.pixels()}, x);
  check_gain(log_gain, shape, x);
  check_leak(leak);
  TORCH_CHECK_VALUE(!log_gain || b3, "b3: expected a bias beside log_gain, found none");
  if (b3) check_weight("b3", *b3, {shape.out}, x);
  const at::Tensor m1 = w1.reshape({shape.hidden1, 9 * shape.in}).contiguous();
  const at::Tensor m2 = w2.reshape({shape.hidden2, shape.hidden1}).contiguous();
  at::Tensor grad_x = empty_reused(x.sizes(), x.options(), x.suggest_memory_format());
  at::Tensor g1 = at::empty(m1.sizes(), x.options()), g2 = at::empty(m2.sizes(), x.options());
  at::Tensor g3 = at::empty({9 * shape.out, shape.hidden2}, x.options());
  at::Tensor gb1 = at::zeros({shape.hidden1}, x.options()), gb2 = at::zeros({shape.hidden2}, x.options());
  std::vector<at::Tensor> last_grads;
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const T slope = static_cast<T>(leak);
    const std::vector<Cut> cuts = cuts_of(shape, sizeof(T));
    LastWeight<T> weight(shape, w3, log_gain);
    if (cuts.empty() || shape.samples == 0) {
      if (!want_weights) return;
      for (at::Tensor* grad : {&g1, &g2, &g3}) grad->zero_();
      last_grads = weight.gradients(g3, grad_out.sum({0, 2, 3}), b3, log_gain);
      return;
    }
    const at::Tensor m3 = weight.by_shift();
    const int64_t most = cuts[0].count, sum_room = ShiftedSum<T>::elements(shape, shape.in, cuts);
    // Gradients of activations: a transposed weight times a gradient. Of weights: a gradient, where it lies, times
    // activations, turned.
    const Left<T> third{shape.hidden2, 9 * shape.out}, second{shape.hidden1, shape.hidden2},
        first{9 * shape.in, shape.hidden1};
    const int64_t padded = whole_blocks(most);
    Workspace<T> work({9 * shape.in * most, 9 * shape.out * padded, shape.hidden1 * padded, shape.hidden2 * padded,
                       sum_room, first.size(), second.size(), third.size()});
    T* const columns_room = work.take(9 * shape.in * most);
    const auto grad_columns = in_whole_blocks(work.take(9 * shape.out * padded), 9 * shape.out);
    const auto d1 = in_whole_blocks(work.take(shape.hidden1 * padded), shape.hidden1);
    const auto d2 = in_whole_blocks(work.take(shape.hidden2 * padded), shape.hidden2);
    ShiftedSum<T> sum(shape, cuts, work.take(sum_room), nullptr, true, grad_x);
    const T* const packed1 = first.pack(weight_of<T>(m1), true, work.take(first.size()));
    const T* const packed2 = second.pack(weight_of<T>(m2), true, work.take(second.size()));
    const T* const packed3 = third.pack(weight_of<T>(m3), true, work.take(third.size()));
    bool add = false;
    for (const Cut& cut : cuts) {
      const auto layer1 = in_blocks(h1.const_data_ptr<T>() + shape.hidden1 * cut.begin, shape.hidden1, cut);
      const auto layer2 = in_blocks(h2.const_data_ptr<T>() + shape.hidden2 * cut.begin, shape.hidden2, cut);
      const auto columns = in_blocks(columns_room, 9 * shape.in, cut);
      columns_of(grad_out, cut, true, grad_columns);
      multiply<T>({third.times(packed3, grad_columns, d2, cut.count, nullptr, layer2, slope)});
      multiply<T>({second.times(packed2, d2, d1, cut.count, nullptr, layer1, slope)});
      multiply<T>({first.times(packed1, d1, sum.product(), cut.count, nullptr, {}, slope)});
      sum.add(cut);
      if (want_weights) {
        columns_of(x, cut, false, columns);
        const auto added = [&](at::Tensor& total, const Matrix<T>& grad, const Matrix<const T>& activations,
                               T* row_sums) {
          return ProductArgs<T>{nullptr,
                                read_only(grad),
                                activations,
                                true,
                                by_rows(total.mutable_data_ptr<T>(), total.size(1)),
                                total.size(0),
                                total.size(1),
                                cut.count,
                                add,
                                nullptr,
                                {},
                                slope,
                                row_sums};
        };
        multiply<T>({added(g3, grad_columns, layer2, nullptr), added(g2, d2, layer1, gb2.mutable_data_ptr<T>()),
                     added(g1, d1, read_only(columns), gb1.mutable_data_ptr<T>())});
      }
      add = true;
    }
    if (want_weights) last_grads = weight.gradients(g3, grad_out.sum({0, 2, 3}), b3, log_gain);
  });
  if (!want_weights) return {grad_x};
  std::vector<at::Tensor> grads = {grad_x, g1.view(w1.sizes()), gb1, g2.view(w2.sizes()), gb2};
  grads.insert(grads.end(), last_grads.begin(), last_grads.end());
  return grads;
}

}  // namespace

void register_net_ops(pybind11::module_& m) {
  using pybind11::arg;
  // The dispatcher leaves out arguments that have their default.
  m.def("coupling_net", &coupling_net, arg("x"), arg("w1"), arg("b1"), arg("w2"), arg("b2"), arg("w3"), arg("b3"),
        arg("log_gain"), arg("keep"), arg("leak") = 0.0, NoGil());
  m.def("coupling_net_backward", &coupling_net_backward, arg("grad_out"), arg("x"), arg("h1"), arg("h2"), arg("w1"),
        arg("w2"), arg("w3"), arg("b3"), arg("log_gain"), arg("want_weights"), arg("leak") = 0.0, NoGil());
}

}  // namespace pyglow::bindings
