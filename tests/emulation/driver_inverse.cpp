// The C interface to what is done with matrices alone that emulator.py calls.
#include "interface.h"

using driver::Sizes;

namespace {

// The addresses of all maps, parameter by parameter.
template <class T>
pyglow::Factors<T> factors_of(const Sizes& sizes, const void* const* table) {
  const auto of = [&](int i) { return reinterpret_cast<const T* const*>(table + i * sizes.samples); };
  return {reinterpret_cast<const int64_t* const*>(table),
          of(1),
          of(2),
          of(3),
          of(4),
          of(5),
          of(6),
          sizes.samples,
          sizes.channels};
}

}  // namespace

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

const char* emulated_fold(int is_double, unsigned seed, Sizes sizes, const void* const* table, void* matrices,
                          void* offsets, void* log_dets) {
  return driver::guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::FoldArgs<T>{factors_of<T>(sizes, table), static_cast<T*>(matrices), static_cast<T*>(offsets),
                                    static_cast<T*>(log_dets)});
  });
}

// grads: of matrices, offsets and log_dets; results: of lower, upper, log_diag, log_scale and bias.
const char* emulated_fold_backward(int is_double, unsigned seed, Sizes sizes, const void* const* table,
                                   const void* const* grads, void* const* results) {
  return driver::guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    const auto in = [&](int i) { return static_cast<const T*>(grads[i]); };
    const auto out = [&](int i) { return static_cast<T*>(results[i]); };
    driver::run(pyglow::FoldBackwardArgs<T>{factors_of<T>(sizes, table), in(0), in(1), in(2), out(0), out(1), out(2),
                                            out(3), out(4)});
  });
}

}  // extern "C"
