// log_det out of a kernel that walks tiles of positions: each block sums the samples that lie within its tiles, and
// leaves the two that may reach beyond them to a second stage. No atomics: two runs give the same bits.
#pragma once
#include "cuda/device.cuh"

namespace pyglow::cuda {

// Tiles [t length, (t + 1) length) of all positions, numbered through all samples; range r has the tiles from
// r per_range on.
struct Ranges {
  int64_t samples, positions, tiles, length, ranges, per_range;

  PYGLOW_HD int64_t begin(int64_t range) const { return range * per_range * length; }
};

inline Ranges ranges_of(int64_t samples, int64_t positions, int64_t length, int64_t most) {
  const int64_t tiles = divide_up(samples * positions, length);
  const int64_t per_range = divide_up(tiles, larger<int64_t>(1, most));
  return {samples, positions, tiles, length, divide_up(tiles, larger<int64_t>(1, per_range)), per_range};
}

template <class T>
struct LogDet {
  T* log_det;        // (N,), or null: not wanted
  double* partials;  // (ranges, 2): of the sample that began before the range, of the one that goes on behind it
  bool negative;
};

// The sums of a tile's samples. logs[sharer * stride + q]: a sum of log s of `unit` positions from q unit on. Whole
// warps, all threads call it, with barriers between two calls.
template <class T>
__device__ __forceinline__ void sum_log_det(const LogDet<T>& out, const Ranges& ranges, int64_t range, int64_t tile,
                                            const T* logs, int sharers, int stride, int unit) {
  PYGLOW_SHARED(double, carry, 2);  // what a tile leaves to the next
  const int64_t positions = ranges.positions, begin = tile * ranges.length, range_begin = ranges.begin(range);
  const int64_t end = smaller(begin + ranges.length, ranges.samples * positions);
  const bool last_tile = tile + 1 == smaller(ranges.tiles, (range + 1) * ranges.per_range);
  const int lane = thread_index() % warp_threads, warps = blockDim.x * blockDim.y / warp_threads;
  for (int64_t n = begin / positions + thread_index() / warp_threads; n * positions < end; n += warps) {
    const int64_t sample_begin = n * positions, sample_end = sample_begin + positions;
    const int from = static_cast<int>(larger(sample_begin, begin) - begin) / unit;
    const int to = static_cast<int>(smaller(sample_end, end) - begin) / unit;
    double sum = 0;
    for (int sharer = 0; sharer < sharers; ++sharer)
      for (int q = from + lane; q < to; q += warp_threads) sum += static_cast<double>(logs[sharer * stride + q]);
#pragma unroll
    for (int offset = warp_threads / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane != 0) continue;
    if (out.negative) sum = -sum;
    if (sample_begin < begin && begin > range_begin) sum += carry[(tile - 1) & 1];
    const bool began_here = sample_begin >= range_begin;
    if (sample_end <= end && began_here)
      out.log_det[n] = static_cast<T>(sum);
    else if (sample_end <= end || last_tile)
      out.partials[2 * range + (began_here ? 1 : 0)] = sum;
    else
      carry[tile & 1] = sum;
  }
}

// The second stage: the samples that lie in several ranges. Defined for float and double in log_det.cu.
template <class T>
int finish_log_det(const LogDet<T>& out, const Ranges& ranges, void* stream);

}  // namespace pyglow::cuda
