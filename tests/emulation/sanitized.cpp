// Runs every kernel on small grids in memory of the exact size, to be built with a sanitizer. Prints "done" at the end.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <memory>

#include "driver.h"

namespace {

using pyglow::Order;
using pyglow::ScaleMap;
using pyglow::Strided;

// A (N, C, P) tensor whose last element is the last of its allocation.
template <class T>
class Tensor {
 public:
  Tensor(int64_t n, int64_t c, int64_t p, bool channels_last, unsigned seed)
      : size_(n * c * p), memory_(static_cast<T*>(std::malloc(size_ * sizeof(T)))) {
    for (int64_t i = 0; i < size_; ++i) memory_[i] = seed ? std::sin(T(i) * T(0.7) + T(seed)) : T(NAN);
    view_ = channels_last ? Strided<T>{memory_, c * p, 1, c} : Strided<T>{memory_, c * p, p, 1};
  }
  ~Tensor() { std::free(memory_); }
  Tensor(const Tensor&) = delete;

  Strided<const T> in() const { return {view_.data, view_.sample, view_.channel, view_.position}; }
  Strided<T> out() const { return view_; }
  T* data() const { return memory_; }
  void expect_written(const char* name) const {
    for (int64_t i = 0; i < size_; ++i)
      if (std::isnan(memory_[i])) throw std::runtime_error(std::string(name) + ": NaN in the result");
  }

 private:
  int64_t size_;
  T* memory_;
  Strided<T> view_;
};

struct Shape {
  int64_t n, c, p;
};

template <class T>
void mixes(const Shape& s, bool channels_last) {
  const Tensor<T> x(s.n, s.c, s.p, channels_last, 1), grad_u(s.n, s.c, s.p, channels_last, 2);
  const Tensor<T> matrix(1, s.c, s.c, false, 3), offset(1, s.c, 1, false, 4);
  for (const bool subtract_first : {false, true}) {
    const Tensor<T> u(s.n, s.c, s.p, channels_last, 0);
    driver::run(
        pyglow::ChannelMixArgs<T>{x.in(), matrix.data(), offset.data(), u.out(), s.n, s.c, s.p, subtract_first});
    u.expect_written("channel_mix");
  }
  const Tensor<T> grad_x(s.n, s.c, s.p, channels_last, 0), grad_matrix(1, s.c, s.c, false, 0);
  const Tensor<T> grad_offset(1, s.c, 1, false, 0);
  driver::run(pyglow::ChannelMixBackwardArgs<T>{x.in(), grad_u.in(), matrix.data(), offset.data(), grad_x.out(),
                                                grad_matrix.data(), grad_offset.data(), s.n, s.c, s.p});
  grad_x.expect_written("grad_x");
  grad_matrix.expect_written("grad_matrix");
  grad_offset.expect_written("grad_offset");
}

template <class T>
void couplings(const Shape& s, bool channels_last, ScaleMap map, Order order, bool inverse) {
  const int64_t transformed = (s.c + 1) / 2, net_channels = map == ScaleMap::none ? transformed : 2 * transformed;
  const pyglow::CouplingKind<T> kind = {map, order, inverse, {T(2), T(0.1), T(2)}};
  const Tensor<T> in(s.n, s.c, s.p, channels_last, 1), net_out(s.n, net_channels, s.p, channels_last, 2);
  const Tensor<T> out(s.n, s.c, s.p, channels_last, 0), log_det(s.n, 1, 1, false, 0);
  driver::run(
      pyglow::CouplingArgs<T>{in.in(), net_out.in(), out.out(), log_det.data(), s.n, s.c, transformed, s.p, kind});
  out.expect_written("coupling");
  log_det.expect_written("log_det");

  const Tensor<T> grad_out(s.n, s.c, s.p, channels_last, 3), grad_log_det(s.n, 1, 1, false, 4);
  const Tensor<T> recovered(s.n, s.c, s.p, channels_last, 0), grad_in(s.n, s.c, s.p, channels_last, 0);
  const Tensor<T> grad_net_out(s.n, net_channels, s.p, channels_last, 0);
  driver::run(pyglow::CouplingBackwardArgs<T>{out.in(), net_out.in(), grad_out.in(), grad_log_det.data(),
                                              recovered.out(), grad_in.out(), grad_net_out.out(), s.n, s.c, transformed,
                                              s.p, kind});
  recovered.expect_written("in");
  grad_in.expect_written("grad_in");
  grad_net_out.expect_written("grad_net_out");
}

template <class T>
void all() {
  // Vector path and tail, one block and several, several groups and chunks of channels, one sample and several.
  for (const Shape& s : {Shape{1, 3, 5}, Shape{2, 4, 16}, Shape{1, 12, 180}, Shape{3, 37, 4}, Shape{1, 70, 8}}) {
    for (const bool channels_last : {false, true}) {
      mixes<T>(s, channels_last);
      couplings<T>(s, channels_last, ScaleMap::sigmoid, Order::shift_scale, false);
    }
  }
  // Two splits of the positions with several tiles each.
  mixes<T>({1, 6, 1204}, false);
  mixes<T>({1, 6, 1205}, false);
  couplings<T>({1, 6, 1205}, false, ScaleMap::sigmoid, Order::shift_scale, false);
  for (const ScaleMap map :
       {ScaleMap::none, ScaleMap::sigmoid, ScaleMap::sigmoid_eps, ScaleMap::exp, ScaleMap::tanh, ScaleMap::atan})
    for (const Order order : {Order::shift_scale, Order::scale_shift})
      for (const bool inverse : {false, true})
        for (const int64_t positions : {4, 5}) couplings<T>({2, 4, positions}, false, map, order, inverse);
}

}  // namespace

int main() {
  try {
    for (const unsigned seed : {0, 3}) {
      emu::schedule_seed = seed;
      all<float>();
      all<double>();
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("done\n");
}
