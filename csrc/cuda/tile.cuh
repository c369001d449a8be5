// Tiles of (N, C, P) tensors in shared memory: some channels (rows) by some positions (columns).
//
// Positions are numbered through all samples, j = n P + p, so that small images fill tiles as well as large ones do. A
// block of threads is (columns / width, any): in the vector path thread x owns the 16-byte column x of a tile and reads
// it from memory as it is; in the strided path the offsets of all columns are in a table in shared memory, and the
// threads walk the tile in the order of the addresses, whichever dimension that is. A squeezed tensor is the same but
// for its offsets; in the vector path, where neighbours in memory are two channels of a position in turn, a thread
// reads 32 bytes for two rows.
#pragma once
#include "cuda/device.cuh"
#include "math/channel_mix.h"

namespace pyglow::cuda {

constexpr int64_t outside = -1;  // the offset of a position behind the last one

// Whether neighbours in memory are channels rather than positions.
template <class T>
bool channels_adjacent(const Squeezed<T>& x, int64_t positions) {
  return x.channel < (x.width > 0 || positions > 1 ? x.position : x.sample);
}
template <class T>
bool channels_adjacent(const Strided<T>& x, int64_t positions) {
  return channels_adjacent(Squeezed<T>{x, 0, 0}, positions);
}

template <class T>
Squeezed<const T> read_only(const Squeezed<T>& x) {
  return {read_only(static_cast<const Strided<T>&>(x)), x.width, x.row};
}

// Where channel c begins.
template <class T>
__device__ __forceinline__ int64_t channel_offset(const Strided<T>& x, int64_t c) {
  return c * x.channel;
}
template <class T>
__device__ __forceinline__ int64_t channel_offset(const Squeezed<T>& x, int64_t c) {
  return x.width > 0 ? (c >> 2) * x.channel + (c >> 1 & 1) * x.row + (c & 1) * x.position : c * x.channel;
}

// Whether columns of `width` positions are 16 aligned bytes of every row.
template <class T>
bool has_vector_columns(const Strided<const T>& x, int64_t positions) {
  return x.position == 1 && positions % width<T> == 0 && x.sample % width<T> == 0 && x.channel % width<T> == 0 &&
         aligned(x.data);
}

// The same of a squeezed one, with 32 bytes for each two rows.
template <class T>
bool has_vector_columns(const Squeezed<const T>& x, int64_t positions) {
  if (x.width == 0) return has_vector_columns(static_cast<const Strided<const T>&>(x), positions);
  return x.position == 1 && x.width % width<T> == 0 && x.sample % width<T> == 0 && x.channel % width<T> == 0 &&
         x.row % width<T> == 0 && aligned(x.data);
}

// Whether `width` channels are 16 aligned bytes at every position.
template <class T>
bool has_vector_channels(const Strided<const T>& x, int64_t channels) {
  return x.channel == 1 && channels % width<T> == 0 && x.sample % width<T> == 0 && x.position % width<T> == 0 &&
         aligned(x.data);
}

// As stage_columns, of a squeezed tensor: rows and `first` are even.
template <class T>
__device__ __forceinline__ void stage_pairs(T* tile, int stride, int rows, const Squeezed<const T>& x, int64_t first,
                                            int inside, const T* center, int64_t own) {
  constexpr int batch = 2;  // pairs whose loads are in flight together
  const int step = 2 * blockDim.y;
#pragma unroll 1
  for (int r = 2 * threadIdx.y; r < rows; r += batch * step) {
    Vec<T> memory[batch][2] = {};
    T c[batch][2] = {};
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      const int row = r + b * step;
      if (row >= inside || own == outside) continue;
      const T* const start = x.data + own + channel_offset(x, first + row);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        memory[b][j] = load_vector(start + j * width<T>);
        if (center != nullptr) c[b][j] = center[first + row + j];
      }
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      if (r + b * step >= rows) break;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        Vec<T> row;
#pragma unroll
        for (int i = 0; i < width<T>; ++i)
          row.v[i] = math::centred(memory[b][2 * i / width<T>].v[(2 * i + j) % width<T>], c[b][j]);
        store_shared(tile + (r + b * step + j) * stride + threadIdx.x * width<T>, row);
      }
    }
  }
}

// Vector path: tile[r * stride + q] = x[first + r, column q], less center[first + r] if there is a center, for the
// thread's own column, whose offset is `own`; zero outside the tensor.
template <class T>
__device__ __forceinline__ void stage_columns(T* tile, int stride, int rows, const Squeezed<const T>& x, int64_t first,
                                              int inside, const T* center, int64_t own) {
  if (x.width > 0) {
    stage_pairs(tile, stride, rows, x, first, inside, center, own);
    return;
  }
  constexpr int batch = 4;  // rows whose loads are in flight together
  const int step = blockDim.y;
#pragma unroll 1
  for (int r = threadIdx.y; r < rows; r += batch * step) {
    Vec<T> column[batch] = {};
    T c[batch] = {};
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      const int row = r + b * step;
      if (own == outside || row >= inside) continue;
      column[b] = load_vector(x.data + own + (first + row) * x.channel);
      if (center != nullptr) c[b] = center[first + row];
    }
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      const int row = r + b * step;
#pragma unroll
      for (int i = 0; i < width<T>; ++i) column[b].v[i] = math::centred(column[b].v[i], c[b]);
      if (row < rows) store_shared(tile + row * stride + threadIdx.x * width<T>, column[b]);
    }
  }
}

}  // namespace pyglow::cuda
