// How pointwise kernels walk the channels of a sample: as rows of elements that are neighbours in memory.
//
// All of a sample's channels form one row where every tensor allows it (contiguous); else there is a row for each
// channel, or for each position if channels are the neighbours (channels-last). Blocks share a sample in parts; a
// thread takes units of 16 bytes, or single elements where alignment or an odd size forbids it.
#pragma once
#include "cuda/net_data.cuh"

namespace pyglow::cuda {

enum class Rows { whole, channels, positions };

// Some channels of a tensor in these terms: element [n, row, i] is data[n * sample + row * step + i * element].
template <class T>
struct RowView {
  T* data;
  int64_t sample, step, element;
};

template <class T>
RowView<T> row_view(const Strided<T>& x, Rows rows, int64_t first_channel) {
  if (x.data == nullptr) return {};
  T* const data = x.data + first_channel * x.channel;
  if (rows == Rows::positions) return {data, x.sample, x.position, x.channel};
  return {data, x.sample, x.channel, x.position};
}

// The same of the net's output or its gradient, whose elements have a type of their own.
template <class Data>
struct NetView {
  Data* data;
  NetType type;
  int64_t sample, step, element;
};

template <class T, class Data>
NetView<Data> net_rows(const NetTensor<Data>& x, Rows rows, int64_t first_channel) {
  using Bytes = std::conditional_t<std::is_const_v<Data>, const char, char>;
  Data* const data = static_cast<Bytes*>(x.data) + first_channel * x.channel * net_bytes<T>(x.type);
  if (rows == Rows::positions) return {data, x.type, x.sample, x.position, x.channel};
  return {data, x.type, x.sample, x.channel, x.position};
}

// The longest rows that are possible in all of these tensors, of the same positions; those without data do not count.
template <class First, class... Rest>
Rows rows_of(int64_t positions, const First& first, const Rest&... rest) {
  if (positions <= 1 || first.channel < first.position) return Rows::positions;
  const auto whole = [&](const auto& x) { return x.data == nullptr || x.channel == positions * x.position; };
  return whole(first) && (whole(rest) && ...) ? Rows::whole : Rows::channels;
}

template <class T>
bool has_vector_rows(const RowView<T>& x, Rows rows) {
  constexpr int unit = width<std::remove_const_t<T>>;
  return x.data == nullptr ||
         (x.element == 1 && x.sample % unit == 0 && (rows == Rows::whole || x.step % unit == 0) && aligned(x.data));
}

template <class T, class Data>
bool has_vector_rows(const NetView<Data>& x, Rows rows) {
  constexpr int unit = width<T>;
  return x.element == 1 && x.sample % unit == 0 && (rows == Rows::whole || x.step % unit == 0) &&
         aligned_net<T>(x.data, x.type);
}

// The units of a row, of a block's part of a sample, and of a sample.
struct Walk {
  int64_t row, part, total;
};

inline int64_t row_length(Rows rows, int64_t channels, int64_t positions) {
  return rows == Rows::whole ? channels * positions : rows == Rows::channels ? positions : channels;
}

inline Walk walk_of(Rows rows, int64_t channels, int64_t positions, int64_t parts, int unit) {
  const int64_t total = channels * positions / unit;
  return {larger<int64_t>(row_length(rows, channels, positions) / unit, 1), divide_up(total, parts), total};
}

constexpr int64_t busy_blocks = 16 * 144;  // 16 for each multiprocessor of a large GPU

// Parts of a sample of `elements`: of 1024 elements, or up to 8192 where that still gives work to a large GPU; and no
// more than fit into scratch memory with a double for each.
inline int64_t parts_of(int64_t samples, int64_t elements) {
  if (samples == 0) return 1;
  const int64_t enough = larger(divide_up(elements, 8192), divide_up(busy_blocks, samples));
  const int64_t fitting = max_scratch_bytes / static_cast<int64_t>(sizeof(double)) / samples;
  return larger<int64_t>(1, smaller(smaller(divide_up(elements, 1024), enough), fitting));
}

// Room for a double for each part of each sample; null where a sample is one part.
inline double* partial_sums(int64_t samples, int64_t parts, const Queue& queue) {
  const int64_t bytes = samples * parts * static_cast<int64_t>(sizeof(double));
  return static_cast<double*>(queue.scratch(parts > 1 ? bytes : 0));
}

// The threads of a block that walks parts of a and of b.
inline dim3 walk_threads(const Walk& a, const Walk& b) {
  const int64_t units = larger<int64_t>(1, larger(a.part, b.part));
  return dim3(static_cast<unsigned>(smaller<int64_t>(block_threads, round_up(units, warp_threads))));
}

// Calls f(row, first element of the unit) for a thread's units of a part.
template <int Unit, class F>
__device__ __forceinline__ void for_each_unit(const Walk& walk, int64_t part, const F& f) {
  const int64_t end = smaller((part + 1) * walk.part, walk.total);
  int64_t at = part * walk.part + threadIdx.x;
  if (at >= end) return;
  int64_t row = at / walk.row, unit = at - row * walk.row;
  const int64_t step_row = blockDim.x / walk.row, step_unit = blockDim.x - step_row * walk.row;
  for (; at < end; at += blockDim.x) {
    f(row, unit * Unit);
    row += step_row;
    unit += step_unit;
    if (unit >= walk.row) {
      unit -= walk.row;
      ++row;
    }
  }
}

template <bool Vector, class T>
__device__ __forceinline__ Unit<std::remove_const_t<T>, Vector> load_unit(const RowView<T>& x, int64_t n, int64_t row,
                                                                          int64_t i) {
  T* const start = x.data + n * x.sample + row * x.step;
  if constexpr (Vector)
    return load_vector(start + i);
  else
    return {{start[i * x.element]}};
}

template <bool Vector, class T>
__device__ __forceinline__ void store_unit(const RowView<T>& x, int64_t n, int64_t row, int64_t i,
                                           const Unit<T, Vector>& unit) {
  T* const start = x.data + n * x.sample + row * x.step;
  if constexpr (Vector)
    store_vector(start + i, unit);
  else
    start[i * x.element] = unit.v[0];
}

// See fetch_net and store_net.
template <class T, bool Vector>
__device__ __forceinline__ Unit<T, Vector> fetch_unit(const NetView<const void>& x, int64_t n, int64_t row, int64_t i) {
  return fetch_net<T, Vector>(x.data, x.type, n * x.sample + row * x.step + i * x.element);
}
template <bool Vector, class U>
__device__ __forceinline__ void store_unit(const NetView<void>& x, int64_t n, int64_t row, int64_t i, const U& unit) {
  store_net<Vector>(x.data, x.type, n * x.sample + row * x.step + i * x.element, unit);
}

}  // namespace pyglow::cuda
