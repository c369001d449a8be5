// One source for both devices: a formula is a scalar function on the GPU and a function of SIMD vectors on the CPU.
#pragma once

#ifdef __CUDACC__
#define PYGLOW_HD __host__ __device__ __forceinline__
#else
#define PYGLOW_HD inline __attribute__((always_inline))
#endif

// The CPU kernels are compiled once per instruction set; a namespace of its own keeps the linker from merging the
// copies. Its vectors are as wide as its registers.
#ifdef PYGLOW_ISA
#if defined(__AVX512F__)
#define PYGLOW_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PYGLOW_VECTOR_BYTES 32
#else
#define PYGLOW_VECTOR_BYTES 16
#endif
#define PYGLOW_MATH_BEGIN  \
  namespace pyglow::math { \
  inline namespace PYGLOW_ISA {
#define PYGLOW_MATH_END \
  }                     \
  }
#else
#define PYGLOW_MATH_BEGIN namespace pyglow::math {
#define PYGLOW_MATH_END }
#endif
