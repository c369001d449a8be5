// Shared memory: heap blocks of the exact size, so that AddressSanitizer sees their ends, filled with NaN bytes for
// every block of threads, so that what a kernel forgot to write, or reads before a barrier, spoils its results.
#pragma once
#include "emu/machine.h"

namespace emu {

constexpr size_t max_dynamic_bytes = 48 * 1024;  // more needs a function attribute, which no kernel here sets
constexpr size_t arena_bytes = size_t{256} << 20;
constexpr size_t fence_bytes = 1024;

EMU_HIDDEN void poison(char* data, size_t bytes) {
  for (volatile char* p = data; bytes > 0; --bytes, ++p) *p = static_cast<char>(0xff);
}

// The block's shared memory that `key` stands for.
EMU_HIDDEN void* shared_memory(const void* key, size_t bytes) {
  Machine& m = machine;
  for (int i = 0; i < m.shared_count; ++i)
    if (m.shared[i].key == key) return m.shared[i].data;
  if (m.shared_count == 16) throw Error("more than 16 shared arrays");
  const size_t room = (bytes + 15) / 16 * 16;
#ifdef EMU_TSAN
  if (m.arena_used + room > arena_bytes) throw Error("the grid is too large for ThreadSanitizer");
  char* const data = m.arena + m.arena_used;
  m.arena_used += room;
#else
  char* const data = static_cast<char*>(aligned_alloc(16, std::max<size_t>(room, 16)));
#endif
  poison(data, bytes);
#ifdef EMU_ASAN
  __asan_poison_memory_region(data + bytes, room - bytes);
#endif
  m.shared[m.shared_count++] = {key, bytes, data};
  return data;
}

// Fences in dynamic shared memory are NaN of any type, and as offsets far away.
constexpr unsigned char fence_pattern[] = {0xad, 0xde, 0xf8, 0x7f};
EMU_HIDDEN void raise_fence(char* fence) {
  volatile char* const p = fence;
  for (size_t i = 0; i < fence_bytes; ++i) p[i] = static_cast<char>(fence_pattern[i % 4]);
#ifdef EMU_ASAN
  __asan_poison_memory_region(fence, fence_bytes);
#endif
  machine.fences[machine.fence_count++] = fence;
}
EMU_HIDDEN void lift_fences() {
  while (machine.fence_count > 0) {
    const char* const fence = machine.fences[--machine.fence_count];
#ifdef EMU_ASAN
    __asan_unpoison_memory_region(fence, fence_bytes);
#endif
    for (size_t i = 0; i < fence_bytes; ++i)
      if (fence[i] != static_cast<char>(fence_pattern[i % 4]))
        throw Error("dynamic shared memory beside an array was written");
  }
}

// Dynamic shared memory as it is on the device, but for the fences before and behind each array.
class DynamicShared {
 public:
  EMU_HIDDEN DynamicShared() : opening_(++machine.current->openings) {}
  template <class T>
  T* take(size_t count) {
    return static_cast<T*>(take(count * sizeof(T), alignof(T)));
  }

 private:
  EMU_HIDDEN void* take(size_t bytes, size_t alignment) {
    Machine& m = machine;
    char* const memory = static_cast<char*>(shared_memory(&m, m.dynamic_bytes + (max_arrays + 1) * fence_bytes));
    if (opening_ < m.openings) throw Error("dynamic shared memory is taken again without a barrier");
    if (opening_ > m.openings) {
      lift_fences();
      raise_fence(memory);
      m.openings = opening_;
    }
    if (used_ % alignment != 0) throw Error("an array in dynamic shared memory is not aligned");
    if (used_ + bytes > m.dynamic_bytes || count_ == max_arrays) throw Error("too little dynamic shared memory");
    char* const array = memory + ++count_ * fence_bytes + used_;
    used_ += bytes;
    if (count_ == m.fence_count) raise_fence(array + bytes);
    if (m.fences[count_] != array + bytes) throw Error("threads take different arrays of dynamic shared memory");
    return array;
  }

  size_t used_ = 0;
  unsigned count_ = 0, opening_;
};

// At the start and the end of a launch and between its blocks.
EMU_HIDDEN void open_shared() {
#ifdef EMU_TSAN
  machine.arena_used = 0;
  machine.arena = static_cast<char*>(
      mmap(nullptr, arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
#endif
}
EMU_HIDDEN void next_shared() {
  Machine& m = machine;
  lift_fences();
  m.openings = 0;
#ifdef EMU_TSAN
  m.shared_count = 0;
  m.block_tag = (m.block_tag + 1) % 4096;
#else
  for (int i = 0; i < m.shared_count; ++i) poison(m.shared[i].data, m.shared[i].bytes);
#endif
}
EMU_HIDDEN void close_shared() {
  Machine& m = machine;
#ifdef EMU_TSAN
  munmap(m.arena, arena_bytes);
#else
  for (int i = 0; i < m.shared_count; ++i) {
#ifdef EMU_ASAN
    __asan_unpoison_memory_region(m.shared[i].data, (m.shared[i].bytes + 15) / 16 * 16);
#endif
    free(m.shared[i].data);
  }
#endif
  m.shared_count = 0;
  m.fence_count = m.openings = 0;
}

// A static shared array, which checks its bounds itself.
template <class T>
struct SharedArray {
  T* data;
  size_t count;
  T& operator[](size_t i) const {
    if (i >= count) throw Error("shared array: index " + std::to_string(i) + " of " + std::to_string(count));
    return data[i];
  }
};

}  // namespace emu
