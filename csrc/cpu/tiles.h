// A tile is a run of positions of one sample, all channels: the unit of work of every kernel.
//
// Kernels see a tile as rows, one per channel, contiguous along positions and a whole number of vectors long. Where the
// tensor has that form, the rows are its own memory; otherwise (channels-last, odd strides, the ragged end of a sample)
// they are copied to scratch, zero-padded, and results are copied back. So there is one kernel, not one per layout.
#pragma once
#include <cstdint>

#include "core.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace pyglow::cpu::PYGLOW_ISA {

template <class T>
struct Rows {
  T* data;  // element [c, i] is data[c * stride + i]
  int64_t stride;
  PYGLOW_HD T* row(int64_t c) const { return data + c * stride; }
};

struct TileShape {
  int64_t samples, positions;
  int64_t length;      // positions of a full tile, a multiple of a vector
  int64_t per_sample;  // tiles of a sample
  PYGLOW_HD int64_t count() const { return samples * per_sample; }
};

struct Tile {
  int64_t index, sample, begin, length;
  int64_t padded;  // length rounded up to whole vectors
};

constexpr int64_t tile_bytes = 24 * 1024;  // half of a first-level cache of 48 KB

// Tiles whose `rows` rows take about `tile_bytes`: the data of one tile should stay in the first-level cache.
template <class T>
TileShape tile_shape(int64_t samples, int64_t positions, int64_t rows) {
  const int64_t step = 2 * lanes<T>;
  int64_t length = tile_bytes / static_cast<int64_t>(sizeof(T)) / larger(rows, 1) / step * step;
  length = smaller(larger(length, step), 1024);
  length = smaller(length, round_up(larger(positions, 1), lanes<T>));
  return {samples, positions, length, (positions + length - 1) / length};
}

template <class T>
Tile tile_at(const TileShape& shape, int64_t index) {
  const int64_t begin = index % shape.per_sample * shape.length;
  const int64_t length = smaller(shape.length, shape.positions - begin);
  return {index, index / shape.per_sample, begin, length, round_up(length, lanes<T>)};
}

template <class T>
PYGLOW_HD T* tile_pointer(const Strided<T>& x, const Tile& tile, int64_t channel) {
  return x.data + tile.sample * x.sample + channel * x.channel + tile.begin * x.position;
}

// Whether the rows of x can be used where they are.
template <class T>
PYGLOW_HD bool in_place(const Strided<T>& x, const Tile& tile) {
  return x.position == 1 && tile.length == tile.padded;
}

// Rows `first` .. `first + count` of x; `room` holds count * padded elements, used if x cannot serve itself.
template <class T>
Rows<const T> read_rows(const Strided<const T>& x, const Tile& tile, int64_t first, int64_t count, T* room) {
  if (in_place(x, tile)) return {tile_pointer(x, tile, first), x.channel};
  for (int64_t c = 0; c < count; ++c) {
    const T* from = tile_pointer(x, tile, first + c);
    T* to = room + c * tile.padded;
    if (x.position == 1) {
      __builtin_memcpy(to, from, tile.length * sizeof(T));
    } else {
      for (int64_t i = 0; i < tile.length; ++i) to[i] = from[i * x.position];
    }
    for (int64_t i = tile.length; i < tile.padded; ++i) to[i] = T(0);
  }
  return {room, tile.padded};
}

// Where to write rows `first` ..; finish with write_back.
template <class T>
Rows<T> write_rows(const Strided<T>& x, const Tile& tile, int64_t first, T* room) {
  if (in_place(x, tile)) return {tile_pointer(x, tile, first), x.channel};
  return {room, tile.padded};
}

template <class T>
void write_back(const Strided<T>& x, const Tile& tile, int64_t first, int64_t count, const Rows<T>& rows) {
  if (in_place(x, tile)) return;
  for (int64_t c = 0; c < count; ++c) {
    T* to = tile_pointer(x, tile, first + c);
    const T* from = rows.row(c);
    if (x.position == 1) {
      __builtin_memcpy(to, from, tile.length * sizeof(T));
    } else {
      for (int64_t i = 0; i < tile.length; ++i) to[i * x.position] = from[i];
    }
  }
}

// Zeroes the positions of scratch rows that the tile does not have.
template <class T>
void clear_padding(const Rows<T>& rows, int64_t count, const Tile& tile) {
  for (int64_t c = 0; c < count; ++c)
    for (int64_t i = tile.length; i < tile.padded; ++i) rows.row(c)[i] = T(0);
}

// Copies rows from one tensor to another; the same memory is left alone.
template <class T>
void copy_rows(const Strided<const T>& from, const Strided<T>& to, const Tile& tile, int64_t first, int64_t count) {
  for (int64_t c = first; c < first + count; ++c) {
    const T* source = tile_pointer(from, tile, c);
    T* target = tile_pointer(to, tile, c);
    if (source == target) continue;
    if (from.position == 1 && to.position == 1) {
      __builtin_memcpy(target, source, tile.length * sizeof(T));
    } else {
      for (int64_t i = 0; i < tile.length; ++i) target[i * to.position] = source[i * from.position];
    }
  }
}

