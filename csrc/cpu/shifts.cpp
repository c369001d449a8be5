// CPU schedules of what surrounds the matrix products of a coupling net; compiled once per instruction set.
//
// A 3x3 convolution is a product with the nine shifts of its input (columns), or the sum of the nine shifts of a
// product. Images are narrow at the deep levels, where a loop per row would be all overhead: a small plane is shifted
// as a whole, as one run of positions, and what came round the edges is masked out.
#include "cpu/shifts.h"

#include "cpu/tiles.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

constexpr int64_t small_plane = 1024;  // positions

template <class T>
using Mask = decltype(Vec<T>{} < Vec<T>{});
template <class T>
using MaskElement = std::remove_reference_t<decltype(Mask<T>{}[0])>;

template <class T>
PYGLOW_HD const T* plane(const Image<const T>& image, int64_t n, int64_t k) {
  return image.data + n * image.sample + k * image.channel;
}

// For a small plane: of each shift its offset, and for every position whether the shifted one lies in the image.
template <class T>
struct Shifts {
  int64_t padded;          // positions rounded up to whole vectors
  MaskElement<T>* inside;  // (9, padded)
  int64_t offset[9];

  static int64_t elements(int64_t positions) { return 9 * round_up(positions, lanes<T>); }

  Shifts(int64_t height, int64_t width, MaskElement<T>* room)
      : padded(round_up(height * width, lanes<T>)), inside(room) {
    for (int64_t s = 0; s < 9; ++s) {
      const int64_t down = s / 3 - 1, right = s % 3 - 1;
      offset[s] = down * width + right;
      for (int64_t p = 0; p < padded; ++p) {
        const int64_t h = p / width + down, w = p % width + right;
        const bool valid = p < height * width && h >= 0 && h < height && w >= 0 && w < width;
        inside[s * padded + p] = valid ? -1 : 0;
      }
    }
  }

  PYGLOW_HD Vec<T> load_shifted(const T* from, int64_t s, int64_t p) const {
    Mask<T> mask;
    __builtin_memcpy(&mask, inside + s * padded + p, sizeof mask);
    return mask ? load<T>(from + p + offset[s]) : Vec<T>{};
  }
};

template <class T>
void copy_plane(const Image<const T>& image, const T* from, int64_t height, int64_t width, T* to) {
  for (int64_t h = 0; h < height; ++h)
    for (int64_t w = 0; w < width; ++w) to[h * width + w] = from[h * image.row + w * image.pixel];
}

// f(to, offset, count) for the runs that a range of pixels of one row has in memory.
template <class T, class F>
PYGLOW_HD void for_runs(const Matrix<T>& m, int64_t row, int64_t begin, int64_t count, const F& f) {
  for (int64_t done = 0; done < count;) {
    const int64_t p = begin + done, run = smaller(count - done, pixel_block - p % pixel_block);
    f(at(m, row, p), done, run);
    done += run;
  }
}

template <class T>
void small_columns(const ColumnsArgs<T>& args, int64_t k, const Shifts<T>& shifts, T* room) {
  const int64_t positions = args.height * args.width, margin = args.width + 1;
  const bool whole = positions % lanes<T> == 0;  // no vector then lies in two blocks
  for (int64_t n = 0; n < args.samples; ++n) {
    copy_plane(args.image, plane(args.image, args.first_sample + n, k), args.height, args.width, room + margin);
    for (int64_t s = 0; s < 9; ++s) {
      const int64_t row = 9 * k + (args.transposed ? 8 - s : s), first = n * positions;
      for (int64_t p = 0; p < positions; p += lanes<T>) {
        const Vec<T> v = shifts.load_shifted(room + margin, s, p);
        if (whole) {
          store<T>(at(args.columns, row, first + p), v);
        } else {
          for (int64_t i = 0; i < smaller(lanes<T>, positions - p); ++i) *at(args.columns, row, first + p + i) = v[i];
        }
      }
    }
  }
}

template <class T>
void large_columns(const ColumnsArgs<T>& args, int64_t k) {
  const int64_t width = args.width, pixel = args.image.pixel;
  for (int64_t n = 0; n < args.samples; ++n) {
    const T* const from = plane(args.image, args.first_sample + n, k);
    for (int64_t s = 0; s < 9; ++s) {
      const int64_t down = s / 3 - 1, right = s % 3 - 1, row = 9 * k + (args.transposed ? 8 - s : s);
      int64_t first = n * args.rows * width;
      for (int64_t r = 0; r < args.rows; ++r, first += width) {
        const int64_t h = args.first_row + r + down;
        const T* const source = from + h * args.image.row + right * pixel;
        const int64_t begin = larger(0, -right), end = smaller(width, width - right);
        if (h < 0 || h >= args.height || begin >= end) {
          for_runs(args.columns, row, first, width, [](T* to, int64_t, int64_t count) {
            for (int64_t i = 0; i < count; ++i) to[i] = T(0);
          });
          continue;
        }
        if (begin > 0) *at(args.columns, row, first) = T(0);
        for_runs(args.columns, row, first + begin, end - begin, [&](T* to, int64_t offset, int64_t count) {
          const T* const x = source + (begin + offset) * pixel;
          if (pixel == 1 && count == pixel_block) {
            __builtin_memcpy(to, x, pixel_block * sizeof(T));
          } else if (pixel == 1 && count == pixel_block - 1) {  // at an edge of the image
            __builtin_memcpy(to, x, (pixel_block - 1) * sizeof(T));
          } else {
            for (int64_t i = 0; i < count; ++i) to[i] = x[i * pixel];
          }
        });
        if (end < width) *at(args.columns, row, first + width - 1) = T(0);
      }
    }
  }
}

