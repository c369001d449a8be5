// The taps of a convolution over the pixels of some samples, one behind the other: how far away the pixel is that a tap
// sees, and whether it is in the image. The same for every channel, so it is found once a call.
#pragma once
#include "core.h"
#include "cpu/net/matrix.h"
#include "cpu/tiles.h"

namespace pyglow::cpu::PYGLOW_ISA {

constexpr int64_t max_taps = 7 * 7 * 7;

class Shifts {
 public:
  // 32 bits for each block of pixels and tap. Where a sample is whole blocks, those of all samples are the same.
  static int64_t words(const Window& window, const Extent& extent, int64_t pixels) {
    return blocks_of(extent, pixels) * window.taps();
  }

  Shifts(const Window& window, const Extent& extent, int64_t pixels, uint32_t* room, const Threads& threads)
      : taps_(window.taps()), reach_(window.reach(extent)), blocks_(blocks_of(extent, pixels)), inside_(room) {
    int64_t tap = 0;
    for (int64_t d = 0; d < window.size[0]; ++d)
      for (int64_t h = 0; h < window.size[1]; ++h)
        for (int64_t w = 0; w < window.size[2]; ++w, ++tap)
          offset_[tap] =
              (shift(window, 0, d) * extent.height + shift(window, 1, h)) * extent.width + shift(window, 2, w);
    parallel(threads, blocks_, grain_of(taps_ + 8 * pixel_block), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) mark(window, extent, block);
    });
  }

  PYGLOW_HD int64_t taps() const { return taps_; }
  PYGLOW_HD int64_t reach() const { return reach_; }
  // What the taps see from a block of pixels, by tap; from the other side the taps are in the opposite order, as a
  // kernel is symmetric about its middle.
  struct Seen {
    const int64_t* offset;   // of the tap's pixel
    const uint32_t* inside;  // bit i: whether that of pixel i of the block is in its sample
  };
  PYGLOW_HD Seen from(int64_t block) const { return {offset_, inside_ + block % blocks_ * taps_}; }
  // The place of a tap in those.
  PYGLOW_HD int64_t place(int64_t tap, bool transposed) const { return transposed ? taps_ - 1 - tap : tap; }

 private:
  static int64_t blocks_of(const Extent& extent, int64_t pixels) {
    const int64_t period = extent.positions() % pixel_block == 0 ? smaller(extent.positions(), pixels) : pixels;
    return larger(1, (period + pixel_block - 1) / pixel_block);
  }
  static int64_t shift(const Window& window, int axis, int64_t tap) {
    return (tap - window.size[axis] / 2) * window.dilation[axis];
  }

  void mark(const Window& window, const Extent& extent, int64_t block) {
    const int64_t sizes[3] = {extent.depth, extent.height, extent.width};
    int64_t at[3][pixel_block];
    const int64_t first = block * pixel_block % extent.positions();
    int64_t d = first / (extent.height * extent.width), h = first / extent.width % extent.height,
            w = first % extent.width;
    for (int64_t i = 0; i < pixel_block; ++i) {
      at[0][i] = d, at[1][i] = h, at[2][i] = w;
      if (++w < extent.width) continue;
      w = 0;
      if (++h < extent.height) continue;
      h = 0;
      if (++d == extent.depth) d = 0;  // of the next sample
    }
    uint32_t along[3][7];
    for (int axis = 0; axis < 3; ++axis)
      for (int64_t tap = 0; tap < window.size[axis]; ++tap) {
        const int64_t by = shift(window, axis, tap);
        uint32_t bits = 0;
        for (int64_t i = 0; i < pixel_block; ++i)
          bits |= static_cast<uint32_t>(at[axis][i] + by >= 0 && at[axis][i] + by < sizes[axis]) << i;
        along[axis][tap] = bits;
      }
    uint32_t* to = inside_ + block * taps_;
    for (int64_t i = 0; i < window.size[0]; ++i)
      for (int64_t j = 0; j < window.size[1]; ++j)
        for (int64_t k = 0; k < window.size[2]; ++k) *to++ = along[0][i] & along[1][j] & along[2][k];
  }

  int64_t taps_, reach_, blocks_;
  int64_t offset_[max_taps];
  uint32_t* inside_;
};

}  // namespace pyglow::cpu::PYGLOW_ISA
