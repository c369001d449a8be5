// A run: K flow steps of one width in one call, forward, inverse and backward, over the kernels of each device.
//
//   forward    u_0 = M_0 x + c_0;  y_k = couple(u_k, net_k(u_k));  u_(k+1) = M_(k+1) y_k + c_(k+1), in one pass
//   inverse    a part whose steps undo: the steps from latents to data, y_k = M_k^-1 (uncouple(u_k, net_k(u_k)) - c_k)
//              in one pass, u_(k+1) = y_k
//   backward   from what the forward kept (mode store), from the states u_k (checkpoint), or from the output alone, the
//              states recomputed by inversion and held against what the forward noted of them (reversible)
//
// The backward of a step that undoes, from y_k: v = M_k y_k + c_k, its gradient, the net on v, u_k = couple(v).
//
// pyglow_fast/runs/compiled.py is the autograd node over these functions.
#pragma once
#include <stdexcept>

#include "bindings/coupling_kind.h"
#include "run/drift.h"
#include "run/net.h"

namespace pyglow::run {

struct Step {
  bindings::Kind kind;
  std::shared_ptr<const NetForm> net;
  int64_t reads;  // how many channels of the state the net reads, the first ones

  void check() const;  // as what Python makes is checked once
};

// The channel map of each coupling, stacked.
struct Maps {
  Tensor matrices, offsets, log_dets;  // (K, C, C), of gathers (K, C); (K, C); (K,)
  Optional indices;                    // (K, C)
};

// The error of a channel map that has no inverse.
struct SingularMatrix : std::domain_error {
  using std::domain_error::domain_error;
};

enum class Mode { none, store, checkpoint, reversible };

// The tensors that a forward keeps, besides its input and output.
struct Kept {
  Tensors anchors;        // reversible: inputs of the steps that are the part's anchors
  Tensors states;         // u of every step; reversible: none
  Tensors outputs, nets;  // store: of every net its output, and what its backward needs
  Optional seen;          // reversible: projections of every u, (K, N, C)
  Optional start;         // reversible: a sketch of the first u, (N, C, S), where the input is not kept
};

// Part of a run: consecutive steps that are one autograd node.
struct Part {
  std::vector<Step> steps;
  bool squeezes;  // the input is squeezed as it is read
  Mode mode;
  std::vector<int64_t> anchors;  // steps but the first whose input is kept, ascending
  bool knows_start;              // the input is kept
  std::optional<Signs> signs;    // of reversible
  bool watches;                  // the largest values of the states are wanted

  int64_t size() const { return static_cast<int64_t>(steps.size()); }
  bool inverse() const { return steps.front().kind.inverse; }  // undoes its couplings and maps
  void check() const;
  // Where what each net has begins among that of all, and last how much there is: tensors, or what is kept.
  std::vector<std::size_t> bounds(std::size_t (NetForm::*count)() const) const;
};

// largest: of a part that watches, per step the largest magnitude of u, of shift and of raw scale, (K, 3); NaN if one
// is.
struct Forward {
  Tensor z, log_det;
  Kept kept;
  Tensor largest;
};

// Check the arguments of the entries below, so that no loop reads out of bounds: counts and presence of tensors.
// Shapes, dtypes and devices are checked by the ops, each of what it reads. No value is looked at. x: the input, or
// what has its sizes; with squeezes the state is x squeezed.
void check_inputs(const Part& part, const char* name, const Tensor& x, bool squeezes, const Optional& cond,
                  const Maps& maps, at::TensorList nets);

// maps: of a part that undoes them, their inverses.
Forward forward(const Part& part, const Tensor& x, const Optional& cond, const Maps& maps, at::TensorList nets);

// The inverses of the maps with their offsets; log_dets stay those of the maps.
Maps inverted(const Maps& maps);

// When the drift of recomputed states is judged: each segment as it comes, which reads a value; once at the end, as on
// a GPU, whose stream that stops; or never by the host.
enum class Judged { each, at_the_end, later };

struct BackwardArgs {
  Optional x, z, cond;  // x where it is known, z of a part that does not keep states
  Tensor grad_z, grad_log_det;
  Kept kept;
  std::vector<bool> wants;  // of the nets' tensors
  bool wants_cond;
  Judged judged;
  double limit;                      // of drift
  std::function<Tensor()> restored;  // gives x where it is not known
};

struct Gradients {
  Tensor x, cond;                      // cond undefined: not wanted
  Tensor matrices, offsets, log_dets;  // of the maps; of a part that undoes them of M^-1, and the sums of grad_y
  Tensors nets;                        // undefined: not wanted
  Tensor start;                        // the part's input, recomputed or true
  Tensor worst;                        // drift, where the host has not read it
  double drift;                        // the worst, where it has
  int64_t redone;                      // steps
};

// undone: the inverses of the maps; without them where nothing is inverted.
void check_backward(const Part& part, const Maps& maps, const std::optional<Maps>& undone, at::TensorList nets,
                    const BackwardArgs& args);
Gradients backward(const Part& part, const Maps& maps, const std::optional<Maps>& undone, at::TensorList nets,
                   BackwardArgs args);

// Maps M = W diag(exp(log_scale)), c = M bias of K invertible 1x1 convolutions in LU factors, each with its actnorm; by
// parameter, in the order of `Factors`, of K steps each.
struct Factors {
  at::TensorList permutation, lower, upper, log_diag, sign_diag, log_scale, bias;
};
Maps fold(const Factors& factors);
// Of log_scale, bias, lower, upper and log_diag of every step, in this order.
Tensors fold_backward(const Factors& factors, const Tensor& grad_matrices, const Tensor& grad_offsets,
                      const Tensor& grad_log_dets);

}  // namespace pyglow::run
