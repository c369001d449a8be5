// Stands in for CUDA's header of the same name, so that the kernels of csrc/cuda run on the CPU. Test-only.
//
// Covered: the part of the language and of the runtime that the kernels use. Not covered: the device's weak memory
// order, code generation, tensor cores, and anything about speed.
#pragma once
#if !defined(PYGLOW_EMULATE_CUDA)
#error "This is the CUDA emulator of the tests: build with -DPYGLOW_EMULATE_CUDA, or take it off the include path."
#endif
#include <cmath>
#include <cstring>

#include "emu/schedule.h"
#include "emu/sync.h"

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define EMU_SITE \
  emu::Site { __FILE__, __LINE__ }
#define __syncthreads() emu::sync_threads(EMU_SITE)
#define __shfl_xor_sync(...) emu::shuffle_xor(EMU_SITE, __VA_ARGS__)

#define PYGLOW_SHARED(T, name, count) \
  static const char name##_key = 0;   \
  const emu::SharedArray<T> name { static_cast<T*>(emu::shared_memory(&name##_key, sizeof(T) * (count))), count }
using emu::DynamicShared;

namespace emu {
template <class P>
P check_aligned(P pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) throw Error("a vector is not aligned");
  return pointer;
}
}  // namespace emu
// What kernels promise about their vectors is checked here.
#define __builtin_assume_aligned(pointer, bytes) \
  const_cast<void*>(static_cast<const volatile void*>(emu::check_aligned(pointer, bytes)))

// Of the GPU that small grids are cut for; by the operating system's thread.
inline thread_local int64_t multiprocessors = 132;

// Stand in for the assembly of csrc/cuda/device.cuh.
template <class T>
void store_whole(T* p, const T& value) {
  *emu::check_aligned(p, sizeof(T)) = value;
}
template <class T>
void copy_async(T* shared, const T* global) {
  emu::begin_copy(emu::check_aligned(shared, sizeof(T)), emu::check_aligned(global, sizeof(T)), sizeof(T));
}
inline void wait_for_copies() {
  while (const emu::Copy* const copy = emu::next_copy()) std::memcpy(copy->to, copy->from, copy->bytes);
}

using cudaError_t = int;
using cudaStream_t = struct emu_stream*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

// Runs the kernel before it returns, which is one of the orders that a stream allows.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const bool valid = emu::launch(reinterpret_cast<const void*>(kernel), config->gridDim.x, config->blockDim,
                                 config->dynamicSmemBytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
  return valid ? cudaSuccess : cudaErrorInvalidConfiguration;
}
