#include "run/nets.h"

#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>

#include <map>

#include "run/rows.h"

namespace pyglow::run {
namespace {

constexpr auto contiguous = at::MemoryFormat::Contiguous;

// A tensor as parts along its first dimension, like those that it was joined from.
Tensors cut(const Tensor& whole, const Tensors& like) {
  if (like.size() == 1) return {whole};
  Tensors found;
  int64_t at = 0;
  for (const Tensor& part : like) {
    found.push_back(whole.narrow(0, at, part.size(0)));
    at += part.size(0);
  }
  return found;
}

at::ScalarType dtype_of(const NetForm& form, const Tensor& weight) {
  return form.narrow && form.way != Way::kernels ? *form.narrow : weight.scalar_type();
}

// What `joined` makes of each of some lists, in one call; tensors of a list have one size.
Tensors together(const std::vector<Tensors>& lists) {
  Tensors found, all;
  for (const Tensors& list : lists) {
    if (list.size() == 1) found.push_back(list[0]);
    for (const Tensor& part : list) all.push_back(part.flatten());
  }
  if (found.size() == lists.size()) return found;
  const Tensor whole = joined(all);
  int64_t at = 0;
  for (const Tensors& list : lists) {
    std::vector<int64_t> sizes = list[0].sizes().vec();
    sizes[0] *= static_cast<int64_t>(list.size());
    found.push_back(whole.narrow(0, at, c10::multiply_integers(sizes)).view(sizes));
    at += found.back().numel();
  }
  return found;
}

Tensor exp_of(const Tensor& logs, double power) { return (power == 1 ? logs : logs * power).exp(); }

// Copies that are all made in one call.
struct Copies {
  Tensors to, from;
  void make() {
    if (!to.empty() && !to[0].is_meta()) at::_foreach_copy_(to, from);
  }
};

// Tensors in a dtype and a memory format: as they are where they have both.
Tensors in_form(const Tensors& parts, at::ScalarType dtype, at::MemoryFormat format, Copies& copies) {
  bool fits = true, dense = true;
  for (const Tensor& part : parts) {
    dense = dense && part.is_contiguous(format);
    fits = fits && dense && part.scalar_type() == dtype;
  }
  if (fits) return parts;
  if (!dense) {
    const Tensor whole = joined(parts);
    const Tensor out = at::empty(whole.sizes(), whole.options().dtype(dtype), format);
    if (!out.is_meta()) out.copy_(whole);
    return cut(out, parts);
  }
  Tensors found;
  for (const Tensor& part : parts) {
    found.push_back(at::empty(part.sizes(), part.options().dtype(dtype), format));
    copies.to.push_back(found.back());
    copies.from.push_back(part);
  }
  return found;
}

// Weights or biases times a scale of each of their outputs.
Tensor scaled(const Tensor& whole, const Tensor& scale, at::ScalarType dtype, at::MemoryFormat format) {
  Tensor out = at::empty(whole.sizes(), whole.options().dtype(dtype), format);
  if (!out.is_meta()) at::mul_out(out, whole, per_output(scale, whole));
  return out;
}

// Sums biases that came in parts, all of one size at once.
void sum_parts(const std::vector<int64_t>& steps, std::vector<NetGradients>& grads) {
  std::map<std::vector<int64_t>, std::vector<Tensor*>> of_size;
  for (const int64_t k : steps)
    for (Tensor& bias : grads[k].biases)
      if (bias.defined() && bias.dim() == 2) of_size[bias.sizes().vec()].push_back(&bias);
  for (const auto& [sizes, biases] : of_size) {
    Tensors parts;
    for (Tensor* const bias : biases) parts.push_back(std::move(*bias));
    const Tensor sums = stacked(parts).sum(1);
    for (std::size_t i = 0; i < biases.size(); ++i) *biases[i] = sums[static_cast<int64_t>(i)];
  }
}

}  // namespace

Nets::Nets(const Part& part, at::TensorList tensors, at::TensorList made)
    : part_(part), tensors_(tensors), first_(part.bounds(&NetForm::tensors)), folded_(part.steps.size()) {
  for (int64_t k = 0; k < part.size(); ++k) {
    const auto found =
        std::find_if(groups_.begin(), groups_.end(), [&](const Group& group) { return alike(group.steps[0], k); });
    if (found != groups_.end())
      found->steps.push_back(k);
    else
      groups_.push_back({{k}, {}, goes_by_rows(form(k), tensors_.slice(first_[k], form(k).tensors()))});
  }
  std::size_t at = 0;
  const auto next = [&](at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(at < made.size() && made[at].sizes() == sizes, "kept.nets: expected ", sizes, " made of tensor ",
                      at, " of ", made.size(), ", found another");
    return made[at++];
  };
  for (Group& group : groups_) {
    const NetForm& own = form(group.steps[0]);
    if (own.way == Way::kernels) continue;
    if (made.empty()) {
      std::vector<Folded> all = folded(group);
      for (std::size_t i = 0; i < all.size(); ++i) folded_[group.steps[i]] = std::move(all[i]);
      continue;
    }
    for (const int64_t k : group.steps) folded_[k].by_rows = group.by_rows;
    group.scales.resize(own.layers());
    for (std::size_t layer = 0; layer < own.layers(); ++layer) {
      const Tensor& weight = tensors_[first_[group.steps[0]] + own.first(layer)];
      const int64_t outputs = weight.size(0);
      if (own.powers[layer] != 0) group.scales[layer] = next({static_cast<int64_t>(group.steps.size()) * outputs});
      for (const int64_t k : group.steps) {
        folded_[k].weights.push_back(
            next(group.by_rows ? matrix_sizes(weight.sizes(), layer == 0) : weight.sizes().vec()));
        folded_[k].biases.push_back(next({outputs}));
      }
    }
  }
}

Tensors Nets::made() const {
  Tensors found;
  for (const Group& group : groups_) {
    for (std::size_t layer = 0; layer < group.scales.size(); ++layer) {
      if (group.scales[layer].defined()) found.push_back(group.scales[layer]);
      for (const int64_t k : group.steps) {
        found.push_back(folded_[k].weights[layer]);
        found.push_back(folded_[k].biases[layer]);
      }
    }
  }
  return found;
}

std::vector<std::size_t> Part::bounds(std::size_t (NetForm::*count)() const) const {
  std::vector<std::size_t> found{0};
  for (const Step& step : steps) found.push_back(found.back() + (*step.net.*count)());
  return found;
}

Net Nets::of(int64_t k) const {
  const at::TensorList own = tensors_.slice(first_[k], form(k).tensors());
  if (form(k).way != Way::kernels) return Net(form(k), own, folded_[k]);
  Group alone{{k}, {}, false};
  return Net(form(k), own, std::move(folded(alone)[0]));
}

// Nets of one description may differ in hidden widths.
bool Nets::alike(int64_t a, int64_t b) const {
  if (part_.steps[a].net != part_.steps[b].net || form(a).way == Way::kernels) return false;
  for (std::size_t i = 0; i < form(a).tensors(); ++i)
    if (tensors_[first_[a] + i].sizes() != tensors_[first_[b] + i].sizes()) return false;
  return true;
}

Tensors Nets::parts(const std::vector<int64_t>& steps, std::size_t at) const {
  Tensors found;
  for (const int64_t k : steps) found.push_back(tensors_[first_[k] + at]);
  return found;
}

Tensors Nets::logs(const std::vector<int64_t>& steps, std::size_t layer) const {
  Tensors found = parts(steps, form(steps[0]).first(layer) + 2);
  for (Tensor& log : found) log = log.flatten();
  return found;
}

// exp(power log_scale) of a layer of all these nets.
Tensor Nets::scale(const std::vector<int64_t>& steps, std::size_t layer) const {
  const NetForm& own = form(steps[0]);
  return exp_of(joined(logs(steps, layer)), own.powers[layer]);
}

std::vector<Folded> Nets::folded(Group& group) const {
  const NetForm& own = form(group.steps[0]);
  std::vector<Folded> found(group.steps.size());
  group.scales.resize(own.layers());
  Copies copies;
  for (std::size_t layer = 0; layer < own.layers(); ++layer) {
    const std::size_t at = own.first(layer);
    Tensors weights = parts(group.steps, at), biases = parts(group.steps, at + 1);
    const auto dtype = dtype_of(own, weights[0]);
    const auto format = own.way == Way::kernels ? contiguous : format_for(own, weights[0]);
    if (is_gain(own, layer)) {
      found[0].log_gain = tensors_[first_[group.steps[0]] + at + 2];
    } else if (own.powers[layer] != 0) {
      const Tensors whole = together({weights, biases, logs(group.steps, layer)});
      const Tensor& factor = group.scales[layer] = exp_of(whole[2], own.powers[layer]);
      weights = cut(scaled(whole[0], factor, dtype, format), weights);
      biases = cut(scaled(whole[1], factor, dtype, contiguous), biases);
    } else if (own.way != Way::kernels) {
      if (!group.by_rows || is_matrix(weights[0], dtype, layer == 0)) weights = in_form(weights, dtype, format, copies);
      biases = in_form(biases, dtype, contiguous, copies);
    }
    if (group.by_rows) weights = matrices_of(weights, dtype, layer == 0);
    for (std::size_t i = 0; i < found.size(); ++i) {
      found[i].by_rows = group.by_rows;
      found[i].weights.push_back(weights[i]);
      found[i].biases.push_back(biases[i]);
    }
  }
  copies.make();
  return found;
}

Tensors Nets::unfolded(std::vector<NetGradients>& grads, const std::vector<bool>& wants) const {
  Tensors found(tensors_.size());
  for (const Group& group : groups_) unfold(group, grads, wants, found);
  return found;
}

void Nets::unfold(const Group& group, std::vector<NetGradients>& grads, const std::vector<bool>& wants,
                  Tensors& found) const {
  const NetForm& own = form(group.steps[0]);
  sum_parts(group.steps, grads);
  Copies copies;
  for (std::size_t layer = 0; layer < own.layers(); ++layer) {
    const std::size_t at = own.first(layer);
    std::vector<int64_t> steps;  // whose layer has gradients
    Tensors weights, biases;
    bool wants_scale = false;
    for (const int64_t k : group.steps) {
      NetGradients& of = grads[k];
      if (of.weights.empty() || !of.weights[layer].defined()) continue;
      steps.push_back(k);
      weights.push_back(std::exchange(of.weights[layer], {}));
      biases.push_back(std::exchange(of.biases[layer], {}));
      if (is_gain(own, layer))
        found[first_[k] + at + 2] = of.log_gain;
      else if (own.powers[layer] != 0)
        wants_scale = wants_scale || wants[first_[k] + at + 2];
    }
    if (steps.empty()) continue;
    const Tensors like = parts(steps, at);
    const auto dtype = like[0].scalar_type();
    const auto format = like[0].suggest_memory_format();
    if (own.powers[layer] == 0 || is_gain(own, layer)) {
      weights = in_form(weights, dtype, format, copies);
      biases = in_form(biases, dtype, contiguous, copies);
    } else {
      const bool all = !group.scales.empty() && steps.size() == group.steps.size();
      const Tensor factor = all ? group.scales[layer] : scale(steps, layer);
      const Tensor by_weight = scaled(joined(weights), factor, dtype, format);
      const Tensor by_bias = scaled(joined(biases), factor, dtype, contiguous);
      weights = cut(by_weight, weights);
      biases = cut(by_bias, biases);
      if (wants_scale) {  // w' = scale w: scale dw' is dw, and sum dw w that of log scale
        const Tensors own_tensors = together({like, parts(steps, at + 1)});
        const Tensor sums = (by_weight * own_tensors[0]).flatten(1).sum(1);
        const Tensor log_scales = at::addcmul(sums, by_bias, own_tensors[1]).mul_(own.powers[layer]);
        const Tensors each = cut(log_scales, biases);
        for (std::size_t i = 0; i < steps.size(); ++i) {
          const std::size_t to = first_[steps[i]] + at + 2;
          found[to] = each[i].reshape(tensors_[to].sizes());
        }
      }
    }
    for (std::size_t i = 0; i < steps.size(); ++i) {
      found[first_[steps[i]] + at] = weights[i];
      found[first_[steps[i]] + at + 1] = biases[i];
    }
  }
  copies.make();
}

}  // namespace pyglow::run
