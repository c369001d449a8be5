#include "sanitized.h"

namespace sanitized {
namespace {

// Matrices of sines, which are regular with ones added to the diagonal.
template <class T>
void run(int64_t count, int64_t channels) {
  const Tensor<T> matrices(count, channels, channels, false, 1), inverses(count, channels, channels, false, 0);
  const Tensor<T> log_dets(count, 1, 1, false, 0);
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < channels; ++i) matrices.data()[(k * channels + i) * channels + i] += T(channels);
  driver::run(pyglow::InvertMatricesArgs<T>{.matrices = matrices.data(),
                                            .inverses = inverses.data(),
                                            .log_dets = log_dets.data(),
                                            .count = count,
                                            .channels = channels});
  inverses.expect_written("inverses");
  log_dets.expect_written("log_dets");
}

template <class T>
void all() {
  run<T>(5, 3);  // more matrices than blocks
  run<T>(1, 8);
  run<T>(3, 33);
  run<T>(3, 78);  // in scratch memory
}

}  // namespace

void inverses() {
  all<float>();
  if constexpr (in_double) all<double>();
}

}  // namespace sanitized
