// The run as Python sees it: forms, parts, and the functions of csrc/run, which run without the interpreter's lock.
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <functional>
#include <string>

#include "bindings/dry.h"
#include "run/run.h"

namespace pyglow::bindings {
namespace {

namespace py = pybind11;
using run::Mode;
using run::Optional;
using run::Tensor;
using run::Tensors;

run::Maps maps_of(const Tensors& maps) {
  return {maps.at(0), maps.at(1), maps.at(2), maps.size() > 3 ? Optional(maps[3]) : std::nullopt};
}

Tensors as_list(const run::Maps& maps) {
  Tensors found{maps.matrices, maps.offsets, maps.log_dets};
  if (maps.indices) found.push_back(*maps.indices);
  return found;
}

// z, log_det; then what is kept: anchors, states, outputs, what nets keep, projections, sketch; largest values.
using Run = std::tuple<Tensor, Tensor, Tensors, Tensors, Tensors, Tensors, Tensor, Tensor, Tensor>;

// Kernels read memory as it lies there: a tensor that is negated as it is read is written out first.
Optional resolved(const Optional& x) { return x ? Optional(x->resolve_neg()) : x; }

Run forward(const run::Part& part, const Tensor& x, const Optional& cond, const Tensors& maps, const Tensors& nets) {
  run::Forward found = run::forward(part, x.resolve_neg(), resolved(cond), maps_of(maps), nets);
  Tensors anchors;
  for (const auto& [step, state] : found.kept.anchors) anchors.push_back(state);
  return {found.z,         found.log_det,   anchors,          found.kept.states, found.kept.outputs,
          found.kept.nets, found.kept.seen, found.kept.start, found.largest};
}

std::tuple<Tensor, Tensor> inverse(const run::Part& part, const Tensor& z, const Optional& cond, const Tensors& maps,
                                   const Tensors& nets) {
  return run::inverse(part, z.resolve_neg(), resolved(cond), maps_of(maps), nets);
}

using Back = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensors, Tensor, Tensor, double, int64_t>;

Back backward(const run::Part& part, const Optional& x, const Optional& z, const Optional& cond, const Tensors& maps,
              const Tensors& nets, const Tensor& grad_z, const Tensor& grad_log_det, const Tensors& anchors,
              const Tensors& states, const Tensors& outputs, const Tensors& kept_nets, const Optional& seen,
              const Optional& start, const std::vector<bool>& wants, bool wants_cond, int64_t judged, double limit,
              const std::function<Tensor()>& restored) {
  run::BackwardArgs args{.x = resolved(x),
                         .z = z,
                         .cond = resolved(cond),
                         .grad_z = grad_z.resolve_neg(),
                         .grad_log_det = grad_log_det.resolve_neg(),
                         .kept = {.anchors = {},
                                  .states = states,
                                  .outputs = outputs,
                                  .nets = kept_nets,
                                  .seen = seen ? *seen : Tensor(),
                                  .start = start ? *start : Tensor()},
                         .wants = wants,
                         .wants_cond = wants_cond,
                         .judged = static_cast<run::Judged>(judged),
                         .limit = limit,
                         .restored = restored};
  for (std::size_t i = 0; i < anchors.size(); ++i) args.kept.anchors[part.anchors.at(i)] = anchors[i];
  run::Gradients found = run::backward(part, maps_of(maps), nets, std::move(args));
  return {found.x,    found.cond,  found.matrices, found.offsets, found.log_dets,
          found.nets, found.start, found.worst,    found.drift,   found.redone};
}

// raw: of all steps each, log_scale, bias, lower, upper and log_diag.
run::Factors factors_of(const Tensors& raw, const Tensors& permutations, const Tensors& signs) {
  const std::size_t count = permutations.size();
  TORCH_CHECK_VALUE(raw.size() == 5 * count && signs.size() == count, "raw: expected five tensors of each step, found ",
                    raw.size(), " of ", count, " steps");
  const at::TensorList all(raw);
  const auto part = [&](std::size_t i) { return all.slice(i * count, count); };
  return {permutations, part(2), part(3), part(4), signs, part(0), part(1)};
}

}  // namespace

void define_run(py::module& m) {
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const run::SingularMatrix& singular) {
      const py::object own = py::module_::import("pyglow_fast._errors").attr("SingularMatrixError");
      PyErr_SetString(own.ptr(), singular.what());
    }
  });
  using Released = py::call_guard<py::gil_scoped_release>;
  py::class_<run::NetForm, std::shared_ptr<run::NetForm>>(m, "NetForm", "All about a coupling net but its tensors.")
      .def(
          py::init([](std::vector<int64_t> activations, std::vector<double> parameters, std::vector<int64_t> dilations,
                      std::vector<double> powers, bool products, const std::string& narrow, bool takes_state,
                      bool takes_cond, std::optional<int64_t> parity, const std::vector<std::array<int64_t, 6>>& chunks,
                      bool in_turn, const std::array<double, 2>& signs, const std::array<double, 2>& caps) {
            std::optional<at::ScalarType> bits;
            if (!narrow.empty()) bits = narrow == "bfloat16" ? at::kBFloat16 : at::kHalf;
            run::NetForm form{std::move(activations),
                              std::move(dilations),
                              std::move(parameters),
                              std::move(powers),
                              products,
                              bits,
                              takes_state,
                              takes_cond,
                              parity,
                              {},
                              {in_turn, signs, caps}};
            for (const auto& c : chunks) form.chunks.push_back({c[0], c[1], c[2], c[3], c[4], c[5]});
            return std::make_shared<run::NetForm>(std::move(form));
          }),
          py::arg("activations"), py::arg("parameters"), py::arg("dilations"), py::arg("powers"), py::arg("products"),
          py::arg("narrow"), py::arg("takes_state"), py::arg("takes_cond"), py::arg("parity"), py::arg("chunks"),
          py::arg("in_turn"), py::arg("signs"), py::arg("caps"))
      .def_property_readonly("tensors", &run::NetForm::tensors, "How many tensors the net has.");
  py::class_<run::Step>(m, "Step", "A coupling of a run and its net.")
      .def(py::init([](int64_t map, int64_t order, double bias, double eps, double clamp, double factor,
                       std::shared_ptr<run::NetForm> net, int64_t reads) {
             return run::Step{{map, order, false, bias, eps, clamp, factor}, std::move(net), reads};
           }),
           py::arg("map"), py::arg("order"), py::arg("bias"), py::arg("eps"), py::arg("clamp"), py::arg("factor"),
           py::arg("net"), py::arg("reads"))
      .def_property_readonly(
          "tensors", [](const run::Step& step) { return step.net->tensors(); }, "How many tensors the net has.")
      .def_property_readonly(
          "overlap", [](const run::Step& step) { return step.net->overlap(); },
          "Positions that the net's chunks read, over those that they give.");
  py::class_<run::Part>(m, "Part", "Consecutive steps that are one autograd node.")
      .def(py::init([](std::vector<run::Step> steps, bool squeezes, int64_t mode, std::vector<int64_t> anchors,
                       bool knows_start, const std::optional<std::tuple<Tensor, Tensor, double>>& signs,
                       const std::optional<std::tuple<Tensor, Tensor, Tensor>>& sketched, bool rounds, bool watches) {
             run::Part part{std::move(steps), squeezes, static_cast<Mode>(mode), std::move(anchors), knows_start, {},
                            watches};
             if (signs) std::tie(part.signs.inner, part.signs.outer, part.signs.sum) = *signs;
             if (sketched)
               std::tie(part.signs.sketch_inner, part.signs.sketch_outer, part.signs.sketch_sums) = *sketched;
             part.signs.rounds = rounds;
             return part;
           }),
           py::arg("steps"), py::arg("squeezes"), py::arg("mode"), py::arg("anchors"), py::arg("knows_start"),
           py::arg("signs"), py::arg("sketched"), py::arg("rounds"), py::arg("watches"));
  m.def("run_forward", &forward, "z and log_det of a part, and what its backward needs.", Released());
  m.def(
      "inverted", [](const Tensors& maps) { return as_list(run::inverted(maps_of(maps))); },
      "The inverses of channel maps.", Released());
  m.def("run_inverse", &inverse, "x and log_det of a part from z.", Released());
  m.def("run_backward", &backward, "Gradients of a part, its recomputed input, its drift and steps redone.",
        Released());
  m.def(
      "fold",
      [](const Tensors& raw, const Tensors& permutations, const Tensors& signs) {
        return as_list(run::fold(factors_of(raw, permutations, signs)));
      },
      "Channel maps of actnorms and convolutions in LU factors.", Released());
  m.def(
      "fold_backward",
      [](const Tensors& raw, const Tensors& permutations, const Tensors& signs, const Tensor& matrices,
         const Tensor& offsets, const Tensor& log_dets) {
        return run::fold_backward(factors_of(raw, permutations, signs), matrices, offsets, log_dets);
      },
      "Gradients of what the maps are folded from.", Released());
}

}  // namespace pyglow::bindings
