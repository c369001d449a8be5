// The entry points of the kernels, by device. Plain types only: neither torch nor CUDA is visible here.
//
// Tensors are (N, C, P): samples, channels, positions (the product of the spatial sizes), given by element strides, so
// that contiguous, channels-last and channel-sliced tensors are the same to a kernel. Unless a comment says so, an
// output may not overlap an input. Sizes may be zero. All arithmetic is in T; sums over positions are formed in T over
// a run of tiles that depends on shapes and layouts alone, and in double across runs.
#pragma once
#include <cstdint>

#include "math/kinds.h"

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

// Mean and sum of squared deviations per channel over samples and positions; both zero where there are none.
template <class T>
struct ChannelMomentsArgs {
  Strided<const T> x;  // (N, C, P)
  double* mean;        // (C,)
  double* m2;          // (C,)
  int64_t samples, channels, positions;
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

constexpr int64_t pixel_block = 32;

// A matrix (rows, pixels), by rows or in blocks of pixels: what a product reads and writes at a time then lies
// together. Element (r, p) is data[p / 32 * block + r * row + p % 32]; from pixel `tail` on, the last and incomplete
// block, rows are tail_row apart.
template <class T>
struct Matrix {
  T* data;
  int64_t row, block, tail, tail_row;
};

// C = A B, or C + A B. A (rows, inner) is what pack_left has made of it, or in whole blocks of pixels, with memory that
// may be read for some rows more; B is (inner, columns), or its transpose where it is turned.
template <class T>
struct ProductArgs {
  const T* packed_a;  // or null
  Matrix<const T> a;  // or its data null
  Matrix<const T> b;
  bool turned;
  Matrix<T> c;
  int64_t rows, columns, inner;
  bool accumulate;
  const T* bias;         // (rows,) or null: C becomes leaky_relu(C + bias)
  Matrix<const T> mask;  // (rows, columns), or its data null: a leaky_relu's result; C becomes its input's gradient
  T leak;                // what leaky_relu multiplies by below zero; 0: relu
  T* row_sums;           // (rows,) or null: the sums of the rows of `a` are added
};

// Images (N, K, H, W) by strides.
template <class T>
struct Image {
  T* data;
  int64_t sample, channel, row, pixel;
};

// The nine shifts of images, as the rows of a matrix: row 9 k + 3 i + j holds image[n, k, h + i - 1, w + j - 1] for the
// pixels of some samples (or of some rows of one sample), zero outside the image. transposed: h + 1 - i, w + 1 - j.
template <class T>
struct ColumnsArgs {
  Image<const T> image;
  Matrix<T> columns;  // (9 K, samples * rows * W)
  int64_t channels, height, width;
  int64_t first_sample, samples, first_row, rows;  // rows < height: one sample
  bool transposed;
};

// image[n, k, h, w] = bias[k] + the sum over i, j of columns[9 k + 3 i + j] at pixel (h + i - 1, w + j - 1) of sample
// n, where that is in the image; transposed: at (h + 1 - i, w + 1 - j). For some samples, or for some rows of one: then
// the columns begin with another row of the image, and reach as far as the rows and their neighbours in it.
template <class T>
struct ShiftSumArgs {
  const T* columns;  // (9 K, at least samples (rows + neighbours) W), rows of `stride`
  int64_t stride;
  const T* bias;  // (K,) or null
  Image<T> image;
  int64_t channels, height, width;
  int64_t first_sample, samples, first_row, rows;
  int64_t columns_row;  // 0 unless only some rows are summed
  bool transposed;
};

}  // namespace pyglow

