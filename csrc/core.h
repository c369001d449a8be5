// The entry points of the kernels, by device. Plain types only: neither torch nor CUDA is visible here.
//
// Tensors are (N, C, P): samples, channels, positions (the product of the spatial sizes), given by element strides, so
// that contiguous, channels-last and channel-sliced tensors are the same to a kernel. Unless a comment says so, an
// output may not overlap an input. Sizes may be zero. All arithmetic is in T; sums over positions are formed in T over
// a run of tiles that depends on shapes and layouts alone, and in double across runs (of a coupling net that of the
// last bias alone, the other sums being products).
#pragma once
#include <cstdint>

#include "math/host_device.h"
#include "math/kinds.h"
#include "math/window.h"

namespace pyglow {

template <class T>
struct Strided {
  T* data;           // element [n, c, p] is data[n * sample + c * channel + p * position]
  int64_t sample;    //
  int64_t channel;   //
  int64_t position;  //
};

// A tensor that the op sees squeezed, (N, C, P) with P = H * width, while memory may hold it as it was before,
// (N, C / 4, 2 H, 2 width): with width > 0, channel 4 k + 2 i + j at position h * width + w is element
// [n, k, 2 h + i, 2 w + j], `row` is the stride of a row of that image and `position` that of a pixel in it. width 0:
// the tensor is as the op sees it.
template <class T>
struct Squeezed : Strided<T> {
  int64_t width, row;
};

// u = M x + c, or u = M (x - c) if subtract_first.
template <class T>
struct ChannelMixArgs {
  Squeezed<const T> x;  // (N, C, P)
  const T* matrix;      // (C, C), row-major
  const T* offset;      // (C,)
  Squeezed<T> u;        // (N, C, P); at most one of x and u is squeezed
  int64_t samples, channels, positions;
  bool subtract_first;
};

// A gradient (N, C, P) that comes in two parts: of all channels, and of the first ones what the coupling net's backward
// adds (data null: nothing).
template <class T>
struct SplitGrad {
  Strided<const T> all;    // (N, C, P)
  Strided<const T> added;  // (N, added_channels, P)
  int64_t added_channels;
};

// Given x, or x - c, that entered the product, and grad_u: grad_x = M^T grad_u, grad_M = sum grad_u x^T, grad_c = sum
// grad_u.
template <class T>
struct ChannelMixBackwardArgs {
  Squeezed<const T> x;  // (N, C, P)
  SplitGrad<T> grad_u;  // (N, C, P)
  const T* matrix;      // (C, C), row-major
  const T* center;      // (C,) taken off x, or null
  Squeezed<T> grad_x;   // (N, C, P), squeezed like x
  T* grad_matrix;       // (C, C)
  T* grad_offset;       // (C,)
  int64_t samples, channels, positions;
};

// The coupling net's output or the gradient of it: T, or 16-bit numbers if the net runs in lower precision.
template <class Data>
struct NetTensor {
  Data* data;    // const void or void
  NetType type;  // state: elements of T
  int64_t sample, channel, position;
};
using NetOutput = NetTensor<const void>;
using NetGrad = NetTensor<void>;

// Which coupling: y2 = (u2 + shift) s or u2 s + shift, in which direction, with which scale map (none: additive).
template <class T>
struct CouplingKind {
  ScaleMap map;
  Order order;
  bool inverse;
  ScaleParams<T> params;
};

// The first channels - transformed channels pass through, the last `transformed` ones are shifted and scaled.
template <class T>
struct CouplingArgs {
  Strided<const T> in;  // (N, C, P)
  NetOutput net_out;    // (N, 2 C2, P): shift, then raw; additive (N, C2, P): shift
  Strided<T> out;       // (N, C, P); may be the same memory as `in`
  T* log_det;           // (N,): sum log s, its negative for the inverse; additive: zero
  int64_t samples, channels, transformed, positions;
  CouplingKind<T> kind;
};

// Gradients from the output alone.
template <class T>
struct CouplingBackwardArgs {
  Strided<const T> out;       // (N, C, P), what CouplingArgs gave
  NetOutput net_out;          // as there
  Strided<const T> grad_out;  // (N, C, P)
  const T* grad_log_det;      // (N,)
  Strided<T> in;              // (N, C, P), the recovered input; data null: not wanted
  Strided<T> grad_in;    // (N, C, P): of the transformed channels; the others are grad_out's, without the net's part
  NetGrad grad_net_out;  // like net_out
  int64_t samples, channels, transformed, positions;
  CouplingKind<T> kind;
};

// The coupling of one step and the channel mixing of the next in one pass: out = M couple(in) + c, so that what lies
// between is never written. Inverse: out = A (uncouple(in) - c), where `matrix` is A = M^-1: both of the same step.
template <class T>
struct CouplingMixArgs {
  CouplingArgs<T> coupling;  // log_det is that of the coupling alone
  const T* matrix;           // (C, C), row-major
  const T* offset;           // (C,)
};

// Gradients of out = M couple(in) + c from its true input: couple(in) is evaluated again, nothing is inverted.
template <class T>
struct CouplingMixBackwardArgs {
  Strided<const T> in;    // (N, C, P)
  NetOutput net_out;      // as in CouplingArgs
  SplitGrad<T> grad_out;  // (N, C, P)
  const T* grad_log_det;  // (N,)
  const T* matrix;        // (C, C)
  Strided<T> grad_in;     // (N, C, P), without the net's part
  NetGrad grad_net_out;   // like net_out
  T* grad_matrix;         // (C, C)
  T* grad_offset;         // (C,)
  int64_t samples, channels, transformed, positions;
  CouplingKind<T> kind;  // forward direction
};

// The backward of a whole step but for its net, from the output alone: with u = uncouple(y), x = A (u - c) is recovered
// for the step before, and the gradients of u (without the net's part) and of the net's output come in the same pass.
template <class T>
struct StepBackwardArgs {
  Strided<const T> y;       // (N, C, P), the step's output
  NetOutput net_out;        // the net's output for it
  Strided<const T> grad_y;  // (N, C, P)
  const T* grad_log_det;    // (N,)
  const T* inverse_matrix;  // (C, C), A = M^-1
  const T* offset;          // (C,)
  Strided<T> x;             // (N, C, P)
  Strided<T> grad_u;        // (N, C, P)
  NetGrad grad_net_out;     // like net_out
  int64_t samples, channels, transformed, positions;
  CouplingKind<T> kind;  // forward direction
};

// The channel mixing whose matrix is a permutation times a scale of each channel, as one pass and no product:
// u_i = scale_i (y_j - center_j) + offset_i with j = index_i.
template <class T>
struct Gather {
  const T* scale;        // (C,)
  const T* offset;       // (C,), or null: nothing is added
  const T* center;       // (C,), or null: nothing is taken off
  const int64_t* index;  // (C,), a permutation
};

// The gather of y = couple(in), of y = uncouple(in), or of y = in where no channel is transformed.
template <class T>
struct GatherArgs {
  Squeezed<const T> in;  // (N, C, P)
  NetOutput net_out;     // as in CouplingArgs; not read if none are transformed
  Gather<T> map;
  Squeezed<T> out;  // (N, C, P); at most one of in and out is squeezed, and only if none are transformed
  T* log_det;       // (N,): that of the coupling, or null: not wanted
  int64_t samples, channels, transformed, positions;
  CouplingKind<T> kind;
};

// Gradients of the gather of y = couple(in), or y = in, from in: grad_y_j = scale_i grad_out_i,
// grad_scale_i = sum grad_out_i (y_j - center_j), grad_offset_i = sum grad_out_i; the coupling is evaluated again.
template <class T>
struct GatherBackwardArgs {
  Squeezed<const T> in;   // (N, C, P)
  NetOutput net_out;      // as in CouplingArgs; not read if none are transformed
  SplitGrad<T> grad_out;  // (N, C, P)
  const T* grad_log_det;  // (N,); not read if none are transformed
  Gather<T> map;
  Squeezed<T> grad_in;   // (N, C, P), squeezed like in; without the net's part
  NetGrad grad_net_out;  // like net_out
  T* grad_scale;         // (C,)
  T* grad_offset;        // (C,)
  int64_t samples, channels, transformed, positions;
  CouplingKind<T> kind;  // forward direction
};

// As StepBackwardArgs, where `map` recovers x of u.
template <class T>
struct StepGatherBackwardArgs {
  Strided<const T> y;       // (N, C, P)
  NetOutput net_out;        // as there
  Strided<const T> grad_y;  // (N, C, P)
  const T* grad_log_det;    // (N,)
  Gather<T> map;
  Strided<T> x;          // (N, C, P)
  Strided<T> grad_u;     // (N, C, P)
  NetGrad grad_net_out;  // like net_out
  int64_t samples, channels, transformed, positions;
  CouplingKind<T> kind;  // forward direction
};

// log N(z; mean, exp(log_sd)) summed per sample; mean and log_sd may have strides of zero.
template <class T>
struct GaussianArgs {
  Strided<const T> z;       // (N, C, P)
  Strided<const T> mean;    // (N, C, P)
  Strided<const T> log_sd;  // (N, C, P)
  T* log_prob;              // (N,)
  int64_t samples, channels, positions;
};

template <class T>
struct GaussianBackwardArgs {
  Strided<const T> z, mean, log_sd;           // as above
  const T* grad_log_prob;                     // (N,)
  Strided<T> grad_z, grad_mean, grad_log_sd;  // (N, C, P) each
  int64_t samples, channels, positions;
};

// z = mean + exp(log_sd) noise.
template <class T>
struct GaussianSampleArgs {
  Strided<const T> noise, mean, log_sd;  // (N, C, P)
  Strided<T> z;                          // (N, C, P)
  int64_t samples, channels, positions;
};

// The numbers of each element (n, c, p): number k is data[n * sample + c * channel + p * position + k * number].
template <class Data>
struct SplineNumbers : NetTensor<Data> {
  int64_t number;
};

// y, log dy/dx of a monotone spline of each element, or of its inverse.
template <class T>
struct SplineArgs {
  Strided<const T> x;             // (N, C, P)
  SplineNumbers<const void> raw;  // spline_numbers() of each
  Strided<T> y, log_slope;        // (N, C, P); y may be the same memory as x
  int64_t samples, channels, positions;
  SplineForm form;
  bool inverse;
  SplineParams<T> params;
};

// Gradients from the input of SplineArgs, or from_output from its output, which is then inverted on the way.
template <class T>
struct SplineBackwardArgs {
  Strided<const T> value;                   // (N, C, P)
  SplineNumbers<const void> raw;            // as there
  Strided<const T> grad_y, grad_log_slope;  // (N, C, P)
  Strided<T> grad_x;                        // (N, C, P)
  SplineNumbers<void> grad_raw;             // like raw
  Strided<T> recovered;                     // (N, C, P): the other one of input and output; data null: not wanted
  int64_t samples, channels, positions;
  SplineForm form;
  bool inverse, from_output;
  SplineParams<T> params;
};

// The inverse of each matrix, formed in double and rounded once, and log|det|. A singular matrix has an inverse of NaN
// and -inf, one with a value that is not finite has NaN for both.
template <class T>
struct InvertMatricesArgs {
  const T* matrices;  // (K, C, C), row-major
  T* inverses;        // (K, C, C), row-major
  T* log_dets;        // (K,)
  int64_t count, channels;
};

// Images (N, K, D, H, W) by strides; fewer dimensions are sizes of 1.
template <class T>
struct Image {
  T* data;
  int64_t sample, channel, depth, row, pixel;
};

// One layer of a net: a(weight * x + bias).
template <class T>
struct NetLayer {
  const T* weight;  // (out, in, *sizes), contiguous
  const T* bias;    // (out,)
  int64_t in, out;
  Window window;
  Activation activation;  // none after the last layer
  T parameter;            // of the activation
};

constexpr int max_net_layers = 6;

// A coupling net: a chain of layers whose last one is multiplied by exp(3 log_gain). half: what lies between layers,
// and what is multiplied, is rounded to bfloat16; sums are formed in float.
template <class T>
struct NetChain {
  NetLayer<T> layers[max_net_layers];
  int64_t count;
  const T* log_gain;  // (out,) or null: no gain
  bool half;

