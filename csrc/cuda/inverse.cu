// CUDA schedule of the inverses of matrices: a block exchanges one, in shared memory where that fits, else in scratch
// memory, which the second-level cache holds.
#include "core.h"
#include "cuda/device.cuh"
#include "math/channel_mix.h"
#include "math/elementary.h"
#include "math/exchange.h"

namespace pyglow::cuda {
namespace {

using math::exchange_panel;

constexpr int batch = 8;  // rows of which a thread has a value in registers: so many loads are on their way
constexpr int64_t max_table_bytes = 47 * 1024;  // of dynamic shared memory; a kilobyte is for the static arrays
enum class Place : int { shared, scratch };

// What a block keeps of one matrix: the sizes of the pivots and their rows, by step; the steps, by row.
PYGLOW_HD int64_t lists_bytes(int64_t size) { return size * static_cast<int64_t>(sizeof(double) + 2 * sizeof(int)); }
PYGLOW_HD int64_t table_bytes(int64_t size) { return size * size * static_cast<int64_t>(sizeof(double)); }

struct Table {
  double* data;    // [row][size]
  double* pivots;  // [step]
  int* row_of;     // [step]
  int* step_of;    // [row]: whose pivot it has; -1: none yet
  int size;
  __device__ __forceinline__ double* row(int i) const { return data + static_cast<int64_t>(i) * size; }
};

// By the first warp: the pivot of a step, and what its row becomes within the panel of `width` columns from `first` on.
__device__ __forceinline__ void find_pivot(const Table& table, int step, int first, int width, double* pivot_row) {
  const int lane = threadIdx.x % warp_threads;
  double best = -1;
  int pivot = 0;
  for (int i = lane; i < table.size; i += warp_threads) {
    const double size = table.step_of[i] < 0 ? math::pivot_size(table.row(i)[step]) : -1.0;
    if (size > best) {
      best = size;
      pivot = i;
    }
  }
#pragma unroll
  for (int offset = warp_threads / 2; offset > 0; offset /= 2) {
    const double size = __shfl_xor_sync(0xffffffffu, best, offset);
    const int row = __shfl_xor_sync(0xffffffffu, pivot, offset);
    if (size > best || (size == best && row < pivot)) {  // the first of equals, whatever the order
      best = size;
      pivot = row;
    }
  }
  if (lane == 0) {
    table.pivots[step] = best;
    table.row_of[step] = pivot;
  }
  if (lane < width) {
    const double reciprocal = 1 / table.row(pivot)[step];
    pivot_row[lane] =
        first + lane == step ? reciprocal : math::exchanged_pivot_row(table.row(pivot)[first + lane], reciprocal);
  }
}

// Exchanges the pivot of a step within its panel.
__device__ __forceinline__ void exchange(const Table& table, int step, int first, int width, const double* pivot_row) {
  const int pivot = table.row_of[step];
  for (int i = threadIdx.x; i < table.size; i += blockDim.x) {
    double* const own = table.row(i) + first;
    const double factor = own[step - first];
    double values[exchange_panel];
#pragma unroll
    for (int s = 0; s < exchange_panel; ++s) values[s] = s < width && first + s != step ? own[s] : 0.0;
    if (i == pivot) table.step_of[i] = step;
#pragma unroll
    for (int s = 0; s < exchange_panel; ++s)
      if (s < width) own[s] = i == pivot ? pivot_row[s] : math::mix_term(values[s], factor, pivot_row[s]);
  }
}

// The columns beside a panel whose steps are done: a lane has a column, a warp every so many rows.
__device__ __forceinline__ void exchange_others(const Table& table, int first, int width) {
  const int lane = threadIdx.x % warp_threads, warp = threadIdx.x / warp_threads, warps = blockDim.x / warp_threads;
  for (int begin = 0; begin < table.size; begin += warp_threads) {
    const int column = begin + lane;
    const bool is_other = column < table.size && (column < first || column >= first + width);
    double sources[exchange_panel] = {};  // of the pivots' rows as they were, negative
    if (is_other)
#pragma unroll
      for (int t = 0; t < exchange_panel; ++t)
        if (t < width) sources[t] = -table.row(table.row_of[first + t])[column];
    __syncthreads();  // all warps have the sources; the panel is there
    if (!is_other) continue;
    for (int i = warp; i < table.size; i += batch * warps) {
      double sums[batch];
#pragma unroll
      for (int b = 0; b < batch; ++b) {  // nothing of a pivot's row stays
        const int row = i + b * warps;
        sums[b] = row < table.size && table.step_of[row] < first ? table.row(row)[column] : 0.0;
      }
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        const int row = i + b * warps;
        if (row >= table.size) break;
#pragma unroll
        for (int t = 0; t < exchange_panel; ++t)
          if (t < width) sums[b] = math::mix_term(sums[b], table.row(row)[first + t], sources[t]);
      }
#pragma unroll
      for (int b = 0; b < batch; ++b)
        if (i + b * warps < table.size) table.row(i + b * warps)[column] = sums[b];
    }
  }
}

template <class T, Place Where>
__global__ void __launch_bounds__(block_threads) invert_kernel(const InvertMatricesArgs<T> args, double* scratch) {
  DynamicShared shared;
  PYGLOW_SHARED(double, pivot_row, exchange_panel);
  const int n = static_cast<int>(args.channels);
  const int lane = threadIdx.x % warp_threads, warp = threadIdx.x / warp_threads, warps = blockDim.x / warp_threads;
  const int64_t values = args.channels * args.channels;
  Table table;
  table.size = n;
  table.pivots = shared.take<double>(n);
  table.row_of = shared.take<int>(n);
  table.step_of = shared.take<int>(n);
  table.data = Where == Place::shared ? shared.take<double>(n * n) : scratch + blockIdx.x * values;
  for (int64_t k = blockIdx.x; k < args.count; k += gridDim.x) {
    const T* const matrix = args.matrices + k * values;
    T* const inverse = args.inverses + k * values;
    __syncthreads();  // the previous matrix has been written out
    for (int i = threadIdx.x; i < n; i += blockDim.x) table.step_of[i] = -1;
    for (int64_t e = threadIdx.x; e < values; e += blockDim.x) table.data[e] = static_cast<double>(matrix[e]);
    double last = 1;  // the size of the last pivot
    for (int first = 0; first < n && math::is_pivot(last); first += exchange_panel) {
      const int width = smaller(exchange_panel, n - first);
      for (int step = first; step < first + width && math::is_pivot(last); ++step) {
        __syncthreads();  // the step before is done
        if (warp == 0) find_pivot(table, step, first, width, &pivot_row[0]);
        __syncthreads();
        last = table.pivots[step];
        if (math::is_pivot(last)) exchange(table, step, first, width, &pivot_row[0]);
      }
      if (math::is_pivot(last)) exchange_others(table, first, width);
    }
    __syncthreads();
    const bool regular = math::is_pivot(last);
    for (int i = warp; i < n; i += warps)
      for (int j = lane; j < n; j += warp_threads)
        inverse[static_cast<int64_t>(i) * n + j] =
            static_cast<T>(regular ? table.row(table.row_of[i])[table.step_of[j]] : static_cast<double>(NAN));
    double sum = 0;
    for (int step = threadIdx.x; regular && step < n; step += blockDim.x) sum += math::log(table.pivots[step]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) args.log_dets[k] = static_cast<T>(regular ? sum : math::log_det_without(last));
  }
}

}  // namespace

