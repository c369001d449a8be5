#include "run/net.h"

#include <ATen/ops/empty.h>

#include <array>

#include "bindings/ops.h"
#include "run/activation.h"
#include "run/convolution.h"

namespace pyglow::run {
namespace {

constexpr double gain_power = 3;

// On the half of a checkerboard and back, as pyglow_fast.reference has it.
Tensor whole_board(const Tensor& kept, int64_t parity) { return bindings::checkerboard_merge(kept, parity, false); }
Tensor half_board(const Tensor& whole, int64_t parity) { return bindings::checkerboard_split(whole, parity, false); }

}  // namespace

bool is_gain(const NetForm& form, std::size_t layer) {
  return form.way == Way::kernels && layer + 1 == form.layers() && form.powers[layer] == gain_power;
}

at::MemoryFormat format_for(const NetForm& form, const Tensor& x) {
  return form.channels_last && x.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

Tensor per_output(const Tensor& scale, const Tensor& weight) {
  std::vector<int64_t> shape(weight.dim(), 1);
  shape[0] = -1;
  return scale.view(shape);
}

Net::Net(const NetForm& form, at::TensorList tensors, Folded folded)
    : form_(form),
      tensors_(tensors),
      folded_(std::move(folded)),
      dtype_(folded_.weights[0].scalar_type()),
      format_(format_for(form, tensors[0])) {}

Net::Inputs Net::inputs(const Tensor& x1, const Optional& cond) const {
  if (!form_.takes_state) return {*cond, {}};
  const Optional beside = form_.takes_cond ? cond : std::nullopt;
  if (!form_.parity) return {x1, beside};
  return {whole_board(x1, *form_.parity), beside ? Optional(beside->flatten(2, 3)) : beside};
}

Tensor Net::joined(const Inputs& given) const {
  const Tensor& x = given.x1;
  if (!given.cond && x.scalar_type() == dtype_ && x.is_contiguous(format_)) return x;
  std::vector<int64_t> shape = x.sizes().vec();
  if (given.cond) shape[1] += given.cond->size(1);
  Tensor both = at::empty(shape, x.options().dtype(dtype_), format_);
  both.narrow(1, 0, x.size(1)).copy_(x);
  if (given.cond) both.narrow(1, x.size(1), given.cond->size(1)).copy_(*given.cond);
  return both;
}

Tensor Net::convolved(std::size_t layer, const Tensor& h) const {
  return convolution(h, folded_.weights[layer], folded_.biases[layer], Window(form_, layer, folded_.weights[layer]));
}

Tensor Net::by_convolutions(Tensor h, Tensors* kept) const {
  for (std::size_t layer = 0; layer < form_.layers(); ++layer) {
    if (kept != nullptr) kept->push_back(h);
    const bool ends = layer + 1 == form_.layers();
    h = convolved(layer, h);
    // Kernels on a GPU take a state and what a net gives for it along positions.
    if (ends) return h.contiguous(h.is_cuda() ? at::MemoryFormat::Contiguous : format_);
    const Through activation = through(form_, layer);
    if (kept != nullptr && activation.keeps_argument()) kept->push_back(h);
    h = activation.value(h);
  }
  TORCH_INTERNAL_ASSERT(false, "a net has a layer");
}

Tensor Net::forward(const Tensor& x1, const Optional& cond, Tensors* kept) const {
  const Inputs given = inputs(x1, cond);
  Tensor out;
  if (form_.way == Way::kernels) {
    auto [found, hidden] =
        bindings::net_chain(given.x1, given.cond, folded_.weights, folded_.biases, folded_.log_gain, form_.activations,
                            form_.parameters, form_.dilations, form_.narrow.has_value(), kept != nullptr);
    out = std::move(found);
    if (kept != nullptr) kept->push_back(std::move(hidden));
  } else if (folded_.by_rows) {
    out = by_rows(given.cond ? joined(given) : given.x1, kept);
  } else {
    out = by_convolutions(joined(given), kept);
  }
  out = form_.outputs.of(std::move(out));
  return form_.parity ? half_board(out.to(x1.scalar_type()), 1 - *form_.parity) : out;
}

NetGradients Net::backward(const Tensor& x1, const Optional& cond, Tensors kept, const Tensor& out,
                           const Tensor& grad_out, const Wanted& wanted) const {
  const Inputs given = inputs(x1, cond);
  const Tensor before = form_.outputs.gradient(grad_out, out);
  const Tensor grad = form_.parity ? whole_board(before, 1 - *form_.parity) : before;
  NetGradients found = form_.way == Way::kernels ? back_by_kernels(given, kept[0], grad, wanted)
                       : folded_.by_rows         ? back_by_rows(given, std::move(kept), grad, wanted)
                                                 : back_by_convolutions(given, std::move(kept), grad, wanted);
  if (!form_.takes_state) {
    found.cond = std::move(found.state);
    found.state = Tensor();
  } else if (form_.parity) {
    if (found.state.defined()) found.state = half_board(found.state, *form_.parity);
    if (found.cond.defined()) found.cond = found.cond.unflatten(2, {-1, 2});
  }
  return found;
}

NetGradients Net::back_by_kernels(const Inputs& given, const Tensor& kept, const Tensor& grad_out,
                                  const Wanted& wanted) const {
  bool want_own = false;
  for (const bool one : wanted.own) want_own = want_own || one;
  const Tensor grad = grad_out.to(given.x1.scalar_type());
  const Optional& gain = folded_.log_gain;
  Tensors grads = bindings::net_chain_backward(
      grad, given.x1, given.cond, kept, folded_.weights, gain ? Optional(folded_.biases.back()) : Optional(), gain,
      form_.activations, form_.parameters, form_.dilations, form_.narrow.has_value(), want_own);
  NetGradients found{grads[0], given.cond ? grads[1] : Tensor(), {}, {}, {}};
  if (!want_own) return found;
  const auto weights = grads.begin() + (given.cond ? 2 : 1), biases = weights + static_cast<int64_t>(form_.layers());
  const auto end = biases + static_cast<int64_t>(form_.layers());
  found.weights.assign(weights, biases);
  found.biases.assign(biases, end);
  if (gain) found.log_gain = *end;
  return found;
}

bool Net::wants_layer(std::size_t layer, const Wanted& wanted) const {
  for (std::size_t i = form_.first(layer); i < form_.first(layer + 1); ++i)
    if (wanted.own[i]) return true;
  return false;
}

bool Net::wants_before(std::size_t layer, const Wanted& wanted) const {
  bool found = wanted.inputs;
  for (std::size_t before = 0; before < layer; ++before) found = found || wants_layer(before, wanted);
  return found;
}

Tensor Net::taken(Tensors& kept, at::IntArrayRef sizes) const {
  Tensor last = std::move(kept.back());
  kept.pop_back();
  TORCH_CHECK_VALUE(last.sizes() == sizes && last.scalar_type() == dtype_, "kept.nets: expected ", sizes, " of ",
                    dtype_, ", found ", last.sizes(), " of ", last.scalar_type());
  return last;
}

void Net::put_inputs(const Tensor& grad, const Inputs& given, NetGradients& found) {
  const int64_t channels = given.x1.size(1);
  found.state = grad.narrow(1, 0, channels).to(given.x1.scalar_type());
  if (given.cond) found.cond = grad.narrow(1, channels, given.cond->size(1)).to(given.cond->scalar_type());
}

NetGradients Net::back_by_convolutions(const Inputs& given, Tensors kept, const Tensor& grad_out,
                                       const Wanted& wanted) const {
  const std::size_t layers = form_.layers();
  NetGradients found{{}, {}, Tensors(layers), Tensors(layers), {}};
  Tensor grad = grad_out.to(dtype_).contiguous(format_);
  for (std::size_t layer = layers; layer-- > 0;) {
    const bool goes_on = wants_before(layer, wanted), own = wants_layer(layer, wanted);
    if (!goes_on && !own) break;
    const Tensor weight = folded_.weights[layer];
    std::vector<int64_t> sizes = grad.sizes().vec();
    sizes[1] = weight.size(1);
    const Tensor h = taken(kept, sizes);
    const std::array<bool, 3> mask{goes_on, own, own};
    std::tie(grad, found.weights[layer], found.biases[layer]) =
        convolution_backward(grad, h, weight, Window(form_, layer, weight), mask);
    if (layer == 0 || !goes_on) break;
    const Through activation = through(form_, layer - 1);
    grad = activation.gradient(grad, activation.keeps_argument() ? taken(kept, sizes) : h);
  }
  if (wanted.inputs && grad.defined()) put_inputs(grad, given, found);
  return found;
}

}  // namespace pyglow::run
