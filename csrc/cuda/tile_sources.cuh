// Sources of tiles: what a kernel brings into shared memory, some channels by the columns of a tile, is a tensor or
// computed from tensors on the way. A source has
//   tensors                        how many tensors it reads (strided path: a table of offsets for each)
//   sums                           whether it gives sums of log s
//   computes                       whether it uses exp and its like, which in double take many registers
//   steps()                        their strides along samples and positions
//   stage<Vector>(tile, stride, rows, first, channels, columns, aside)
//                                  tile[r * stride + q] = its value at channel first + r, column q; zero behind the
//                                  last channel and position
#pragma once
#include "cuda/net_data.cuh"
#include "cuda/tile.cuh"

namespace pyglow::cuda {

// Strides along samples and positions of the tensors that a source reads. With width > 0, position h * width + w is the
// pixel (h, w) of an image, `row` and `position` are strides of its rows and of the pixels in them.
template <int Tensors>
struct Steps {
  int64_t sample[Tensors], position[Tensors];
  int64_t width = 0, row = 0;
};

template <class T>
__device__ __forceinline__ Steps<1> steps_of(const Strided<T>& x) {
  return {{x.sample}, {x.position}};
}
template <class T>
__device__ __forceinline__ Steps<1> steps_of(const Squeezed<T>& x) {
  if (x.width > 0) return {{x.sample}, {2 * x.position}, x.width, 2 * x.row};
  return {{x.sample}, {x.position}};
}

// Where the columns of a tile are in those tensors: offsets of the thread's own column (vector path) or, for each
// tensor, a table of them in shared memory (strided path); `outside` behind the last position.
template <int Tensors>
struct Columns {
  int64_t own[Tensors];
  const int64_t* table;
};

// The columns of the tile that begins at position `begin`. Strided path: fills the table, a barrier must follow.
template <bool Vector, class T, int Tensors>
__device__ __forceinline__ Columns<Tensors> columns_of(const Steps<Tensors>& steps, int64_t begin, int64_t samples,
                                                       int64_t positions, int64_t* table) {
  Columns<Tensors> result = {};
  const int count = blockDim.x * width<T>;
  const auto locate = [&](int64_t j, const auto& put) {
    const int64_t n = j / positions;
    int64_t p = j - n * positions, rows = 0;
    if (steps.width > 0) {
      const int64_t h = p / steps.width;
      p -= h * steps.width;
      rows = h * steps.row;
    }
#pragma unroll
    for (int k = 0; k < Tensors; ++k)
      put(k, n < samples ? n * steps.sample[k] + rows + p * steps.position[k] : outside);
  };
  if constexpr (Vector) {
    locate(begin + threadIdx.x * width<T>, [&](int k, int64_t offset) { result.own[k] = offset; });
  } else {
    result.table = table;
    for (int q = thread_index(); q < count; q += blockDim.x * blockDim.y)
      locate(begin + q, [&](int k, int64_t offset) { table[k * count + q] = offset; });
  }
  return result;
}

// What a source may give beside its tile, where the kernel asks for it: at most once for each element.
template <class T>
struct Aside {
  bool wanted;
  int64_t begin, positions;  // the tile's first position, through all samples; positions of a sample
  T* logs;                   // sums of log s, [sharer of a column][column], set with the first channels, then added to
  int logs_stride;           //
};

// Calls f(q, first row, step of the rows) for the columns q of a tile that the thread fills: in the vector path one
// column of 16 bytes, else columns of one position. Threads that are neighbours take neighbours in memory: positions,
// or 8 channels at a time, which are a sector. A column's rows are shared by column_sharers() threads, always the same
// ones.
template <bool Vector, class T, class F>
__device__ __forceinline__ void for_each_column(bool channels_adjacent, const F& f) {
  if constexpr (Vector) {
    f(static_cast<int>(threadIdx.x), static_cast<int>(threadIdx.y), static_cast<int>(blockDim.y));
  } else {
    const int count = blockDim.x * width<T>, thread = thread_index();
    const int sharers = channels_adjacent ? 8 : blockDim.y, share = channels_adjacent ? thread % 8 : threadIdx.y;
    const int step = channels_adjacent ? blockDim.x * blockDim.y / 8 : blockDim.x;
#pragma unroll 1
    for (int q = channels_adjacent ? thread / 8 : threadIdx.x; q < count; q += step) f(q, share, sharers);
  }
}

template <bool Vector>
__device__ __forceinline__ int column_sharers(bool channels_adjacent) {
  return !Vector && channels_adjacent ? 8 : blockDim.y;
}

// Loads that a thread has in flight together: four, but for the strided path in double, whose registers are taken by
// sums and offsets.
template <class T, bool Vector>
constexpr int loads_at_once = Vector || sizeof(T) == sizeof(float) ? 4 : 1;

// A tensor, which may be squeezed, less a center if there is one.
template <class T>
struct PlainSource {
  static constexpr int tensors = 1;
  static constexpr bool sums = false;
  static constexpr bool computes = false;
  Squeezed<const T> x;
  const T* center;         // (C,) or null
  bool channels_adjacent;  // in memory, rather than positions

