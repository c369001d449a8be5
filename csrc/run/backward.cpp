#include <ATen/ops/pixel_unshuffle.h>

#include <algorithm>

#include "run/steps.h"

namespace pyglow::run {
namespace {

// A sum over steps of which the last segment may still be taken back. What is added may be shared, and is not written.
class Sum {
 public:
  void add(const Tensor& value) {
    if (value.defined()) add_to(segment_, owns_segment_, value);
  }
  void drop_segment() { segment_ = Tensor(); }
  void close() {
    if (segment_.defined()) add_to(total_, owns_total_, segment_);
    segment_ = Tensor();
  }
  Tensor result() {
    close();
    return total_;
  }

 private:
  static void add_to(Tensor& sum, bool& owns, const Tensor& value) {
    const bool first = !sum.defined();
    sum = first ? value : owns ? sum.add_(value) : sum + value;
    owns = !first;
  }
  Tensor segment_, total_;
  bool owns_segment_ = false, owns_total_ = false;
};

// What the forward has made of the nets' tensors: behind what each net has kept.
at::TensorList made_of(const Part& part, const Tensors& kept) {
  return at::TensorList(kept).slice(std::min(part.bounds(&NetForm::kept).back(), kept.size()));
}

// The value of a drift; of a dry run, which has none, no drift.
double read(const Tensor& drift) { return drift.is_meta() ? 0 : drift.item<double>(); }

struct Segment {
  int64_t first, end;
  Tensor input;  // of the first step; undefined: not known
};

class Backward {
 public:
  Backward(const Part& part, const Maps& maps, const std::optional<Maps>& undone, at::TensorList nets,
           BackwardArgs&& args)
      : part_(part),
        args_(std::move(args)),
        inverse_(undone),
        maps_(unstacked(maps)),
        inverses_(undone ? unstacked(*undone) : std::vector<Map>()),
        nets_(part, nets, made_of(part, args_.kept.nets)),
        of_nets_(part.size()),
        first_(part.bounds(&NetForm::tensors)),
        kept_(part.bounds(&NetForm::kept)),
        matrices_(part.size()),
        offsets_(part.size()) {}

  Gradients run() {
    Gradients found{};
    if (part_.mode == Mode::reversible) {
      found.x = args_.judged == Judged::each ? judged_each(found) : judged_at_the_end(found);
    } else {
      found.x = differentiated(0, args_.kept.states, *args_.x, args_.grad_z);
    }
    found.nets = nets_.unfolded(of_nets_, args_.wants);
    for (std::size_t i = 0; i < found.nets.size(); ++i)
      if (!args_.wants[i]) found.nets[i] = Tensor();
    if (args_.wants_cond) found.cond = cond_.result();
    std::tie(found.matrices, found.offsets) = stacked_maps();
    const int64_t times = bindings::positions_of(args_.grad_z) * (part_.inverse() ? -1 : 1);
    found.log_dets = args_.grad_log_det.sum().expand({part_.size()}) * times;
    found.start = start_;
    found.redone = redone_;
    return found;
  }

 private:
  // The gradients of matrices and offsets of all steps, copied at once.
  std::pair<Tensor, Tensor> stacked_maps() const {
    Tensors all;
    for (const Tensors* some : {&matrices_, &offsets_})
      for (const Tensor& one : *some) all.push_back(one.flatten());
    const Tensor whole = joined(all);
    const auto like = [&](const Tensor& one, int64_t at) {
      std::vector<int64_t> sizes = one.sizes().vec();
      sizes.insert(sizes.begin(), part_.size());
      return whole.narrow(0, at, one.numel() * part_.size()).view(sizes);
    };
    return {like(matrices_[0], 0), like(offsets_[0], matrices_[0].numel() * part_.size())};
  }

  std::vector<Segment> segments() const {  // the last first
    std::vector<Segment> found;
    int64_t end = part_.size();
    for (std::size_t i = part_.anchors.size(); i-- > 0;) {
      found.push_back({part_.anchors[i], end, args_.kept.anchors[i]});
      end = part_.anchors[i];
    }
    found.push_back({0, end, args_.x ? *args_.x : Tensor()});
    return found;
  }

