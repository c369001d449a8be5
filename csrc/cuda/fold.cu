// CUDA schedule of the channel maps that actnorms and convolutions in LU factors are folded into: a block for each row
// of each map, in double, so that each number is rounded once. No second stage, and no order but that of the loops.
#include <cmath>

#include "core.h"
#include "cuda/device.cuh"
#include "math/elementary.h"

namespace pyglow::cuda {
namespace {

constexpr int at_once = 64;  // maps of a launch, whose tensors' addresses are its parameters

// Some of the maps, with the numbers that their matrices are made of.
template <class T>
struct Maps {
  const int64_t* permutation[at_once];
  const T *lower[at_once], *upper[at_once], *log_diag[at_once], *sign_diag[at_once];
  const T *log_scale[at_once], *bias[at_once];
  int64_t first, channels;

  Maps(const Factors<T>& of, int64_t first) : first(first), channels(of.channels) {
    for (int64_t k = 0; k < smaller<int64_t>(at_once, of.count - first); ++k) {
      permutation[k] = of.permutation[first + k];
      lower[k] = of.lower[first + k];
      upper[k] = of.upper[first + k];
      log_diag[k] = of.log_diag[first + k];
      sign_diag[k] = of.sign_diag[first + k];
      log_scale[k] = of.log_scale[first + k];
      bias[k] = of.bias[first + k];
    }
  }
  // The row of L that row i comes from; some row where the permutation, which the host has not seen, names none.
  __device__ __forceinline__ int64_t source(int64_t k, int64_t i) const {
    return smaller(larger<int64_t>(permutation[k][i], 0), channels - 1);
  }
  __device__ __forceinline__ double scale(int k, int64_t j) const {
    return math::exp(static_cast<double>(log_scale[k][j]));
  }
  __device__ __forceinline__ double diagonal(int k, int64_t j) const {
    return sign_diag[k][j] * math::exp(static_cast<double>(log_diag[k][j]));
  }
  // M[i, j], of row p of the factors.
  __device__ __forceinline__ double entry(int k, int64_t p, int64_t j) const {
    double sum = 0;
    for (int64_t t = 0; t < smaller(p, j); ++t)
      sum += static_cast<double>(lower[k][p * channels + t]) * upper[k][t * channels + j];
    sum += p < j ? static_cast<double>(upper[k][p * channels + j])
                 : (p > j ? static_cast<double>(lower[k][p * channels + j]) : 1.0) * diagonal(k, j);
    return sum * scale(k, j);
  }
};

template <class T>
__global__ void __launch_bounds__(block_threads) fold_kernel(const Maps<T> maps, T* matrices, T* offsets, T* log_dets) {
  const int64_t n = maps.channels, k = blockIdx.x / n, i = blockIdx.x - k * n, row = (maps.first + k) * n + i;
  const int64_t p = maps.source(k, i);
  const bool there = p == maps.permutation[k][i];
  double offset = 0, log_det = 0;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    const double value = there ? maps.entry(k, p, j) : NAN;
    matrices[row * n + j] = static_cast<T>(value);
    offset += value * maps.bias[k][j];
    log_det += static_cast<double>(maps.log_diag[k][j]) + maps.log_scale[k][j];
  }
  offset = block_sum(offset);
  log_det = block_sum(log_det);
  if (threadIdx.x != 0) return;
  offsets[row] = static_cast<T>(offset);
  if (i == 0) log_dets[maps.first + k] = static_cast<T>(log_det);
}

// A block has row i of the map and its row p of L, then row i of U, then column i of the map.
template <class T>
__global__ void __launch_bounds__(block_threads)
    fold_backward_kernel(const Maps<T> maps, const FoldBackwardArgs<T> args) {
  const int64_t n = maps.channels, k = blockIdx.x / n, i = blockIdx.x - k * n, map = maps.first + k;
  const T *const lower = maps.lower[k], *const upper = maps.upper[k], *const bias = maps.bias[k];
  const T *const of_matrix = args.grad_matrices + map * n * n, *const of_offset = args.grad_offsets + map * n;
  const auto grad = [&](int64_t row, int64_t j) {
    return of_matrix[row * n + j] + static_cast<double>(of_offset[row]) * bias[j];
  };
  const double of_log_det = args.grad_log_dets[map];
  const int64_t p = maps.source(k, i);
  double* const of_product = DynamicShared().take<double>(static_cast<int>(n));  // row p of the gradient of L U
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) of_product[j] = grad(i, j) * maps.scale(k, j);
  __syncthreads();
  for (int64_t t = threadIdx.x; t < n; t += blockDim.x) {
    double of_lower = 0, of_upper = 0;
    if (t < p) {
      for (int64_t j = t + 1; j < n; ++j) of_lower += of_product[j] * upper[t * n + j];
      of_lower += of_product[t] * maps.diagonal(k, t);
    }
    if (t >= i) {
      for (int64_t row = 0; row < n; ++row) {
        const int64_t q = maps.source(k, row);
        if (q >= i) of_upper += (q > i ? static_cast<double>(lower[q * n + i]) : 1.0) * grad(row, t);
      }
      of_upper *= maps.scale(k, t);
    }
    args.grad_lower[(map * n + p) * n + t] = static_cast<T>(of_lower);
    args.grad_upper[(map * n + i) * n + t] = static_cast<T>(t > i ? of_upper : 0.0);
    if (t == i) args.grad_log_diag[map * n + i] = static_cast<T>(of_upper * maps.diagonal(k, i) + of_log_det);
  }
  double of_bias = 0, of_log_scale = 0;
  for (int64_t row = threadIdx.x; row < n; row += blockDim.x) {
    const double value = maps.entry(k, maps.source(k, row), i);
    of_bias += value * of_offset[row];
    of_log_scale += value * grad(row, i);
  }
  of_bias = block_sum(of_bias);
  of_log_scale = block_sum(of_log_scale);
  if (threadIdx.x != 0) return;
  args.grad_bias[map * n + i] = static_cast<T>(of_bias);
  args.grad_log_scale[map * n + i] = static_cast<T>(of_log_scale + of_log_det);
}

