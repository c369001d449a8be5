#include "bindings/ops.h"
#include "run/run.h"

namespace pyglow::run {
namespace {

void check_count(const char* name, std::size_t found, std::size_t expected) {
  TORCH_CHECK_VALUE(found == expected, name, ": expected ", expected, " of them, found ", found);
}

void check_given(const char* name, const Optional& x) {
  TORCH_CHECK_VALUE(x.has_value(), name, ": expected a tensor, found None");
}

// Of states of these sizes.
void check_form(const NetForm& form, at::IntArrayRef sizes, const Optional& cond) {
  bindings::check_chain({form.activations, form.parameters, form.dilations, false}, form.layers(), sizes.size() - 2);
  if (form.takes_cond || !form.takes_state) check_given("cond", cond);
  if (form.chunks.empty()) return;
  const Chunk& last = form.chunks.back();
  const bool fits = last.sample + last.samples == sizes[0] && (sizes.size() < 3 || last.row + last.rows == sizes[2]);
  TORCH_CHECK_VALUE(fits, "chunks: expected those of states ", sizes, ", found others");
}

}  // namespace

void Step::check() const { TORCH_CHECK_VALUE(net != nullptr, "net: expected a NetForm, found None"); }

void Part::check() const {
  TORCH_CHECK_VALUE(!steps.empty(), "steps: expected at least one, found none");
  for (const Step& step : steps)
    TORCH_CHECK_VALUE(step.kind.inverse == inverse(), "steps: expected those of one direction, found both");
  TORCH_CHECK_VALUE(!(squeezes && inverse()), "squeezes: expected false of steps from latents to data, found true");
  TORCH_CHECK_VALUE(mode != Mode::reversible || signs, "signs: expected those of mode reversible, found None");
  for (std::size_t i = 0; i < anchors.size(); ++i)
    TORCH_CHECK_VALUE((i == 0 ? 0 : anchors[i - 1]) < anchors[i] && anchors[i] < size(),
                      "anchors: expected ascending steps from 1 to ", size() - 1, ", found ", anchors);
}

void check_inputs(const Part& part, const char* name, const Tensor& x, bool squeezes, const Optional& cond,
                  const Maps& maps, at::TensorList nets) {
  bindings::check_state(name, x);
  bindings::check_squeeze(squeezes ? 1 : 0, x);
  bindings::check_shape("log_dets", maps.log_dets, {part.size()});
  bindings::check_like("log_dets", maps.log_dets, name, x);
  const std::vector<int64_t> sizes = squeezes ? bindings::squeezed_sizes(x) : x.sizes().vec();
  const std::vector<std::size_t> first = part.bounds(&NetForm::tensors);
  check_count("nets", nets.size(), first.back());
  for (int64_t k = 0; k < part.size(); ++k) {
    const NetForm& form = *part.steps[k].net;
    if (k == 0 || part.steps[k].net != part.steps[k - 1].net) check_form(form, sizes, cond);
    for (std::size_t layer = 0; layer < form.layers(); ++layer) {
      const std::size_t at = first[k] + form.first(layer);
      TORCH_CHECK_VALUE(nets[at].dim() == x.dim() && nets[at + 1].dim() == 1, "nets: expected weights of ", x.dim(),
                        " dimensions, and biases of one, found ", nets[at].sizes(), " and ", nets[at + 1].sizes());
    }
  }
}

void check_backward(const Part& part, const Maps& maps, const std::optional<Maps>& undone, at::TensorList nets,
                    const BackwardArgs& args) {
  const bool reversible = part.mode == Mode::reversible, stores = part.mode == Mode::store;
  TORCH_CHECK_VALUE(undone.has_value() == (reversible || part.inverse()), "undone: expected ",
                    reversible || part.inverse() ? "the inverses of the maps, found none" : "none, found some");
  check_inputs(part, "grad_z", args.grad_z, false, args.cond, maps, nets);
  if (undone) check_inputs(part, "grad_z", args.grad_z, false, args.cond, *undone, nets);
  if (!reversible || part.knows_start) check_given("x", args.x);
  if (reversible || stores) check_given("z", args.z);
  const Kept& kept = args.kept;
  const std::size_t held = part.bounds(&NetForm::kept).back();
  TORCH_CHECK_VALUE(stores ? kept.nets.size() >= held : kept.nets.empty(), "kept.nets: expected ", stores ? held : 0,
                    " tensors, found ", kept.nets.size());
  check_count("kept.anchors", kept.anchors.size(), part.anchors.size());
  check_count("kept.states", kept.states.size(), reversible ? 0 : part.steps.size());
  check_count("kept.outputs", kept.outputs.size(), stores ? part.steps.size() : 0);
  check_count("wants", args.wants.size(), nets.size());
  if (!reversible) return;
  check_given("kept.seen", kept.seen);
  bindings::check_shape("kept.seen", *kept.seen, {part.size(), args.grad_z.size(0), args.grad_z.size(1)});
  if (!part.knows_start) check_given("kept.start", kept.start);
}

}  // namespace pyglow::run
