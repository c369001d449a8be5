// A record of what was launched, for tests that look at grids.
#pragma once
#include "emu/schedule.h"

namespace emu {

struct Launched {
  const void* kernel;
  dim3 grid, block;
  uint64_t dynamic_bytes;
};
// By the operating system's thread, since it was last cleared.
inline thread_local std::vector<Launched> launched;
// Whether launches are recorded and not run; outputs then stay as they are.
inline thread_local bool only_recorded = false;

EMU_HIDDEN bool launch(const void* kernel, dim3 grid, dim3 block, size_t dynamic_bytes,
                       const std::function<void()>& body) {
  launched.push_back({kernel, grid, block, dynamic_bytes});
  return only_recorded ? valid(grid, block, dynamic_bytes) : run_grid(grid, block, dynamic_bytes, body);
}

}  // namespace emu
