#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/zeros_like.h>

#include "run/steps.h"

namespace pyglow::run {

std::vector<Map> unstacked(const Maps& maps) {
  const Tensors matrices = maps.matrices.unbind(), offsets = maps.offsets.unbind();
  const Tensors indices = maps.indices ? maps.indices->unbind() : Tensors();
  std::vector<Map> found;
  for (std::size_t k = 0; k < matrices.size(); ++k)
    found.push_back({matrices[k], offsets[k], maps.indices ? Optional(indices[k]) : std::nullopt});
  return found;
}

// A singular matrix is refused where reading a value stops no stream.
Maps inverted(const Maps& maps) {
  const Plain plain;
  if (!maps.indices) {
    auto [inverses, log_dets] = bindings::invert_matrices(maps.matrices);
    if (log_dets.is_cpu()) {
      const bool singular = log_dets.eq(-std::numeric_limits<double>::infinity()).any().item<bool>();
      if (singular) throw SingularMatrix("matrix: expected an invertible matrix, found a singular one");
    }
    return {inverses, maps.offsets, maps.log_dets, {}};
  }
  if (maps.matrices.is_cpu() && maps.matrices.eq(0).any().item<bool>())
    throw SingularMatrix("scale: expected scales that are not zero, found a zero");
  const Tensor back = maps.indices->argsort(int64_t{-1});
  return {maps.matrices.gather(-1, back).reciprocal(), maps.offsets, maps.log_dets, back};
}

// Over the steps: of couplings (N,) each, of maps (K,) times how often they are applied.
static Tensor summed(const Tensors& couplings, const Tensor& maps, int64_t times) {
  if (couplings.size() == 1) return couplings[0].add(maps.squeeze(0), times);
  const Tensor all = stacked(couplings);
  return all.is_meta() ? at::empty_like(couplings[0]) : all.add_(maps.unsqueeze(-1), times).sum(0);
}

namespace {

Tensor magnitude(const Tensor& x) {
  const auto [least, most] = at::aminmax(x);
  return at::maximum(most, least.neg());
}

Tensor magnitudes(const Step& step, const Tensor& u, const Tensor& net_out) {
  const bool scales = step.kind.map != static_cast<int64_t>(ScaleMap::none);
  const int64_t shifts = scales ? net_out.size(1) / 2 : net_out.size(1);
  const Tensor state = magnitude(u), shift = magnitude(net_out.narrow(1, 0, shifts));
  const Tensor raw = scales ? magnitude(net_out.narrow(1, shifts, shifts)) : at::zeros_like(shift);
  return stacked({state, shift.to(state.scalar_type()), raw.to(state.scalar_type())});
}

}  // namespace

Forward forward(const Part& part, const Tensor& x, const Optional& cond, const Maps& maps_in, at::TensorList tensors) {
  const Plain plain;
  check_inputs(part, "x", x, part.squeezes, cond, maps_in, tensors);
  const std::vector<Map> maps = unstacked(maps_in);
  const Nets nets(part, tensors);
  const int64_t count = part.size();
  const bool stores = part.mode == Mode::store, inverts = part.mode == Mode::reversible, undoes = part.inverse();
  Forward found;
  Kept& kept = found.kept;
  Tensors seen, log_dets, largest;
  Tensor u = undoes ? x : mixed(x, maps[0], part.squeezes);
  if (inverts && !part.knows_start) kept.start = sketch(u, *part.signs);
  for (int64_t k = 0; k < count; ++k) {
    const Step& step = part.steps[k];
    if (inverts) seen.push_back(project(u, *part.signs));
    if (stores || part.mode == Mode::checkpoint) kept.states.push_back(u);
    const Tensor net_out = net_output(step, nets.of(k), u, cond, stores ? &kept.nets : nullptr);
    if (stores) kept.outputs.push_back(net_out);
    if (part.watches) largest.push_back(magnitudes(step, u, net_out));
    const std::size_t next = kept.anchors.size();
    const bool ends = k + 1 == count, keeps = next < part.anchors.size() && part.anchors[next] == k + 1;
    Tensor step_log_det;
    if (undoes) {
      std::tie(u, step_log_det) = coupled_and_mixed(step.kind, u, net_out, maps[k]);
    } else if (ends || keeps) {
      std::tie(u, step_log_det) = bindings::coupling(u, net_out, step.kind);
    } else {
      std::tie(u, step_log_det) = coupled_and_mixed(step.kind, u, net_out, maps[k + 1]);
    }
    if (keeps) kept.anchors.push_back(u);
    if (keeps && !undoes) u = mixed(u, maps[k + 1], false);
    log_dets.push_back(step_log_det);
  }
  if (inverts) kept.seen = stacked(seen);
  if (stores)
    for (Tensor& one : nets.made()) kept.nets.push_back(std::move(one));
  if (part.watches) found.largest = stacked(largest);
  found.z = u;
  found.log_det = summed(log_dets, maps_in.log_dets, bindings::positions_of(u) * (undoes ? -1 : 1));
  return found;
}

}  // namespace pyglow::run
