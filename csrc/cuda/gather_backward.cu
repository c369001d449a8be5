// CUDA schedules of the gradients of the channel mixing by a permutation: from the input, with sums over positions in
// two stages without atomics, and from a step's output, which has none.
#include <cmath>

#include "cuda/gather.cuh"
#include "cuda/rows.cuh"
#include "cuda/sample_sums.cuh"

namespace pyglow::cuda {
namespace {

constexpr int most_terms = 64;  // that a thread adds up in T

// Blocks share channels and positions: a thread keeps its channel i, of the blockDim.x that its block has, and walks
// the positions, of all samples, that are its block's share; neighbours in memory are neighbours among threads.
struct Shares {
  int64_t channels, positions;
  int64_t units;           // of positions, through all samples
  int64_t groups, splits;  // of channels, of units
  int64_t per_split;       // units

  __device__ int64_t tasks() const { return groups * splits; }
  __device__ int64_t channel(int64_t task) const { return task % groups * blockDim.x + threadIdx.x; }
  __device__ int64_t split(int64_t task) const { return task / groups; }

  // f(sample, first position of the unit), for the thread's units.
  template <int Unit, class F>
  __device__ __forceinline__ void for_each(int64_t task, const F& f) const {
    const int64_t begin = split(task) * per_split, end = smaller(begin + per_split, units);
    for (int64_t unit = begin + threadIdx.y; unit < end; unit += blockDim.y) {
      const int64_t at = unit * Unit, n = at / positions;
      f(n, at - n * positions);
    }
  }
};

// Up to 64 terms for each thread, or two units where that still gives work to a large GPU. `sums`: of two numbers for
// each channel and split there must be room.
Shares shares_of(int64_t samples, int64_t channels, int64_t positions, const dim3& threads, int unit, bool sums) {
  Shares shares = {channels, positions, samples * positions / unit, divide_up(channels, threads.x), 0, 0};
  const int64_t enough = divide_up(shares.units, divide_up(busy_blocks, shares.groups));
  shares.per_split = threads.y * smaller<int64_t>(most_terms / unit, larger<int64_t>(2, divide_up(enough, threads.y)));
  if (sums) {
    const int64_t fitting = max_scratch_bytes / static_cast<int64_t>(2 * sizeof(double)) / channels;
    shares.per_split = larger(shares.per_split, divide_up(shares.units, larger<int64_t>(fitting, 1)));
  }
  shares.splits = larger<int64_t>(1, divide_up(shares.units, shares.per_split));  // of no positions the sums are zero
  return shares;
}

dim3 share_threads(bool channels_adjacent) {
  return channels_adjacent ? dim3(warp_threads, block_threads / warp_threads) : dim3(1, block_threads);
}

template <class T>
struct BackwardPass {
  GatherBackwardArgs<T> args;
  Shares shares;
  double* partials;    // (2, C, splits)
  bool added_columns;  // what is added has vector columns
};

// grad_in and grad_net_out of one unit of channel j; gives y.
template <bool Vector, class T>
__device__ __forceinline__ Unit<T, Vector> backward_unit(const GatherBackwardArgs<T>& args, int64_t n, int64_t j,
                                                         int64_t p, Unit<T, Vector> grad_y) {
  Unit<T, Vector> y = load_unit<Vector>(args.in.data + element_offset(args.in, n, j, p));
  const int64_t c = j - (args.channels - args.transformed);
  if (c >= 0) {
    auto net = fetch_net_units<Vector, T>(args.net_out, args.kind.map, n, c, args.transformed, p);
    const T weight = args.grad_log_det[n];
    widen_net(args.net_out.type, net.shift, net.raw);
    with_scale_map(args.kind.map, [&](auto map) {
#pragma unroll
      for (int k = 0; k < unit_width<T, Vector>; ++k) {
        const math::Scale<T> scale = scale_at<decltype(map)::value>(net.raw.v[k], args.kind.params);
        y.v[k] = couple_in(args.kind.order, y.v[k], net.shift.v[k], scale.s);
        const auto grads = couple_backward_in(args.kind.order, y.v[k], net.shift.v[k], scale.s, grad_y.v[k], weight);
        grad_y.v[k] = grads.in;
        net.shift.v[k] = grads.shift;
        net.raw.v[k] = grads.log_s * scale.slope;
      }
    });
    store_net_units<Vector, T>(args.grad_net_out, args.kind.map, n, c, args.transformed, p, net);
  }
  store_unit<Vector>(args.grad_in.data + element_offset(args.grad_in, n, j, p), grad_y);
  return y;
}

// The sum over the threads of a block that have the same channel, in those with threadIdx.y == 0.
__device__ __forceinline__ double channel_sum(double value) {
  if (blockDim.x == 1) return block_sum(value);
  PYGLOW_SHARED(double, shares, block_threads);
  __syncthreads();  // the values of an earlier call have been read
  shares[thread_index()] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.y == 0)
    for (int row = 0; row < static_cast<int>(blockDim.y); ++row) sum += shares[row * blockDim.x + threadIdx.x];
  return sum;
}

template <class T, bool Vector>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 4 ? 3 : 2)
    gather_backward_kernel(const BackwardPass<T> pass) {
  constexpr int unit = unit_width<T, Vector>;
  const GatherBackwardArgs<T>& args = pass.args;
  const SplitGrad<T>& grad_out = args.grad_out;
  const Shares& shares = pass.shares;
  for (int64_t task = blockIdx.x; task < shares.tasks(); task += gridDim.x) {
    const int64_t i = shares.channel(task);
    T sum_scale = T(0), sum_offset = T(0);
    if (i < shares.channels) {
      const int64_t j = source_channel(args.map, i, shares.channels);
      if (j == outside) {
        sum_scale = sum_offset = T(NAN);
      } else {
        const T scale = args.map.scale[i], center = args.map.center == nullptr ? T(0) : args.map.center[j];
        shares.for_each<unit>(task, [&](int64_t n, int64_t p) {
          Unit<T, Vector> grad = load_unit<Vector>(grad_out.all.data + element_offset(grad_out.all, n, i, p)), grad_y;
          if (i < grad_out.added_channels) {
            const auto added = load_any<Vector>(grad_out.added, pass.added_columns,
                                                grad_out.added.data + element_offset(grad_out.added, n, i, p));
#pragma unroll
            for (int k = 0; k < unit; ++k) grad.v[k] += added.v[k];
          }
#pragma unroll
          for (int k = 0; k < unit; ++k) grad_y.v[k] = grad.v[k] * scale;
          const Unit<T, Vector> y = backward_unit<Vector>(args, n, j, p, grad_y);
#pragma unroll
          for (int k = 0; k < unit; ++k) {
            sum_scale += grad.v[k] * math::centred(y.v[k], center);
            sum_offset += grad.v[k];
          }
        });
      }
    }
    const double scale_total = channel_sum(sum_scale), offset_total = channel_sum(sum_offset);
    if (threadIdx.y != 0 || i >= shares.channels) continue;
    pass.partials[i * shares.splits + shares.split(task)] = scale_total;
    pass.partials[(shares.channels + i) * shares.splits + shares.split(task)] = offset_total;
  }
}