  Tensor judged_each(Gradients& found) {
    Tensor y = *args_.z, grad = args_.grad_z;
    for (const Segment& segment : segments()) {
      Measures measures;
      auto [start, grad_start] = inverted_segment(segment, y, grad, measures);
      const double error = read(drift_of(measures, unmix_all(), args_.kept.seen, *part_.signs));
      found.drift = std::isnan(found.drift) || std::isnan(error) ? NAN : std::max(found.drift, error);
      if (!(error <= args_.limit)) {
        cond_.drop_segment();
        std::tie(start, grad_start) = redone(segment, grad);
      }
      cond_.close();
      y = start;
      grad = grad_start;
    }
    start_ = y;
    return grad;
  }

  Tensor judged_at_the_end(Gradients& found) {
    Tensor y = *args_.z, grad = args_.grad_z;
    Measures measures;
    for (const Segment& segment : segments()) std::tie(y, grad) = inverted_segment(segment, y, grad, measures);
    start_ = y;
    found.worst = drift_of(measures, unmix_all(), args_.kept.seen, *part_.signs);
    if (args_.judged == Judged::later) return grad;
    found.drift = read(found.worst);
    if (found.drift <= args_.limit) return grad;
    cond_ = Sum();
    grad = args_.grad_z;
    for (const Segment& segment : segments()) std::tie(start_, grad) = redone(segment, grad);
    return grad;
  }

  // Steps by inversion, good or bad, from the output of the last one: the first one's input, true if it is known, and
  // its gradient.
  std::pair<Tensor, Tensor> inverted_segment(const Segment& segment, Tensor y, Tensor grad, Measures& measures) {
    for (int64_t k = segment.end - 1; k >= segment.first; --k) {
      const Tensor truth = k == segment.first ? segment.input : Tensor();
      std::tie(y, grad) = inverted_step(k, y, grad, truth);
      measures.push_back(measured(k, y, truth));
    }
    return {segment.input.defined() ? segment.input : y, grad};
  }

  // What makes of the projections that the forward has noted those of the steps' inputs; none: they are of these.
  std::optional<Unmix> unmix_all() const {
    return part_.inverse() ? std::nullopt
                           : std::optional(Unmix{inverse_->matrices, inverse_->indices, inverse_->offsets});
  }
  Unmix unmix(int64_t k) const { return {inverses_[k].matrix, inverses_[k].index, inverses_[k].offset}; }

  Measure measured(int64_t k, const Tensor& x, const Tensor& truth) const {
    if (truth.defined()) {
      const Tensor state = k == 0 && part_.squeezes ? at::pixel_unshuffle(truth, 2) : truth;
      return {k, {}, norms(state), difference_norms(x, state), {}};
    }
    if (k > 0) return {k, {}, norms(x), {}, project(x, *part_.signs)};
    const Tensor& start = *args_.kept.start;
    const Tensor expected = part_.inverse() ? start : sketch_before(start, unmix(k), *part_.signs);
    return {k, sketched_drift(x, expected, *part_.signs, part_.inverse()), {}, {}, {}};
  }

  // Step k's input from its output, and the gradient of it, which uses the true input where that is known. One run of
  // the net serves both.
  std::pair<Tensor, Tensor> inverted_step(int64_t k, const Tensor& y, const Tensor& grad_y, const Tensor& truth) {
    const Map& back = inverses_[k];
    if (part_.inverse()) return turned_step(k, mixed(y, maps_[k], false), grad_y);
    Gathered x_parts(y), grad_parts(y);
    const Consume consume = [&](const Tensor& net_out, const Chunk* chunk) {
      auto [x, grad_u, grad_net_out] = bindings::step_backward(outputs(chunk, y), net_out, outputs(chunk, grad_y),
                                                               per_sample(chunk, args_.grad_log_det), back.matrix,
                                                               back.offset, part_.steps[k].kind, back.index);
      x_parts.put(chunk, x);
      grad_parts.put(chunk, grad_u);
      return grad_net_out;
    };
    const Tensor added = net_backward(k, y, consume);
    const Tensor x = x_parts.get();
    return {x, mix_backward(k, truth.defined() ? truth : x, grad_parts.get(), added, truth.defined())};
  }

