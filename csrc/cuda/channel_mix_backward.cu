// CUDA schedule of the channel mixing's gradients: grad_x is a product like the forward one, grad_M and grad_c are sums
// over all positions, formed in two stages without atomics so that two runs give the same bits.
#include "core.h"
#include "cuda/mix_product.cuh"
#include "cuda/tile.cuh"

namespace pyglow::cuda {
namespace {

constexpr int micro = 4;                                 // a thread's share: micro outputs by micro inputs
constexpr int max_side = block_threads >= 256 ? 16 : 8;  // such shares along a side of a block's part of grad_M
constexpr int reduce_columns = 32;
constexpr int reduce_rows = larger(block_threads / reduce_columns, 1);
constexpr int64_t wanted_blocks = smaller<int64_t>(4 * 132, max_blocks);

// How the sums are cut. grad_M falls into parts * parts square parts of side * micro channels; positions fall into
// tiles, tile t belonging to split t % splits. A block sums one part over one split, its threads being groups that
// share each tile's columns.
struct Split {
  int side, parts, groups, threads, columns;
  int64_t tiles, splits;
};

template <class T>
Split split_of(int64_t samples, int64_t channels, int64_t positions) {
  Split split = {};
  const int64_t total = samples * positions;
  if (channels == 0) return split;
  const int64_t sides = divide_up(channels, micro);
  split.parts = static_cast<int>(divide_up(sides, max_side));
  split.side = static_cast<int>(divide_up(sides, split.parts));
  const int share = split.side * split.side;
  split.groups = block_threads / share;
  // 16-byte columns of a tile: 2 * micro * side rows of them take about 32 KB of shared memory.
  split.columns = split.side > 8 ? 16 : split.side > 4 ? 32 : 64;
  split.threads = static_cast<int>(round_up(share * split.groups, larger(split.columns, warp_threads)));
  split.tiles = divide_up(total, split.columns * width<T>);
  const int64_t fitting = max_scratch_bytes / static_cast<int64_t>(sizeof(double)) / ((channels + 1) * channels);
  const int64_t wanted = divide_up(wanted_blocks, static_cast<int64_t>(split.parts) * split.parts);
  split.splits = smaller(split.tiles, larger<int64_t>(1, smaller(fitting, wanted)));
  return split;
}

template <class T>
struct Sums {
  TileSource<const T> x, grad_u;
  const T* center;
  T *grad_matrix, *grad_offset;  // written directly if there is one split
  double* partials;              // [split][C * C + C]
  int64_t samples, channels, positions;
  Split split;
};

// Where the sum of outputs o and inputs i goes, or of output o if i is C.
template <class T>
__device__ __forceinline__ void put(const Sums<T>& s, int64_t split, int64_t o, int64_t i, double sum) {
  const int64_t channels = s.channels, at = i == channels ? channels * channels + o : o * channels + i;
  if (s.split.splits > 1) {
    s.partials[split * (channels + 1) * channels + at] = sum;
  } else if (i == channels) {
    s.grad_offset[o] = static_cast<T>(sum);
  } else {
    s.grad_matrix[at] = static_cast<T>(sum);
  }
}

// A thread adds up micro by micro products over its group's columns, 16 bytes of positions at a time: 2 * micro shared
// loads for micro * micro * width multiply-adds. Sums are kept in T per tile and per split, then in double.
template <class T, bool Vector>
__global__ void __launch_bounds__(block_threads, 2) sums_kernel(const Sums<T> s) {
  const int side = s.split.side, share = side * side, rows = side * micro;
  const int columns = s.split.columns,
            stride = columns * width<T> + width<T>;  // + width: rows begin in different banks
  const int threads = blockDim.x * blockDim.y, thread = thread_index();
  const int group = thread / share, in_group = thread - group * share;
  const int b = in_group / side, a = in_group - b * side;  // outputs b + k side, inputs a + k side
  const bool summing = group < s.split.groups;
  PYGLOW_DYNAMIC_SHARED(T, x_tile);
  T* const u_tile = x_tile + rows * stride;
  int64_t* const x_offsets = reinterpret_cast<int64_t*>(u_tile + rows * stride);
  int64_t* const u_offsets = x_offsets + columns * width<T>;

  const int64_t parts = s.split.parts, split = blockIdx.x / (parts * parts);
  const int part = static_cast<int>(blockIdx.x - split * parts * parts);
  const int64_t first_out = part / parts * rows, first_in = part % parts * rows;
  // grad_c: `lanes` threads to a row of grad_u.
  const int lanes = threads / rows, offset_row = thread / lanes, lane = thread - offset_row * lanes;
  const bool offsets_too = first_in == 0 && offset_row < rows;
  T sum[micro][micro] = {}, offset_sum = T(0);

  for (int64_t tile = split; tile < s.split.tiles; tile += s.split.splits) {
    const int64_t begin = tile * columns * width<T>, own = begin + threadIdx.x * width<T>;
    int64_t x_own = outside, u_own = outside;
    if constexpr (Vector) {
      x_own = offset_of(s.x.tensor, own, s.samples, s.positions);
      u_own = offset_of(s.grad_u.tensor, own, s.samples, s.positions);
    } else {
      fill_offsets(x_offsets, columns * width<T>, s.x.tensor, begin, s.samples, s.positions);
      fill_offsets(u_offsets, columns * width<T>, s.grad_u.tensor, begin, s.samples, s.positions);
    }
    __syncthreads();  // the previous tile has been used, the offsets are there
    const T* const none = nullptr;
    stage<Vector>(x_tile, stride, rows, columns * width<T>, s.x, first_in, s.channels, s.center, x_own, x_offsets);
    stage<Vector>(u_tile, stride, rows, columns * width<T>, s.grad_u, first_out, s.channels, none, u_own, u_offsets);
    __syncthreads();
    if (summing) {
      T tile_sum[micro][micro] = {};
      for (int column = group; column < columns; column += s.split.groups) {
        Vec<T> x[micro];
#pragma unroll
        for (int k = 0; k < micro; ++k) x[k] = load_vector(x_tile + (a + k * side) * stride + column * width<T>);
#pragma unroll
        for (int k = 0; k < micro; ++k) {
          const Vec<T> u = load_vector(u_tile + (b + k * side) * stride + column * width<T>);
#pragma unroll
          for (int l = 0; l < micro; ++l)
#pragma unroll
            for (int i = 0; i < width<T>; ++i) tile_sum[k][l] = math::mix_term(tile_sum[k][l], u.v[i], x[l].v[i]);
        }
      }
#pragma unroll
      for (int k = 0; k < micro; ++k)
#pragma unroll
        for (int l = 0; l < micro; ++l) sum[k][l] += tile_sum[k][l];
    }
    if (offsets_too) {
      T tile_sum = T(0);
      for (int column = lane; column < columns; column += lanes) {
        const Vec<T> u = load_vector(u_tile + offset_row * stride + column * width<T>);
#pragma unroll
        for (int i = 0; i < width<T>; ++i) tile_sum += u.v[i];
      }
      offset_sum += tile_sum;
    }
  }

  // The sums of the groups, [group][k, l][in_group], in the memory of the tiles.
  T* const group_sums = x_tile;
  __syncthreads();
  if (summing) {
#pragma unroll
    for (int k = 0; k < micro; ++k)
#pragma unroll
      for (int l = 0; l < micro; ++l)
        group_sums[(group * micro * micro + k * micro + l) * share + in_group] = sum[k][l];
  }
  __syncthreads();
  for (int e = thread; e < micro * micro * share; e += threads) {
    const int kl = e / share, cell = e - kl * share;
    const int64_t o = first_out + cell / side + kl / micro * side, i = first_in + cell % side + kl % micro * side;
    double total = 0;
    for (int g = 0; g < s.split.groups; ++g) total += group_sums[(g * micro * micro + kl) * share + cell];
    if (o < s.channels && i < s.channels) put(s, split, o, i, total);
  }
  if (first_in != 0) return;
  __syncthreads();
  if (offsets_too) group_sums[thread] = offset_sum;
  __syncthreads();
  if (thread < rows && first_out + thread < s.channels) {
    double total = 0;
    for (int l = 0; l < lanes; ++l) total += group_sums[thread * lanes + l];
    put(s, split, first_out + thread, s.channels, total);
  }
}

// The second stage: sums of the partials over the splits, 32 of them by `reduce_rows` shares of the splits in a block.
template <class T>
__global__ void __launch_bounds__(block_threads) reduce_kernel(const Sums<T> s) {
  PYGLOW_SHARED(double, shares, reduce_columns* reduce_rows);
  const int64_t size = (s.channels + 1) * s.channels;
  for (int64_t first = blockIdx.x * int64_t{reduce_columns}; first < size;
       first += gridDim.x * int64_t{reduce_columns}) {
    const int64_t at = first + threadIdx.x;
    double sum = 0;
    if (at < size) {
#pragma unroll 8
      for (int64_t split = threadIdx.y; split < s.split.splits; split += reduce_rows)
        sum += s.partials[split * size + at];
    }
    __syncthreads();  // the shares of the previous sums have been read
    shares[thread_index()] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && at < size) {
      double total = 0;
      for (int row = 0; row < reduce_rows; ++row) total += shares[row * reduce_columns + threadIdx.x];
      if (at < s.channels * s.channels) {
        s.grad_matrix[at] = static_cast<T>(total);
      } else {
        s.grad_offset[at - s.channels * s.channels] = static_cast<T>(total);
      }
    }
  }
}

template <class T>
int64_t shared_bytes(const Split& split, bool vector) {
  const int64_t tiles = 2 * split.side * micro * (split.columns + 1) * width<T> * static_cast<int64_t>(sizeof(T));
  const int64_t offsets = vector ? 0 : 2 * split.columns * width<T> * static_cast<int64_t>(sizeof(int64_t));
  const int64_t groups = micro * micro * split.side * split.side * split.groups * static_cast<int64_t>(sizeof(T));
  return larger(tiles + offsets, groups);
}

}  // namespace

