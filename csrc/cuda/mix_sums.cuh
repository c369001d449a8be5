// grad_M = sum u x^T and grad_c = sum u over all positions, for tiles of x and u of any source: formed in two stages
// without atomics, so that two runs give the same bits.
#pragma once
#include "cuda/tile_sources.cuh"

namespace pyglow::cuda {

constexpr int micro = 4;                                 // a thread's share: micro outputs by micro inputs
constexpr int max_side = block_threads >= 256 ? 16 : 8;  // such shares along a side of a block's part of grad_M

// How the sums are cut. grad_M falls into parts * parts square parts of side * micro channels; positions fall into
// tiles, tile t belonging to split t % splits. A block sums one part over one split, its threads being groups that
// share each tile's columns.
struct Split {
  int side, parts, groups, threads, columns;
  int64_t tiles, splits;
};

template <class T>
Split split_of(int64_t samples, int64_t channels, int64_t positions);

// The partial sums' sum over the splits. Defined for float and double in mix_sums.cu.
template <class T>
int reduce_sums(const double* partials, int64_t splits, int64_t channels, T* grad_matrix, T* grad_offset, void* stream);

template <class T, class X, class U>
struct Sums {
  X x;                           // sources of tiles (tile_sources.cuh): what entered the product,
  U grad_u;                      // and the gradient of what came out of it
  T *grad_matrix, *grad_offset;  // written directly if there is one split
  double* partials;              // [split][C * C + C]
  int64_t samples, channels, positions;
  Split split;
};

// Where the sum of outputs o and inputs i goes, or of output o if i is C.
template <class T, class X, class U>
__device__ __forceinline__ void put(const Sums<T, X, U>& s, int64_t split, int64_t o, int64_t i, double sum) {
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
template <class T, class X, class U, bool Vector>
__global__ void __launch_bounds__(block_threads, sizeof(T) == sizeof(float) || !X::computes ? 2 : 1)
    sums_kernel(const Sums<T, X, U> s) {
  const int side = s.split.side, share = side * side, rows = side * micro;
  const int columns = s.split.columns,
            stride = columns * width<T> + width<T>;  // + width: rows begin in different banks
  const int threads = blockDim.x * blockDim.y, thread = thread_index();
  const int group = thread / share, in_group = thread - group * share;
  const int b = in_group / side, a = in_group - b * side;  // outputs b + k side, inputs a + k side
  const bool summing = group < s.split.groups;
  DynamicShared shared;
  T* const x_tile = shared.take<T>(rows * stride);
  T* const u_tile = shared.take<T>(rows * stride);
  int64_t* const x_offsets = shared.take<int64_t>(Vector ? 0 : X::tensors * columns * width<T>);
  int64_t* const u_offsets = shared.take<int64_t>(Vector ? 0 : U::tensors * columns * width<T>);

  const int64_t parts = s.split.parts, split = blockIdx.x / (parts * parts);
  const int part = static_cast<int>(blockIdx.x - split * parts * parts);
  const int64_t first_out = part / parts * rows, first_in = part % parts * rows;
  // grad_c: `lanes` threads to a row of grad_u.
  const int lanes = threads / rows, offset_row = thread / lanes, lane = thread - offset_row * lanes;
  const bool offsets_too = first_in == 0 && offset_row < rows;
  T sum[micro][micro] = {}, offset_sum = T(0);

  for (int64_t tile = split; tile < s.split.tiles; tile += s.split.splits) {
    const int64_t begin = tile * columns * width<T>;
    const auto x_columns = columns_of<Vector, T>(s.x.steps(), begin, s.samples, s.positions, x_offsets);
    const auto u_columns = columns_of<Vector, T>(s.grad_u.steps(), begin, s.samples, s.positions, u_offsets);
    __syncthreads();  // the previous tile has been used, the offsets are there
    s.x.template stage<Vector>(x_tile, stride, rows, first_in, s.channels, x_columns);
    s.grad_u.template stage<Vector>(u_tile, stride, rows, first_out, s.channels, u_columns);
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
  __syncthreads();
  T* const group_sums = DynamicShared().take<T>(micro * micro * share * s.split.groups);
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

template <class T, class X, class U>
int64_t sums_shared_bytes(const Split& split, bool vector) {
  const int64_t tiles = 2 * split.side * micro * (split.columns + 1) * width<T> * static_cast<int64_t>(sizeof(T));
  const int64_t offsets =
      vector ? 0 : (X::tensors + U::tensors) * split.columns * width<T> * static_cast<int64_t>(sizeof(int64_t));
  const int64_t groups = micro * micro * split.side * split.side * split.groups * static_cast<int64_t>(sizeof(T));
  return larger(tiles + offsets, groups);
}

// - Grid: splits of the positions by parts of grad_M of up to 64 by 64, parts fastest so that they find their tiles in
//   L2; about four for each multiprocessor in all, fewer where there are fewer tiles or the partial sums would pass 16
//   MB (C = 768: 3 splits of 144 parts). From C = 1024 on one split remains and writes the result itself.
// - Occupancy: up to 128 registers and 42 KB of shared memory, so 2 blocks of up to 256 threads on a multiprocessor; a
//   tile's loads are all in flight together, and one block's arithmetic hides the other's loads. A double source that
//   computes takes more registers: 1 block.
// - Bound: memory up to about C = 48 (2 C values read for C^2 multiply-adds), then the multiply-add units. The second
//   stage reads at most 16 MB. A source that computes what it stages does so once for each part along the other side.
// No positions give zeros.
template <class T, class X, class U>
int mix_sums(const X& x, const U& grad_u, T* grad_matrix, T* grad_offset, int64_t samples, int64_t channels,
             int64_t positions, bool vector, const Queue& queue) {
  const Split split = split_of<T>(samples, channels, positions);
  const int64_t sizes = split.splits > 1 ? split.splits * (channels + 1) * channels : 0;
  double* const partials = static_cast<double*>(queue.scratch(sizes * static_cast<int64_t>(sizeof(double))));
  if (split.splits > 0) {
    const Sums<T, X, U> sums = {x, grad_u, grad_matrix, grad_offset, partials, samples, channels, positions, split};
    const int64_t blocks = split.splits * split.parts * split.parts;
    const dim3 threads(split.columns, split.threads / split.columns);
    const int64_t bytes = sums_shared_bytes<T, X, U>(split, vector);
    const int error = vector ? launch(sums_kernel<T, X, U, true>, blocks, threads, bytes, queue.stream, sums)
                             : launch(sums_kernel<T, X, U, false>, blocks, threads, bytes, queue.stream, sums);
    if (error != cudaSuccess) return error;
  }
  if (split.splits == 1 || channels == 0) return cudaSuccess;
  return reduce_sums<T>(partials, split.splits, channels, grad_matrix, grad_offset, queue.stream);
}

}  // namespace pyglow::cuda
