// The run as Python sees it: structs by their fields, and the functions of csrc/run, which run without the
// interpreter's lock.
#include <pybind11/functional.h>
#include <pybind11/native_enum.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings/dry.h"
#include "run/run.h"

namespace pyglow::bindings {
namespace {

namespace py = pybind11;
using run::Optional;
using run::Tensor;
using run::Tensors;

run::Maps maps_of(const Tensors& maps) {
  TORCH_CHECK_VALUE(maps.size() == 3 || maps.size() == 4, "maps: expected 3 or 4 tensors, found ", maps.size());
  for (const Tensor& one : maps)
    TORCH_CHECK_VALUE(one.dim() > 0 && one.size(0) == maps[0].size(0), "maps: expected stacks of as many each, found ",
                      maps[0].sizes(), " and ", one.sizes());
  return {maps[0], maps[1], maps[2], maps.size() > 3 ? Optional(maps[3]) : std::nullopt};
}

Tensors as_list(const run::Maps& maps) {
  Tensors found{maps.matrices, maps.offsets, maps.log_dets};
  if (maps.indices) found.push_back(*maps.indices);
  return found;
}

// Kernels read memory as it lies there: a tensor that is negated as it is read is written out first.
Optional resolved(const Optional& x) { return x ? Optional(x->resolve_neg()) : x; }

run::Forward forward(const run::Part& part, const Tensor& x, const Optional& cond, const Tensors& maps,
                     const Tensors& nets) {
  return run::forward(part, x.resolve_neg(), resolved(cond), maps_of(maps), nets);
}

run::Gradients backward(const run::Part& part, const Tensors& maps, const Tensors& undone, const Tensors& nets,
                        run::BackwardArgs args) {
  args.x = resolved(args.x);
  args.cond = resolved(args.cond);
  args.grad_z = args.grad_z.resolve_neg();
  args.grad_log_det = args.grad_log_det.resolve_neg();
  const auto inverses = undone.empty() ? std::nullopt : std::optional(maps_of(undone));
  return run::backward(part, maps_of(maps), inverses, nets, std::move(args));
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

// A struct whose fields, each with its name, Python reads.
template <class T, class... F>
auto read(py::module_& m, const char* name, const char* doc, std::pair<const char*, F T::*>... field) {
  py::class_<T, std::shared_ptr<T>> made(m, name, doc);
  (made.def_readonly(field.first, field.second), ...);
  return made;
}

// One that Python makes, too, of all its fields by their names.
template <class T, class... F>
auto given(py::module_& m, const char* name, const char* doc, std::pair<const char*, F T::*>... field) {
  const auto init = [field...](F... value) {
    T made{};
    ((made.*field.second = std::move(value)), ...);
    if constexpr (requires { made.check(); }) made.check();
    return made;
  };
  return read(m, name, doc, field...).def(py::init(init), py::kw_only(), py::arg(field.first)...);
}

}  // namespace

#define FIELD(Struct, name) std::pair(#name, &Struct::name)
void define_run(py::module& m) {
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const run::SingularMatrix& singular) {
      const py::object own = py::module_::import("pyglow_fast._core.errors").attr("SingularMatrixError");
      PyErr_SetString(own.ptr(), singular.what());
    }
  });
  py::native_enum<run::Mode>(m, "Mode", "enum.Enum", "What a forward keeps for the backward.")
      .value("none", run::Mode::none)
      .value("store", run::Mode::store)
      .value("checkpoint", run::Mode::checkpoint)
      .value("reversible", run::Mode::reversible)
      .finalize();
  py::native_enum<run::Way>(m, "Way", "enum.Enum", "Who computes a coupling net.")
      .value("kernels", run::Way::kernels)
      .value("rows", run::Way::rows)
      .value("convolutions", run::Way::convolutions)
      .finalize();
  py::native_enum<run::Judged>(m, "Judged", "enum.Enum", "When the drift of recomputed states is judged.")
      .value("each", run::Judged::each)
      .value("at_the_end", run::Judged::at_the_end)
      .value("later", run::Judged::later)
      .finalize();
  using run::Part, run::Step, run::Outputs, run::NetForm, run::Chunk, run::Signs, run::Kept, run::Forward,
      run::Gradients;
  using Args = run::BackwardArgs;
  given(m, "Chunk", "Some samples, and of those some rows, that a net runs on at a time.", FIELD(Chunk, sample),
        FIELD(Chunk, samples), FIELD(Chunk, row), FIELD(Chunk, rows), FIELD(Chunk, taken), FIELD(Chunk, takes));
  given(m, "Outputs", "How a net gives shift and raw scale.", FIELD(Outputs, in_turn), FIELD(Outputs, signs),
        FIELD(Outputs, caps));
  given(m, "NetForm", "All about a coupling net but its tensors.", FIELD(NetForm, activations),
        FIELD(NetForm, dilations), FIELD(NetForm, parameters), FIELD(NetForm, powers), FIELD(NetForm, way),
        FIELD(NetForm, channels_last), FIELD(NetForm, narrow), FIELD(NetForm, takes_state), FIELD(NetForm, takes_cond),
        FIELD(NetForm, parity), FIELD(NetForm, chunks), FIELD(NetForm, outputs));
  given(m, "Kind", "Which coupling: map and order by their codes.", FIELD(Kind, map), FIELD(Kind, order),
        FIELD(Kind, inverse), FIELD(Kind, bias), FIELD(Kind, eps), FIELD(Kind, clamp), FIELD(Kind, factor));
  given(m, "Step", "A coupling of a run and its net.", FIELD(Step, kind), FIELD(Step, net), FIELD(Step, reads))
      .def_property_readonly(
          "tensors", [](const Step& step) { return step.net->tensors(); }, "How many tensors the net has.");
  given(m, "Signs", "Random signs of positions, and those of a sketch.", FIELD(Signs, inner), FIELD(Signs, outer),
        FIELD(Signs, sum), FIELD(Signs, sketch_inner), FIELD(Signs, sketch_outer), FIELD(Signs, sketch_sums),
        FIELD(Signs, rounds));
  given(m, "Part", "Consecutive steps that are one autograd node.", FIELD(Part, steps), FIELD(Part, squeezes),
        FIELD(Part, mode), FIELD(Part, anchors), FIELD(Part, knows_start), FIELD(Part, signs), FIELD(Part, watches));
  given(m, "Kept", "What a forward keeps, besides its input and output.", FIELD(Kept, anchors), FIELD(Kept, states),
        FIELD(Kept, outputs), FIELD(Kept, nets), FIELD(Kept, seen), FIELD(Kept, start));
  read(m, "Forward", "What a part gives, and what its backward needs.", FIELD(Forward, z), FIELD(Forward, log_det),
       FIELD(Forward, kept), FIELD(Forward, largest));
  given(m, "BackwardArgs", "What a backward is given besides maps and nets.", FIELD(Args, x), FIELD(Args, z),
        FIELD(Args, cond), FIELD(Args, grad_z), FIELD(Args, grad_log_det), FIELD(Args, kept), FIELD(Args, wants),
        FIELD(Args, wants_cond), FIELD(Args, judged), FIELD(Args, limit), FIELD(Args, restored));
  read(m, "Gradients", "What a backward finds.", FIELD(Gradients, x), FIELD(Gradients, cond),
       FIELD(Gradients, matrices), FIELD(Gradients, offsets), FIELD(Gradients, log_dets), FIELD(Gradients, nets),
       FIELD(Gradients, start), FIELD(Gradients, worst), FIELD(Gradients, drift), FIELD(Gradients, redone));
  using Released = py::call_guard<py::gil_scoped_release>;
  m.def("run_forward", &forward, "z and log_det of a part, and what its backward needs.", Released());
  m.def(
      "inverted", [](const Tensors& maps) { return as_list(run::inverted(maps_of(maps))); },
      "The inverses of channel maps.", Released());
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
#undef FIELD

}  // namespace pyglow::bindings
