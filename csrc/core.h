// The entry points of the kernels, by device. Plain types only: neither torch nor CUDA is visible here.
//
// Tensors are (N, C, P): samples, channels, positions (the product of the spatial sizes), given by element strides, so that
// contiguous, channels-last and channel-sliced tensors are the same to a kernel. Unless a comment says so, an output may not
// overlap an input. Sizes may be zero. All arithmetic is in T, sums over positions in T per tile and in double across tiles.
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

// u = M x + c, or u = M (x - c) if subtract_first.
template <class T>
struct ChannelMixArgs {
  Strided<const T> x;  // (N, C, P)
  const T* matrix;     // (C, C), row-major
  const T* offset;     // (C,)
  Strided<T> u;        // (N, C, P)
  int64_t samples, channels, positions;
  bool subtract_first;
};

// Given x, or x - c, that entered the product, and grad_u: grad_x = M^T grad_u, grad_M = sum grad_u x^T, grad_c = sum grad_u.
template <class T>
struct ChannelMixBackwardArgs {
  Strided<const T> x;       // (N, C, P)
  Strided<const T> grad_u;  // (N, C, P)
  const T* matrix;          // (C, C), row-major
  const T* center;          // (C,) taken off x, or null
  Strided<T> grad_x;        // (N, C, P)
  T* grad_matrix;           // (C, C)
  T* grad_offset;           // (C,)
  int64_t samples, channels, positions;
};

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
  Strided<const T> in;       // (N, C, P)
  Strided<const T> net_out;  // (N, 2 C2, P): shift, then raw; additive (N, C2, P): shift
  Strided<T> out;            // (N, C, P); may be the same memory as `in`
  T* log_det;                // (N,): sum log s, its negative for the inverse; additive: zero
  int64_t samples, channels, transformed, positions;
  CouplingKind<T> kind;
};

// Gradients from the output alone.
template <class T>
struct CouplingBackwardArgs {
  Strided<const T> out;       // (N, C, P), what CouplingArgs gave
  Strided<const T> net_out;   // as there
  Strided<const T> grad_out;  // (N, C, P)
  const T* grad_log_det;      // (N,)
  Strided<T> in;              // (N, C, P), the recovered input; data null: not wanted
  Strided<T> grad_in;         // (N, C, P): of the transformed channels; the others are grad_out's, without the net's part
  Strided<T> grad_net_out;    // like net_out
  int64_t samples, channels, transformed, positions;
  CouplingKind<T> kind;
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

// The functions that the kernels use, on arrays: for tests of their error bounds.
enum class Elementary : int { exp, log, log1p_unit, tanh, atan };
template <class T>
void elementary(Elementary function, const T* x, T* y, int64_t count);

}  // namespace pyglow::cpu

namespace pyglow::cuda {

// Return values are cudaError_t as int, zero for success.
int device_count(int* count);
int runtime_version(int* version);
const char* error_string(int error);

// Kernels are enqueued on `stream` (a cudaStream_t) of the current device. `scratch` is device memory of the size that the
// function of the same name gives, needed only until the kernels have run.
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

}  // namespace pyglow::cuda
