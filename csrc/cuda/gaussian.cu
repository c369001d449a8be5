// CUDA schedules of the diagonal normal distribution: pointwise passes over samples in parts, the log density summed in
// two stages without atomics, so that two runs give the same bits.
#include "core.h"
#include "cuda/rows.cuh"
#include "cuda/sample_sums.cuh"
#include "math/gaussian.h"

namespace pyglow::cuda {
namespace {

// A value (or its noise) and its distribution; which parts of which samples.
template <class T>
struct Normal {
  RowView<const T> value, mean, log_sd;
  Walk walk;
  int64_t samples, parts;
  bool vector;
  Rows rows;
};

// Mean and log_sd are often the same for a whole row: one value, read once for all elements of a unit.
template <bool Vector, class T>
__device__ __forceinline__ Unit<T, Vector> load_or_repeat(const RowView<const T>& x, int64_t n, int64_t row,
                                                          int64_t i) {
  if constexpr (Vector) {
    if (x.element == 0) {
      const T value = x.data[n * x.sample + row * x.step];
      Vec<T> unit;
#pragma unroll
      for (int k = 0; k < width<T>; ++k) unit.v[k] = value;
      return unit;
    }
  }
  return load_unit<Vector>(x, n, row, i);
}

// `outputs` are the tensors that are written, the first of them choosing the order of the walk.
template <class T, class... Outputs>
Normal<T> normal_of(const Strided<const T>& value, const Strided<const T>& mean, const Strided<const T>& log_sd,
                    int64_t samples, int64_t channels, int64_t positions, const Outputs&... outputs) {
  const Rows rows = rows_of(positions, outputs..., value, mean, log_sd);
  Normal<T> n = {};
  n.value = row_view(value, rows, 0);
  n.mean = row_view(mean, rows, 0);
  n.log_sd = row_view(log_sd, rows, 0);
  n.samples = samples;
  n.parts = parts_of(samples, channels * positions);
  const auto repeats = [&](const RowView<const T>& x) { return x.element == 0 || has_vector_rows(x, rows); };
  n.vector = row_length(rows, channels, positions) % width<T> == 0 && has_vector_rows(n.value, rows) &&
             repeats(n.mean) && repeats(n.log_sd) && (has_vector_rows(row_view(outputs, rows, 0), rows) && ...);
  n.rows = rows;
  n.walk = walk_of(rows, channels, positions, n.parts, n.vector ? width<T> : 1);
  return n;
}

// Launches one of the kernels below, in its vector form where memory allows it.
template <class T, class... Parameters, class... Arguments>
int launch_normal(const Normal<T>& normal, void (*vector)(Normal<T>, Parameters...),
                  void (*single)(Normal<T>, Parameters...), void* stream, const Arguments&... arguments) {
  const int64_t blocks = smaller(normal.samples * normal.parts, max_blocks);
  return launch(normal.vector ? vector : single, blocks, walk_threads(normal.walk, normal.walk), 0, stream, normal,
                arguments...);
}

// A thread adds up its terms in T, the block in double.
template <class T, bool Vector>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 4 ? 4 : 3)
    log_prob_kernel(const Normal<T> normal, double constant, double* partials, T* log_prob) {
  constexpr int unit = unit_width<T, Vector>;
  for (int64_t task = blockIdx.x; task < normal.samples * normal.parts; task += gridDim.x) {
    const int64_t n = task / normal.parts;
    T terms = T(0);
    for_each_unit<unit>(normal.walk, task - n * normal.parts, [&](int64_t row, int64_t i) {
      const Unit<T, Vector> value = load_unit<Vector>(normal.value, n, row, i);
      const Unit<T, Vector> mean = load_or_repeat<Vector>(normal.mean, n, row, i);
      const Unit<T, Vector> log_sd = load_or_repeat<Vector>(normal.log_sd, n, row, i);
#pragma unroll
      for (int k = 0; k < unit; ++k) terms += math::gaussian_log_density(value.v[k], mean.v[k], log_sd.v[k]);
    });
    const double sum = block_sum(static_cast<double>(terms));
    if (threadIdx.x != 0) continue;
    if (normal.parts == 1) {
      log_prob[n] = static_cast<T>(constant + sum);
    } else {
      partials[task] = sum;
    }
  }
}

template <class T, bool Vector>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 4 ? 4 : 3)
    log_prob_backward_kernel(const Normal<T> normal, const T* grad_log_prob, const RowView<T> grad_z,
                             const RowView<T> grad_mean, const RowView<T> grad_log_sd) {
  constexpr int unit = unit_width<T, Vector>;
  for (int64_t task = blockIdx.x; task < normal.samples * normal.parts; task += gridDim.x) {
    const int64_t n = task / normal.parts;
    const T grad = grad_log_prob[n];
    for_each_unit<unit>(normal.walk, task - n * normal.parts, [&](int64_t row, int64_t i) {
      const Unit<T, Vector> value = load_unit<Vector>(normal.value, n, row, i);
      const Unit<T, Vector> mean = load_or_repeat<Vector>(normal.mean, n, row, i);
      const Unit<T, Vector> log_sd = load_or_repeat<Vector>(normal.log_sd, n, row, i);
      Unit<T, Vector> z_grads, mean_grads, log_sd_grads;
#pragma unroll
      for (int k = 0; k < unit; ++k) {
        const math::GaussianGrad<T> grads = math::gaussian_backward(value.v[k], mean.v[k], log_sd.v[k], grad);
        z_grads.v[k] = grads.z;
        mean_grads.v[k] = grads.mean;
        log_sd_grads.v[k] = grads.log_sd;
      }
      store_unit<Vector>(grad_z, n, row, i, z_grads);
      store_unit<Vector>(grad_mean, n, row, i, mean_grads);
      store_unit<Vector>(grad_log_sd, n, row, i, log_sd_grads);
    });
  }
}

