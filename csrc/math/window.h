// Where the taps of a window are: of a position of an extent, and of a tap. Positions of a sample are less than 2^31.
#pragma once
#include "core.h"

PYGLOW_MATH_BEGIN

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
