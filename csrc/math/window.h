// Where the taps of a window are: of a position of an extent, and of a tap.
#pragma once
#include "core.h"

PYGLOW_MATH_BEGIN

struct Place {
  int64_t depth, height, width;
};

PYGLOW_HD Place place_of(const Extent& extent, int64_t position) {
  const int64_t row = position / extent.width;
  return {row / extent.height, row % extent.height, position % extent.width};
}

PYGLOW_HD Place shift_of(const Window& window, int64_t tap, bool mirrored) {
  const int64_t row = tap / window.size[2], sign = mirrored ? -1 : 1;
  const auto along = [&](int dim, int64_t index) {
    return sign * (index - window.size[dim] / 2) * window.dilation[dim];
  };
  return {along(0, row / window.size[1]), along(1, row % window.size[1]), along(2, tap % window.size[2])};
}

// The position at a shift from there, or -1 outside of the extent.
PYGLOW_HD int64_t shifted(const Extent& extent, const Place& at, const Place& shift) {
  const int64_t depth = at.depth + shift.depth, height = at.height + shift.height, width = at.width + shift.width;
  const bool inside =
      depth >= 0 && depth < extent.depth && height >= 0 && height < extent.height && width >= 0 && width < extent.width;
  return inside ? (depth * extent.height + height) * extent.width + width : -1;
}

PYGLOW_MATH_END
