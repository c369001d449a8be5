// The second stage of log_det.cuh.
#include "cuda/log_det.cuh"

namespace pyglow::cuda {
namespace {

// A warp for each border between two ranges: if it is the first one within its sample, it sums what the sample left in
// each range.
template <class T>
__global__ void __launch_bounds__(block_threads) finish_kernel(const LogDet<T> out, const Ranges ranges) {
  const int lane = threadIdx.x % warp_threads;
  const int64_t range = blockIdx.x * (blockDim.x / warp_threads) + threadIdx.x / warp_threads + 1;
  if (range >= ranges.ranges) return;
  const int64_t n = ranges.begin(range) / ranges.positions, begin = n * ranges.positions,
                end = begin + ranges.positions;
  if (begin == ranges.begin(range) || begin < ranges.begin(range - 1)) return;
  double sum = lane == 0 ? out.partials[2 * (range - 1) + 1] : 0;
  for (int64_t r = range + lane; r < ranges.ranges && ranges.begin(r) < end; r += warp_threads)
    sum += out.partials[2 * r];
#pragma unroll
  for (int offset = warp_threads / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (lane == 0) out.log_det[n] = static_cast<T>(sum);
}

}  // namespace

// At most max_blocks borders, a warp each, which reads at most as many numbers: a few microseconds.
template <class T>
int finish_log_det(const LogDet<T>& out, const Ranges& ranges, void* stream) {
  if (ranges.ranges <= 1 || ranges.begin(1) % ranges.positions == 0) return cudaSuccess;  // no sample lies in two
  const int64_t blocks = divide_up(ranges.ranges - 1, block_threads / warp_threads);
  return launch(finish_kernel<T>, blocks, dim3(block_threads), 0, stream, out, ranges);
}

template int finish_log_det<float>(const LogDet<float>&, const Ranges&, void*);
template int finish_log_det<double>(const LogDet<double>&, const Ranges&, void*);

}  // namespace pyglow::cuda
