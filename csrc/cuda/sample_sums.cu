#include "cuda/sample_sums.cuh"

namespace pyglow::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(block_threads)
    sample_sums_kernel(const double* partials, int64_t samples, int64_t parts, double start, T* sums) {
  for (int64_t n = blockIdx.x; n < samples; n += gridDim.x) {
    double sum = 0;
#pragma unroll 4
    for (int64_t part = threadIdx.x; part < parts; part += blockDim.x) sum += partials[n * parts + part];
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[n] = static_cast<T>(start + sum);
  }
}

}  // namespace

// A block for each sample, of as many threads as it has parts: it reads one double per part, at most 16 MB in all, and
// what bounds it is the latency of a launch. No parts give the start.
template <class T>
int sample_sums(const double* partials, int64_t samples, int64_t parts, double start, T* sums, void* stream) {
  if (samples == 0) return cudaSuccess;
  const dim3 threads(
      static_cast<unsigned>(smaller<int64_t>(block_threads, round_up(larger<int64_t>(parts, 1), warp_threads))));
  return launch(sample_sums_kernel<T>, smaller(samples, max_blocks), threads, 0, stream, partials, samples, parts,
                start, sums);
}

template int sample_sums<float>(const double*, int64_t, int64_t, double, float*, void*);
template int sample_sums<double>(const double*, int64_t, int64_t, double, double*, void*);

}  // namespace pyglow::cuda
