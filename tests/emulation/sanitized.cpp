// Runs every kernel on small grids in memory of the exact size, to be built with a sanitizer. Prints "done" at the end.
#include <cstdio>

#include "sanitized.h"

int main() {
  try {
    for (const unsigned seed : {0, 3}) {
      emu::schedule_seed = seed;
      sanitized::couplings();
      sanitized::fused();
      sanitized::mixes();
      sanitized::statistics();
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("done\n");
}
