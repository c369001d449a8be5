// Calls the entry points of pyglow::cuda as the bindings do: scratch memory of the exact size, filled with NaN bytes.
#pragma once
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core.h"

namespace driver {

constexpr int64_t max_scratch_bytes = 16 << 20;

class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(std::malloc(bytes)) {
    if (bytes > max_scratch_bytes) throw std::runtime_error("scratch memory of " + std::to_string(bytes) + " bytes");
    std::memset(memory_, 0xff, bytes);
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  void* get() const { return memory_; }

 private:
  void* memory_;
};

inline void check(int error) {
  if (error != 0) throw std::runtime_error(pyglow::cuda::error_string(error));
}

template <class T>
void run(const pyglow::ChannelMixArgs<T>& args) {
  check(pyglow::cuda::channel_mix(args, nullptr));
}
template <class T>
void run(const pyglow::ChannelMixBackwardArgs<T>& args) {
  const Scratch scratch(pyglow::cuda::channel_mix_backward_scratch<T>(args.samples, args.channels, args.positions));
  check(pyglow::cuda::channel_mix_backward(args, scratch.get(), nullptr));
}
template <class T>
void run(const pyglow::ChannelMomentsArgs<T>& args) {
  const Scratch scratch(pyglow::cuda::channel_moments_scratch(args));
  check(pyglow::cuda::channel_moments(args, scratch.get(), nullptr));
}
template <class T>
void run(const pyglow::GaussianArgs<T>& args) {
  const Scratch scratch(pyglow::cuda::gaussian_log_prob_scratch(args.samples, args.channels, args.positions));
  check(pyglow::cuda::gaussian_log_prob(args, scratch.get(), nullptr));
}
template <class T>
void run(const pyglow::GaussianBackwardArgs<T>& args) {
  check(pyglow::cuda::gaussian_log_prob_backward(args, nullptr));
}
template <class T>
void run(const pyglow::GaussianSampleArgs<T>& args) {
  check(pyglow::cuda::gaussian_sample(args, nullptr));
}
template <class T>
void run(const pyglow::CouplingArgs<T>& args) {
  const Scratch scratch(pyglow::cuda::coupling_scratch(args.samples, args.transformed, args.positions));
  check(pyglow::cuda::coupling(args, scratch.get(), nullptr));
}
template <class T>
void run(const pyglow::CouplingBackwardArgs<T>& args) {
  check(pyglow::cuda::coupling_backward(args, nullptr));
}

template <class T>
void run(const pyglow::CouplingMixArgs<T>& args) {
  const Scratch scratch(pyglow::cuda::coupling_mix_scratch<T>(args.coupling.samples, args.coupling.positions));
  check(pyglow::cuda::coupling_mix(args, scratch.get(), nullptr));
}
template <class T>
void run(const pyglow::CouplingMixBackwardArgs<T>& args) {
  const Scratch scratch(pyglow::cuda::coupling_mix_backward_scratch<T>(args.samples, args.channels, args.positions));
  check(pyglow::cuda::coupling_mix_backward(args, scratch.get(), nullptr));
}
template <class T>
void run(const pyglow::StepBackwardArgs<T>& args) {
  check(pyglow::cuda::step_backward(args, nullptr));
}

}  // namespace driver
