// The product of a C x C matrix with every position, between a source that computes what enters it while staging and a
// sink that computes on with what comes out of it while that is in registers.
//
// A sink has
//   tensors, computes, steps()
//                        as a source has
//   store<Vector>(sum, out, channels, columns, begin, positions)
//                        sum[k][i]: the thread's output channel out + k at its position i of the tile at `begin`
#pragma once
#include "cuda/log_det.cuh"
#include "cuda/tile_sources.cuh"

namespace pyglow::cuda {

// Output channels of a thread. Eight share each load from shared memory among 32 multiply-adds; two make four times as
// many threads of a product too small to occupy the GPU, for half as many multiply-adds to a load.
constexpr int wide_rows = 8, narrow_rows = 2;
constexpr int fused_group = 8 * smaller(block_threads / 16, 16);  // output channels of a block, at most
constexpr int fused_min_columns = 4;                              // 16-byte columns of a tile, at least
template <class T>
constexpr int fused_chunk = sizeof(T) == sizeof(float) ? 32 : 16;  // input channels in shared memory at a time
constexpr int64_t fused_shared_bytes = (48 << 10) - 1024;          // leaves room for static shared memory

// How the product is cut: ranges of tiles of positions by `groups` of output channels; blocks are x by y threads, each
// with `rows` output channels.
struct FusedCut {
  int x, y, rows, groups, chunk;
  Ranges ranges;
};

template <class T, class Source, class Sink>
struct FusedProduct {
  Source source;
  Sink sink;
  const T* matrix;      // M[o, i] is matrix[o * row + i * column]
  int64_t row, column;  //
  const T* offset;      // (C,) or null
  int64_t channels;
  LogDet<T> log_det;  // of sources that give one
  FusedCut cut;
};

// Strides in shared memory: rows, or threads that fill a column, begin in different banks; rows stay aligned.
template <class T>
PYGLOW_HD constexpr int padded(int columns) {
  return columns + width<T>;
}

// weights[k * padded(group) + o] = M[out + o, in + k], zero outside M: copies under way, not waited for, so that a
// source stages meanwhile. Each row of threads brings its own output channels, of 8 input channels at a time.
template <int Rows, class T>
__device__ __forceinline__ void stage_weights(T* weights, const T* matrix, int64_t row, int64_t column,
                                              int64_t channels, int64_t out, int64_t in, int inputs) {
  const int stride = padded<T>(blockDim.y * Rows), count = Rows * static_cast<int>(round_up(inputs, 8));
  for (int e = threadIdx.x; e < count; e += blockDim.x) {
    const int k = e / (8 * Rows) * 8 + e % 8, o = threadIdx.y * Rows + e / 8 % Rows;
    if (k >= inputs) continue;
    if (out + o < channels)
      copy_async(weights + k * stride + o, matrix + (out + o) * row + (in + k) * column);
    else
      weights[k * stride + o] = T(0);
  }
}

// Weights that a thread loads at once.
template <class T, int Count>
struct alignas(Count * sizeof(T)) Weights {
  T v[Count];
};

// sum[o][i] += weights[k, o] x[k, i] over the staged channels k.
template <bool Vector, int Rows, class T>
__device__ __forceinline__ void multiply(T (&sum)[Rows][width<T>], const T* inputs, int stride, const T* weights,
                                         int weight_stride, int count) {
  constexpr int at_once = smaller(Rows, width<T>);
  using Loaded = Weights<T, at_once>;
#pragma unroll 2
  for (int k = 0; k < count; ++k) {
    Vec<T> x;
    if constexpr (Vector) {
      x = load_vector(inputs + k * stride + threadIdx.x * width<T>);
    } else {
#pragma unroll
      for (int i = 0; i < width<T>; ++i) x.v[i] = inputs[k * stride + threadIdx.x + i * blockDim.x];
    }
    const T* const row = weights + k * weight_stride + threadIdx.y * Rows;
#pragma unroll
    for (int o = 0; o < Rows; o += at_once) {
      const Loaded weight = *static_cast<const Loaded*>(__builtin_assume_aligned(row + o, sizeof(Loaded)));
#pragma unroll
      for (int l = 0; l < at_once; ++l)
#pragma unroll
        for (int i = 0; i < width<T>; ++i) sum[o + l][i] = math::mix_term(sum[o + l][i], weight.v[l], x.v[i]);
    }
  }
}

// A thread keeps Rows output channels by `width` positions in registers. Each chunk has sums of its own, so that
// rounding errors do not pile up over all of C; chunks are the same however the output channels are cut, and so are the
// bits. Only blocks of the first group have the source store and sum what it gives beside its tile. In double, what
// computes takes more registers than two blocks would leave.
template <class T, class Source, class Sink, int Rows, bool Vector>
__global__ void __launch_bounds__(block_threads,
                                  sizeof(T) == sizeof(float) || !(Source::computes || Sink::computes) ? 2 : 1)
    fused_kernel(const FusedProduct<T, Source, Sink> p) {
  const int columns = blockDim.x * width<T>, stride = padded<T>(columns);
  const int group = blockDim.y * Rows, chunk = p.cut.chunk, groups = p.cut.groups;
  const int64_t channels = p.channels;
  DynamicShared shared;
  T* const weights = shared.take<T>(chunk * padded<T>(group));
  T* const inputs = shared.take<T>(chunk * stride);
  const int log_stride = padded<T>(Vector ? blockDim.x : columns),
            sharers = column_sharers<Vector>(p.source.channels_adjacent);
  T* const logs = shared.take<T>(Source::sums ? sharers * log_stride : 0);
  int64_t* const source_table = shared.take<int64_t>(Vector ? 0 : Source::tensors * columns);
  int64_t* const sink_table = shared.take<int64_t>(Vector ? 0 : Sink::tensors * columns);
  // A matrix that fits is read once for all tiles of a block.
  const bool resident = groups == 1 && chunk >= channels;
  const int64_t range = blockIdx.x / groups, first_out = (blockIdx.x - range * groups) * group;
  const int64_t out = first_out + threadIdx.y * Rows;
  const Ranges& ranges = p.cut.ranges;
  const int64_t first_tile = range * ranges.per_range;

  for (int64_t tile = first_tile; tile < smaller(ranges.tiles, first_tile + ranges.per_range); ++tile) {
    const int64_t begin = tile * columns;
    if constexpr (!Vector) __syncthreads();  // the offsets of the previous tile have been used
    const auto source_columns =
        columns_of<Vector, T>(p.source.steps(), begin, ranges.samples, ranges.positions, source_table);
    Columns<Sink::tensors> sink_columns = {};
    if constexpr (!Vector)
      sink_columns = columns_of<Vector, T>(p.sink.steps(), begin, ranges.samples, ranges.positions, sink_table);
    T total[Rows][width<T>];
#pragma unroll
    for (int k = 0; k < Rows; ++k) {
      // Added to the sum of a chunk, not in front of its terms, each of which a large one would round to its own size.
      const T start = p.offset != nullptr && out + k < channels ? p.offset[out + k] : T(0);
#pragma unroll
      for (int i = 0; i < width<T>; ++i) total[k][i] = start;
    }
    for (int64_t in = 0; in < channels; in += chunk) {
      const int count = static_cast<int>(smaller<int64_t>(chunk, channels - in));
      __syncthreads();  // the previous chunk has been used, the offsets are there
      if (!resident || tile == first_tile)
        stage_weights<Rows>(weights, p.matrix, p.row, p.column, channels, first_out, in, count);
      const Aside<T> aside = {first_out == 0, begin, ranges.positions, logs, log_stride};
      p.source.template stage<Vector>(inputs, stride, count, in, channels, source_columns, aside);
      wait_for_copies();
      __syncthreads();
      T sum[Rows][width<T>] = {};
      multiply<Vector>(sum, inputs, stride, weights, padded<T>(group), count);
#pragma unroll
      for (int k = 0; k < Rows; ++k)
#pragma unroll
        for (int i = 0; i < width<T>; ++i) total[k][i] += sum[k][i];
    }
    if constexpr (Source::sums) {
      if (first_out == 0) sum_log_det(p.log_det, ranges, range, tile, logs, sharers, log_stride, Vector ? width<T> : 1);
    }
    if constexpr (Vector)  // not before: they would stand in registers all the while
      sink_columns = columns_of<Vector, T>(p.sink.steps(), begin, ranges.samples, ranges.positions, sink_table);
    p.sink.template store<Vector>(total, out, channels, sink_columns, begin, ranges.positions);
  }
}

// Stores the product; `Tensor` is Strided<T>, or Squeezed<T> if it may be unsqueezed on the way.
template <class T, class Tensor>
struct PlainSink {
  static constexpr int tensors = 1;
  static constexpr bool computes = false;
  Tensor u;
  bool vector_channels;  // the strided path may store `width` channels at once

