// CPU schedules of the monotone splines; compiled once per instruction set.
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/views.h"
#include "math/spline.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

// The numbers of one channel, a row for each. Where those of an element lie side by side they are transposed in
// registers, blocks of whole vectors of elements and of numbers; the last block of numbers overlaps the one before.
template <class Data>
NetTensor<Data> rows_of(const SplineNumbers<Data>& raw, int64_t channel, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<Data>, const char, char>;
  return {static_cast<Byte*>(raw.data) + channel * raw.channel * bytes, raw.type, raw.sample, raw.number, raw.position};
}
template <class T, class Data>
bool side_by_side(const SplineNumbers<Data>& raw, int64_t count) {
  return raw.type == NetType::state && raw.number == 1 && raw.position != 1 && count >= lanes<T>;
}
template <class T, class F>
void for_blocks(const Tile& tile, int64_t count, const F& f) {
  for (int64_t i = 0; i + lanes<T> <= tile.length; i += lanes<T>)
    for (int64_t k = 0; k < count; k += lanes<T>) f(i, smaller(k, count - lanes<T>));
}

template <class T>
Rows<const T> read_numbers(const SplineNumbers<const void>& raw, const Tile& tile, int64_t channel, int64_t count,
                           T* room) {
  const NetOutput rows = rows_of(raw, channel, raw.type == NetType::state ? sizeof(T) : 2);
  if (!side_by_side<T>(raw, count)) return read_rows(rows, tile, 0, count, room);
  const T* const from = tile_pointer(net_elements<const T>(rows), tile, 0);
  for_blocks<T>(tile, count, [&](int64_t i, int64_t k) {
    transpose_block<T>({from + i * raw.position, raw.position}, 0, k, lanes<T>, room + k * tile.padded + i,
                       tile.padded);
  });
  for (int64_t i = tile.length / lanes<T> * lanes<T>; i < tile.padded; ++i)
    for (int64_t k = 0; k < count; ++k) room[k * tile.padded + i] = i < tile.length ? from[i * raw.position + k] : T(0);
  return {room, tile.padded};
}

template <class T>
Rows<T> write_numbers(const SplineNumbers<void>& raw, const Tile& tile, int64_t channel, int64_t count, T* room) {
  if (side_by_side<T>(raw, count)) return {room, tile.padded};
  return write_rows(rows_of(raw, channel, raw.type == NetType::state ? sizeof(T) : 2), tile, 0, room);
}

template <class T>
void write_numbers_back(const SplineNumbers<void>& raw, const Tile& tile, int64_t channel, int64_t count,
                        const Rows<T>& found) {
  const NetGrad rows = rows_of(raw, channel, raw.type == NetType::state ? sizeof(T) : 2);
  if (!side_by_side<T>(raw, count)) return write_back(rows, tile, 0, count, found);
  T* const to = tile_pointer(net_elements<T>(rows), tile, 0);
  for_blocks<T>(tile, count, [&](int64_t i, int64_t k) {
    transpose_block<T>({found.data, found.stride}, k, i, lanes<T>, to + i * raw.position + k, raw.position);
  });
  for (int64_t i = tile.length / lanes<T> * lanes<T>; i < tile.length; ++i)
    for (int64_t k = 0; k < count; ++k) to[i * raw.position + k] = found.row(k)[i];
}

// Those of a vector of elements. Weights wait in memory of the first-level cache.
template <class T>
struct ElementNumbers {
  const T* from;
  int64_t from_stride;
  T* to;  // gradients, or null
  int64_t to_stride;
  int bins;
  Vec<T>* kept;  // 2 K
  Vec<T> most[2] = {};

  PYGLOW_HD Vec<T> raw(int row) const { return load<T>(from + row * from_stride); }
  PYGLOW_HD Vec<T> raw(int side, int k) const { return raw(side * bins + k); }
  PYGLOW_HD void keep(int side, int k, Vec<T> weight) { kept[side * bins + k] = weight; }
  PYGLOW_HD Vec<T> weight(int side, int k) const { return kept[side * bins + k]; }
  PYGLOW_HD void give(int row, Vec<T> grad) const { store<T>(to + row * to_stride, grad); }
};

