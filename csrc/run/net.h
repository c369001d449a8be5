// The coupling net of a step: a chain of layers, run without autograd, forward and backward.
#pragma once
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace pyglow::run {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

// Some samples of a batch, of those some rows (positions along the first spatial dimension) that a net's output is
// wanted for, and the rows that it reads for them: those and the halo.
struct Chunk {
  int64_t sample, samples, row, rows, taken, takes;

  Tensor inputs(const Tensor& x) const { return cut(x, taken, takes); }
  Tensor outputs(const Tensor& y) const { return cut(y, row, rows); }
  Tensor per_sample(const Tensor& values) const { return values.narrow(0, sample, samples); }
  // Of what a net makes of the inputs: where the outputs are.
  Tensor crop(const Tensor& net_out) const { return rows == takes ? net_out : net_out.narrow(2, row - taken, rows); }

 private:
  Tensor cut(const Tensor& x, int64_t first, int64_t count) const {
    const Tensor some = x.narrow(0, sample, samples);
    return x.dim() < 3 ? some : some.narrow(2, first, count);
  }
};

// The form of a net's output: shift and raw scale, one half of the channels each.
struct Outputs {
  bool in_turn = false;               // they alternate: shift, raw, shift, ...
  std::array<double, 2> signs{1, 1};  // what each is multiplied by,
  std::array<double, 2> caps{0, 0};   // and then bounded by, as cap tanh(. / cap); 0: not at all

  bool is_plain() const { return !in_turn && signs == std::array<double, 2>{1, 1} && caps == std::array<double, 2>{}; }
  Tensor of(Tensor own) const;  // what the coupling takes of the net's own outputs, which it may write over
  Tensor gradient(const Tensor& grad, const Tensor& out) const;  // of the own outputs; out: what `of` gave

 private:
  // The shifts (i = 0) or raw scales (i = 1), as the coupling takes them and as the net gives them.
  Tensor coupled(const Tensor& out, int64_t i) const;
  Tensor given(const Tensor& own, int64_t i) const;
};

// The way to compute a net: this package's kernels, on a CPU; the library's matrix products over the rows of a sample's
// positions, where nothing but the first and the last layer sees more than its position; or the library's convolutions.
enum class Way { kernels, rows, convolutions };

// A net without its tensors: w_L * h_(L-1) + b_L, h_l = a_l(w_l * h_(l-1) + b_l), weight and bias of a layer with
// a log_scale multiplied by exp(power log_scale). Its tensors are, layer by layer, weight, bias and log_scale.
struct NetForm {
  std::vector<int64_t> activations, dilations;  // codes and numbers as net_chain takes them
  std::vector<double> parameters;
  std::vector<double> powers;            // of each layer; 0: the layer has no log_scale
  Way way;                               // rows: for the nets that allow it
  bool channels_last;                    // of convolutions of images; of rows always
  std::optional<at::ScalarType> narrow;  // the 16 bits that it computes in
  bool takes_state, takes_cond;          // what it reads: x1 of the state, the condition beside it, or that alone
  std::optional<int64_t> parity;         // of a checkerboard: the net sees whole images, x1 is a half of them
  std::vector<Chunk> chunks;             // how a batch is cut where nothing is kept; none: not at all
  Outputs outputs;

  std::size_t layers() const { return powers.size(); }
  std::size_t first(std::size_t layer) const;  // where the layer's tensors begin
  std::size_t tensors() const;
  std::size_t kept() const;  // tensors that forward keeps
  // Of a dry run no more than two of each size: the others take what the second does.
  std::vector<Chunk> chunks_for(const Tensor& x) const;
};

// The gradients that a backward is to compute; others are left out where that is cheaper.
struct Wanted {
  bool inputs;            // gradients of what the net reads
  std::vector<bool> own;  // of each of its tensors
};

// The gradients of a net; a tensor is undefined where it is not wanted or does not exist.
struct NetGradients {
  Tensor state, cond;
  Tensors weights, biases;  // of what `Folded` has; of a bias perhaps parts (shares, out), which are to be summed
  Tensor log_gain;
};

// A net's tensors as it computes with them: of each layer weight and bias, scaled, in the net's dtype and memory
// format; of rows each weight is a matrix (see rows.h).
struct Folded {
  Tensors weights, biases;
  bool by_rows = false;
  Optional log_gain;  // of the last layer, where our kernels multiply by it themselves
};

// Whether our kernels multiply by the log_scale of a layer themselves.
bool is_gain(const NetForm& form, std::size_t layer);
at::MemoryFormat format_for(const NetForm& form, const Tensor& x);
Tensor per_output(const Tensor& scale, const Tensor& weight);

// A net with its tensors, ready to run.
class Net {
 public:
  // tensors: its own, as `form` has them.
  Net(const NetForm& form, at::TensorList tensors, Folded folded);

  // The output, whole, of x1 (N, C1, *spatial) and the condition; what backward needs is put behind `kept`.
  Tensor forward(const Tensor& x1, const Optional& cond, Tensors* kept) const;
  // out: what forward gave.
  NetGradients backward(const Tensor& x1, const Optional& cond, Tensors kept, const Tensor& out, const Tensor& grad_out,
                        const Wanted& wanted) const;

 private:
  struct Inputs {
    Tensor x1;
    Optional cond;
  };
  Inputs inputs(const Tensor& x1, const Optional& cond) const;
  Tensor joined(const Inputs& given) const;
  Tensor convolved(std::size_t layer, const Tensor& h) const;
  void check_rows(int64_t channels) const;
  Tensor by_rows(const Tensor& x, Tensors* kept) const;
  Tensor by_convolutions(Tensor h, Tensors* kept) const;
  NetGradients back_by_kernels(const Inputs& given, const Tensor& kept, const Tensor& grad_out,
                               const Wanted& wanted) const;
  NetGradients back_by_convolutions(const Inputs& given, Tensors kept, const Tensor& grad_out,
                                    const Wanted& wanted) const;
  NetGradients back_by_rows(const Inputs& given, Tensors kept, const Tensor& grad_out, const Wanted& wanted) const;
  // The last of what is kept, of these sizes; freed behind its use, if nobody else has it.
  Tensor taken(Tensors& kept, at::IntArrayRef sizes) const;
  // The gradient of what the first layer reads, as that of x1 and of the condition.
  static void put_inputs(const Tensor& grad, const Inputs& given, NetGradients& found);
  // Whether the gradient of a layer's output is needed: for its own tensors, and for what is before it.
  bool wants_layer(std::size_t layer, const Wanted& wanted) const;
  bool wants_before(std::size_t layer, const Wanted& wanted) const;
  at::IntArrayRef sizes(std::size_t layer) const { return tensors_[form_.first(layer)].sizes(); }  // of the weight

  const NetForm& form_;
  const at::TensorList tensors_;
  const Folded folded_;
  at::ScalarType dtype_;
  at::MemoryFormat format_;
};

}  // namespace pyglow::run
