// The forms of tensors that are not rows of T in memory: squeezed, of 16-bit numbers, in two parts. Read into scratch
// rows, or written from them; so the kernels know rows only.
#pragma once
#include "cpu/tiles.h"
#include "math/half.h"

namespace pyglow::cpu::PYGLOW_ISA {

// ---- Squeezed ----

// Calls f(row of the tile, offset of the first value in memory, number of values): the runs of a tile's channel that
// lie in one row of the image, whose pixels are 2 * position apart.
template <class T, class F>
void squeezed_runs(const Squeezed<T>& x, const Tile& tile, int64_t channel, const F& f) {
  const int64_t base =
      tile.sample * x.sample + channel / 4 * x.channel + channel / 2 % 2 * x.row + channel % 2 * x.position;
  int64_t h = tile.begin / x.width, w = tile.begin % x.width;
  for (int64_t i = 0; i < tile.length; ++h, w = 0) {
    const int64_t count = smaller(x.width - w, tile.length - i);
    f(i, base + 2 * (h * x.row + w * x.position), count);
    i += count;
  }
}

template <class T>
Rows<const T> read_rows(const Squeezed<const T>& x, const Tile& tile, int64_t first, int64_t count, T* room) {
  if (x.width == 0) return read_rows(static_cast<const Strided<const T>&>(x), tile, first, count, room);
  for (int64_t c = 0; c < count; ++c) {
    T* const to = room + c * tile.padded;
    squeezed_runs(x, tile, first + c, [&](int64_t i, int64_t offset, int64_t length) {
      const T* const from = x.data + offset;
      if (x.position == 1) {
        for (int64_t k = 0; k < length; ++k) to[i + k] = from[2 * k];
      } else {
        for (int64_t k = 0; k < length; ++k) to[i + k] = from[2 * k * x.position];
      }
    });
    for (int64_t i = tile.length; i < tile.padded; ++i) to[i] = T(0);
  }
  return {room, tile.padded};
}

template <class T>
Rows<T> write_rows(const Squeezed<T>& x, const Tile& tile, int64_t first, T* room) {
  if (x.width == 0) return write_rows(static_cast<const Strided<T>&>(x), tile, first, room);
  return {room, tile.padded};
}

template <class T>
void write_back(const Squeezed<T>& x, const Tile& tile, int64_t first, int64_t count, const Rows<T>& rows) {
  if (x.width == 0) return write_back(static_cast<const Strided<T>&>(x), tile, first, count, rows);
  for (int64_t c = 0; c < count; ++c) {
    const T* const from = rows.row(c);
    squeezed_runs(x, tile, first + c, [&](int64_t i, int64_t offset, int64_t length) {
      T* const to = x.data + offset;
      if (x.position == 1) {
        for (int64_t k = 0; k < length; ++k) to[2 * k] = from[i + k];
      } else {
        for (int64_t k = 0; k < length; ++k) to[2 * k * x.position] = from[i + k];
      }
    });
  }
}

// ---- A gradient in two parts ----

template <class T>
void add_row(const Strided<const T>& added, const Tile& tile, int64_t channel, T* to) {
  const T* const from = tile_pointer(added, tile, channel);
  if (added.position == 1) {
    for (int64_t i = 0; i < tile.length; ++i) to[i] += from[i];
  } else {
    for (int64_t i = 0; i < tile.length; ++i) to[i] += from[i * added.position];
  }
}

template <class T>
Rows<const T> read_rows(const SplitGrad<T>& x, const Tile& tile, int64_t channels, T* room) {
  const Rows<const T> all = read_rows(x.all, tile, 0, channels, room);
  if (x.added.data == nullptr) return all;
  for (int64_t c = 0; c < channels; ++c) {
    T* const to = room + c * tile.padded;
    if (all.row(c) != to) __builtin_memcpy(to, all.row(c), tile.padded * sizeof(T));
    if (c < x.added_channels) add_row(x.added, tile, c, to);
  }
  return {room, tile.padded};
}

// One channel of it.
template <class T>
const T* read_row(const SplitGrad<T>& x, const Tile& tile, int64_t channel, T* room) {
  const T* const all = read_rows(x.all, tile, channel, 1, room).data;
  if (channel >= x.added_channels) return all;
  if (all != room) __builtin_memcpy(room, all, tile.padded * sizeof(T));
  add_row(x.added, tile, channel, room);
  return room;
}

// ---- The coupling net's output and its gradient ----

template <class E, class Data>
Strided<E> net_elements(const NetTensor<Data>& net) {
  return {static_cast<E*>(net.data), net.sample, net.channel, net.position};
}

template <class H, class T>
Rows<const T> widen_rows(const Strided<const H>& x, const Tile& tile, int64_t first, int64_t count, T* room) {
  for (int64_t c = 0; c < count; ++c) {
    const H* const from = tile_pointer(x, tile, first + c);
    T* const to = room + c * tile.padded;
    if (x.position == 1) {
      for (int64_t i = 0; i < tile.length; ++i) to[i] = static_cast<T>(math::widen(from[i]));
    } else {
      for (int64_t i = 0; i < tile.length; ++i) to[i] = static_cast<T>(math::widen(from[i * x.position]));
    }
    for (int64_t i = tile.length; i < tile.padded; ++i) to[i] = T(0);
  }
  return {room, tile.padded};
}

template <class T>
Rows<const T> read_rows(const NetOutput& net, const Tile& tile, int64_t first, int64_t count, T* room) {
  switch (net.type) {
    case NetType::bfloat16:
      return widen_rows(net_elements<const BFloat16>(net), tile, first, count, room);
    case NetType::float16:
      return widen_rows(net_elements<const Float16>(net), tile, first, count, room);
    case NetType::state:
      break;
  }
  return read_rows(net_elements<const T>(net), tile, first, count, room);
}

template <class T>
Rows<T> write_rows(const NetGrad& net, const Tile& tile, int64_t first, T* room) {
  if (net.type == NetType::state) return write_rows(net_elements<T>(net), tile, first, room);
  return {room, tile.padded};
}

template <class H, class T>
void narrow_rows(const Strided<H>& x, const Tile& tile, int64_t first, int64_t count, const Rows<T>& rows) {
  for (int64_t c = 0; c < count; ++c) {
    H* const to = tile_pointer(x, tile, first + c);
    const T* const from = rows.row(c);
    if (x.position == 1) {
      for (int64_t i = 0; i < tile.length; ++i) math::narrow(static_cast<float>(from[i]), to[i]);
    } else {
      for (int64_t i = 0; i < tile.length; ++i) math::narrow(static_cast<float>(from[i]), to[i * x.position]);
    }
  }
}

template <class T>
void write_back(const NetGrad& net, const Tile& tile, int64_t first, int64_t count, const Rows<T>& rows) {
  switch (net.type) {
    case NetType::bfloat16:
      return narrow_rows(net_elements<BFloat16>(net), tile, first, count, rows);
    case NetType::float16:
      return narrow_rows(net_elements<Float16>(net), tile, first, count, rows);
    case NetType::state:
      return write_back(net_elements<T>(net), tile, first, count, rows);
  }
}

}  // namespace pyglow::cpu::PYGLOW_ISA
