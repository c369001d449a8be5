// Shared memory: heap blocks of the exact size, so that AddressSanitizer sees their ends, filled with NaN bytes for
// every block of threads, so that what a kernel forgot to write, or reads before a barrier, spoils its results.
#pragma once
#include "emu/machine.h"

namespace emu {

constexpr size_t max_dynamic_bytes = 48 * 1024;  // more needs a function attribute, which no kernel here sets
constexpr size_t arena_bytes = size_t{256} << 20;

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

EMU_HIDDEN void* dynamic_shared() { return shared_memory(&machine, machine.dynamic_bytes); }

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
