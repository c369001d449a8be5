// Calls the entry points of pyglow::cuda as the bindings do: scratch memory of the exact size, filled with NaN bytes.
#pragma once
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core.h"

namespace driver {

constexpr int64_t max_scratch_bytes = 16 << 20;

// What a call takes of device memory, freed after it.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  pyglow::cuda::Queue queue() { return {nullptr, &allocate, this}; }

 private:
  static void* allocate(int64_t bytes, void* context) {
    if (bytes > max_scratch_bytes) throw std::runtime_error("scratch memory of " + std::to_string(bytes) + " bytes");
    void*& memory = static_cast<Scratch*>(context)->memory_;
    if (memory != nullptr) throw std::runtime_error("a second piece of scratch memory");
    memory = std::malloc(bytes);
    return std::memset(memory, 0xff, bytes);
  }

  void* memory_ = nullptr;
};

#define PYGLOW_RUN(kernel, Args)                                                 \
  template <class T>                                                             \
  void run(const pyglow::Args<T>& args) {                                        \
    Scratch scratch;                                                             \
    const int error = pyglow::cuda::kernel(args, scratch.queue());               \
    if (error != 0) throw std::runtime_error(pyglow::cuda::error_string(error)); \
  }
PYGLOW_KERNELS(PYGLOW_RUN)
#undef PYGLOW_RUN

}  // namespace driver