template <class T>
void write_rows(const ShiftSumArgs<T>& args, int64_t n, int64_t k, const T* from) {
  const Image<T>& image = args.image;
  T* const to = image.data + (args.first_sample + n) * image.sample + k * image.channel + args.first_row * image.row;
  for (int64_t r = 0; r < args.rows; ++r)
    for (int64_t w = 0; w < args.width; ++w) to[r * image.row + w * image.pixel] = from[r * args.width + w];
}

template <class T>
void small_sum(const ShiftSumArgs<T>& args, int64_t n, int64_t k, T bias, const Shifts<T>& shifts, T* sum) {
  const int64_t positions = args.height * args.width;
  const T* const rows = args.columns + 9 * k * args.stride + n * positions;
  for (int64_t p = 0; p < shifts.padded; p += lanes<T>) {
    Vec<T> total = broadcast<T>(bias);
    for (int64_t s = 0; s < 9; ++s)
      total += shifts.load_shifted(rows + (args.transposed ? 8 - s : s) * args.stride, s, p);
    store<T>(sum + p, total);
  }
}

// Whole vectors first: where they reach round an edge of the image they read the pixel before or after in memory, and
// the two pixels at the edges are then summed anew.
template <class T>
void large_sum(const ShiftSumArgs<T>& args, int64_t n, int64_t k, T bias, T* sum) {
  const int64_t width = args.width;
  const T* const rows = args.columns + 9 * k * args.stride + (n * args.height - args.columns_row) * width;
  for (int64_t h = args.first_row; h < args.first_row + args.rows; ++h) {
    T* const to = sum + (h - args.first_row) * width;
    const T* from[9];
    const int64_t first = h == 0 ? 3 : 0, last = h + 1 == args.height ? 6 : 9;
    for (int64_t s = first; s < last; ++s)
      from[s] = rows + (args.transposed ? 8 - s : s) * args.stride + (h + s / 3 - 1) * width + s % 3 - 1;
    for (int64_t w = 0; w < width; w += lanes<T>) {
      Vec<T> total = broadcast<T>(bias);
      if (last - first == 9) {
#pragma GCC unroll 9
        for (int64_t s = 0; s < 9; ++s) total += load<T>(from[s] + w);
      } else {
        for (int64_t s = first; s < last; ++s) total += load<T>(from[s] + w);
      }
      store<T>(to + w, total);
    }
    for (int64_t w = 0; w < width; w += larger(1, width - 1)) {
      T total = bias;
      for (int64_t s = first; s < last; ++s)
        if (w + s % 3 - 1 >= 0 && w + s % 3 - 1 < width) total += from[s][w];
      to[w] = total;
    }
  }
}

}  // namespace

// A task is a channel: its nine rows of columns.
template <class T>
void shift_columns(const ColumnsArgs<T>& args, const Threads& threads) {
  const int64_t positions = args.height * args.width, work = 9 * args.samples * args.rows * args.width;
  if (work == 0) return;
  parallel(threads, args.channels, grain_of(work), [&](int64_t begin, int64_t end) {
    if (positions > small_plane || args.rows != args.height) {
      for (int64_t k = begin; k < end; ++k) large_columns(args, k);
      return;
    }
    const int64_t padded = round_up(positions, lanes<T>), margin = args.width + 1;
    const int64_t room = padded + 2 * margin + lanes<T>;
    T* const memory =
        static_cast<T*>(thread_scratch(Scratch::tile, (room + Shifts<T>::elements(positions)) * sizeof(T)));
    for (int64_t i = 0; i < room; ++i) memory[i] = T(0);
    const Shifts<T> shifts(args.height, args.width, reinterpret_cast<MaskElement<T>*>(memory + room));
    for (int64_t k = begin; k < end; ++k) small_columns(args, k, shifts, memory);
  });
}

// A task is a plane. Around the columns there must be readable memory: a row and a pixel before, and a vector more
// after.
template <class T>
void shift_sum(const ShiftSumArgs<T>& args, const Threads& threads) {
  const int64_t positions = args.rows * args.width;
  if (positions == 0) return;
  parallel(threads, args.samples * args.channels, grain_of(9 * positions), [&](int64_t begin, int64_t end) {
    // Of a sample that is cut into rows the columns begin at another row, even where all rows are summed.
    const bool is_small = positions <= small_plane && args.rows == args.height && args.columns_row == 0;
    const int64_t padded = round_up(positions, lanes<T>);
    const int64_t masks = is_small ? Shifts<T>::elements(positions) : 0;
    const int64_t room = padded + lanes<T>;  // the last row's last vector may reach so far
    T* const memory = static_cast<T*>(thread_scratch(Scratch::tile, (room + masks) * sizeof(T)));
    const Shifts<T> shifts(is_small ? args.height : 0, args.width, reinterpret_cast<MaskElement<T>*>(memory + room));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / args.channels, k = task % args.channels;
      const T bias = args.bias == nullptr ? T(0) : args.bias[k];
      if (is_small) {
        small_sum(args, n, k, bias, shifts, memory);
      } else {
        large_sum(args, n, k, bias, memory);
      }
      write_rows(args, n, k, memory);
    }
  });
}

#define PYGLOW_INSTANTIATE(T)                                            \
  template void shift_columns<T>(const ColumnsArgs<T>&, const Threads&); \
  template void shift_sum<T>(const ShiftSumArgs<T>&, const Threads&);
PYGLOW_INSTANTIATE(float)
PYGLOW_INSTANTIATE(double)

}  // namespace pyglow::cpu::PYGLOW_ISA
