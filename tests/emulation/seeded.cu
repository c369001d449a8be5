// A sum over blocks, warps and lanes with one bug at a time, named by the argument: what the emulator and the
// sanitizers must find. Prints the sum, or what the emulator says. Without an argument, or for "none", there is no bug.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifndef PYGLOW_BLOCK_THREADS
#define PYGLOW_BLOCK_THREADS 64
#endif

namespace {

constexpr int threads = PYGLOW_BLOCK_THREADS, warps = threads / 32, blocks = 4, rounds = 2;
constexpr int vectors = rounds * blocks * threads;

struct alignas(16) Float4 {
  float v[4];
};
struct alignas(8) Float2 {
  float v[2];
};

const char* seeded = "none";
bool has(const char* bug) { return std::strcmp(seeded, bug) == 0; }

__device__ float warp_sum(float value) {
  if (has("no_warp_reduction")) return value;
  if (has("absent_lanes") && threadIdx.x % 32 >= 16) return value;
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__global__ void sum_kernel(const float* x, float* block_sums) {
  PYGLOW_SHARED(float, warp_sums, warps);
  DynamicShared shared;
  float* const firsts = shared.take<float>(threads);
  float* const lasts = shared.take<float>(threads);
  float total = 0;
  if (has("early_return") && threadIdx.x < threads / 2) return;
  for (int round = 0; round < rounds; ++round) {
    const int index = (round * blocks + blockIdx.x) * threads + threadIdx.x;
    const float* at = x + 4 * index + (has("out_of_bounds") ? 4 : 0) + (has("misaligned") ? 1 : 0);
    const Float4 loaded = *static_cast<const Float4*>(__builtin_assume_aligned(at, 16));
    const Float2 pair = *reinterpret_cast<const Float2*>(at + (has("misaligned_pair") ? 1 : 0));
    copy_async(&firsts[threadIdx.x], at);
    copy_async(has("array_overrun") ? &firsts[threads + threadIdx.x] : &lasts[threadIdx.x], at + 3);
    if (!has("no_wait")) wait_for_copies();
    const float sum = warp_sum(firsts[threadIdx.x] + pair.v[1] + loaded.v[2] + lasts[threadIdx.x]);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32 + (has("shared_overrun") ? 1 : 0)] = sum;
    const bool waits = !has("no_barrier") && (!has("no_full_barrier") || threads < 256);
    if (waits && (!has("divergent_barrier") || threadIdx.x < threads / 2)) __syncthreads();
    // Not the first thread: it would find its own warp's sum even without the barrier.
    if (threadIdx.x == threads - 32)
      for (int warp = 0; warp < warps; ++warp) total += warp_sums[warp];
    if (!has("no_second_barrier")) __syncthreads();
  }
  if (threadIdx.x != threads - 32) return;
  if (has("no_block_reduction")) {
    block_sums[0] += total;
  } else {
    block_sums[blockIdx.x] = total;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) seeded = argv[1];
  emu::schedule_seed = 1;  // the last warp first: a missing barrier then shows
  // Exact sizes, so that AddressSanitizer knows the ends.
  float* const x = static_cast<float*>(std::malloc(4 * vectors * sizeof(float)));
  float* const block_sums = static_cast<float*>(std::calloc(blocks, sizeof(float)));
  for (int i = 0; i < 4 * vectors; ++i) x[i] = 1.f;
  try {
    cudaLaunchConfig_t config;
    config.gridDim = blocks;
    config.blockDim = threads;
    config.dynamicSmemBytes = 2 * threads * sizeof(float);
    cudaLaunchKernelEx(&config, sum_kernel, x, block_sums);
    float sum = 0;
    for (int block = 0; block < blocks; ++block) sum += block_sums[block];
    std::printf("%g of %d\n", sum, 4 * vectors);
  } catch (const emu::Error& error) {
    std::printf("%s\n", error.what());
  }
  std::free(x);
  std::free(block_sums);
}
