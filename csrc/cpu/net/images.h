// Images by strides, as planes: a matrix (channels, pixels), the pixels of some samples one behind the other.
#pragma once
#include "cpu/net/packing.h"
#include "cpu/tiles.h"

namespace pyglow::cpu::PYGLOW_ISA {

// Some pixels of an image that are evenly spaced in memory.
struct Piece {
  int64_t offset, step, count;
};

// The pieces that a block of pixels is, the same for all channels. Pixel 0 is the first of sample `sample`.
class Pieces {
 public:
  template <class T>
  Pieces(const Image<T>& image, const Extent& extent, int64_t sample, int64_t first, int64_t count) {
    const int64_t plane = extent.positions();
    const bool has_rows = image.row == extent.width * image.pixel || extent.height * extent.depth == 1;
    const bool has_planes = has_rows && (image.depth == extent.height * image.row || extent.depth == 1);
    const int64_t run = has_planes ? plane : has_rows ? extent.height * extent.width : extent.width;
    // Where channels lie innermost, and of vectors, also the samples follow each other evenly.
    const bool is_even = has_planes && (image.sample == plane * image.pixel || plane == 1);
    const int64_t step = plane == 1 ? image.sample : image.pixel;
    for (int64_t done = 0; done < count;) {
      const int64_t p = first + done, n = sample + p / plane, q = p % plane;
      const int64_t d = q / (extent.height * extent.width), h = q / extent.width % extent.height, w = q % extent.width;
      const int64_t length = is_even ? count - done : smaller(count - done, run - q % run);
      piece_[count_++] = {n * image.sample + d * image.depth + h * image.row + w * image.pixel, step, length};
      done += length;
    }
  }

  template <class T, class S>
  PYGLOW_HD void read(const T* channel, S* to) const {
    for (int i = 0; i < count_; ++i) {
      const Piece& piece = piece_[i];
      const T* const from = channel + piece.offset;
      if (piece.step == 1) {
        for (int64_t k = 0; k < piece.count; ++k) narrow(from[k], to[k]);
      } else {
        for (int64_t k = 0; k < piece.count; ++k) narrow(from[k * piece.step], to[k]);
      }
      to += piece.count;
    }
  }
  template <class T>
  PYGLOW_HD void write(const T* from, T* channel) const {
    for (int i = 0; i < count_; ++i) {
      const Piece& piece = piece_[i];
      T* const to = channel + piece.offset;
      if (piece.step == 1) {
        for (int64_t k = 0; k < piece.count; ++k) to[k] = from[k];
      } else {
        for (int64_t k = 0; k < piece.count; ++k) to[k * piece.step] = from[k];
      }
      from += piece.count;
    }
  }

 private:
  Piece piece_[pixel_block];
  int count_ = 0;
};

// f(first pixel, count) for the blocks of pixels [begin, end), of which `begin` starts one, on the caller's threads.
template <class F>
void for_blocks(int64_t begin, int64_t end, int64_t work, const Threads& threads, const F& f) {
  const int64_t blocks = (end - begin + pixel_block - 1) / pixel_block;
  parallel(threads, blocks, grain_of(work * pixel_block), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t p = begin + i * pixel_block;
      f(p, smaller(pixel_block, end - p));
    }
  });
}

// Channels of an image, from sample `sample` on, to planes; multiplied by gain[channel] where there is one. Then the
// sums of the blocks before that are written, too, (blocks, channels).
template <class T, class S>
void read_planes(const Image<const T>& image, const Extent& extent, int64_t sample, int64_t channels, int64_t pixels,
                 const T* gain, T* block_sums, const Matrix<S>& planes, const Threads& threads) {
  for_blocks(0, pixels, channels, threads, [&](int64_t p, int64_t count) {
    const Pieces pieces(image, extent, sample, p, count);
    for (int64_t c = 0; c < channels; ++c) {
      S* const to = at(planes, c, p);
      if (gain == nullptr) {
        pieces.read(image.data + c * image.channel, to);
        continue;
      }
      T row[pixel_block] = {}, sum{};
      pieces.read(image.data + c * image.channel, row);
      for (int64_t i = 0; i < pixel_block; ++i) sum += row[i];
      for (int64_t i = 0; i < count; ++i) narrow(gain[c] * row[i], to[i]);
      block_sums[p / pixel_block * channels + c] = sum;
    }
  });
}

// The same back, of the pixels [begin, end) alone, which the planes begin with.
template <class T>
void write_planes(const Matrix<const T>& planes, const Image<T>& image, const Extent& extent, int64_t sample,
                  int64_t channels, int64_t begin, int64_t end, const Threads& threads) {
  for_blocks(begin, end, channels, threads, [&](int64_t p, int64_t count) {
    const Pieces pieces(image, extent, sample, p, count);
    for (int64_t c = 0; c < channels; ++c) pieces.write(at(planes, c, p - begin), image.data + c * image.channel);
  });
}

// Where the planes of one sample lie in an image already, that memory; else its data null.
template <class T>
Matrix<T> planes_in_place(const Image<T>& image, const Extent& extent, int64_t sample) {
  const bool even = image.pixel == 1 && (image.row == extent.width || extent.height * extent.depth == 1) &&
                    (image.depth == extent.height * image.row || extent.depth == 1);
  return even ? by_rows(image.data + sample * image.sample, image.channel) : Matrix<T>{};
}

// The right matrix of a convolution, columns [0, count), written out in whole blocks of pixels.
template <class S>
void write_columns(const Right<S>& right, int64_t rows, int64_t count, const Matrix<S>& columns,
                   const Threads& threads) {
  for_blocks(0, count, rows, threads, [&](int64_t p, int64_t valid) {
    S* const block = at(columns, 0, p);
    for_rows(right, 0, rows, p, valid, [&](int64_t row, const S* from, uint32_t bits) {
      for (int64_t i = 0; i < pixel_block; i += vector_elements<S>)
        copy_where(from + i, bits >> i, block + row * pixel_block + i);
    });
  });
}

}  // namespace pyglow::cpu::PYGLOW_ISA