template <class T, bool Vector>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 4 ? 4 : 3)
    sample_kernel(const Normal<T> normal, const RowView<T> z) {
  constexpr int unit = unit_width<T, Vector>;
  for (int64_t task = blockIdx.x; task < normal.samples * normal.parts; task += gridDim.x) {
    const int64_t n = task / normal.parts;
    for_each_unit<unit>(normal.walk, task - n * normal.parts, [&](int64_t row, int64_t i) {
      Unit<T, Vector> value = load_unit<Vector>(normal.value, n, row, i);
      const Unit<T, Vector> mean = load_or_repeat<Vector>(normal.mean, n, row, i);
      const Unit<T, Vector> log_sd = load_or_repeat<Vector>(normal.log_sd, n, row, i);
#pragma unroll
      for (int k = 0; k < unit; ++k) value.v[k] = math::gaussian_value(value.v[k], mean.v[k], log_sd.v[k]);
      store_unit<Vector>(z, n, row, i, value);
    });
  }
}

}  // namespace

// The three ops have one schedule:
// - Grid: samples by parts of 1024 to 8192 elements, at most max_blocks blocks, which then loop.
// - Occupancy: up to 64 registers (float), so 4 blocks of 256 threads on a multiprocessor; each thread has three
//   16-byte loads in flight, 48 KB in all, more than bandwidth times latency (about 30 KB).
// - Bound: memory; one exponential and a few products for each 12 (or 4, if mean and log_sd repeat) bytes read. The
//   second stage of the sum reads one double per part.
template <class T>
int gaussian_log_prob(const GaussianArgs<T>& args, const Queue& queue) {
  if (args.samples == 0) return cudaSuccess;
  const Normal<T> normal = normal_of<T>(args.z, args.mean, args.log_sd, args.samples, args.channels, args.positions);
  const double constant = -math::half_log_2pi * static_cast<double>(args.channels * args.positions);
  double* const partials = partial_sums(args.samples, normal.parts, queue);
  const int error = launch_normal(normal, log_prob_kernel<T, true>, log_prob_kernel<T, false>, queue.stream, constant,
                                  partials, args.log_prob);
  if (error != cudaSuccess || normal.parts == 1) return error;
  return sample_sums(partials, args.samples, normal.parts, constant, args.log_prob, queue.stream);
}

template <class T>
int gaussian_log_prob_backward(const GaussianBackwardArgs<T>& args, const Queue& queue) {
  if (args.samples == 0) return cudaSuccess;
  const Normal<T> normal = normal_of<T>(args.z, args.mean, args.log_sd, args.samples, args.channels, args.positions,
                                        args.grad_z, args.grad_mean, args.grad_log_sd);
  return launch_normal(normal, log_prob_backward_kernel<T, true>, log_prob_backward_kernel<T, false>, queue.stream,
                       args.grad_log_prob, row_view(args.grad_z, normal.rows, 0),
                       row_view(args.grad_mean, normal.rows, 0), row_view(args.grad_log_sd, normal.rows, 0));
}

template <class T>
int gaussian_sample(const GaussianSampleArgs<T>& args, const Queue& queue) {
  if (args.samples == 0) return cudaSuccess;
  const Normal<T> normal =
      normal_of<T>(args.noise, args.mean, args.log_sd, args.samples, args.channels, args.positions, args.z);
  return launch_normal(normal, sample_kernel<T, true>, sample_kernel<T, false>, queue.stream,
                       row_view(args.z, normal.rows, 0));
}

PYGLOW_CUDA_INSTANTIATE(gaussian_log_prob, GaussianArgs)
PYGLOW_CUDA_INSTANTIATE(gaussian_log_prob_backward, GaussianBackwardArgs)
PYGLOW_CUDA_INSTANTIATE(gaussian_sample, GaussianSampleArgs)

}  // namespace pyglow::cuda
