// Barriers and the exchange of registers within a warp, as far as the kernels use them.
#pragma once
#include "emu/machine.h"

namespace emu {

EMU_HIDDEN void sync_threads(Site site) {
#ifdef EMU_TSAN
  char* const tag = &machine.block_tags[machine.block_tag][machine.current->barriers++ % 2];
  __tsan_release(tag);
#endif
  wait_for(Wait::block, site);
#ifdef EMU_TSAN
  __tsan_acquire(tag);
#endif
}

// The value of another lane of the warp, all of whose lanes meet here. Two buffers take turns, so that a lane may
// already write the next value while another still reads this one.
EMU_HIDDEN uint64_t exchange_bits(uint64_t bits, unsigned source, Site site) {
  Fiber& fiber = *machine.current;
  uint64_t* const buffer = machine.exchange[fiber.parity][warp()];
  fiber.parity ^= 1;
  buffer[lane()] = bits;
  wait_for(Wait::warp, site);
  return buffer[source];
}

template <class T>
T shuffle_xor(Site site, unsigned mask, T value, unsigned by) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move up to 8 bytes");
  if (mask != all_lanes) throw Error("the emulator has no shuffles of a part of a warp: " + site.text());
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange_bits(bits, lane() ^ by, site);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emu
