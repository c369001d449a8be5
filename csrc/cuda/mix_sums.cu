// How sums over positions are cut, and their second stage: the same for every source of tiles.
#include "cuda/mix_sums.cuh"

namespace pyglow::cuda {
namespace {

constexpr int reduce_columns = 32;
constexpr int reduce_rows = larger(block_threads / reduce_columns, 1);

// The second stage: sums of the partials over the splits, 32 of them by `reduce_rows` shares of the splits in a block.
template <class T>
__global__ void __launch_bounds__(block_threads)
    reduce_kernel(const double* partials, int64_t splits, int64_t channels, T* grad_matrix, T* grad_offset) {
  PYGLOW_SHARED(double, shares, reduce_columns* reduce_rows);
  const int64_t size = (channels + 1) * channels;
  for (int64_t first = blockIdx.x * int64_t{reduce_columns}; first < size;
       first += gridDim.x * int64_t{reduce_columns}) {
    const int64_t at = first + threadIdx.x;
    double sum = 0;
    if (at < size) {
#pragma unroll 8
      for (int64_t split = threadIdx.y; split < splits; split += reduce_rows) sum += partials[split * size + at];
    }
    __syncthreads();  // the shares of the previous sums have been read
    shares[thread_index()] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && at < size) {
      double total = 0;
      for (int row = 0; row < reduce_rows; ++row) total += shares[row * reduce_columns + threadIdx.x];
      if (at < channels * channels) {
        grad_matrix[at] = static_cast<T>(total);
      } else {
        grad_offset[at - channels * channels] = static_cast<T>(total);
      }
    }
  }
}

// 16-byte columns of a tile: 2 * micro * side rows of them take about 32 KB of shared memory.
int columns_for(int side) { return side > 8 ? 16 : side > 4 ? 32 : 64; }

template <class T>
Split split_into(int64_t total, int64_t channels, int64_t parts, int columns) {
  Split split = {};
  split.parts = static_cast<int>(parts);
  split.side = static_cast<int>(divide_up(divide_up(channels, micro), parts));
  split.columns = columns;
  const int share = split.side * split.side;
  split.groups = smaller(block_threads / share, columns);
  const int threads = share * (block_threads / share);  // those beyond the groups help staging
  split.threads = static_cast<int>(round_up(threads, larger(columns, warp_threads)));
  split.tiles = divide_up(total, columns * width<T>);
  const int64_t fitting = max_scratch_bytes / static_cast<int64_t>(sizeof(double)) / ((channels + 1) * channels);
  const int64_t wanted = divide_up(smaller(4 * multiprocessors, max_blocks), parts * parts);
  split.splits = smaller(split.tiles, larger<int64_t>(1, smaller(fitting, wanted)));
  return split;
}

int64_t blocks_of(const Split& split) { return split.splits * split.parts * split.parts; }

}  // namespace

// Of a sum that gives at most half of the multiprocessors a block, tiles become shorter, down to 16 columns, and then
// the parts of grad_M smaller, down to 16 by 16: a block has less to stage and to multiply, for tiles that are staged
// once more from the L2 and, of shorter ones, more partial sums.
template <class T>
Split split_of(int64_t samples, int64_t channels, int64_t positions) {
  if (channels == 0) return {};
  const int64_t sides = divide_up(channels, micro);
  int64_t parts = divide_up(sides, max_side);
  int side = static_cast<int>(divide_up(sides, parts));
  int columns = columns_for(side);
  Split split = split_into<T>(samples * positions, channels, parts, columns);
  if (blocks_of(split) > multiprocessors / 2) return split;
  while (blocks_of(split) < multiprocessors) {
    // One split needs no second stage: its tile becomes shorter only by what is empty.
    if (columns > 16 && (split.splits > 1 || columns / 2 * width<T> >= samples * positions)) {
      columns /= 2;
    } else if (side > 4) {
      side = static_cast<int>(divide_up(sides, ++parts));
      columns = columns_for(side);
    } else {
      break;
    }
    split = split_into<T>(samples * positions, channels, parts, columns);
  }
  return split;
}

template <class T>
int reduce_sums(const double* partials, int64_t splits, int64_t channels, T* grad_matrix, T* grad_offset,
                void* stream) {
  const int64_t blocks = smaller(divide_up((channels + 1) * channels, reduce_columns), max_blocks);
  return launch(reduce_kernel<T>, blocks, dim3(reduce_columns, reduce_rows), 0, stream, partials, splits, channels,
                grad_matrix, grad_offset);
}

template Split split_of<float>(int64_t, int64_t, int64_t);
template Split split_of<double>(int64_t, int64_t, int64_t);
template int reduce_sums<float>(const double*, int64_t, int64_t, float*, float*, void*);
template int reduce_sums<double>(const double*, int64_t, int64_t, double*, double*, void*);

}  // namespace pyglow::cuda
