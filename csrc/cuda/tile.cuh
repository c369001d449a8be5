// Tiles of (N, C, P) tensors in shared memory: some channels (rows) by some positions (columns).
//
// Positions are numbered through all samples, j = n P + p, so that small images fill tiles as well as large ones do. A
// block of threads is (columns / width, any): in the vector path thread x owns the 16-byte column x of a tile and reads
// it from memory as it is; in the strided path the offsets of all columns are in a table in shared memory, and the
// threads walk the tile in the order of the addresses, whichever dimension that is.
#pragma once
#include "cuda/device.cuh"
#include "math/channel_mix.h"

namespace pyglow::cuda {

constexpr int64_t outside = -1;  // the offset of a position behind the last one

// A tensor, and whether neighbours in memory are channels rather than positions.
template <class T>
struct TileSource {
  Strided<T> tensor;
  bool channels_adjacent;
};

template <class T>
TileSource<T> tile_source(const Strided<T>& x, int64_t positions) {
  return {x, x.channel < (positions > 1 ? x.position : x.sample)};
}

// Whether columns of `width` positions are 16 aligned bytes of every row.
template <class T>
bool has_vector_columns(const Strided<const T>& x, int64_t positions) {
  return x.position == 1 && positions % width<T> == 0 && x.sample % width<T> == 0 && x.channel % width<T> == 0 &&
         aligned(x.data);
}

// Whether `width` channels are 16 aligned bytes at every position.
template <class T>
bool has_vector_channels(const Strided<const T>& x, int64_t channels) {
  return x.channel == 1 && channels % width<T> == 0 && x.sample % width<T> == 0 && x.position % width<T> == 0 &&
         aligned(x.data);
}

template <class T>
__device__ __forceinline__ int64_t offset_of(const Strided<T>& x, int64_t j, int64_t samples, int64_t positions) {
  const int64_t n = j / positions;
  return n < samples ? n * x.sample + (j - n * positions) * x.position : outside;
}

// The strided path's table: offsets of the columns of the tile that begins at j. A barrier must follow.
template <class T>
__device__ __forceinline__ void fill_offsets(int64_t* offsets, int columns, const Strided<T>& x, int64_t begin,
                                             int64_t samples, int64_t positions) {
  for (int q = thread_index(); q < columns; q += blockDim.x * blockDim.y)
    offsets[q] = offset_of(x, begin + q, samples, positions);
}

// tile[r * stride + q] = x[first + r, column q], less center[first + r] if there is a center; zero outside the tensor.
// `own` is the offset of the thread's column (vector path), `offsets` the table (strided path).
template <bool Vector, class T>
__device__ __forceinline__ void stage(T* tile, int stride, int rows, int columns, const TileSource<const T>& source,
                                      int64_t first, int64_t channels, const T* center, int64_t own,
                                      const int64_t* offsets) {
  const Strided<const T>& x = source.tensor;
  const int inside = static_cast<int>(smaller<int64_t>(rows, channels - first));
  if constexpr (Vector) {
#pragma unroll 4
    for (int r = threadIdx.y; r < rows; r += blockDim.y) {
      Vec<T> column = {};
      if (own != outside && r < inside) {
        column = load_vector(x.data + own + (first + r) * x.channel);
        if (center != nullptr) {
          const T c = center[first + r];
#pragma unroll
          for (int i = 0; i < width<T>; ++i) column.v[i] = math::centred(column.v[i], c);
        }
      }
      store_shared(tile + r * stride + threadIdx.x * width<T>, column);
    }
    return;
  }
  const auto element = [&](int r, int q) {
    const int64_t offset = offsets[q];
    if (offset == outside || r >= inside) return T(0);
    const T value = x.data[offset + (first + r) * x.channel];
    return center != nullptr ? math::centred(value, center[first + r]) : value;
  };
  if (source.channels_adjacent) {
    const int threads = blockDim.x * blockDim.y, thread = thread_index();
    int q = thread / rows, r = thread - q * rows;
    const int step_q = threads / rows, step_r = threads - step_q * rows;
    while (q < columns) {
      tile[r * stride + q] = element(r, q);
      r += step_r;
      q += step_q;
      if (r >= rows) {
        r -= rows;
        ++q;
      }
    }
  } else {
    for (int r = threadIdx.y; r < rows; r += blockDim.y) {
#pragma unroll
      for (int i = 0; i < width<T>; ++i) {
        const int q = threadIdx.x + i * blockDim.x;
        tile[r * stride + q] = element(r, q);
      }
    }
  }
}

}  // namespace pyglow::cuda
