#include <vector>

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

// Convolutions in LU factors that turn the order of the channels round.
template <class T>
void fold(int64_t count, int64_t channels) {
  const Tensor<T> lower(count, channels, channels, false, 1), upper(count, channels, channels, false, 2);
  const Tensor<T> vectors(4 * count, channels, 1, false, 3);  // log_diag, sign_diag, log_scale, bias
  std::vector<int64_t> order(channels);
  for (int64_t i = 0; i < channels; ++i) order[i] = channels - 1 - i;
  const std::vector<const int64_t*> orders(count, order.data());
  std::vector<const T*> of[6];
  for (int64_t k = 0; k < count; ++k) {
    of[0].push_back(lower.data() + k * channels * channels);
    of[1].push_back(upper.data() + k * channels * channels);
    for (int64_t i = 0; i < 4; ++i) of[2 + i].push_back(vectors.data() + (i * count + k) * channels);
  }
  const pyglow::Factors<T> factors = {orders.data(), of[0].data(), of[1].data(), of[2].data(), of[3].data(),
                                      of[4].data(),  of[5].data(), count,        channels};
  const Tensor<T> matrices(count, channels, channels, false, 0), offsets(count, channels, 1, false, 0);
  const Tensor<T> log_dets(count, 1, 1, false, 0), of_lower(count, channels, channels, false, 0);
  const Tensor<T> of_upper(count, channels, channels, false, 0), of_vectors(3 * count, channels, 1, false, 0);
  driver::run(pyglow::FoldArgs<T>{factors, matrices.data(), offsets.data(), log_dets.data()});
  matrices.expect_written("matrices");
  offsets.expect_written("offsets");
  log_dets.expect_written("log_dets");
  T* const of_rest = of_vectors.data();
  driver::run(pyglow::FoldBackwardArgs<T>{factors, matrices.data(), offsets.data(), log_dets.data(), of_lower.data(),
                                          of_upper.data(), of_rest, of_rest + count * channels,
                                          of_rest + 2 * count * channels});
  of_lower.expect_written("grad_lower");
  of_upper.expect_written("grad_upper");
  of_vectors.expect_written("grad_log_diag, grad_log_scale, grad_bias");
}

template <class T>
void all() {
  fold<T>(66, 3);  // more maps than a launch takes
  fold<T>(1, 70);  // more channels than threads
  run<T>(5, 3);    // more matrices than blocks
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
