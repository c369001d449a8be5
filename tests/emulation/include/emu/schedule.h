// Running a launch: one fiber per CUDA thread, the blocks one after another on the calling thread.
#pragma once
#include <utility>

#include "emu/shared_memory.h"

namespace emu {

constexpr size_t max_tsan_threads = 7000;  // ThreadSanitizer has 8128 slots

EMU_HIDDEN void call_body() {
  try {
    (*machine.body)();
    if (next_copy() != nullptr) throw Error("a thread ended without waiting for its copies");
  } catch (...) {
    machine.failure = std::current_exception();
  }
}

EMU_HIDDEN void fiber_entry() {
  entered(machine.scheduler);
  call_body();
#ifdef EMU_TSAN
  __tsan_release(&machine.done_tag);
#endif
  wait_for(Wait::finished, {});
  abort();
}

EMU_HIDDEN void start_fiber(Fiber& fiber, dim3 index, unsigned linear) {
  if (!prepare(fiber.context, fiber_entry)) throw Error("no memory for the stacks of a block");
#ifdef EMU_TSAN
  // Destroyed at the end of the launch only: a slot used again would hide races between blocks.
  if (fiber.context.tsan_fiber != nullptr) machine.dead_fibers.push_back(fiber.context.tsan_fiber);
  if (machine.dead_fibers.size() > max_tsan_threads) throw Error("the grid is too large for ThreadSanitizer");
  fiber.context.tsan_fiber = __tsan_create_fiber(0);
#endif
  fiber.index = index;
  fiber.linear = linear;
  fiber.wait = Wait::nothing;
  fiber.parity = fiber.barriers = fiber.openings = 0;
  fiber.copy_count = 0;
}

// Runs one thread until it waits or ends.
EMU_HIDDEN void resume(Fiber& fiber) {
  machine.current = &fiber;
  threadIdx = fiber.index;
  enter(machine.scheduler, fiber.context);
  if (machine.failure) std::rethrow_exception(std::exchange(machine.failure, nullptr));
}

// Lets go the lanes of one warp, threads [begin, end), if all wait at one shuffle; true if they do.
EMU_HIDDEN bool release_warp(unsigned begin, unsigned end) {
  std::vector<Fiber>& fibers = machine.fibers;
  for (unsigned t = begin; t < end; ++t)
    if (fibers[t].wait != Wait::warp || !(fibers[t].site == fibers[begin].site)) return false;
  for (unsigned t = begin; t < end; ++t) fibers[t].wait = Wait::nothing;
  return true;
}

[[noreturn]] EMU_HIDDEN void report_deadlock(unsigned threads, unsigned at_barrier) {
  for (const Fiber& fiber : machine.fibers) {
    if (fiber.wait == Wait::warp)
      throw Error("a warp operation waits for lanes that never come: " + fiber.site.text() + ", thread " +
                  std::to_string(fiber.linear));
    if (fiber.wait == Wait::block && at_barrier < threads)
      throw Error("__syncthreads reached by " + std::to_string(at_barrier) + " of " + std::to_string(threads) +
                  " threads: " + fiber.site.text());
  }
  throw Error("the threads of a block wait at different __syncthreads");
}

struct Random {
  unsigned state;
  unsigned below(unsigned n) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % n;
  }
};

// True if all threads stand at the same barrier, which then opens; false if all have ended.
EMU_HIDDEN bool open_barrier(unsigned threads) {
  std::vector<Fiber>& fibers = machine.fibers;
  unsigned live = 0, waiting = 0;
  for (unsigned t = 0; t < threads; ++t) {
    live += fibers[t].wait != Wait::finished;
    waiting += fibers[t].wait == Wait::block;
  }
  if (live == 0) return false;
  for (unsigned t = 0; t < threads; ++t)
    if (waiting != threads || !(fibers[t].site == fibers[0].site)) report_deadlock(threads, waiting);
  for (unsigned t = 0; t < threads; ++t) fibers[t].wait = Wait::nothing;
  return true;
}

EMU_HIDDEN void run_block(unsigned block, Random& random) {
  Machine& m = machine;
  blockIdx = block;
  const unsigned threads = blockDim.x * blockDim.y;
  const unsigned warps = (threads + warp_lanes - 1) / warp_lanes;
  unsigned t = 0;
  for (unsigned y = 0; y < blockDim.y; ++y)
    for (unsigned x = 0; x < blockDim.x; ++x, ++t) start_fiber(m.fibers[t], {x, y}, t);
  do {
    const unsigned first_warp = schedule_seed ? random.below(warps) : 0;
    for (unsigned w = 0; w < warps; ++w) {
      const unsigned begin = (w + first_warp) % warps * warp_lanes, end = std::min(threads, begin + warp_lanes);
      do {
        const unsigned flip = schedule_seed ? random.below(warp_lanes) : 0;  // lanes in an order mirrored by xor
        for (unsigned k = 0; k < warp_lanes; ++k) {
          const unsigned i = begin + (k ^ flip);
          if (i < end && m.fibers[i].wait == Wait::nothing) resume(m.fibers[i]);
        }
      } while (release_warp(begin, end));
    }
  } while (open_barrier(threads));
}

// What must be undone however a launch ends.
struct Launch {
  Launch() { open_shared(); }
  ~Launch() {
    close_shared();
#ifdef EMU_TSAN
    __tsan_acquire(&machine.done_tag);
    for (void* fiber : machine.dead_fibers) __tsan_destroy_fiber(fiber);
    machine.dead_fibers.clear();
#endif
  }
};

// A record of what was launched, for tests that look at grids: by the operating system's thread, since it was last
// cleared.
struct Launched {
  const void* kernel;
  unsigned blocks, threads;
};
inline thread_local std::vector<Launched> launched;
// Whether launches are recorded and not run; outputs then stay as they are.
inline thread_local bool only_recorded = false;

// False, with nothing run, if CUDA would refuse the configuration.
EMU_HIDDEN bool launch(const void* kernel, unsigned blocks, dim3 block, size_t dynamic_bytes,
                       const std::function<void()>& body) {
  const unsigned threads = block.x * block.y;
  launched.push_back({kernel, blocks, threads});
  const bool fits =
      blocks > 0 && blocks < 1u << 31 && threads > 0 && threads <= 1024 && dynamic_bytes <= max_dynamic_bytes;
  if (!fits || only_recorded) return fits;
  Machine& m = machine;
  blockDim = block;
  gridDim = blocks;
  m.body = &body;
  m.dynamic_bytes = dynamic_bytes;
  m.fibers.resize(std::max<size_t>(m.fibers.size(), threads));
  for (Fiber& fiber : m.fibers) fiber.wait = Wait::finished;
#ifdef EMU_TSAN
  m.scheduler.tsan_fiber = __tsan_get_current_fiber();
#endif
  const Launch all;
  Random random = {schedule_seed * 2654435761u};
  const uint64_t first = schedule_seed ? random.below(std::min(blocks, 1u << 20)) : 0;
  for (unsigned b = 0; b < blocks; ++b) {
    const unsigned index = static_cast<unsigned>((b + first) % blocks);
    run_block(schedule_seed % 2 == 1 ? blocks - 1 - index : index, random);
    next_shared();
  }
  return true;
}

}  // namespace emu
