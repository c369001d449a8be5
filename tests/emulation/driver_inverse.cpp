// The C interface to the inverses of matrices that emulator.py calls.
#include "interface.h"

using driver::Sizes;

extern "C" {

const char* emulated_invert_matrices(int is_double, unsigned seed, Sizes sizes, const void* matrices, void* inverses,
                                     void* log_dets) {
  return driver::guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::InvertMatricesArgs<T>{.matrices = static_cast<const T*>(matrices),
                                              .inverses = static_cast<T*>(inverses),
                                              .log_dets = static_cast<T*>(log_dets),
                                              .count = sizes.samples,
                                              .channels = sizes.channels});
  });
}

}  // extern "C"
