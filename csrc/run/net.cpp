#include "run/net.h"

#include <ATen/Context.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/cudnn_convolution_relu.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>

#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <string>

#include "bindings/dry.h"
#include "bindings/ops.h"
#include "math/kinds.h"

namespace pyglow::run {
namespace {

// A layer's activation, as the convolutions have it.
struct Through {
  Activation kind;
  double parameter;

  bool is_relu() const { return kind == Activation::relu || (kind == Activation::leaky_relu && parameter == 0); }
  // Its derivative takes the argument, not the value.
  bool keeps_argument() const {
    return kind == Activation::silu || kind == Activation::gelu || kind == Activation::gelu_tanh;
  }

  Tensor value(Tensor h) const {
    switch (kind) {
      case Activation::none:
        return h;
      case Activation::relu:
        return h.relu_();
      case Activation::leaky_relu:
        return at::leaky_relu_(h, parameter);
      case Activation::silu:
        return at::silu(h);
      case Activation::gelu:
        return at::gelu(h, "none");
      case Activation::gelu_tanh:
        return at::gelu(h, "tanh");
      case Activation::elu:
        return at::elu_(h, parameter);
      case Activation::tanh:
        return h.tanh_();
      case Activation::sigmoid:
        return h.sigmoid_();
    }
    TORCH_INTERNAL_ASSERT(false, "no such activation");
  }

  // The gradient before it, from the one behind it, which a relu writes over; `kept` is the value or the argument.
  Tensor gradient(Tensor grad, const Tensor& kept) const {
    if (is_relu()) {
      at::threshold_backward_out(grad, grad, kept, 0);
      return grad;
    }
    switch (kind) {
      case Activation::leaky_relu:
        return at::leaky_relu_backward(grad, kept, parameter, true);
      case Activation::silu:
        return at::silu_backward(grad, kept);
      case Activation::gelu:
        return at::gelu_backward(grad, kept, "none");
      case Activation::gelu_tanh:
        return at::gelu_backward(grad, kept, "tanh");
      case Activation::elu:
        return at::elu_backward(grad, parameter, 1, 1, true, kept);
      case Activation::tanh:
        return at::tanh_backward(grad, kept);
      case Activation::sigmoid:
        return at::sigmoid_backward(grad, kept);
      default:
        return grad;
    }
  }
};

Through through(const NetForm& form, std::size_t layer) {
  return {static_cast<Activation>(form.activations[layer]), form.parameters[layer]};
}

constexpr double gain_power = 3;

// Of a convolution that keeps the size.
struct Window {
  std::vector<int64_t> ones, sides, dilation, zeros;