  __device__ Steps<1> steps() const { return steps_of(u); }
  template <bool Vector, int Rows>
  __device__ __forceinline__ void store(const T (&sum)[Rows][width<T>], int64_t out, int64_t channels,
                                        const Columns<1>& columns, int64_t, int64_t) const {
    if constexpr (Vector) {
      if (columns.own[0] != outside) store_columns(sum, out, channels, u.data + columns.own[0]);
    } else {
#pragma unroll
      for (int i = 0; i < width<T>; ++i) {
        const int64_t at = columns.table[threadIdx.x + i * blockDim.x];
        if (at == outside) continue;
        T* const target = u.data + at;
        if constexpr (Rows % width<T> == 0) {
          if (vector_channels) {
#pragma unroll
            for (int k = 0; k < Rows; k += width<T>) {
              if (out + k >= channels) break;
              Vec<T> unit;
#pragma unroll
              for (int l = 0; l < width<T>; ++l) unit.v[l] = sum[k + l][i];
              store_vector(target + out + k, unit);
            }
            continue;
          }
        }
#pragma unroll
        for (int k = 0; k < Rows; ++k)
          if (out + k < channels) target[channel_offset(u, out + k)] = sum[k][i];
      }
    }
  }

  // Whole vectors of positions; of two channels side by side if u is unsqueezed, where the neighbours in memory are the
  // two channels of a position in turn.
  template <int Rows>
  __device__ __forceinline__ void store_columns(const T (&sum)[Rows][width<T>], int64_t out, int64_t channels,
                                                T* target) const {
    if constexpr (std::is_same_v<Tensor, Squeezed<T>>) {
      if (u.width > 0) {
#pragma unroll
        for (int k = 0; k < Rows; k += 2) {
          if (out + k >= channels) break;
          T* const pair = target + channel_offset(u, out + k);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            Vec<T> unit;
#pragma unroll
            for (int i = 0; i < width<T>; ++i) unit.v[i] = sum[k + i % 2][(half * width<T> + i) / 2];
            store_vector(pair + half * width<T>, unit);
          }
        }
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < Rows; ++k) {
      Vec<T> unit;
#pragma unroll
      for (int i = 0; i < width<T>; ++i) unit.v[i] = sum[k][i];
      if (out + k < channels) store_vector(target + (out + k) * u.channel, unit);
    }
  }
};

template <class T>
PlainSink<T, Squeezed<T>> plain_sink(const Squeezed<T>& u, int64_t channels) {
  return {u, u.width == 0 && has_vector_channels(read_only(u), channels)};
}
template <class T>
PlainSink<T, Strided<T>> plain_sink(const Strided<T>& u, int64_t channels) {
  return {u, has_vector_channels(read_only(u), channels)};
}

template <class T, class Source, class Sink>
int64_t fused_bytes(const FusedCut& cut, bool vector) {
  const int64_t columns = cut.x * width<T>, sharers = vector ? cut.y : larger(cut.y, 8);
  const int64_t logs = Source::sums ? sharers * padded<T>(static_cast<int>(vector ? cut.x : columns)) : 0;
  const int64_t elements = cut.chunk * (padded<T>(cut.y * cut.rows) + padded<T>(static_cast<int>(columns))) + logs;
  const int64_t table = vector ? 0 : (Source::tensors + Sink::tensors) * columns;
  return elements * static_cast<int64_t>(sizeof(T)) + table * static_cast<int64_t>(sizeof(int64_t));
}

inline int64_t blocks_of(const FusedCut& cut, int64_t samples, int64_t positions, int column) {
  return divide_up(samples * positions, cut.x * column) * cut.groups;
}

// Wide tiles for few channels keep blocks at 64 to 256 threads, in whole warps; tiles shrink until they fit into shared
// memory, and while there are fewer blocks than a large GPU runs at once.
template <class T, class Source, class Sink>
FusedCut wide_cut(int64_t samples, int64_t channels, int64_t positions, bool vector) {
  const int64_t thread_groups = divide_up(channels, wide_rows);
  FusedCut cut = {};
  cut.rows = wide_rows;
  cut.y = static_cast<int>(divide_up(thread_groups, divide_up(thread_groups, fused_group / wide_rows)));
  if (32 * cut.y > block_threads) cut.y = static_cast<int>(round_up(cut.y, 2));
  cut.groups = static_cast<int>(divide_up(thread_groups, cut.y));
  cut.chunk = static_cast<int>(smaller<int64_t>(fused_chunk<T>, channels));
  cut.x = smaller(64, block_threads);
  while (cut.x > 16 && cut.x / 2 * cut.y % warp_threads == 0 &&
         (cut.x * cut.y > block_threads || fused_bytes<T, Source, Sink>(cut, vector) > fused_shared_bytes ||
          (cut.x * cut.y > 64 && blocks_of(cut, samples, positions, width<T>) < 2 * multiprocessors)))
    cut.x /= 2;
  return cut;
}

// The wide cut, or one with narrow tiles and threads of few output channels, in blocks of 64 to 256, if it gives more
// blocks: the fewest groups of output channels that give each multiprocessor a block, and the widest tile with these;
// else what gives the most blocks. A group more stages, and so couples, the whole tile once more, from the L2, but
// every block multiplies less and brings fewer weights. At (16, 96, 8, 8), 192 blocks bring 18 KB each and 27 KB to a
// multiprocessor, where 16 brought 61 KB each, and a warp has 96 times 8 multiply-adds, not 32. It ends at 64 threads:
// what a thread waits for is the rows of a tile that it stages, in batches of four, and they become more as threads
// become fewer.
template <class T, class Source, class Sink>
FusedCut narrow_cut(const FusedCut& wide, int64_t samples, int64_t channels, int64_t positions, bool vector) {
  const int64_t thread_groups = divide_up(channels, narrow_rows);
  FusedCut best = wide;
  int64_t most = blocks_of(wide, samples, positions, width<T>);
  for (int64_t groups = divide_up(channels, fused_group); groups <= thread_groups; ++groups) {
    for (int x = smaller(64, block_threads); x >= fused_min_columns; x /= 2) {
      const int y = static_cast<int>(round_up(divide_up(thread_groups, groups), larger(1, warp_threads / x)));
      const bool half_empty = x > fused_min_columns && x / 2 * width<T> >= samples * positions;
      if (half_empty || x * y > block_threads || x * y < smaller(64, block_threads)) continue;
      const FusedCut cut = {x, y, narrow_rows, static_cast<int>(divide_up(thread_groups, y)), wide.chunk, {}};
      const int64_t blocks = blocks_of(cut, samples, positions, width<T>);
      if (blocks <= most || fused_bytes<T, Source, Sink>(cut, vector) > fused_shared_bytes) continue;
      best = cut;
      most = blocks;
      if (most >= multiprocessors) return best;
    }
  }
  return best;
}

// With more blocks than half of the multiprocessors the wide cut stays: if each block were cut in two, some
// multiprocessor would get two of the halves, and would finish no earlier.
template <class T, class Source, class Sink>
FusedCut fused_cut(int64_t samples, int64_t channels, int64_t positions, bool vector) {
  FusedCut cut = wide_cut<T, Source, Sink>(samples, channels, positions, vector);
  if (blocks_of(cut, samples, positions, width<T>) <= multiprocessors / 2)
    cut = narrow_cut<T, Source, Sink>(cut, samples, channels, positions, vector);
  cut.ranges = ranges_of(samples, positions, cut.x * width<T>, max_blocks / cut.groups);
  return cut;
}

// The most ranges of any cut: what LogDet has room for.
template <class T>
int64_t most_ranges(int64_t samples, int64_t positions) {
  return smaller(divide_up(samples * positions, fused_min_columns * width<T>), max_blocks);
}

template <int Rows, class T, class Source, class Sink>
int launch_product(const FusedProduct<T, Source, Sink>& product, bool vector, void* stream) {
  const FusedCut& cut = product.cut;
  const int64_t blocks = cut.ranges.ranges * cut.groups, bytes = fused_bytes<T, Source, Sink>(cut, vector);
  const dim3 threads(cut.x, cut.y);
  return vector ? launch(fused_kernel<T, Source, Sink, Rows, true>, blocks, threads, bytes, stream, product)
                : launch(fused_kernel<T, Source, Sink, Rows, false>, blocks, threads, bytes, stream, product);
}

// No positions and no channels: nothing to do. LogDet: of a source that sums.
template <class T, class Source, class Sink>
int fused_product(const Source& source, const Sink& sink, const T* matrix, int64_t row, int64_t column, const T* offset,
                  int64_t samples, int64_t channels, int64_t positions, bool vector, const LogDet<T>& log_det,
                  void* stream) {
  const FusedCut cut = fused_cut<T, Source, Sink>(samples, channels, positions, vector);
  const FusedProduct<T, Source, Sink> product = {source, sink, matrix, row, column, offset, channels, log_det, cut};
  const int error = cut.rows == narrow_rows ? launch_product<narrow_rows>(product, vector, stream)
                                            : launch_product<wide_rows>(product, vector, stream);
  if (error != cudaSuccess || !Source::sums) return error;
  return finish_log_det(log_det, cut.ranges, stream);
}

}  // namespace pyglow::cuda
