// Barriers and the exchange of registers within a warp.
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

// All lanes of the mask meet here.
EMU_HIDDEN void meet(unsigned mask, Site site) {
  if ((mask >> lane() & 1) == 0)
    throw Error("a lane calls a warp operation whose mask does not name it: " + site.text());
  wait_for(Wait::warp, site, mask);
}

EMU_HIDDEN void sync_warp(unsigned mask, Site site) {  // orders memory, as on the device; shuffles do not
#ifdef EMU_TSAN
  char* const tag = &machine.warp_tags[warp()][machine.current->warp_barriers++ % 2];
  __tsan_release(tag);
#endif
  meet(mask, site);
#ifdef EMU_TSAN
  __tsan_acquire(tag);
#endif
}

// The value of lane `source`; all bits set (NaN) if the mask does not name it, which CUDA leaves undefined. Two buffers
// take turns, so that a lane may already write the next value while another still reads this one; lanes of part of a
// warp do not all take turns together and meet twice instead.
EMU_HIDDEN uint64_t exchange_bits(unsigned mask, uint64_t bits, unsigned source, Site site) {
  Fiber& fiber = *machine.current;
  uint64_t* const buffer = machine.exchange[fiber.parity][warp()];
  buffer[lane()] = bits;
  if (mask == all_lanes) fiber.parity ^= 1;
  meet(mask, site);
  const uint64_t found = mask >> source & 1 ? buffer[source] : ~uint64_t{0};
  if (mask != all_lanes) meet(mask, site);
  return found;
}

template <class T>
T exchange(unsigned mask, T value, unsigned source, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange_bits(mask, bits, source, site);
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T shuffle(Site site, unsigned mask, T value, unsigned source, unsigned width = warp_lanes) {
  return exchange(mask, value, lane() / width * width + source % width, site);
}
template <class T>
T shuffle_up(Site site, unsigned mask, T value, unsigned delta, unsigned width = warp_lanes) {
  return exchange(mask, value, lane() % width >= delta ? lane() - delta : lane(), site);
}
template <class T>
T shuffle_down(Site site, unsigned mask, T value, unsigned delta, unsigned width = warp_lanes) {
  return exchange(mask, value, lane() % width + delta < width ? lane() + delta : lane(), site);
}
template <class T>
T shuffle_xor(Site site, unsigned mask, T value, unsigned bits, unsigned width = warp_lanes) {
  const unsigned source = lane() ^ bits;
  return exchange(mask, value, source / width <= lane() / width ? source : lane(), site);
}

}  // namespace emu