template <class T>
struct StepPass {
  StepGatherBackwardArgs<T> args;
  Shares shares;
};

template <class T, bool Vector>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 4 ? 4 : 2)
    step_gather_backward_kernel(const StepPass<T> pass) {
  constexpr int unit = unit_width<T, Vector>;
  const StepGatherBackwardArgs<T>& args = pass.args;
  const Shares& shares = pass.shares;
  for (int64_t task = blockIdx.x; task < shares.tasks(); task += gridDim.x) {
    const int64_t i = shares.channel(task);
    if (i >= shares.channels) continue;
    const int64_t j = source_channel(args.map, i, shares.channels), c = j - (args.channels - args.transformed);
    const T scale = j == outside ? T(NAN) : args.map.scale[i];
    const T center = j == outside || args.map.center == nullptr ? T(0) : args.map.center[j];
    shares.for_each<unit>(task, [&](int64_t n, int64_t p) {
      Unit<T, Vector> value = {}, grad;
      if (j != outside) {
        value = load_unit<Vector>(args.y.data + element_offset(args.y, n, j, p));
        grad = load_unit<Vector>(args.grad_y.data + element_offset(args.grad_y, n, j, p));
        if (c >= 0) {
          auto net = fetch_net_units<Vector, T>(args.net_out, args.kind.map, n, c, args.transformed, p);
          const T weight = args.grad_log_det[n];
          widen_net(args.net_out.type, net.shift, net.raw);
          with_scale_map(args.kind.map, [&](auto map) {
#pragma unroll
            for (int k = 0; k < unit; ++k) {
              const math::Scale<T> s = scale_at<decltype(map)::value>(net.raw.v[k], args.kind.params);
              const auto grads =
                  couple_backward_in(args.kind.order, value.v[k], net.shift.v[k], s.s, grad.v[k], weight);
              value.v[k] = uncouple_in(args.kind.order, value.v[k], net.shift.v[k], s.s);
              grad.v[k] = grads.in;
              net.shift.v[k] = grads.shift;
              net.raw.v[k] = grads.log_s * s.slope;
            }
          });
          store_net_units<Vector, T>(args.grad_net_out, args.kind.map, n, c, args.transformed, p, net);
        }
        store_unit<Vector>(args.grad_u.data + element_offset(args.grad_u, n, j, p), grad);
      }
#pragma unroll
      for (int k = 0; k < unit; ++k) value.v[k] = math::gathered(math::centred(value.v[k], center), scale, T(0));
      store_unit<Vector>(args.x.data + element_offset(args.x, n, i, p), value);
    });
  }
}