  Window(const NetForm& form, std::size_t layer, const Tensor& weight) {
    const auto dims = static_cast<std::size_t>(weight.dim() - 2);
    ones.assign(dims, 1);
    zeros.assign(dims, 0);
    for (std::size_t i = 0; i < dims; ++i) {
      dilation.push_back(form.dilations[layer * dims + i]);
      sides.push_back(dilation[i] * (weight.size(static_cast<int64_t>(i) + 2) / 2));
    }
  }
};

Tensor scratch_of(const Tensor& h, const Tensor& weight) {
  return bindings::convolution_scratch(h, weight.size(0), weight.numel() / (weight.size(0) * weight.size(1)));
}

// What the library's convolutions give; of a dry run's tensors, for which torch asks Python, memory alone.
Tensor convolution(const Tensor& h, const Tensor& weight, const Tensor& bias, const Window& window) {
  if (h.is_meta()) {
    const Tensor scratch = scratch_of(h, weight);
    std::vector<int64_t> shape = h.sizes().vec();
    shape[1] = weight.size(0);
    return at::empty(shape, h.options(), h.suggest_memory_format());
  }
  return at::convolution(h, weight, bias, window.ones, window.sides, window.dilation, false, window.zeros, 1);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& h, const Tensor& weight,
                                                        const Window& window, const std::array<bool, 3>& mask) {
  const std::vector<int64_t> bias_sizes{weight.size(0)};
  if (h.is_meta()) {
    const Tensor scratch = scratch_of(h, weight);
    const auto given = [](bool wanted, const Tensor& like) { return wanted ? at::empty_like(like) : Tensor(); };
    return {given(mask[0], h), given(mask[1], weight), mask[2] ? grad.new_empty(bias_sizes) : Tensor()};
  }
  return at::convolution_backward(grad, h, weight, at::OptionalIntArrayRef(bias_sizes), window.ones, window.sides,
                                  window.dilation, false, window.zeros, 1, mask);
}

// Whether cuDNN is to compute a convolution and its relu as one. Not where its algorithms are to be deterministic,
// which that op does not see to, nor beyond what it counts with 32 bits.
bool cudnn_fuses(const Tensor& h, const Tensor& weight) {
  const auto& context = at::globalContext();
  const auto dtype = h.scalar_type();
  const bool known = dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16;
  if (!h.is_cuda() || h.dim() != 4 || !known || at::Context::hasHIP()) return false;
  if (!context.userEnabledCuDNN() || !at::Context::hasCuDNN()) return false;
  if (context.deterministicCuDNN() || context.deterministicAlgorithms()) return false;
  const int64_t per_channel = h.numel() / std::max<int64_t>(1, h.size(1));
  return std::max(h.numel(), per_channel * weight.size(0)) <= std::numeric_limits<int32_t>::max();
}

Tensor fused(const Tensor& h, const Tensor& weight, const Tensor& bias, const Window& window) {
  return at::cudnn_convolution_relu(h, weight, bias, window.ones, window.sides, window.dilation, 1);
}

// Whether cuDNN finds an engine for both, and one that is right, which is tried once: the op passes its output's fresh
// memory as an addend, times zero, and an engine that reads it keeps a NaN of whatever was there. So the allocator gets
// an output full of NaN back just before. The host reads what comes of it; a CUDA graph is warmed up first anyway.
bool fuses(const Tensor& h, const Tensor& weight, const Tensor& bias, const Window& window) {
  static std::mutex mutex;
  static std::map<std::string, bool> tried;
  if (!cudnn_fuses(h, weight)) return false;
  std::string key = std::to_string(static_cast<int>(h.scalar_type()));
  for (const auto& sizes : {h.sizes(), weight.sizes(), at::IntArrayRef(window.dilation)})
    for (const int64_t size : sizes) key += "," + std::to_string(size);
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = tried.find(key); found != tried.end()) return found->second;
  try {
    convolution(h, weight, bias, window).fill_(NAN);
    return tried[key] = !fused(h, weight, bias, window).isnan().any().item<bool>();
  } catch (const c10::Error& error) {
    if (std::string(error.what()).find("unable to find an engine") == std::string::npos) throw;
    return tried[key] = false;
  }
}

Tensor relu_convolution(const Tensor& h, const Tensor& weight, const Tensor& bias, const Window& window) {
  return fuses(h, weight, bias, window) ? fused(h, weight, bias, window) : convolution(h, weight, bias, window).relu_();
}

// On the half of a checkerboard and back, as pyglow_fast.reference has it.
Tensor whole_board(const Tensor& kept, int64_t parity) { return bindings::checkerboard_merge(kept, parity, false); }
Tensor half_board(const Tensor& whole, int64_t parity) { return bindings::checkerboard_split(whole, parity, false); }

}  // namespace

bool is_gain(const NetForm& form, std::size_t layer) {
  return form.products && layer + 1 == form.layers() && form.powers[layer] == gain_power;
}