// f(maps, blocks, threads) for `at_once` maps after another.
template <class T, class F>
int each_launch(const Factors<T>& factors, const F& f) {
  const dim3 threads(static_cast<unsigned>(smaller<int64_t>(block_threads, round_up(factors.channels, warp_threads))));
  for (int64_t first = 0; factors.channels > 0 && first < factors.count; first += at_once) {
    const int64_t count = smaller<int64_t>(at_once, factors.count - first);
    const int error = f(Maps<T>(factors, first), count * factors.channels, threads);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

// - Grid: K C blocks, of as many threads as a row has numbers.
// - Occupancy: a row of doubles in shared memory, up to 80 registers: what is read comes from the L2 and is small.
// - Bound: the latency of C dependent additions in double; K C^3 of them (backward: four times as many).
template <class T>
int fold(const FoldArgs<T>& args, const Queue& queue) {
  return each_launch(args.factors, [&](const Maps<T>& maps, int64_t blocks, dim3 threads) {
    return launch(fold_kernel<T>, blocks, threads, 0, queue.stream, maps, args.matrices, args.offsets, args.log_dets);
  });
}

template <class T>
int fold_backward(const FoldBackwardArgs<T>& args, const Queue& queue) {
  return each_launch(args.factors, [&](const Maps<T>& maps, int64_t blocks, dim3 threads) {
    return launch(fold_backward_kernel<T>, blocks, threads, maps.channels * int64_t{sizeof(double)}, queue.stream, maps,
                  args);
  });
}

PYGLOW_CUDA_INSTANTIATE(fold, FoldArgs)
PYGLOW_CUDA_INSTANTIATE(fold_backward, FoldBackwardArgs)

}  // namespace pyglow::cuda