  __device__ Steps<1> steps() const { return steps_of(x); }
  template <bool Vector>
  __device__ __forceinline__ void stage(T* tile, int stride, int rows, int64_t first, int64_t channels,
                                        const Columns<1>& columns, const Aside<T>& = {}) const {
    const int inside = static_cast<int>(smaller<int64_t>(rows, channels - first));
    if constexpr (Vector) {
      stage_columns(tile, stride, rows, x, first, inside, center, columns.own[0]);
    } else {
      for_each_column<Vector, T>(channels_adjacent, [&](int q, int begin, int step) {
        constexpr int batch = loads_at_once<T, Vector>;
        const int64_t at = columns.table[q];
#pragma unroll 1
        for (int r = begin; r < rows; r += batch * step) {
          T value[batch] = {}, c[batch] = {};
#pragma unroll
          for (int b = 0; b < batch; ++b) {
            const int row = r + b * step;
            if (at == outside || row >= inside) continue;
            value[b] = x.data[at + channel_offset(x, first + row)];
            if (center != nullptr) c[b] = center[first + row];
          }
#pragma unroll
          for (int b = 0; b < batch; ++b)
            if (r + b * step < rows) tile[(r + b * step) * stride + q] = math::centred(value[b], c[b]);
        }
      });
    }
  }
};

template <class T>
PlainSource<T> plain_source(const Squeezed<const T>& x, const T* center, int64_t positions) {
  return {x, center, channels_adjacent(x, positions)};
}

template <class T>
bool has_vector_columns(const PlainSource<T>& source, int64_t positions) {
  return has_vector_columns(source.x, positions);
}

// The first row from `least` on of a thread that takes rows sharer, sharer + step, ...
__device__ __forceinline__ int row_from(int least, int sharer, int step) {
  return least <= sharer ? sharer : sharer + (least - sharer + step - 1) / step * step;
}

template <bool Vector, class T>
__device__ __forceinline__ void stage_unit(T* tile, int stride, int r, int q, const Unit<T, Vector>& unit) {
  if constexpr (Vector)
    store_shared(tile + r * stride + q * width<T>, unit);
  else
    tile[r * stride + q] = unit.v[0];
}

// A gradient in two parts.
template <class T>
struct SplitSource {
  static constexpr int tensors = 2;
  static constexpr bool sums = false;  // of log s
  static constexpr bool computes = false;
  SplitGrad<T> grad;       // without a second part added_channels is 0
  bool channels_adjacent;  // of the first part in memory, rather than positions
  bool added_columns;      // the second part has vector columns

  __device__ Steps<2> steps() const {
    return {{grad.all.sample, grad.added.sample}, {grad.all.position, grad.added.position}};
  }
  template <bool Vector>
  __device__ __forceinline__ void stage(T* tile, int stride, int rows, int64_t first, int64_t channels,
                                        const Columns<2>& columns, const Aside<T>& = {}) const {
    const int count = blockDim.x * width<T>, inside = static_cast<int>(smaller<int64_t>(rows, channels - first));
    const int sums = static_cast<int>(larger<int64_t>(0, smaller<int64_t>(inside, grad.added_channels - first)));
    for_each_column<Vector, T>(channels_adjacent, [&](int q, int begin, int step) {
      constexpr int batch = larger(loads_at_once<T, Vector> / 2, 1);
      const int64_t all_at = Vector ? columns.own[0] : columns.table[q];
      const int64_t added_at = Vector ? columns.own[1] : columns.table[count + q];
      const T* const all = grad.all.data + all_at + first * grad.all.channel;
      const T* const added = grad.added.data + added_at + first * grad.added.channel;
#pragma unroll 1
      for (int r = begin; r < rows; r += batch * step) {
        Unit<T, Vector> sum[batch] = {}, more[batch] = {};
#pragma unroll
        for (int b = 0; b < batch; ++b) {
          const int row = r + b * step;
          const bool there = all_at != outside && row < inside;
          if (there) sum[b] = load_unit<Vector>(all + row * grad.all.channel);
          if (there && row < sums)
            more[b] = load_any<Vector>(grad.added, added_columns, added + row * grad.added.channel);
        }
#pragma unroll
        for (int b = 0; b < batch; ++b) {
#pragma unroll
          for (int i = 0; i < unit_width<T, Vector>; ++i) sum[b].v[i] += more[b].v[i];
          if (r + b * step < rows) stage_unit<Vector>(tile, stride, r + b * step, q, sum[b]);
        }
      }
    });
  }
};

template <class T>
SplitSource<T> split_source(SplitGrad<T> grad, int64_t positions) {
  if (grad.added.data == nullptr) {
    grad.added = {};
    grad.added_channels = 0;
  }
  return {grad, channels_adjacent(grad.all, positions), has_vector_columns(grad.added, positions)};
}

// Whatever the second part is like.
template <class T>
bool has_vector_columns(const SplitSource<T>& source, int64_t positions) {
  return has_vector_columns(source.grad.all, positions);
}

}  // namespace pyglow::cuda
