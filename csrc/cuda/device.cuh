// What every kernel here is written with: launching, 16-byte vectors, shared memory and sums within a block.
//
// The same sources are compiled by a host compiler for tests/emulation (-DPYGLOW_EMULATE_CUDA), where cuda_runtime.h is
// the emulator's and brings its own PYGLOW_SHARED, DynamicShared, store_whole, copy_async and wait_for_copies,
// which check bounds and alignment and poison the memory, and a number of multiprocessors that tests choose. So kernels
// use no <<<>>>, no __shared__ and no assembly of their own.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "core.h"
#include "math/host_device.h"

#ifndef PYGLOW_EMULATE_CUDA
#define PYGLOW_SHARED(T, name, count) __shared__ T name[count]
#endif

// Threads of a full block: a power of two, at least 64; and blocks of a launch, 16 for each multiprocessor of a large
// GPU: kernels loop over what is left. The sanitizer builds take less of both, to see loops and races on small data.
#ifndef PYGLOW_BLOCK_THREADS
#define PYGLOW_BLOCK_THREADS 256
#endif
#ifndef PYGLOW_MAX_BLOCKS
#define PYGLOW_MAX_BLOCKS (16 * 144)
#endif

namespace pyglow::cuda {

constexpr int block_threads = PYGLOW_BLOCK_THREADS;
constexpr int warp_threads = 32;
constexpr int64_t max_blocks = PYGLOW_MAX_BLOCKS;
constexpr int64_t max_scratch_bytes = 16 << 20;

template <class T>
PYGLOW_HD constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
PYGLOW_HD constexpr T larger(T a, T b) {
  return a > b ? a : b;
}
PYGLOW_HD constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
PYGLOW_HD constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Enqueues a kernel; dynamic_bytes of shared memory stay below the 48 KB that need no opting in.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, int64_t dynamic_bytes, void* stream,
           const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(dynamic_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class T>
constexpr int width = 16 / static_cast<int>(sizeof(T));  // elements of a vector

template <class T>
struct alignas(16) Vec {
  T v[width<T>];
};

template <class T>
__device__ __forceinline__ Vec<T> load_vector(const T* p) {
  return *static_cast<const Vec<T>*>(__builtin_assume_aligned(p, 16));
}

// To shared memory.
template <class T>
__device__ __forceinline__ void store_shared(T* p, const Vec<T>& vector) {
  *static_cast<Vec<T>*>(__builtin_assume_aligned(p, 16)) = vector;
}

#ifndef PYGLOW_EMULATE_CUDA
// Multiprocessors of a large GPU, an H100: what small grids are cut for.
constexpr int64_t multiprocessors = 132;

// A block's dynamic shared memory, handed out array by array; another one begins where the first began. The emulator
// has a fence between the arrays: all threads take the same.
class DynamicShared {
 public:
  __device__ __forceinline__ DynamicShared() {
    extern __shared__ __align__(16) unsigned char dynamic_shared[];
    next_ = dynamic_shared;
  }
  template <class T>
  __device__ __forceinline__ T* take(int count) {
    T* const array = reinterpret_cast<T*>(next_);
    next_ += count * sizeof(T);
    return array;
  }

 private:
  unsigned char* next_;
};

// *p = v in global memory, p being aligned to the size of v, as one instruction. nvcc splits the plain assignment into
// stores of single members where these come from different branches; the intrinsic __stwb stays whole, but orders the
// store for the multiprocessor (STRONG.SM).
__device__ __forceinline__ void store_whole(float4* p, const float4& v) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "f"(v.x), "f"(v.y),
               "f"(v.z), "f"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_whole(double2* p, const double2& v) {
  asm volatile("st.global.v2.f64 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "d"(v.x), "d"(v.y) : "memory");
}
__device__ __forceinline__ void store_whole(uint2* p, const uint2& v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y) : "memory");
}

// Copies one element from global to shared memory without waiting for it: wait_for_copies() does, and a barrier then
// shows it to the other threads.
template <class T>
__device__ __forceinline__ void copy_async(T* shared, const T* global) {
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(__cvta_generic_to_global(global)),
               "n"(sizeof(T))
               : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif

// To global memory.
__device__ __forceinline__ void store_vector(float* p, const Vec<float>& vector) {
  store_whole(reinterpret_cast<float4*>(p), make_float4(vector.v[0], vector.v[1], vector.v[2], vector.v[3]));
}
__device__ __forceinline__ void store_vector(double* p, const Vec<double>& vector) {
  store_whole(reinterpret_cast<double2*>(p), make_double2(vector.v[0], vector.v[1]));
}

template <class T>
Strided<const T> read_only(const Strided<T>& x) {
  return {x.data, x.sample, x.channel, x.position};
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); }

// The sum over the threads of a block, in thread 0; always added in the same order. Whole warps, all threads call it.
__device__ __forceinline__ double block_sum(double value) {
  PYGLOW_SHARED(double, warp_sums, block_threads / warp_threads);
#pragma unroll
  for (int offset = warp_threads / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  const int thread = thread_index();
  __syncthreads();  // the sums of an earlier call have been read
  if (thread % warp_threads == 0) warp_sums[thread / warp_threads] = value;
  __syncthreads();
  double sum = 0;
  if (thread == 0)
    for (int warp = 0; warp < static_cast<int>(blockDim.x * blockDim.y) / warp_threads; ++warp) sum += warp_sums[warp];
  return sum;
}

}  // namespace pyglow::cuda
