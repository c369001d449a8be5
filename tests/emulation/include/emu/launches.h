// A record of what was launched, for tests that look at grids and for what executes the compiled kernels.
#pragma once
#include <cstring>

#include "emu/schedule.h"

namespace emu {

struct Launched {
  const void* kernel;
  dim3 grid, block;
  uint64_t dynamic_bytes;
  std::vector<unsigned char> parameters;  // the arguments, as a kernel finds them in its constant memory
};
// By the operating system's thread, since it was last cleared.
inline thread_local std::vector<Launched> launched;
// Whether launches are recorded and not run; outputs then stay as they are.
inline thread_local bool only_recorded = false;

template <class T>
void append(std::vector<unsigned char>& parameters, const T& value) {
  const size_t at = (parameters.size() + alignof(T) - 1) / alignof(T) * alignof(T);
  parameters.resize(at + sizeof(T));
  std::memcpy(parameters.data() + at, &value, sizeof(T));
}

EMU_HIDDEN bool launch(const void* kernel, dim3 grid, dim3 block, size_t dynamic_bytes,
                       std::vector<unsigned char> parameters, const std::function<void()>& body) {
  launched.push_back({kernel, grid, block, dynamic_bytes, std::move(parameters)});
  return only_recorded ? valid(grid, block, dynamic_bytes) : run_grid(grid, block, dynamic_bytes, body);
}

}  // namespace emu