  PYGLOW_HD const NetLayer<T>& last() const { return layers[count - 1]; }
  // What one position keeps for the backward: each hidden layer's result, and its argument where that is needed.
  PYGLOW_HD int64_t kept_per_position() const {
    int64_t rows = 0;
    for (int64_t i = 0; i + 1 < count; ++i) rows += layers[i].out * (keeps_input(layers[i].activation) ? 2 : 1);
    return rows;
  }
  // Elements of what is kept: of all positions, with a margin around them that may be read.
  PYGLOW_HD int64_t kept(const Extent& extent, int64_t samples) const {
    return kept_per_position() * samples * extent.positions() + 2 * margin(extent);
  }
  PYGLOW_HD int64_t margin(const Extent& extent) const {
    int64_t reach = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t own = layers[i].window.reach(extent);
      if (own > reach) reach = own;
    }
    return reach + 64;
  }
};

// The input is x and, behind it, cond; both are read once.
template <class T>
struct NetArgs {
  Image<const T> x, cond;  // (N, in - cond_channels, D, H, W), (N, cond_channels, D, H, W)
  int64_t cond_channels;
  NetChain<T> net;
  Image<T> y;  // (N, out, D, H, W)
  void* kept;  // net.kept() elements of T, or of bfloat16 if half, in an order of the net's kernels; null: not kept
  int64_t samples;
  Extent extent;
};

