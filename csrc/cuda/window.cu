// CUDA schedules of what coupling nets take besides matrix products: what each position sees in a window, as a row, the
// transpose of that, and a relu's gradient with its sums. The products' tensors have channels as neighbours in memory,
// the flow state has positions: tiles go through shared memory, so that both are read and written along their rows.
#include "cuda/net_data.cuh"
#include "math/activation.h"
#include "math/window.h"

namespace pyglow::cuda {
namespace {

constexpr int tile_columns = 32, tile_positions = summed_positions;
constexpr int tile_stride = tile_positions + 1;  // odd: threads of a warp along either side have banks of their own

template <class T>
__device__ __forceinline__ T load_one(const void* data, NetType type, int64_t at) {
  auto one = fetch_net<T, false>(data, type, at);
  widen_net(type, one);
  return one.v[0];
}
template <class T>
__device__ __forceinline__ void store_one(void* data, NetType type, int64_t at, T value) {
  store_net<false>(data, type, at, Single<T>{{value}});
}

// The thread's place in its warp, along a row of one side or the other, and the warp's in its block.
__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % warp_threads; }
__device__ __forceinline__ int warp_of_block() { return static_cast<int>(threadIdx.x) / warp_threads; }
__device__ __forceinline__ int warps_of_block() { return static_cast<int>(blockDim.x) / warp_threads; }

// Calls f(index of the tile along positions, through all samples, and first column) for the tiles of a block.
template <class F>
__device__ __forceinline__ void for_each_tile(int64_t positions, int64_t columns, const F& f) {
  const int64_t across = divide_up(columns, tile_columns), tiles = divide_up(positions, tile_positions) * across;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) f(tile / across, tile % across * tile_columns);
}

// What a column of the patches is of.
struct Column {
  int channel;
  math::Place shift;
};

template <class T>
__global__ void __launch_bounds__(block_threads, 4) patches_kernel(const PatchesArgs<T> args) {
  PYGLOW_SHARED(T, tile, tile_columns * tile_stride);
  PYGLOW_SHARED(Column, table, tile_columns);
  const int64_t positions = args.extent.positions(), total = args.samples * positions;
  const int taps = static_cast<int>(args.window.taps()), channels = static_cast<int>(args.channels);
  const int lane = lane_of_warp(), warp = warp_of_block(), warps = warps_of_block();
  for_each_tile(total, args.rows.length, [&](int64_t index, int64_t first_column) {
    const int64_t first = index * tile_positions;
    for (int r = static_cast<int>(threadIdx.x); r < tile_columns; r += static_cast<int>(blockDim.x)) {
      const int column = static_cast<int>(first_column) + r;
      table[r] = {column / taps, math::shift_of(args.window, column % taps, args.mirrored)};
    }
    __syncthreads();
    for (int q = lane; q < tile_positions; q += warp_threads) {
      const int64_t n = (first + q) / positions;
      const math::Place place = math::place_of(args.extent, first + q - n * positions);
#pragma unroll 1
      for (int r = warp; r < tile_columns; r += warps) {
        const Column column = table[r];
        T value = T(0);
        if (column.channel < channels && first + q < total) {
          const int p = math::shifted(args.extent, place, column.shift);
          const int64_t at = n * args.x.sample + column.channel * args.x.channel + p * args.x.position;
          if (p >= 0) value = load_one<T>(args.x.data, args.x.type, at);
        }
        tile[r * tile_stride + q] = value;
      }
    }
    __syncthreads();
    const int64_t column = first_column + lane;
    for (int q = warp; q < tile_positions; q += warps)
      if (first + q < total && column < args.rows.length)
        store_one(args.rows.data, args.rows.type, (first + q) * args.rows.length + column,
                  tile[lane * tile_stride + q]);
    const int c = table[lane].channel;
    if (args.sums != nullptr && warp == 0 && c < channels && column == c * taps + taps / 2) {  // which sees x itself
      T sum = T(0);
      for (int q = 0; q < tile_positions; ++q) sum += tile[lane * tile_stride + q];
      args.sums[index * channels + c] = sum;
    }
    __syncthreads();  // the tile has been read
  });
}

template <class T>
__global__ void __launch_bounds__(block_threads, 4) tap_sums_kernel(const TapSumsArgs<T> args) {
  PYGLOW_SHARED(T, tile, tile_columns * tile_stride);
  const int64_t positions = args.extent.positions(), total = args.samples * positions, taps = args.window.taps();
  const WindowRows<const void>& rows = args.rows;
  const int lane = lane_of_warp(), warp = warp_of_block(), warps = warps_of_block();
  for_each_tile(total, args.channels, [&](int64_t index, int64_t first_channel) {
    const int64_t first = index * tile_positions;
    const int channels = static_cast<int>(smaller<int64_t>(tile_columns, args.channels - first_channel));
#pragma unroll 1
    for (int i = threadIdx.x; i < channels * tile_positions; i += blockDim.x) {
      const int q = i / channels, r = i % channels;
      if (first + q >= total) break;
      const int64_t n = (first + q) / positions, c = first_channel + r;
      const math::Place place = math::place_of(args.extent, first + q - n * positions);
      T sum = args.bias == nullptr ? T(0) : load_one<T>(args.bias, rows.type, c);
      math::for_each_tap(args.window, args.mirrored, [&](int tap, const math::Place& shift) {
        const int p = math::shifted(args.extent, place, shift);
        if (p >= 0) sum += load_one<T>(rows.data, rows.type, (n * positions + p) * rows.length + c * taps + tap);
      });
      tile[r * tile_stride + q] = sum;
    }
    __syncthreads();
    for (int q = lane; q < tile_positions; q += warp_threads) {
      if (first + q >= total) break;
      const int64_t n = (first + q) / positions, p = (first + q) % positions;
      for (int r = warp; r < channels; r += warps) {
        const int64_t at = n * args.y.sample + (first_channel + r) * args.y.channel + p * args.y.position;
        store_one(args.y.data, args.y.type, at, tile[r * tile_stride + q]);
      }
    }
    __syncthreads();  // the tile has been read
  });
}

