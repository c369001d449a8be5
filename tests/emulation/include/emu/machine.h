// What one operating system thread is emulating: the fibers of a block, its shared memory, the launch.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "emu/context.h"

// Grids of the kernels have one dimension, their blocks two.
struct dim3 {
  unsigned x, y;
  constexpr dim3(unsigned a = 1, unsigned b = 1) : x(a), y(b) {}
};

// Of the running CUDA thread.
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

// A fault of the kernel, as far as it can be told: what CUDA calls undefined behaviour.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr unsigned warp_lanes = 32, max_warps = 32;
constexpr unsigned all_lanes = ~0u;
constexpr unsigned max_arrays = 8;    // in dynamic shared memory at a time
constexpr unsigned max_copies = 256;  // that a thread has under way; CUDA knows no limit

// Where a thread waits, so that threads at different barriers are told apart.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site& other) const { return line == other.line && file == other.file; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

enum class Wait : uint8_t { nothing, block, warp, finished };

// From global to shared memory, made when the thread waits for it.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  Context context;
  dim3 index;
  unsigned linear = 0;    // in the block
  unsigned parity = 0;    // which half of the exchange buffer comes next
  unsigned barriers = 0;  // passed so far
  unsigned openings = 0;  // of dynamic shared memory
  Wait wait = Wait::finished;
  Site site{};
  Copy copies[max_copies];  // begun and not yet waited for
  unsigned copy_count = 0;
};

struct SharedBlock {
  const void* key;
  size_t bytes;
  char* data;
};

struct Machine {
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  Context scheduler;
  SharedBlock shared[16];
  int shared_count = 0;
  size_t dynamic_bytes = 0;
  char* fences[max_arrays + 1];  // around its arrays
  unsigned fence_count = 0, openings = 0;
  const std::function<void()>* body = nullptr;
  std::exception_ptr failure;
  uint64_t exchange[2][max_warps][warp_lanes];
  // ThreadSanitizer: what threads synchronise on, shared memory that no two blocks share, fibers to be destroyed.
  // Successive barriers take turns with two tags: a thread that leaves one late would otherwise also learn what the
  // early ones have done since, and races between two barriers would go unseen.
  char block_tags[4096][2], done_tag;
  int block_tag = 0;
  char* arena = nullptr;
  size_t arena_used = 0;
  std::vector<void*> dead_fibers;
};
inline thread_local Machine machine;

// 0: blocks, warps and lanes run in order; any other number: in an order of its own.
inline thread_local unsigned schedule_seed = 0;

EMU_HIDDEN unsigned lane() { return machine.current->linear % warp_lanes; }
EMU_HIDDEN unsigned warp() { return machine.current->linear / warp_lanes; }

EMU_HIDDEN void begin_copy(void* to, const void* from, size_t bytes) {
  Fiber& fiber = *machine.current;
  if (fiber.copy_count == max_copies) throw Error("a thread has more copies under way than the emulator keeps");
  Copy& copy = fiber.copies[fiber.copy_count++];
  copy.to = to;
  copy.from = from;
  copy.bytes = bytes;
}
// The last copy that has not been made; null if there is none.
EMU_HIDDEN const Copy* next_copy() {
  Fiber& fiber = *machine.current;
  return fiber.copy_count == 0 ? nullptr : &fiber.copies[--fiber.copy_count];
}

// Suspends the running thread until what it waits for has happened.
EMU_HIDDEN void wait_for(Wait wait, Site site) {
  Fiber& fiber = *machine.current;
  fiber.wait = wait;
  fiber.site = site;
  leave(fiber.context, machine.scheduler, wait == Wait::finished);
}

}  // namespace emu
