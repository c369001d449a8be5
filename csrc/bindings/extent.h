// Spatial sizes as the kernels of nets take them: three of them, ones in front where a tensor has fewer.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>

#include "core.h"

namespace pyglow::bindings {

inline Extent extent_of(at::IntArrayRef sizes) {
  int64_t found[3] = {1, 1, 1};
  for (std::size_t i = 2; i < sizes.size(); ++i) found[3 - sizes.size() + i] = sizes[i];
  return {found[0], found[1], found[2]};
}

// kernel, dilations: one of each spatial dimension.
inline Window window_of(at::IntArrayRef spatial, at::IntArrayRef kernel, at::IntArrayRef dilations) {
  Window window = {{1, 1, 1}, {1, 1, 1}};
  for (std::size_t d = 0; d < kernel.size(); ++d) {
    const std::size_t to = 3 - kernel.size() + d;
    window.size[to] = kernel[d];
    // A tap that is farther away than the image is large sees nothing of it, however far.
    window.dilation[to] = kernel[d] == 1 ? 1 : std::min(dilations[d], std::max<int64_t>(spatial[d], 1));
  }
  return window;
}

}  // namespace pyglow::bindings
