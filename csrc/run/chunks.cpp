#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include "run/steps.h"

namespace pyglow::run {

Tensor net_output(const Step& step, const Net& net, const Tensor& state, const Optional& cond, Tensors* kept) {
  const Tensor x1 = read_by(step, state);
  if (kept != nullptr || step.net->chunks.empty()) return net.forward(x1, cond, kept);
  Tensor all;
  for (const Chunk& chunk : step.net->chunks_for(state)) {
    const Optional beside = cond ? Optional(chunk.inputs(*cond)) : cond;
    const Tensor part = chunk.crop(net.forward(chunk.inputs(x1), beside, nullptr));
    if (!all.defined()) {
      std::vector<int64_t> shape = x1.sizes().vec();
      shape[1] = part.size(1);
      all = at::empty(shape, part.options(), part.suggest_memory_format());
    }
    chunk.outputs(all).copy_(part);
  }
  return all;
}

// Into a sum of the state's dtype, in which 16 bits lose nothing.
static void add_to(Tensor& sum, const Tensor& value, at::ScalarType dtype) {
  if (value.defined()) sum = sum.defined() ? sum.add_(value) : value.to(dtype);
}

NetGradients net_gradients(const Step& step, const Net& net, const Tensor& state, const Optional& cond, bool wants_cond,
                           const Wanted& wanted, const Consume& consume) {
  const NetForm& form = *step.net;
  const Tensor x1 = read_by(step, state);
  NetGradients sums{{}, {}, Tensors(form.layers()), Tensors(form.layers()), {}};  // halos overlap
  if (form.takes_state) sums.state = at::zeros_like(x1);
  if (wants_cond && (form.takes_cond || !form.takes_state)) sums.cond = at::zeros_like(*cond);
  for (const Chunk& chunk : form.chunks_for(state)) {
    const Tensor part = chunk.inputs(x1);
    const Optional beside = cond ? Optional(chunk.inputs(*cond)) : cond;
    Tensors kept;
    const Tensor whole = net.forward(part, beside, &kept);
    const Tensor cropped = consume(chunk.crop(whole), &chunk);
    Tensor grad_out = cropped;
    if (cropped.sizes() != whole.sizes()) {
      grad_out = at::zeros_like(whole);
      chunk.crop(grad_out).copy_(cropped);
    }
    NetGradients found = net.backward(part, beside, std::move(kept), whole, grad_out, wanted);
    if (sums.state.defined()) chunk.inputs(sums.state).add_(found.state);
    if (sums.cond.defined()) chunk.inputs(sums.cond).add_(found.cond);
    for (std::size_t i = 0; i < found.weights.size(); ++i) {
      add_to(sums.weights[i], found.weights[i], state.scalar_type());
      const bool in_parts = found.biases[i].defined() && found.biases[i].dim() == 2;
      add_to(sums.biases[i], in_parts ? found.biases[i].sum(0) : found.biases[i], state.scalar_type());
    }
    add_to(sums.log_gain, found.log_gain, state.scalar_type());
  }
  return sums;
}

}  // namespace pyglow::run
