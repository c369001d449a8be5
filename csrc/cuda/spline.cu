// CUDA schedules of the monotone splines: a thread for each element, which walks the element's numbers in global
// memory.
#include "core.h"
#include "cuda/net_data.cuh"
#include "math/spline.h"

namespace pyglow::cuda {
namespace {

// The numbers of one element. A weight is formed again where it is needed, so that a thread keeps no array.
template <SplineForm F, class T>
struct ThreadNumbers {
  const void* from;
  void* to;  // gradients, or null
  NetType type;
  int64_t at, to_at, number, to_number;
  const SplineParams<T>& params;
  T most[2];

  __device__ __forceinline__ T raw(int row) const {
    Single<T> unit = fetch_net<T, false>(from, type, at + row * number);
    widen_net(type, unit);
    return unit.v[0];
  }
  __device__ __forceinline__ T raw(int side, int k) const { return raw(side * params.bins + k); }
  __device__ __forceinline__ void keep(int, int, T) {}
  __device__ __forceinline__ T weight(int side, int k) const {
    return math::exp_negative(math::spline_logit<F>(raw(side, k), params) - most[side]);
  }
  __device__ __forceinline__ void give(int row, T grad) const {
    store_net<false>(to, type, to_at + row * to_number, Single<T>{{grad}});
  }
};

struct Element {
  int64_t n, c, p;

  template <class Tensor>
  __device__ __forceinline__ int64_t in(const Tensor& x) const {
    return n * x.sample + c * x.channel + p * x.position;
  }
};

// Calls f for each element of this thread; neighbouring threads have neighbouring positions.
template <class F>
__device__ __forceinline__ void for_each_element(int64_t samples, int64_t channels, int64_t positions, const F& f) {
  const int64_t count = samples * channels * positions, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t row = i / positions, n = row / channels;
    f(Element{n, row - n * channels, i - row * positions});
  }
}

template <class T, SplineForm F, bool Inverse>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 4 ? 4 : 2) spline_kernel(const SplineArgs<T> args) {
  for_each_element(args.samples, args.channels, args.positions, [&](const Element& here) {
    ThreadNumbers<F, T> numbers{args.raw.data, nullptr, args.raw.type, here.in(args.raw), 0, args.raw.number, 0,
                                args.params,   {}};
    const math::SplineResult<T> found =
        math::spline_result<F, Inverse>(args.x.data[here.in(args.x)], numbers, args.params);
    args.y.data[here.in(args.y)] = found.y;
    args.log_slope.data[here.in(args.log_slope)] = found.log_slope;
  });
}

template <class T, SplineForm F, bool Inverse, bool FromY>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 4 ? 3 : 2)
    spline_backward_kernel(const SplineBackwardArgs<T> args) {
  for_each_element(args.samples, args.channels, args.positions, [&](const Element& here) {
    ThreadNumbers<F, T> numbers{args.raw.data,
                                args.grad_raw.data,
                                args.raw.type,
                                here.in(args.raw),
                                here.in(args.grad_raw),
                                args.raw.number,
                                args.grad_raw.number,
                                args.params,
                                {}};
    const math::SplineBackward<T> found = math::spline_backward<F, Inverse, FromY>(
        args.value.data[here.in(args.value)], args.grad_y.data[here.in(args.grad_y)],
        args.grad_log_slope.data[here.in(args.grad_log_slope)], numbers, args.params);
    args.grad_x.data[here.in(args.grad_x)] = found.grad_value;
    if (args.recovered.data != nullptr) args.recovered.data[here.in(args.recovered)] = found.recovered;
  });
}

template <class Args>
int launch_elements(void (*kernel)(Args), const Args& args, const Queue& queue) {
  const int64_t count = args.samples * args.channels * args.positions;
  if (count == 0) return cudaSuccess;
  const int64_t blocks = smaller(divide_up(count, int64_t{block_threads}), max_blocks);
  return launch(kernel, blocks, dim3(block_threads), 0, queue.stream, args);
}

}  // namespace

// - Grid: a thread an element, at most max_blocks blocks, which then loop.
// - Memory: an element's numbers are read three times forward and four times backward, from the second time on from the
//   caches: 92 bytes an element of 8 bins in float. They are read whole lines at a time where elements lie side by
//   side; where the numbers do, neighbouring threads take turns on a line, which waits in the L1.
// - Bound: instructions; 4 K exponentials an element forward, 6 K backward, since no weight is kept.
template <class T>
int spline(const SplineArgs<T>& args, const Queue& queue) {
  return math::with_spline(args.form, args.inverse, [&](auto of) {
    return launch_elements(spline_kernel<T, decltype(of)::form, decltype(of)::inverse>, args, queue);
  });
}

template <class T>
int spline_backward(const SplineBackwardArgs<T>& args, const Queue& queue) {
  return math::with_spline(args.form, args.inverse, [&](auto of) {
    using Of = decltype(of);
    // An x is what a spline gets or what its inverse gives.
    if (args.from_output == Of::inverse)
      return launch_elements(spline_backward_kernel<T, Of::form, Of::inverse, false>, args, queue);
    return launch_elements(spline_backward_kernel<T, Of::form, Of::inverse, true>, args, queue);
  });
}

PYGLOW_CUDA_INSTANTIATE(spline, SplineArgs)
PYGLOW_CUDA_INSTANTIATE(spline_backward, SplineBackwardArgs)

}  // namespace pyglow::cuda