// Gradients of the input and of the weights, each like the weight itself; the first weight's null: of the input alone.
template <class T>
struct NetBackwardArgs {
  Image<const T> grad_y;   // (N, out, D, H, W)
  Image<const T> x, cond;  // as in NetArgs
  int64_t cond_channels;
  NetChain<T> net;  // no bias is read but the last, where there is a gain
  const void* kept;
  Image<T> grad_x, grad_cond;
  T *grad_weight[max_net_layers], *grad_bias[max_net_layers];
  T* grad_log_gain;  // (out,), or null without a gain
  int64_t samples;
  Extent extent;
};

// A row for each position of each sample, samples one after another: for each channel and each tap of a window an
// element, in column c * taps + tap.
template <class Data>
struct WindowRows {
  Data* data;      // const void or void
  NetType type;    // state: elements of T
  int64_t length;  // elements from one row to the next
};

// What each position sees of x: rows[(n, p), (c, tap)] = x[n, c, p + shift of the tap], zero outside of the extent, and
// in the columns behind those. Of a gradient the sums of x, over `summed_positions` after one another through samples.
constexpr int64_t summed_positions = 64;
template <class T>
struct PatchesArgs {
  NetOutput x;            // (N, C, P)
  WindowRows<void> rows;  // (N P, length)
  T* sums;                // (ceil(N P / summed_positions), C), or null
  int64_t samples, channels;
  Extent extent;
  Window window;
  bool mirrored;  // p - shift
};

