// The product of a C x C matrix with every position, which channel_mix and its backward share.
#pragma once
#include "core.h"

namespace pyglow::cuda {

// u[n, o, p] = offset[o] + sum_i M[o, i] (x[n, i, p] - center[i])
template <class T>
struct MixProduct {
  Strided<const T> x;   // (N, C, P)
  const T* matrix;      // M[o, i] is matrix[o * row + i * column]
  int64_t row, column;  //
  const T* center;      // (C,) or null
  const T* offset;      // (C,) or null
  Strided<T> u;         // (N, C, P), no overlap with x
  int64_t samples, channels, positions;
};

// Defined for float and double in channel_mix.cu; returns a cudaError_t.
template <class T>
int mix_product(const MixProduct<T>& product, void* stream);

}  // namespace pyglow::cuda