// Of what a backward reads of the net's output and writes of its gradient; true where no channel is transformed.
template <class T, class Args>
bool has_vector_nets(const Args& args, int64_t positions) {
  return args.transformed == 0 ||
         (has_vector_net<T>(args.net_out, positions) && has_vector_net<T>(args.grad_net_out, positions));
}

}  // namespace

// - Grid: channels (32 where they are neighbours in memory) by shares of two units to 64 terms for each thread, at most
//   max_blocks blocks, which then loop.
// - Occupancy: up to 80 registers (float), so 3 blocks of 256 threads on a multiprocessor; a thread has up to five
//   16-byte loads in flight, 60 KB in all, more than bandwidth times latency (about 30 KB). Double: 2.
// - Bound: memory, 3 values moved for a kept element and 7 for a transformed one. The second stage reads two doubles
//   for each channel and share.
template <class T>
int gather_backward(const GatherBackwardArgs<T>& args, const Queue& queue) {
  const int64_t samples = args.samples, channels = args.channels, positions = args.positions;
  if (channels == 0) return cudaSuccess;
  const bool adjacent = channels_adjacent(args.grad_out.all, positions);
  const bool vector = !adjacent && has_vector_units(args.in, positions) &&
                      has_vector_columns(args.grad_out.all, positions) &&
                      has_vector_units(read_only(args.grad_in), positions) && has_vector_nets<T>(args, positions);
  const dim3 threads = share_threads(adjacent);
  const Shares shares = shares_of(samples, channels, positions, threads, vector ? width<T> : 1, true);
  double* const partials =
      static_cast<double*>(queue.scratch(2 * channels * shares.splits * static_cast<int64_t>(sizeof(double))));
  const BackwardPass<T> pass = {args, shares, partials, has_vector_columns(args.grad_out.added, positions)};
  const int64_t blocks = smaller(shares.groups * shares.splits, max_blocks);
  int error = vector ? launch(gather_backward_kernel<T, true>, blocks, threads, 0, queue.stream, pass)
                     : launch(gather_backward_kernel<T, false>, blocks, threads, 0, queue.stream, pass);
  if (error != cudaSuccess) return error;
  error = sample_sums<T>(partials, channels, shares.splits, 0.0, args.grad_scale, queue.stream);
  if (error != cudaSuccess) return error;
  return sample_sums<T>(partials + channels * shares.splits, channels, shares.splits, 0.0, args.grad_offset,
                        queue.stream);
}

// As above, but that nothing is summed: 4 values moved for a kept element and 8 for a transformed one, up to 64
// registers (float), so 4 blocks. Double: 2.
template <class T>
int step_gather_backward(const StepGatherBackwardArgs<T>& args, const Queue& queue) {
  const int64_t samples = args.samples, channels = args.channels, positions = args.positions;
  if (samples * positions == 0 || channels == 0) return cudaSuccess;
  const bool adjacent = channels_adjacent(args.y, positions);
  const auto vector_columns = [&](const auto&... x) { return (has_vector_columns(x, positions) && ...); };
  const bool vector = !adjacent && vector_columns(args.y, args.grad_y, read_only(args.grad_u), read_only(args.x)) &&
                      has_vector_nets<T>(args, positions);
  const dim3 threads = share_threads(adjacent);
  const StepPass<T> pass = {args, shares_of(samples, channels, positions, threads, vector ? width<T> : 1, false)};
  const int64_t blocks = smaller(pass.shares.groups * pass.shares.splits, max_blocks);
  return vector ? launch(step_gather_backward_kernel<T, true>, blocks, threads, 0, queue.stream, pass)
                : launch(step_gather_backward_kernel<T, false>, blocks, threads, 0, queue.stream, pass);
}

PYGLOW_CUDA_INSTANTIATE(gather_backward, GatherBackwardArgs)
PYGLOW_CUDA_INSTANTIATE(step_gather_backward, StepGatherBackwardArgs)

}  // namespace pyglow::cuda