  // The input and its gradient of a step that undoes, from what lies between its coupling and its map.
  std::pair<Tensor, Tensor> turned_step(int64_t k, const Tensor& v, const Tensor& grad_y) {
    Tensor grad_v;
    std::tie(grad_v, matrices_[k], offsets_[k]) = unmix_backward(k, v, grad_y, {});
    Gathered x_parts(v), grad_parts(v);
    const Consume consume = [&](const Tensor& net_out, const Chunk* chunk) {
      auto [grad_x, grad_net_out, x] =
          bindings::coupling_backward(outputs(chunk, v), net_out, outputs(chunk, grad_v),
                                      per_sample(chunk, args_.grad_log_det), part_.steps[k].kind, true);
      x_parts.put(chunk, x);
      grad_parts.put(chunk, grad_x);
      return grad_net_out;
    };
    const Tensor added = net_backward(k, v, consume);
    return {x_parts.get(), with_added(grad_parts.get(), added)};
  }

  // From grad_y of y = M^-1 (v - c): grad_v, the gradient of M^-1, and the sum of grad_y. `added` belongs to grad_y.
  std::tuple<Tensor, Tensor, Tensor> unmix_backward(int64_t k, const Tensor& v, const Tensor& grad_y,
                                                    const Optional& added) const {
    const Map& back = inverses_[k];
    return bindings::channel_mix_backward(v, grad_y, back.matrix, back.offset, added, false, back.index);
  }

  // A gradient of our own, to whose first channels what flows through a net is added.
  static Tensor with_added(Tensor grad, const Tensor& added) {
    if (added.defined()) grad.narrow(1, 0, added.size(1)).add_(added);
    return grad;
  }

  Tensor mix_backward(int64_t k, const Tensor& x, const Tensor& grad_u, const Tensor& added, bool is_input) {
    Tensor grad_x;
    std::tie(grad_x, matrices_[k], offsets_[k]) =
        bindings::channel_mix_backward(x, grad_u, maps_[k].matrix, {}, added.defined() ? Optional(added) : Optional(),
                                       k == 0 && is_input && part_.squeezes, maps_[k].index);
    return grad_x;
  }

  // A segment again, from its true input on, whose states are kept for it: that input, and its gradient.
  std::pair<Tensor, Tensor> redone(const Segment& segment, const Tensor& grad) {
    const Tensor x = segment.input.defined() ? segment.input : args_.restored();
    const bool squeezes = segment.first == 0 && segment.input.defined() && part_.squeezes;
    Tensors states{part_.inverse() ? x : mixed(x, maps_[segment.first], squeezes)};
    for (int64_t k = segment.first; k + 1 < segment.end; ++k) {
      const Tensor& u = states.back();
      const Tensor net_out = net_output(part_.steps[k], nets_.of(k), u, args_.cond, nullptr);
      const Map& map = part_.inverse() ? inverses_[k] : maps_[k + 1];
      states.push_back(std::get<0>(coupled_and_mixed(part_.steps[k].kind, u, net_out, map)));
    }
    redone_ += segment.end - segment.first;
    return {x, differentiated(segment.first, states, x, grad)};
  }

