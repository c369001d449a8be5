// What the two processes agree on: the module that torch calls, and the program that has the kernels.
//
// Tensors lie in one file that both map at one address, so that a pointer means the same to both, and structures of
// core.h are the same bytes: both processors have 64-bit pointers, little-endian numbers and one alignment of each
// type.
#pragma once
#include <unistd.h>

#include <cstdint>
#include <stdexcept>

#include "core.h"

namespace calls {

inline void* const memory = reinterpret_cast<void*>(int64_t{0x200000000000});
constexpr int64_t memory_bytes = int64_t{1} << 33;  // of which pages exist once they are written

enum class Kernel : int64_t {
#define PYGLOW_NAME(kernel, Args) kernel,
  PYGLOW_KERNELS(PYGLOW_NAME) PYGLOW_CPU_KERNELS(PYGLOW_NAME) PYGLOW_NET_KERNELS(PYGLOW_NAME)
#undef PYGLOW_NAME
};

// Followed by the kernel's arguments, which are so many bytes. The answer is the length of an error's text, and that.
struct Call {
  Kernel kernel;
  int64_t is_double, bytes;
};

// All bytes, through a pipe; an end of it before the first of them is `false`.
inline bool receive(int pipe, void* to, int64_t bytes) {
  for (int64_t done = 0; done < bytes;) {
    const int64_t count = read(pipe, static_cast<char*>(to) + done, bytes - done);
    if (count == 0 && done == 0) return false;
    if (count <= 0) throw std::runtime_error("the other process ended within a message");
    done += count;
  }
  return true;
}

inline void send(int pipe, const void* from, int64_t bytes) {
  for (int64_t done = 0; done < bytes;) {
    const int64_t count = write(pipe, static_cast<const char*>(from) + done, bytes - done);
    if (count <= 0) throw std::runtime_error("the kernels' process: it ended before a call");
    done += count;
  }
}

}  // namespace calls
