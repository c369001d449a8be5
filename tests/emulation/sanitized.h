// What the parts of sanitized.cpp share.
#pragma once
#include <cuda_runtime.h>

#include <cmath>

#include "driver.h"
#include "math/half.h"

namespace sanitized {

// A (N, C, P) tensor whose last element is the last of its allocation; NaN without a seed.
template <class T>
class Tensor {
 public:
  Tensor(int64_t n, int64_t c, int64_t p, bool channels_last, unsigned seed)
      : size_(n * c * p), memory_(static_cast<T*>(std::malloc(size_ * sizeof(T)))) {
    for (int64_t i = 0; i < size_; ++i) memory_[i] = seed ? std::sin(T(i) * T(0.7) + T(seed)) : T(NAN);
    view_ = channels_last ? pyglow::Strided<T>{memory_, c * p, 1, c} : pyglow::Strided<T>{memory_, c * p, p, 1};
  }
  ~Tensor() { std::free(memory_); }
  Tensor(const Tensor&) = delete;

  pyglow::Strided<const T> in() const { return {view_.data, view_.sample, view_.channel, view_.position}; }
  pyglow::Strided<T> out() const { return view_; }
  // As they are, and as images whose squeezed width is `width`.
  pyglow::Squeezed<const T> in(int64_t width) const { return {in(), width, 2 * width * view_.position}; }
  pyglow::Squeezed<T> out(int64_t width) const { return {view_, width, 2 * width * view_.position}; }
  T* data() const { return memory_; }
  void expect_written(const char* name) const {
    for (int64_t i = 0; i < size_; ++i)
      if (std::isnan(memory_[i])) throw std::runtime_error(std::string(name) + ": NaN in the result");
  }

 private:
  int64_t size_;
  T* memory_;
  pyglow::Strided<T> view_;
};

// The coupling net's output or room for its gradient: elements of T or of 16 bits.
template <class T>
class Net {
 public:
  Net(int64_t n, int64_t c, int64_t p, bool channels_last, unsigned seed, pyglow::NetType type)
      : size_(n * c * p), wide_(n, c, type == pyglow::NetType::state ? p : 0, channels_last, seed), type_(type) {
    const pyglow::Strided<T> view = Tensor<T>(0, c, p, channels_last, 0).out();
    strides_ = {nullptr, view.sample, view.channel, view.position};
    if (type == pyglow::NetType::state) return;
    bits_ = static_cast<uint16_t*>(std::malloc(size_ * sizeof(uint16_t)));
    for (int64_t i = 0; i < size_; ++i) {
      const float value = seed ? std::sin(i * 0.7f + seed) : NAN;
      pyglow::BFloat16 b;
      pyglow::Float16 f;
      pyglow::math::narrow(value, b);
      pyglow::math::narrow(value, f);
      bits_[i] = type == pyglow::NetType::bfloat16 ? b.bits : f.bits;
    }
  }
  ~Net() { std::free(bits_); }
  Net(const Net&) = delete;

  pyglow::NetOutput in() const { return {data(), type_, strides_.sample, strides_.channel, strides_.position}; }
  pyglow::NetGrad out() const { return {data(), type_, strides_.sample, strides_.channel, strides_.position}; }
  void expect_written(const char* name) const {
    if (bits_ == nullptr) return wide_.expect_written(name);
    const int exponent = type_ == pyglow::NetType::bfloat16 ? 0x7f80 : 0x7c00;
    for (int64_t i = 0; i < size_; ++i)
      if ((bits_[i] & 0x7fff) > exponent) throw std::runtime_error(std::string(name) + ": NaN in the result");
  }

 private:
  void* data() const { return bits_ == nullptr ? static_cast<void*>(wide_.data()) : bits_; }

  int64_t size_;
  Tensor<T> wide_;
  uint16_t* bits_ = nullptr;
  pyglow::NetType type_;
  pyglow::Strided<T> strides_;
};

struct Shape {
  int64_t n, c, p;
};

template <class T>
pyglow::CouplingArgs<T> coupling_args(const Shape& s, const Tensor<T>& in, const Net<T>& net_out, const Tensor<T>& out,
                                      const Tensor<T>& log_det, int64_t transformed,
                                      const pyglow::CouplingKind<T>& kind) {
  return {.in = in.in(),
          .net_out = net_out.in(),
          .out = out.out(),
          .log_det = log_det.data(),
          .samples = s.n,
          .channels = s.c,
          .transformed = transformed,
          .positions = s.p,
          .kind = kind};
}

// The types that the net's output may have beside a state of T.
template <class T>
constexpr int net_types = sizeof(T) == sizeof(float) ? 3 : 1;

constexpr pyglow::ScaleMap maps[] = {pyglow::ScaleMap::none, pyglow::ScaleMap::sigmoid};  // those of PYGLOW_FEW_MAPS
constexpr pyglow::Order orders[] = {pyglow::Order::shift_scale, pyglow::Order::scale_shift};

// ThreadSanitizer takes its time, and the barriers of both are the same.
#ifdef EMU_TSAN
constexpr bool in_double = false;
#else
constexpr bool in_double = true;
#endif

// Run all kernels of a kind, for float and double; throw if a result is not written.
void gathers();
void inverses();
void mixes();
void statistics();
void couplings();
void fused();

}  // namespace sanitized