at::MemoryFormat format_for(const Tensor& x) {
  const bool images = x.dim() == 4 && !(x.is_cuda() && x.scalar_type() == at::kDouble);
  return images ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

Tensor per_output(const Tensor& scale, const Tensor& weight) {
  std::vector<int64_t> shape(weight.dim(), 1);
  shape[0] = -1;
  return scale.view(shape);
}

Tensor Outputs::of(Tensor own) const {
  if (is_plain()) return own;
  Tensor found = in_turn ? at::empty_like(own) : own;
  for (int64_t i = 0; i < 2; ++i) {
    Tensor half = coupled(found, i);
    if (in_turn) half.copy_(given(own, i));
    if (signs[i] != 1) half.mul_(signs[i]);
    if (caps[i] != 0) half.div_(caps[i]).tanh_().mul_(caps[i]);
  }
  return found;
}

Tensor Outputs::gradient(const Tensor& grad, const Tensor& out) const {
  if (is_plain()) return grad;
  const Tensor found = at::empty_like(grad);
  for (int64_t i = 0; i < 2; ++i) {
    Tensor half = given(found, i);
    half.copy_(coupled(grad, i));
    if (caps[i] != 0) half.mul_(1 - (coupled(out, i) / caps[i]).square());
    if (signs[i] != 1) half.mul_(signs[i]);
  }
  return found;
}

Tensor Outputs::coupled(const Tensor& out, int64_t i) const {
  const int64_t first = i * (out.size(1) / 2);
  return out.narrow(1, first, i == 0 ? out.size(1) / 2 : out.size(1) - first);
}

Tensor Outputs::given(const Tensor& own, int64_t i) const {
  return in_turn ? own.slice(1, i, own.size(1), 2) : coupled(own, i);
}

std::size_t NetForm::first(std::size_t layer) const {
  std::size_t count = 2 * layer;
  for (std::size_t before = 0; before < layer; ++before) count += powers[before] != 0;
  return count;
}

std::size_t NetForm::tensors() const { return first(layers()); }

std::size_t NetForm::kept() const {
  if (products) return 1;
  std::size_t count = layers();
  for (std::size_t layer = 0; layer + 1 < layers(); ++layer) count += through(*this, layer).keeps_argument();
  return count;
}

std::vector<Chunk> NetForm::chunks_for(const Tensor& x) const {
  if (!x.is_meta()) return chunks;
  std::map<std::array<int64_t, 3>, int> counts;
  std::vector<Chunk> found;
  for (const Chunk& chunk : chunks)
    if (++counts[{chunk.samples, chunk.rows, chunk.takes}] <= 2) found.push_back(chunk);
  return found;
}

Net::Net(const NetForm& form, Folded folded)
    : form_(form),
      folded_(std::move(folded)),
      dtype_(folded_.weights[0].scalar_type()),
      format_(format_for(folded_.weights[0])) {}

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
    if (layer + 1 == form_.layers()) return convolved(layer, h).contiguous(format_);
    const Through activation = through(form_, layer);
    if (activation.is_relu()) {
      h = relu_convolution(h, folded_.weights[layer], folded_.biases[layer],
                           Window(form_, layer, folded_.weights[layer]));
      continue;
    }
    h = convolved(layer, h);
    if (kept != nullptr && activation.keeps_argument()) kept->push_back(h);
    h = activation.value(h);
  }
  TORCH_INTERNAL_ASSERT(false, "a net has a layer");
}

Tensor Net::forward(const Tensor& x1, const Optional& cond, Tensors* kept) const {
  const Inputs given = inputs(x1, cond);
  Tensor out;
  if (form_.products) {
    auto [found, hidden] =
        bindings::net_chain(given.x1, given.cond, folded_.weights, folded_.biases, folded_.log_gain, form_.activations,
                            form_.parameters, form_.dilations, form_.narrow.has_value(), kept != nullptr);
    out = std::move(found);
    if (kept != nullptr) kept->push_back(std::move(hidden));
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
  NetGradients found = form_.products ? back_by_products(given, kept[0], grad, wanted)
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

NetGradients Net::back_by_products(const Inputs& given, const Tensor& kept, const Tensor& grad_out,
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

NetGradients Net::back_by_convolutions(const Inputs& given, Tensors kept, const Tensor& grad_out,
                                       const Wanted& wanted) const {
  const std::size_t layers = form_.layers();
  NetGradients found{{}, {}, Tensors(layers), Tensors(layers), {}};
  Tensor grad = grad_out.to(dtype_).contiguous(format_);
  const auto taken = [&kept] {  // freed behind its last use, if nobody else has it
    Tensor last = std::move(kept.back());
    kept.pop_back();
    return last;
  };
  for (std::size_t layer = layers; layer-- > 0;) {
    bool goes_on = wanted.inputs;
    for (std::size_t before = 0; before < layer; ++before) goes_on = goes_on || wants_layer(before, wanted);
    const bool own = wants_layer(layer, wanted);
    if (!goes_on && !own) break;
    const Tensor h = taken(), weight = folded_.weights[layer];
    std::vector<int64_t> sizes = grad.sizes().vec();
    sizes[1] = weight.size(1);
    TORCH_CHECK_VALUE(h.sizes() == sizes && h.scalar_type() == dtype_, "kept.nets: expected ", sizes, " of ", dtype_,
                      ", found ", h.sizes(), " of ", h.scalar_type());
    const std::array<bool, 3> mask{goes_on, own, own};
    std::tie(grad, found.weights[layer], found.biases[layer]) =
        convolution_backward(grad, h, weight, Window(form_, layer, weight), mask);
    if (layer == 0 || !goes_on) break;
    const Through activation = through(form_, layer - 1);
    const Tensor behind = activation.keeps_argument() ? taken() : h;
    grad = activation.gradient(grad, behind);
  }
  if (wanted.inputs && grad.defined()) {
    const int64_t channels = given.x1.size(1);
    found.state = grad.narrow(1, 0, channels).to(given.x1.scalar_type());
    if (given.cond) found.cond = grad.narrow(1, channels, given.cond->size(1)).to(given.cond->scalar_type());
  }
  return found;
}

}  // namespace pyglow::run