namespace pyglow::cpu {

// How a kernel shares its tasks among threads: body(context, begin, end) is called for disjoint ranges that cover
// [0, tasks), each of at least `grain` tasks; the ranges do not influence results.
struct Threads {
  void (*run)(int64_t tasks, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

// The instruction set whose kernels run on this machine: "portable", "avx2" or "avx512". The environment variable
// PYGLOW_CPU overrides the choice; throws std::invalid_argument if it names one that cannot run here.
const char* instruction_set();

template <class T>
void channel_mix(const ChannelMixArgs<T>& args, const Threads& threads);
template <class T>
void channel_mix_backward(const ChannelMixBackwardArgs<T>& args, const Threads& threads);
template <class T>
void coupling(const CouplingArgs<T>& args, const Threads& threads);
template <class T>
void coupling_backward(const CouplingBackwardArgs<T>& args, const Threads& threads);
template <class T>
void coupling_mix(const CouplingMixArgs<T>& args, const Threads& threads);
template <class T>
void coupling_mix_backward(const CouplingMixBackwardArgs<T>& args, const Threads& threads);
template <class T>
void step_backward(const StepBackwardArgs<T>& args, const Threads& threads);
template <class T>
void channel_moments(const ChannelMomentsArgs<T>& args, const Threads& threads);
template <class T>
void gaussian_log_prob(const GaussianArgs<T>& args, const Threads& threads);
template <class T>
void gaussian_log_prob_backward(const GaussianBackwardArgs<T>& args, const Threads& threads);
template <class T>
void gaussian_sample(const GaussianSampleArgs<T>& args, const Threads& threads);

// At least `bytes` of this thread's own memory for the matrices of a coupling net, valid until it asks again.
void* net_workspace(int64_t bytes);

// Matrix products. A takes packed_size elements when packed; stored by rows it may be turned.
template <class T>
int64_t packed_size(int64_t rows, int64_t inner);
template <class T>
void pack_left(const Matrix<const T>& a, bool turned, int64_t rows, int64_t inner, T* packed, const Threads& threads);
template <class T>
void matrix_products(const ProductArgs<T>* products, int64_t count, const Threads& threads);

// Around the matrix products of a coupling net.
template <class T>
void shift_columns(const ColumnsArgs<T>& args, const Threads& threads);
template <class T>
void shift_sum(const ShiftSumArgs<T>& args, const Threads& threads);

// The functions that the kernels use, on arrays: for tests of their error bounds.
enum class Elementary : int { exp, log, log1p_unit, tanh, atan };
template <class T>
void elementary(Elementary function, const T* x, T* y, int64_t count);

}  // namespace pyglow::cpu

namespace pyglow::cuda {

// Return values are cudaError_t as int, zero for success.
int device_count(int* count);
const char* error_string(int error);

// Kernels are enqueued on `stream` (a cudaStream_t) of the current device. `scratch` is device memory of the size that
// the function of the same name gives, needed only until the kernels have run.
template <class T>
int channel_mix(const ChannelMixArgs<T>& args, void* stream);
template <class T>
int64_t channel_mix_backward_scratch(int64_t samples, int64_t channels, int64_t positions);  // bytes
template <class T>
int channel_mix_backward(const ChannelMixBackwardArgs<T>& args, void* scratch, void* stream);
int64_t coupling_scratch(int64_t samples, int64_t transformed, int64_t positions);  // bytes
template <class T>
int coupling(const CouplingArgs<T>& args, void* scratch, void* stream);
template <class T>
int coupling_backward(const CouplingBackwardArgs<T>& args, void* stream);
template <class T>
int64_t coupling_mix_scratch(int64_t samples, int64_t positions);  // bytes
template <class T>
int coupling_mix(const CouplingMixArgs<T>& args, void* scratch, void* stream);
template <class T>
int64_t coupling_mix_backward_scratch(int64_t samples, int64_t channels, int64_t positions);  // bytes
template <class T>
int coupling_mix_backward(const CouplingMixBackwardArgs<T>& args, void* scratch, void* stream);
template <class T>
int step_backward(const StepBackwardArgs<T>& args, void* stream);
template <class T>
int64_t channel_moments_scratch(const ChannelMomentsArgs<T>& args);  // bytes
template <class T>
int channel_moments(const ChannelMomentsArgs<T>& args, void* scratch, void* stream);
int64_t gaussian_log_prob_scratch(int64_t samples, int64_t channels, int64_t positions);  // bytes
template <class T>
int gaussian_log_prob(const GaussianArgs<T>& args, void* scratch, void* stream);
template <class T>
int gaussian_log_prob_backward(const GaussianBackwardArgs<T>& args, void* stream);
template <class T>
int gaussian_sample(const GaussianSampleArgs<T>& args, void* stream);

}  // namespace pyglow::cuda
