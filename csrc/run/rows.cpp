#include "run/rows.h"

#include <ATen/ops/_addmm_activation.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "bindings/ops.h"
#include "run/activation.h"
#include "run/drift.h"

namespace pyglow::run {
namespace {

int64_t count_of(at::IntArrayRef sizes) { return c10::multiply_integers(sizes); }

// Of a layer: what its window is, where it has one of its own.
struct Taps {
  std::vector<int64_t> kernel, dilations;

  Taps(const NetForm& form, at::IntArrayRef weight, std::size_t layer, bool one)
      : kernel(one ? std::vector<int64_t>(weight.size() - 2, 1) : weight.slice(2).vec()) {
    const auto first = form.dilations.begin() + static_cast<std::ptrdiff_t>(layer * kernel.size());
    dilations.assign(first, first + static_cast<std::ptrdiff_t>(kernel.size()));
  }
};

// A matrix's gradient as that of the weight (out, in, *kernel).
Tensor as_weight(const Tensor& grad, at::IntArrayRef sizes, bool first) {
  if (first) return grad.view(sizes);
  std::vector<int64_t> shape = sizes.vec();
  shape.erase(shape.begin() + 1);
  shape.push_back(sizes[1]);
  return grad.view(shape).movedim(-1, 1);
}

// Uninitialised; its rows begin at multiples of 16 bytes.
Tensor aligned(int64_t rows, int64_t columns, const at::TensorOptions& options) {
  const int64_t length = bindings::row_length(columns, c10::typeMetaToScalarType(options.dtype()));
  return at::empty({rows, length}, options).narrow(1, 0, columns);
}

// a b, with such rows.
Tensor product(const Tensor& a, const Tensor& b) {
  Tensor found = aligned(a.size(0), b.size(1), a.options());
  at::mm_out(found, a, b);
  return found;
}

}  // namespace

bool goes_by_rows(const NetForm& form, at::TensorList tensors) {
  if (form.way != Way::rows) return false;
  for (std::size_t layer = 1; layer + 1 < form.layers(); ++layer)
    if (count_of(tensors[form.first(layer)].sizes().slice(2)) != 1) return false;
  return true;
}

std::vector<int64_t> matrix_sizes(at::IntArrayRef weight, bool first) {
  const int64_t taps = count_of(weight.slice(2));
  if (first) return {weight[0], weight[1] * taps};
  return {weight[0] * taps, weight[1]};
}

bool is_matrix(const Tensor& weight, at::ScalarType dtype, bool first) {
  return !first && weight.dim() == 4 && bindings::row_length(weight.size(1), dtype) == weight.size(1);
}

Tensors matrices_of(const Tensors& weights, at::ScalarType dtype, bool first) {
  if (is_matrix(weights[0], dtype, first)) {
    Tensors found;
    for (const Tensor& weight : weights)
      found.push_back(weight.movedim(1, -1).view(matrix_sizes(weight.sizes(), first)));
    return found;
  }
  const Tensor whole = first ? joined(weights) : joined(weights).movedim(1, -1);
  const std::vector<int64_t> sizes = matrix_sizes(weights[0].sizes(), first);
  const auto count = static_cast<int64_t>(weights.size());
  const Tensor all = aligned(count * sizes[0], sizes[1], whole.options().dtype(dtype));
  if (!all.is_meta()) {
    const int64_t rows = first ? 1 : whole.dim() - 1;  // dimensions that are rows of the matrix
    all.unflatten(1, whole.sizes().slice(rows)).unflatten(0, whole.sizes().slice(0, rows)).copy_(whole);
  }
  return all.split(sizes[0]);
}

// As an operation for the whole net would, before products take parts of what there is.
void Net::check_rows(int64_t channels) const {
  for (std::size_t layer = 0; layer < form_.layers(); ++layer) {
    const at::IntArrayRef weight = sizes(layer);
    TORCH_CHECK_VALUE(weight[1] == channels, "weights[", layer, "]: expected (outputs, ", channels, ") with ",
                      weight.size() - 2, " kernel sizes, found ", weight);
    channels = weight[0];
    TORCH_CHECK_VALUE(folded_.biases[layer].sizes() == at::IntArrayRef(channels), "biases[", layer, "]: expected ",
                      channels, " elements, found ", folded_.biases[layer].sizes());
  }
}

Tensor Net::by_rows(const Tensor& x, Tensors* kept) const {
  const std::size_t last = form_.layers() - 1;
  check_rows(x.size(1));
  const Taps begin(form_, sizes(0), 0, false), end(form_, sizes(last), last, last == 0);
  Tensor h = std::get<0>(bindings::patches(x, begin.kernel, begin.dilations, false, dtype_))
                 .narrow(1, 0, folded_.weights[0].size(1));
  for (std::size_t layer = 0; layer < last; ++layer) {
    if (kept != nullptr) kept->push_back(h);
    const Through activation = through(form_, layer);
    const Tensor weight = folded_.weights[layer].t();
    if (activation.is_relu()) {
      h = at::_addmm_activation(folded_.biases[layer], h, weight);
      continue;
    }
    h = at::addmm(folded_.biases[layer], h, weight);
    if (kept != nullptr && activation.keeps_argument()) kept->push_back(h);
    h = activation.value(h);
  }
  if (kept != nullptr) kept->push_back(h);
  const Tensor taps = product(h, folded_.weights[last].t());
  std::vector<int64_t> shape = x.sizes().vec();
  shape[1] = sizes(last)[0];
  return bindings::tap_sums(taps, folded_.biases[last], shape, end.kernel, end.dilations, false, dtype_);
}

NetGradients Net::back_by_rows(const Inputs& given, Tensors kept, const Tensor& grad_out, const Wanted& wanted) const {
  const std::size_t layers = form_.layers(), last = layers - 1;
  const Taps begin(form_, sizes(0), 0, false), end(form_, sizes(last), last, last == 0);
  NetGradients found{{}, {}, Tensors(layers), Tensors(layers), {}};
  auto [grad, sums] = bindings::patches(grad_out, end.kernel, end.dilations, true, dtype_);
  grad = grad.narrow(1, 0, folded_.weights[last].size(0));
  for (std::size_t layer = layers; layer-- > 0;) {
    const bool goes_on = wants_before(layer, wanted);
    if (!goes_on && !wants_layer(layer, wanted)) break;
    const std::array<int64_t, 2> expected{grad.size(0), folded_.weights[layer].size(1)};
    const Tensor h = taken(kept, expected);
    if (wants_layer(layer, wanted)) {
      found.weights[layer] = as_weight(at::mm(grad.t(), h), sizes(layer), layer == 0);
      found.biases[layer] = sums.defined() ? sums : grad.sum(0);
    }
    if (!goes_on) return found;
    if (layer == 0) break;
    grad = at::mm(grad, folded_.weights[layer]);
    const Through activation = through(form_, layer - 1);
    if (activation.is_relu()) {
      sums = bindings::relu_backward(grad, h.contiguous());
    } else {
      grad = activation.gradient(grad, activation.keeps_argument() ? taken(kept, expected) : h);
      sums = Tensor();
    }
  }
  if (!wanted.inputs) return found;
  std::vector<int64_t> shape = given.x1.sizes().vec();
  if (given.cond) shape[1] += given.cond->size(1);
  const Tensor taps = product(grad, folded_.weights[0]);
  const auto dtype = given.x1.scalar_type();
  put_inputs(bindings::tap_sums(taps, {}, shape, begin.kernel, begin.dilations, true, dtype), given, found);
  return found;
}

}  // namespace pyglow::run