template <SplineForm F, bool Inverse, class T>
void spline_tiles(const SplineArgs<T>& args, const Threads& threads) {
  const SplineParams<T> params = args.params;
  const int64_t count = spline_numbers(params.bins, params.tails);
  const TileShape shape = tile_shape<T>(args.samples, args.positions, 2 * count);
  const int64_t room = shape.length;
  for_tiles<T>(shape, threads, 8 * count * args.channels, (count + 3) * room, [&](const Tile& tile, T* memory) {
    Vec<T> kept[2 * max_spline_bins];
    for (int64_t c = 0; c < args.channels; ++c) {
      const T* const x = read_rows(args.x, tile, c, 1, memory).data;
      const Rows<const T> raw = read_numbers(args.raw, tile, c, count, memory + 3 * room);
      const Rows<T> y = write_rows(args.y, tile, c, memory + room);
      const Rows<T> log_slope = write_rows(args.log_slope, tile, c, memory + 2 * room);
      for (int64_t i = 0; i < tile.padded; i += lanes<T>) {
        ElementNumbers<T> numbers{raw.data + i, raw.stride, nullptr, 0, params.bins, kept};
        const math::SplineResult<Vec<T>> found = math::spline_result<F, Inverse>(load<T>(x + i), numbers, params);
        store<T>(y.data + i, found.y);
        store<T>(log_slope.data + i, found.log_slope);
      }
      write_back(args.y, tile, c, 1, y);
      write_back(args.log_slope, tile, c, 1, log_slope);
    }
  });
}

template <SplineForm F, bool Inverse, bool FromY, class T>
void spline_backward_tiles(const SplineBackwardArgs<T>& args, const Threads& threads) {
  const SplineParams<T> params = args.params;
  const int64_t count = spline_numbers(params.bins, params.tails);
  const bool recover = args.recovered.data != nullptr;
  const TileShape shape = tile_shape<T>(args.samples, args.positions, 3 * count);
  const int64_t room = shape.length;
  for_tiles<T>(shape, threads, 12 * count * args.channels, (2 * count + 5) * room, [&](const Tile& tile, T* memory) {
    Vec<T> kept[2 * max_spline_bins];
    T* const of_numbers = memory + 5 * room;
    for (int64_t c = 0; c < args.channels; ++c) {
      const T* const value = read_rows(args.value, tile, c, 1, memory).data;
      const T* const grad_y = read_rows(args.grad_y, tile, c, 1, memory + room).data;
      const T* const grad_log_slope = read_rows(args.grad_log_slope, tile, c, 1, memory + 2 * room).data;
      const Rows<const T> raw = read_numbers(args.raw, tile, c, count, of_numbers);
      const Rows<T> grad_x = write_rows(args.grad_x, tile, c, memory + 3 * room);
      const Rows<T> grad_raw = write_numbers(args.grad_raw, tile, c, count, of_numbers + count * room);
      const Rows<T> recovered = recover ? write_rows(args.recovered, tile, c, memory + 4 * room) : Rows<T>{};
      for (int64_t i = 0; i < tile.padded; i += lanes<T>) {
        ElementNumbers<T> numbers{raw.data + i, raw.stride, grad_raw.data + i, grad_raw.stride, params.bins, kept};
        const math::SplineBackward<Vec<T>> found = math::spline_backward<F, Inverse, FromY>(
            load<T>(value + i), load<T>(grad_y + i), load<T>(grad_log_slope + i), numbers, params);
        store<T>(grad_x.data + i, found.grad_value);
        if (recover) store<T>(recovered.data + i, found.recovered);
      }
      write_back(args.grad_x, tile, c, 1, grad_x);
      write_numbers_back(args.grad_raw, tile, c, count, grad_raw);
      if (recover) write_back(args.recovered, tile, c, 1, recovered);
    }
  });
}

}  // namespace

template <class T>
void spline(const SplineArgs<T>& args, const Threads& threads) {
  math::with_spline(args.form, args.inverse,
                    [&](auto of) { spline_tiles<decltype(of)::form, decltype(of)::inverse>(args, threads); });
}

template <class T>
void spline_backward(const SplineBackwardArgs<T>& args, const Threads& threads) {
  math::with_spline(args.form, args.inverse, [&](auto of) {
    using Of = decltype(of);
    // An x is what a spline gets or what its inverse gives.
    if (args.from_output == Of::inverse) return spline_backward_tiles<Of::form, Of::inverse, false>(args, threads);
    return spline_backward_tiles<Of::form, Of::inverse, true>(args, threads);
  });
}

PYGLOW_CPU_INSTANTIATE(spline, SplineArgs)
PYGLOW_CPU_INSTANTIATE(spline_backward, SplineBackwardArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
