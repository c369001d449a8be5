// Calls the entry points of pyglow::cuda as the bindings do: scratch memory of the exact size, filled with NaN bytes.
// Without AddressSanitizer, which knows its end, the bytes behind it must stay as they are.
#pragma once
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core.h"

namespace driver {

constexpr int64_t max_scratch_bytes = 16 << 20;
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t guard_bytes = 0;
#else
constexpr int64_t guard_bytes = 4096;
#endif

// What a call takes of device memory, freed after it.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  pyglow::cuda::Queue queue() { return {nullptr, &allocate, this}; }
  void expect_inside() const {
    for (int64_t i = 0; memory_ != nullptr && i < guard_bytes; ++i)
      if (static_cast<const unsigned char*>(memory_)[bytes_ + i] != 0xff)
        throw std::runtime_error("memory behind the scratch memory was written");
  }

 private:
  static void* allocate(int64_t bytes, void* context) {
    if (bytes > max_scratch_bytes) throw std::runtime_error("scratch memory of " + std::to_string(bytes) + " bytes");
    Scratch& scratch = *static_cast<Scratch*>(context);
    if (scratch.memory_ != nullptr) throw std::runtime_error("a second piece of scratch memory");
    scratch.bytes_ = bytes;
    scratch.memory_ = std::malloc(bytes + guard_bytes);
    return std::memset(scratch.memory_, 0xff, bytes + guard_bytes);
  }

  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

#define PYGLOW_RUN(kernel, Args)                                                 \
  template <class T>                                                             \
  void run(const pyglow::Args<T>& args) {                                        \
    Scratch scratch;                                                             \
    const int error = pyglow::cuda::kernel(args, scratch.queue());               \
    if (error != 0) throw std::runtime_error(pyglow::cuda::error_string(error)); \
    scratch.expect_inside();                                                     \
  }
PYGLOW_KERNELS(PYGLOW_RUN)
#undef PYGLOW_RUN

}  // namespace driver