// The transpose: y[n, c, p] = bias_c + sum over taps of rows[(n, p + shift of the tap), (c, tap)].
template <class T>
struct TapSumsArgs {
  WindowRows<const void> rows;  // (N P, length)
  const void* bias;             // (C,) of the type of rows, or null
  NetGrad y;                    // (N, C, P)
  int64_t samples, channels;
  Extent extent;
  Window window;
  bool mirrored;
};

// The gradient before a relu, over the one behind it: zero where its value h is not above 0; and the sums of each of so
// many shares of the rows.
template <class T>
struct ReluBackwardArgs {
  void* grad;     // (rows, columns), and h, row-major
  const void* h;  //
  NetType type;   // of both
  T* sums;        // (shares, columns)
  int64_t rows, columns, shares;
  PYGLOW_HD int64_t per_share() const { return (rows + shares - 1) / shares; }
};

// Images (N, C, 2 R, M, W), each channel's values one after another, and their two halves (N, C, R, M, W), likewise:
// position [r, m, w] of `kept` is that of rows 2 r and 2 r + 1 whose indices have a sum of the given parity (0 or 1),
// of `other` the other one. Split writes the halves, merge the whole. With data of `other` null that half is not
// written, or is zero.
template <class T>
struct Planes {
  T* data;  // values of sample n, channel c begin at data[n * sample + c * channel]
  int64_t sample, channel;
};
struct Board {
  int64_t samples, channels, row_pairs, middle, width, parity;
};
template <class T>
struct CheckerboardSplitArgs {
  Planes<const T> whole;
  Planes<T> kept, other;
  Board board;
};
template <class T>
struct CheckerboardMergeArgs {
  Planes<const T> kept, other;
  Planes<T> whole;
  Board board;
};

