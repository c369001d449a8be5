// Runs every kernel on small grids in memory of the exact size, to be built with a sanitizer. Prints "done" at the end.
// An argument is the one order of threads to run them in; without it there are two.
#include <cstdio>
#include <cstdlib>

#include "sanitized.h"

int main(int argc, char** argv) {
  try {
    for (const unsigned seed : {0u, 3u}) {
      if (argc > 1 && seed != std::strtoul(argv[1], nullptr, 10)) continue;
      emu::schedule_seed = seed;
      sanitized::couplings();
      sanitized::fused();
      sanitized::gathers();
      sanitized::inverses();
      sanitized::mixes();
      sanitized::statistics();
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("done\n");
}