  // The gradient of the input x of step `first`, from u of each step from there on. Nothing is inverted.
  Tensor differentiated(int64_t first, const Tensors& states, const Tensor& x, Tensor grad) {
    Tensor added;
    const auto count = static_cast<int64_t>(states.size());
    for (int64_t i = count - 1; i >= 0; --i) {
      const int64_t k = first + i;
      const auto& kind = part_.steps[k].kind;
      const Tensor& u = states[i];
      Gathered grad_parts(u);
      Tensor grad_matrix, grad_offset;
      const Consume consume = [&](const Tensor& net_out, const Chunk* chunk) {
        const Tensor part = outputs(chunk, u), grad_out = outputs(chunk, grad);
        const Tensor grad_log_det = per_sample(chunk, args_.grad_log_det);
        const Optional own_added = added.defined() ? Optional(outputs(chunk, added)) : Optional();
        Tensor grad_u, grad_net_out, of_matrix, of_offset;
        if (part_.inverse()) {
          const Tensor v = std::get<0>(bindings::coupling(part, net_out, kind));
          std::tie(grad_u, of_matrix, of_offset) = unmix_backward(k, v, grad_out, own_added);
          std::tie(grad_u, grad_net_out, std::ignore) =
              bindings::coupling_backward(v, net_out, grad_u, grad_log_det, kind, false);
        } else if (i + 1 == count) {
          const Tensor y = part_.mode == Mode::store ? *args_.z : std::get<0>(bindings::coupling(part, net_out, kind));
          std::tie(grad_u, grad_net_out, std::ignore) =
              bindings::coupling_backward(y, net_out, grad_out, grad_log_det, kind, false);
        } else {
          const Map& map = maps_[k + 1];
          std::tie(grad_u, grad_net_out, of_matrix, of_offset) = bindings::coupling_mix_backward(
              part, net_out, grad_out, grad_log_det, map.matrix, kind, own_added, map.index);
        }
        if (of_matrix.defined()) {
          grad_matrix = grad_matrix.defined() ? grad_matrix.add_(of_matrix) : of_matrix;
          grad_offset = grad_offset.defined() ? grad_offset.add_(of_offset) : of_offset;
        }
        grad_parts.put(chunk, grad_u);
        return grad_net_out;
      };
      added = net_backward(k, u, consume);
      if (grad_matrix.defined()) {
        matrices_[part_.inverse() ? k : k + 1] = grad_matrix;
        offsets_[part_.inverse() ? k : k + 1] = grad_offset;
      }
      grad = grad_parts.get();
    }
    return part_.inverse() ? with_added(grad, added) : mix_backward(first, x, grad, added, true);
  }

  // The net of step k on a state, run and differentiated, a chunk at a time: gives the gradient of what it reads of the
  // state, undefined if that is nothing.
  Tensor net_backward(int64_t k, const Tensor& state, const Consume& consume) {
    const Step& step = part_.steps[k];
    const NetForm& form = *step.net;
    const Net net = nets_.of(k);
    const Tensor x1 = read_by(step, state);
    Wanted wanted{form.takes_state || args_.wants_cond, {}};
    wanted.own.assign(args_.wants.begin() + static_cast<std::ptrdiff_t>(first_[k]),
                      args_.wants.begin() + static_cast<std::ptrdiff_t>(first_[k] + form.tensors()));
    NetGradients found;
    if (part_.mode == Mode::store || form.chunks.empty()) {
      Tensors kept;
      Tensor net_out;
      if (part_.mode == Mode::store) {
        const auto at = args_.kept.nets.begin() + static_cast<std::ptrdiff_t>(kept_[k]);
        kept.assign(at, at + static_cast<std::ptrdiff_t>(form.kept()));
        net_out = args_.kept.outputs[k];
      } else {
        net_out = net.forward(x1, args_.cond, &kept);
      }
      const Tensor grad_out = consume(net_out, nullptr);
      found = net.backward(x1, args_.cond, std::move(kept), net_out, grad_out, wanted);
    } else {
      found = net_gradients(step, net, state, args_.cond, args_.wants_cond, wanted, consume);
    }
    if (args_.wants_cond) cond_.add(found.cond);
    Tensor of_state = std::move(found.state);
    of_nets_[k] = {{}, {}, std::move(found.weights), std::move(found.biases), std::move(found.log_gain)};
    return of_state;
  }

  const Part& part_;
  BackwardArgs args_;
  const std::optional<Maps>& inverse_;
  std::vector<Map> maps_, inverses_;
  Nets nets_;
  std::vector<NetGradients> of_nets_;
  std::vector<std::size_t> first_, kept_;  // of each step's tensors among all, and of what its net kept
  Tensors matrices_, offsets_;
  Sum cond_;
  Tensor start_;
  int64_t redone_ = 0;
};

}  // namespace

Gradients backward(const Part& part, const Maps& maps, const std::optional<Maps>& undone, at::TensorList nets,
                   BackwardArgs args) {
  const Plain plain;
  check_backward(part, maps, undone, nets, args);
  return Backward(part, maps, undone, nets, std::move(args)).run();
}

}  // namespace pyglow::run