// y = function(x) as the kernels compute it, on arrays: for tests of the error bounds.
enum class Elementary : int { exp, log, log1p_unit, tanh, atan, expm1_negative, erf, erfc };
template <class T>
struct ElementaryArgs {
  Elementary function;
  const T* x;
  T* y;
  int64_t count;
};

// An activation of the nets on an array, or its backward, for tests as well: y = a(x), or with a gradient y = grad a',
// where x is what a layer keeps for that.
template <class T>
struct ActivationArgs {
  Activation kind;
  T parameter;
  const T* x;
  const T* grad;  // or null
  T* y;
  int64_t count;
};

// K invertible 1x1 convolutions in LU factors, each folded with the actnorm before it: W = P L U by rows gathered,
// (P A)[i] = A[permutation[i]], L with ones and U with sign exp(log_diag) on the diagonal; M = W diag(exp(log_scale)),
// c = M bias, log_det = sum log_diag + sum log_scale. Of lower and upper only what lies strictly there is read.
template <class T>
struct Factors {
  const int64_t* const* permutation;            // of each convolution (C,); the tables of addresses are the host's
  const T *const *lower, *const *upper;         // (C, C), row-major
  const T *const *log_diag, *const *sign_diag;  // (C,)
  const T *const *log_scale, *const *bias;      // (C,)
  int64_t count, channels;
};
template <class T>
struct FoldArgs {
  Factors<T> factors;
  T *matrices, *offsets, *log_dets;  // (K, C, C), (K, C), (K,)
};
template <class T>
struct FoldBackwardArgs {
  Factors<T> factors;
  const T *grad_matrices, *grad_offsets, *grad_log_dets;
  T *grad_lower, *grad_upper;                     // (K, C, C), zero elsewhere
  T *grad_log_diag, *grad_log_scale, *grad_bias;  // (K, C)
};

// Every kernel and what it takes, on CPU and GPU, then on the CPU alone, then those of the nets, which there are some
// more instruction sets for; each exists for float and double. What declares, forwards, instantiates or launches
// kernels goes through these lists: K(kernel, Args).
#define PYGLOW_KERNELS(K)                             \
  K(channel_mix, ChannelMixArgs)                      \
  K(channel_mix_backward, ChannelMixBackwardArgs)     \
  K(coupling, CouplingArgs)                           \
  K(coupling_backward, CouplingBackwardArgs)          \
  K(coupling_mix, CouplingMixArgs)                    \
  K(coupling_mix_backward, CouplingMixBackwardArgs)   \
  K(step_backward, StepBackwardArgs)                  \
  K(gather, GatherArgs)                               \
  K(gather_backward, GatherBackwardArgs)              \
  K(step_gather_backward, StepGatherBackwardArgs)     \
  K(gaussian_log_prob, GaussianArgs)                  \
  K(gaussian_log_prob_backward, GaussianBackwardArgs) \
  K(gaussian_sample, GaussianSampleArgs)              \
  K(spline, SplineArgs)                               \
  K(spline_backward, SplineBackwardArgs)              \
  K(invert_matrices, InvertMatricesArgs)              \
  K(fold, FoldArgs)                                   \
  K(fold_backward, FoldBackwardArgs)                  \
  K(patches, PatchesArgs)                             \
  K(tap_sums, TapSumsArgs)                            \
  K(relu_backward, ReluBackwardArgs)