// Calls f(begin, end) for ranges of tasks on the caller's threads.
template <class F>
void parallel(const Threads& threads, int64_t tasks, int64_t grain, const F& f) {
  const auto body = [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); };
  threads.run(tasks, grain, body, const_cast<F*>(&f));
}

// Tasks that make a range worth a thread of its own: about 10 us of work, given the elements that a task touches.
PYGLOW_HD int64_t grain_of(int64_t elements_per_task) { return larger(1, 16384 / larger(elements_per_task, 1)); }

// f(tile, memory) for all tiles on the caller's threads: `work` elements are touched at each position, and the memory
// has `room` elements of scratch.
template <class T, class F>
void for_tiles(const TileShape& shape, const Threads& threads, int64_t work, int64_t room, const F& f) {
  parallel(threads, shape.count(), grain_of(work * shape.length), [&](int64_t begin, int64_t end) {
    T* const memory = static_cast<T*>(thread_scratch(Scratch::tile, room * sizeof(T)));
    for (int64_t index = begin; index < end; ++index) f(tile_at<T>(shape, index), memory);
  });
}

// Sums over all tiles. The tiles are dealt to slots, whose number depends on the shape alone. A slot is one task with
// `size` partial sums of its own (no two threads write to one cache line), and the slots are added up in order, so the
// bits do not depend on threads.
template <class S>
struct Slots {
  TileShape shape;
  int64_t size, count, tiles;  // sums of a slot, slots, tiles of a slot
  S* partials = nullptr;       // count * size elements

  Slots(const TileShape& shape, int64_t sums, int64_t most)
      : shape(shape),
        size(round_up(sums, 64 / static_cast<int64_t>(sizeof(S)))),
        count(smaller(most, shape.count())),
        tiles(count == 0 ? 0 : (shape.count() + count - 1) / count) {}

  // f(tile, memory, sums) adds a tile's; `work` elements are touched, and the memory has `room` elements of scratch.
  template <class T, class F>
  void add_tiles(const Threads& threads, int64_t work, int64_t room, const F& f) const {
    parallel(threads, count, grain_of(tiles * work), [&](int64_t begin, int64_t end) {
      T* const memory = static_cast<T*>(thread_scratch(Scratch::tile, room * sizeof(T)));
      for (int64_t slot = begin; slot < end; ++slot) {
        S* const sums = partials + slot * size;
        for (int64_t i = 0; i < size; ++i) sums[i] = S(0);
        const int64_t last = smaller((slot + 1) * tiles, shape.count());
        for (int64_t index = slot * tiles; index < last; ++index) f(tile_at<T>(shape, index), memory, sums);
      }
    });
  }

  double total(int64_t i) const {
    double sum = 0;
    for (int64_t slot = 0; slot < count; ++slot) sum += static_cast<double>(partials[slot * size + i]);
    return sum;
  }
};

// total[n] = sign * (start + the partial sums of the tiles of sample n, in their order).
template <class T>
void sum_per_sample(const double* partials, const TileShape& shape, double sign, double start, T* total) {
  for (int64_t n = 0; n < shape.samples; ++n) {
    double sum = start;
    for (int64_t i = 0; i < shape.per_sample; ++i) sum += partials[n * shape.per_sample + i];
    total[n] = static_cast<T>(sign * sum);
  }
}

// lanes x lanes values: rows at x, columns to `out`, `stride` apart; rows from `valid` on count as zero.
template <class T>
PYGLOW_HD void transpose_block(const Rows<const T>& x, int64_t row, int64_t position, int64_t valid, T* out,
                               int64_t stride) {
  constexpr int n = static_cast<int>(lanes<T>);
  using Mask = decltype(Vec<T>{} < Vec<T>{});
  Vec<T> v[n], w[n];
  if (valid >= n) {  // apart, as it would be a branch per row
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k) v[k] = load<T>(x.row(row + k) + position);
  } else {
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k) v[k] = k < valid ? load<T>(x.row(row + k) + position) : Vec<T>{};
  }
  Mask low, high;
  for (int i = 0; i < n; ++i) {
    low[i] = i / 2 + (i % 2 == 0 ? 0 : n);
    high[i] = low[i] + n / 2;
  }
  // Each pass interleaves row k with row k + n / 2; after log2(n) of them rows are columns.
#pragma GCC unroll 4
  for (int pass = 1; pass < n; pass *= 2) {
#pragma GCC unroll 8
    for (int k = 0; k < n / 2; ++k) {
      w[2 * k] = shuffle<T>(v[k], v[k + n / 2], low);
      w[2 * k + 1] = shuffle<T>(v[k], v[k + n / 2], high);
    }
#pragma GCC unroll 16
    for (int k = 0; k < n; ++k) v[k] = w[k];
  }
#pragma GCC unroll 16
  for (int k = 0; k < n; ++k) store<T>(out + k * stride, v[k]);
}

}  // namespace pyglow::cpu::PYGLOW_ISA
