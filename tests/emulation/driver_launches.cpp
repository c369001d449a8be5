// The C interface to the record of launches, which emulator.py reads.
#include <dlfcn.h>

#include <algorithm>

#include "interface.h"

namespace {

// The kernel by its distance from the library's beginning, as the symbol table has it.
struct Launch {
  int64_t kernel, blocks, x, y, dynamic_bytes;
};

Launch launch_of(const emu::Launched& launched) {
  Dl_info library = {};
  dladdr(launched.kernel, &library);
  const int64_t offset = static_cast<const char*>(launched.kernel) - static_cast<const char*>(library.dli_fbase);
  return {offset, launched.grid.x, launched.block.x, launched.block.y, static_cast<int64_t>(launched.dynamic_bytes)};
}

}  // namespace

extern "C" {

void emulated_only_recorded(int only) { emu::only_recorded = only != 0; }

void emulated_multiprocessors(int64_t number) { multiprocessors = number; }

// Fills `out` with the launches of this thread's last call, as far as there is room, and returns how many they were.
int64_t emulated_launches(Launch* out, int64_t room) {
  const int64_t count = static_cast<int64_t>(emu::launched.size());
  for (int64_t i = 0; i < std::min(count, room); ++i) out[i] = launch_of(emu::launched[i]);
  return count;
}

}  // extern "C"