template <class T>
int64_t channel_mix_backward_scratch(int64_t samples, int64_t channels, int64_t positions) {
  const Split split = split_of<T>(samples, channels, positions);
  return split.splits > 1 ? split.splits * (channels + 1) * channels * static_cast<int64_t>(sizeof(double)) : 0;
}

// - Grid: splits of the positions by parts of grad_M of up to 64 by 64, parts fastest so that they find their tiles in
// L2;
//   about wanted_blocks in all, fewer where there are fewer tiles or the partial sums would pass 16 MB (C = 768: 3
//   splits of 144 parts). From C = 1024 on one split remains and writes the result itself.
// - Occupancy: up to 128 registers and 38 KB of shared memory, so 2 blocks of up to 256 threads on a multiprocessor; a
//   tile's loads are all in flight together, and one block's arithmetic hides the other's loads.
// - Bound: memory up to about C = 48 (2 C values read for C^2 multiply-adds), then the multiply-add units. The second
//   stage reads at most 16 MB.
template <class T>
int channel_mix_backward(const ChannelMixBackwardArgs<T>& args, void* scratch, void* stream) {
  const int64_t channels = args.channels;
  if (channels == 0) return cudaSuccess;
  const int error = mix_product<T>(
      {args.grad_u, args.matrix, 1, channels, nullptr, nullptr, args.grad_x, args.samples, channels, args.positions},
      stream);
  if (error != cudaSuccess) return error;
  const Split split = split_of<T>(args.samples, channels, args.positions);
  const Sums<T> sums = {tile_source(args.x, args.positions),
                        tile_source(args.grad_u, args.positions),
                        args.center,
                        args.grad_matrix,
                        args.grad_offset,
                        static_cast<double*>(scratch),
                        args.samples,
                        channels,
                        args.positions,
                        split};
  if (split.splits > 0) {
    const bool vector = has_vector_columns(args.x, args.positions) && has_vector_columns(args.grad_u, args.positions);
    const int64_t blocks = split.splits * split.parts * split.parts;
    const dim3 threads(split.columns, split.threads / split.columns);
    const int64_t bytes = shared_bytes<T>(split, vector);
    const int sums_error = vector ? launch(sums_kernel<T, true>, blocks, threads, bytes, stream, sums)
                                  : launch(sums_kernel<T, false>, blocks, threads, bytes, stream, sums);
    if (sums_error != cudaSuccess) return sums_error;
  }
  if (split.splits == 1) return cudaSuccess;
  const int64_t blocks = smaller(divide_up((channels + 1) * channels, reduce_columns), max_blocks);
  return launch(reduce_kernel<T>, blocks, dim3(reduce_columns, reduce_rows), 0, stream, sums);
}

template int64_t channel_mix_backward_scratch<float>(int64_t, int64_t, int64_t);
template int64_t channel_mix_backward_scratch<double>(int64_t, int64_t, int64_t);
template int channel_mix_backward<float>(const ChannelMixBackwardArgs<float>&, void*, void*);
template int channel_mix_backward<double>(const ChannelMixBackwardArgs<double>&, void*, void*);

}  // namespace pyglow::cuda