// A block takes a share of the rows, `unit` columns for each thread of a warp; its warps take rows in turn.
template <class T, bool Vector>
__global__ void __launch_bounds__(block_threads, 4) relu_backward_kernel(const ReluBackwardArgs<T> args) {
  constexpr int unit = unit_width<T, Vector>;
  PYGLOW_SHARED(T, shares, block_threads * unit);
  const int lane = lane_of_warp(), warp = warp_of_block(), warps = warps_of_block();
  const int64_t groups = divide_up(args.columns, warp_threads * unit);
  for (int64_t task = blockIdx.x; task < args.shares * groups; task += gridDim.x) {
    const int64_t share = task / groups, column = (task % groups * warp_threads + lane) * unit;
    const int64_t end = smaller((share + 1) * args.per_share(), args.rows);
    Unit<T, Vector> sum = {};
    if (column < args.columns) {
      for (int64_t row = share * args.per_share() + warp; row < end; row += warps) {
        const int64_t at = row * args.columns + column;
        Unit<T, Vector> grad = fetch_net<T, Vector>(args.grad, args.type, at);
        Unit<T, Vector> h = fetch_net<T, Vector>(args.h, args.type, at);
        widen_net(args.type, grad, h);
#pragma unroll
        for (int i = 0; i < unit; ++i) {
          grad.v[i] = math::leaky_relu_backward<false>(grad.v[i], h.v[i], T(0));
          sum.v[i] += grad.v[i];
        }
        store_net<Vector>(args.grad, args.type, at, grad);
      }
    }
#pragma unroll
    for (int i = 0; i < unit; ++i) shares[(warp * unit + i) * warp_threads + lane] = sum.v[i];
    __syncthreads();
    if (warp == 0 && column < args.columns) {
      Unit<T, Vector> total = {};
#pragma unroll 1
      for (int k = 0; k < warps; ++k) {
#pragma unroll
        for (int i = 0; i < unit; ++i) total.v[i] += shares[(k * unit + i) * warp_threads + lane];
      }
      store_unit<Vector>(args.sums + share * args.columns + column, total);
    }
    __syncthreads();  // the shares have been read
  }
}

int64_t tiles_of(int64_t positions, int64_t columns) {
  return smaller(divide_up(positions, tile_positions) * divide_up(columns, tile_columns), max_blocks);
}

}  // namespace

// Patches and sums of taps:
// - Grid: tiles of 64 positions by 32 columns, or channels, at most max_blocks blocks, which then loop.
// - Occupancy: up to 64 registers, so 4 blocks of 256 threads; 8 KB of shared memory (double: 16).
// - Bound: the caches, as each value of the narrow side is read once for each tap; memory moves the rows once. A sector
//   of rows that are summed belongs to taps of neighbouring positions: it is read once and waits in the L1.
// The relu's gradient:
// - Grid: shares of rows by 128 columns (strided path 32).
// - Occupancy: up to 64 registers, so 4 blocks; 4 KB of shared memory.
// - Bound: memory, two values read and one written.
template <class T>
int patches(const PatchesArgs<T>& args, const Queue& queue) {
  const int64_t positions = args.samples * args.extent.positions();
  if (positions * args.rows.length == 0) return cudaSuccess;
  const int64_t blocks = tiles_of(positions, args.rows.length);
  return launch(patches_kernel<T>, blocks, dim3(block_threads), 0, queue.stream, args);
}

template <class T>
int tap_sums(const TapSumsArgs<T>& args, const Queue& queue) {
  const int64_t positions = args.samples * args.extent.positions();
  if (positions * args.channels == 0) return cudaSuccess;
  const int64_t blocks = tiles_of(positions, args.channels);
  return launch(tap_sums_kernel<T>, blocks, dim3(block_threads), 0, queue.stream, args);
}

template <class T>
int relu_backward(const ReluBackwardArgs<T>& args, const Queue& queue) {
  if (args.rows * args.columns == 0) return cudaSuccess;
  const bool vector =
      args.columns % width<T> == 0 && aligned_net<T>(args.grad, args.type) && aligned_net<T>(args.h, args.type);
  const int64_t groups = divide_up(args.columns, warp_threads * (vector ? width<T> : 1));
  const int64_t blocks = smaller(args.shares * groups, max_blocks);
  return vector ? launch(relu_backward_kernel<T, true>, blocks, dim3(block_threads), 0, queue.stream, args)
                : launch(relu_backward_kernel<T, false>, blocks, dim3(block_threads), 0, queue.stream, args);
}

PYGLOW_CUDA_INSTANTIATE(patches, PatchesArgs)
PYGLOW_CUDA_INSTANTIATE(tap_sums, TapSumsArgs)
PYGLOW_CUDA_INSTANTIATE(relu_backward, ReluBackwardArgs)

}  // namespace pyglow::cuda
