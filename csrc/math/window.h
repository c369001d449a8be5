// The window of a convolution, and where its taps are: of a position of an extent, and of a tap.
#pragma once
#include <cstdint>

#include "math/host_device.h"

namespace pyglow {

struct Extent {  // of one channel of a sample
  int64_t depth, height, width;
  PYGLOW_HD int64_t positions() const { return depth * height * width; }
};

// The shifts of a convolution's kernel, along depth, height and width: odd sizes, zero padding that keeps the extent.
struct Window {
  int64_t size[3], dilation[3];
  PYGLOW_HD int64_t taps() const { return size[0] * size[1] * size[2]; }
  // How far apart in memory the outermost tap and the middle one are, in a channel of that extent.
  PYGLOW_HD int64_t reach(const Extent& e) const {
    const int64_t depth = size[0] / 2 * dilation[0], height = size[1] / 2 * dilation[1];
    return (depth * e.height + height) * e.width + size[2] / 2 * dilation[2];
  }
};

}  // namespace pyglow

PYGLOW_MATH_BEGIN

// Of less than 2^26 positions.
struct Place {
  int depth, height, width;
};

PYGLOW_HD Place place_of(const Extent& extent, int64_t position) {
  const int p = static_cast<int>(position), height = static_cast<int>(extent.height);
  const int width = static_cast<int>(extent.width), row = p / width;
  return {row / height, row % height, p % width};
}

PYGLOW_HD int shift_along(const Window& window, int dim, int index, bool mirrored) {
  const int shift = (index - static_cast<int>(window.size[dim]) / 2) * static_cast<int>(window.dilation[dim]);
  return mirrored ? -shift : shift;
}

PYGLOW_HD Place shift_of(const Window& window, int tap, bool mirrored) {
  const int height = static_cast<int>(window.size[1]), width = static_cast<int>(window.size[2]), row = tap / width;
  return {shift_along(window, 0, row / height, mirrored), shift_along(window, 1, row % height, mirrored),
          shift_along(window, 2, tap % width, mirrored)};
}

// Calls f(tap, its shift) for all taps in turn.
template <class F>
PYGLOW_HD void for_each_tap(const Window& window, bool mirrored, const F& f) {
  int tap = 0;
  for (int z = 0; z < static_cast<int>(window.size[0]); ++z)
    for (int y = 0; y < static_cast<int>(window.size[1]); ++y)
      for (int x = 0; x < static_cast<int>(window.size[2]); ++x)
        f(tap++, Place{shift_along(window, 0, z, mirrored), shift_along(window, 1, y, mirrored),
                       shift_along(window, 2, x, mirrored)});
}

// The position at a shift from there, or -1 outside of the extent.
PYGLOW_HD int shifted(const Extent& extent, const Place& at, const Place& shift) {
  const int depth = at.depth + shift.depth, height = at.height + shift.height, width = at.width + shift.width;
  const int heights = static_cast<int>(extent.height), widths = static_cast<int>(extent.width);
  const bool inside = depth >= 0 && depth < static_cast<int>(extent.depth) && height >= 0 && height < heights &&
                      width >= 0 && width < widths;
  return inside ? (depth * heights + height) * widths + width : -1;
}

PYGLOW_MATH_END
