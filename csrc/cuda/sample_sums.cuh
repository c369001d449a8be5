// The second stage of sums per sample: the first leaves one sum for each part of a sample.
#pragma once
#include "cuda/device.cuh"

namespace pyglow::cuda {

// sums[n] = start + sum of partials[n * parts + part], always added in the same order. Defined for float and double in
// sample_sums.cu; returns a cudaError_t.
template <class T>
int sample_sums(const double* partials, int64_t samples, int64_t parts, double start, T* sums, void* stream);

// The sums where there is nothing to add up.
template <class T>
int no_sums(int64_t samples, T* sums, void* stream) {
  return sample_sums<T>(nullptr, samples, 0, 0.0, sums, stream);
}

}  // namespace pyglow::cuda