// - Grid: a block for each matrix, or as many as 16 MB of scratch memory have room for where that is used; of 4 threads
//   for each channel, 32 to 256.
// - Shared memory: up to C = 76 the matrix in double and three lists, 47 KB; beyond that the lists alone, to C = 3000.
// - Bound: the latency of C steps one after the other, each a search, a division and two barriers: 350 instructions or
//   so on sm_90, predicted as 800 cycles. Then C^3 multiply-adds in double, and C / 8 loads and stores of each value.
//   At C = 48 the steps count, predicted as 22 us; at C = 384 what the second-level cache gives one multiprocessor, 113
//   MB for a matrix, predicted as 2 to 3 ms.
template <class T>
int invert_matrices(const InvertMatricesArgs<T>& args, const Queue& queue) {
  if (args.count == 0) return cudaSuccess;
  const int64_t lists = lists_bytes(args.channels), table = table_bytes(args.channels);
  const dim3 threads(static_cast<unsigned>(
      larger<int64_t>(warp_threads, smaller<int64_t>(block_threads, round_up(4 * args.channels, warp_threads)))));
  const int64_t blocks = smaller(args.count, max_blocks);
  if (lists + table <= max_table_bytes) {
    double* const none = nullptr;
    return launch(invert_kernel<T, Place::shared>, blocks, threads, lists + table, queue.stream, args, none);
  }
  const int64_t in_scratch = smaller(blocks, larger<int64_t>(1, max_scratch_bytes / table));
  double* const scratch = static_cast<double*>(queue.scratch(in_scratch * table));
  return launch(invert_kernel<T, Place::scratch>, in_scratch, threads, lists, queue.stream, args, scratch);
}

PYGLOW_CUDA_INSTANTIATE(invert_matrices, InvertMatricesArgs)

}  // namespace pyglow::cuda
