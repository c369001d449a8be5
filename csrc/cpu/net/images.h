// Images by strides, as planes: a matrix (channels, pixels), the pixels of some samples one behind the other.
#pragma once
#include "cpu/net/packing.h"
#include "cpu/tiles.h"

namespace pyglow::cpu::PYGLOW_ISA {

// Some pixels of an image that are evenly spaced in memory.
struct Piece {
  int64_t offset, step, count;
};

// The pieces that make up a block of pixels, the same for all channels. Pixel 0 is the first of sample `sample`.
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

  // f(piece, pixels before it) for all of them.
  template <class F>
  PYGLOW_HD void each(const F& f) const {
    int64_t done = 0;
    for (int i = 0; i < count_; ++i) {
      f(piece_[i], done);
      done += piece_[i].count;
    }
  }
  template <class T>
  PYGLOW_HD void write(const T* from, T* channel) const {
    each([&](const Piece& piece, int64_t done) {
      T* const to = channel + piece.offset;
      if (piece.step == 1) {
        for (int64_t k = 0; k < piece.count; ++k) to[k] = from[done + k];
      } else {
        for (int64_t k = 0; k < piece.count; ++k) to[k * piece.step] = from[done + k];
      }
    });
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

// Whether the pixels of a channel of one sample lie side by side in memory.
template <class T>
PYGLOW_HD bool has_planes(const Image<T>& image, const Extent& extent) {
  return image.pixel == 1 && (image.row == extent.width || extent.height * extent.depth == 1) &&
         (image.depth == extent.height * image.row || extent.depth == 1);
}

// f(channel, first pixel, count, address of the first, how far apart they are) for the pixels [begin, end) of all
// channels, counted from sample `sample` on: planes by their longest runs, and other layouts a block of pixels after
// the other, so that what lies between in memory is used, too.
template <class T, class F>
void for_runs(const Image<T>& image, const Extent& extent, int64_t sample, int64_t channels, int64_t begin, int64_t end,
              const Threads& threads, const F& f) {
  const int64_t plane = extent.positions();
  if (has_planes(image, extent) && plane >= pixel_block) {
    const int64_t first = begin / plane, samples = (end + plane - 1) / plane - first;
    parallel(threads, samples * channels, grain_of(plane), [&](int64_t task, int64_t last) {
      for (; task < last; ++task) {
        const int64_t n = first + task / channels, channel = task % channels;
        const int64_t p = larger(begin, n * plane), count = smaller(end, (n + 1) * plane) - p;
        f(channel, p, count, image.data + (sample + n) * image.sample + channel * image.channel + (p - n * plane), 1);
      }
    });
    return;
  }
  for_blocks(begin, end, channels, threads, [&](int64_t p, int64_t count) {
    const Pieces pieces(image, extent, sample, p, count);
    for (int64_t channel = 0; channel < channels; ++channel)
      pieces.each([&](const Piece& piece, int64_t done) {
        f(channel, p + done, piece.count, image.data + channel * image.channel + piece.offset, piece.step);
      });
  });
}

// sums (blocks of pixels, channels) = those of an image's pixels [begin, end): the same bits for any layout.
template <class T>
void sum_blocks(const Image<const T>& image, const Extent& extent, int64_t sample, int64_t channels, int64_t begin,
                int64_t end, T* sums, const Threads& threads) {
  for_blocks(begin, end, channels, threads, [&](int64_t p, int64_t count) {
    const Pieces pieces(image, extent, sample, p, count);
    for (int64_t channel = 0; channel < channels; ++channel) {
      T row[pixel_block] = {};
      pieces.each([&](const Piece& piece, int64_t done) {
        const T* const from = image.data + channel * image.channel + piece.offset;
        for (int64_t i = 0; i < piece.count; ++i) row[done + i] = from[i * piece.step];
      });
      for (int64_t half = pixel_block / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) row[i] += row[i + half];
      sums[(p - begin) / pixel_block * channels + channel] = row[0];
    }
  });
}

// Copies the pixels [begin, end) of an image's channels, counted from sample `sample` on, into the rows from `row` on
// of a matrix whose first column is pixel `begin`; times gain[channel], if there is one.
template <class T, class S>
void read_image(const Image<const T>& image, const Extent& extent, int64_t sample, int64_t channels, int64_t begin,
                int64_t end, const Matrix<S>& to, int64_t row, const Threads& threads, const T* gain = nullptr) {
  const bool is_by_rows = to.block == pixel_block;
  for_runs(image, extent, sample, channels, begin, end, threads,
           [&](int64_t channel, int64_t p, int64_t count, const T* from, int64_t step) {
             const T factor = gain == nullptr ? T(1) : gain[channel];
             for (int64_t done = 0; done < count;) {
               const int64_t pixel = p - begin + done;
               const int64_t n = is_by_rows ? count : smaller(count - done, pixel_block - pixel % pixel_block);
               S* const into = at(to, row + channel, pixel);
               if (step == 1) {
                 for (int64_t i = 0; i < n; ++i) narrow(factor * from[done + i], into[i]);
               } else {
                 for (int64_t i = 0; i < n; ++i) narrow(factor * from[(done + i) * step], into[i]);
               }
               done += n;
             }
           });
}

// Copies planes, whose first column is pixel `begin`, back into the pixels [begin, end) of an image.
template <class T>
void write_planes(const Matrix<const T>& planes, const Image<T>& image, const Extent& extent, int64_t sample,
                  int64_t channels, int64_t begin, int64_t end, const Threads& threads) {
  for_runs(image, extent, sample, channels, begin, end, threads,
           [&](int64_t channel, int64_t p, int64_t count, T* to, int64_t step) {
             const T* const from = planes.data + channel * planes.row + (p - begin);
             if (step == 1) {
               for (int64_t i = 0; i < count; ++i) to[i] = from[i];
             } else {
               for (int64_t i = 0; i < count; ++i) to[i * step] = from[i];
             }
           });
}

// Writes out columns [0, count) of the right matrix of a convolution, in whole blocks of pixels.
template <class S>
void write_columns(const Right<S>& right, int64_t rows, int64_t count, const Matrix<S>& columns,
                   const Threads& threads) {
  for_blocks(0, count, rows, threads,
             [&](int64_t p, int64_t valid) { copy_block(right, 0, rows, p, valid, at(columns, 0, p)); });
}

}  // namespace pyglow::cpu::PYGLOW_ISA