#define PYGLOW_CPU_KERNELS(K)                  \
  K(checkerboard_split, CheckerboardSplitArgs) \
  K(checkerboard_merge, CheckerboardMergeArgs) \
  K(elementary, ElementaryArgs)                \
  K(activation, ActivationArgs)
#define PYGLOW_NET_KERNELS(K) \
  K(net_chain, NetArgs)       \
  K(net_chain_backward, NetBackwardArgs)

}  // namespace pyglow

namespace pyglow::cpu {

// How a kernel shares its tasks among threads: body(context, begin, end) is called for disjoint ranges that cover
// [0, tasks), each of at least `grain` tasks; the ranges do not influence results.
struct Threads {
  void (*run)(int64_t tasks, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

// The instruction set whose kernels run on this machine: "portable", "avx2", "avx512", or "avx512_bf16" or "amx", which
// are avx512 with instructions for bfloat16. The environment variable PYGLOW_CPU overrides the choice; throws
// std::invalid_argument if it names one that cannot run here.
const char* instruction_set();

// Memory of large outputs and of the nets' workspaces, which waits for another use: fresh pages cost more than what
// most ops do with them, and malloc by default returns large blocks to the system at once. At most 64 MiB wait within a
// step, and 32 MiB after it, but no more than one of the last 16 steps needed.
struct Block {
  void* data;  // null: there is not so much memory
  int64_t size;
};
constexpr int64_t least_reused = int64_t{1} << 17;  // bytes; malloc keeps what is smaller by itself
Block take_block(int64_t bytes);
void give_back(const Block& block);
int64_t idle_bytes();  // that wait
void release_idle();   // to the system

#define PYGLOW_DECLARE(kernel, Args) \
  template <class T>                 \
  void kernel(const Args<T>& args, const Threads& threads);
PYGLOW_KERNELS(PYGLOW_DECLARE)
PYGLOW_CPU_KERNELS(PYGLOW_DECLARE)
PYGLOW_NET_KERNELS(PYGLOW_DECLARE)
#undef PYGLOW_DECLARE

// What the source of a kernel ends with.
#define PYGLOW_CPU_INSTANTIATE(kernel, Args)                       \
  template void kernel<float>(const Args<float>&, const Threads&); \
  template void kernel<double>(const Args<double>&, const Threads&);

}  // namespace pyglow::cpu

namespace pyglow::cuda {

// Return values are cudaError_t as int, zero for success.
const char* error_string(int error);

// Where kernels are enqueued: `stream` is a cudaStream_t of the current device. scratch gives device memory of so many
// bytes, which is needed only until the kernels have run; null for none. One call has one piece of it at most.
struct Queue {
  void* stream;
  void* (*allocate)(int64_t bytes, void* context);
  void* context;
  void* scratch(int64_t bytes) const { return bytes == 0 ? nullptr : allocate(bytes, context); }
};

#define PYGLOW_DECLARE(kernel, Args) \
  template <class T>                 \
  int kernel(const Args<T>& args, const Queue& queue);
PYGLOW_KERNELS(PYGLOW_DECLARE)
#undef PYGLOW_DECLARE

#define PYGLOW_CUDA_INSTANTIATE(kernel, Args)                   \
  template int kernel<float>(const Args<float>&, const Queue&); \
  template int kernel<double>(const Args<double>&, const Queue&);

}  // namespace pyglow::cuda
