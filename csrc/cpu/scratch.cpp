#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace pyglow::cpu {
namespace {

constexpr std::size_t alignment = 64;

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }

  void* at_least(std::size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = 0;
      const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
      memory_ = std::aligned_alloc(alignment, rounded);
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  std::size_t size_ = 0;
};

Buffer& buffer_of(Scratch kind) {
  thread_local Buffer buffers[3];
  return buffers[static_cast<int>(kind)];
}

}  // namespace

void* thread_scratch(Scratch kind, std::size_t bytes) { return buffer_of(kind).at_least(bytes); }

}  // namespace pyglow::cpu
