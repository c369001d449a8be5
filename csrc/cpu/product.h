// The C x C product over the positions of a tile, register-blocked.
//
// A block of up to block_rows output rows times two vectors of positions stays in registers while the input rows stream
// past once: one load of x and one broadcast weight per fused multiply-add, so the arithmetic units are the limit. The
// weights of a block are packed side by side, [input][row], once per call.
#pragma once
#include "cpu/tiles.h"
#include "math/channel_mix.h"

namespace pyglow::cpu::PYGLOW_ISA {

struct Blocks {
  int64_t count, rows;  // blocks, and rows in each but the last
};

// Blocks of equal size, so that no block is left with a row or two.
inline Blocks blocks_of(int64_t channels) {
  const int64_t count = (channels + block_rows - 1) / block_rows;
  return {count, count == 0 ? 0 : (channels + count - 1) / count};
}

template <int N>
struct NumRowsOf {
  static constexpr int value = N;
};

// f(NumRowsOf<rows>()) for 1 <= rows <= block_rows: so that the rows of a block are registers.
template <class F>
PYGLOW_HD void with_rows(int64_t rows, const F& f) {
  switch (rows) {
#define PYGLOW_CASE(R) \
  case R:              \
    return f(NumRowsOf<R>());
    PYGLOW_CASE(1)
    PYGLOW_CASE(2)
    PYGLOW_CASE(3)
    PYGLOW_CASE(4)
    PYGLOW_CASE(5)
    PYGLOW_CASE(6)
#if PYGLOW_VECTOR_BYTES == 64
    PYGLOW_CASE(7)
    PYGLOW_CASE(8)
    PYGLOW_CASE(9)
    PYGLOW_CASE(10)
    PYGLOW_CASE(11)
    PYGLOW_CASE(12)
#endif
#undef PYGLOW_CASE
  }
}

// Elements of a packed matrix, rounded up to whole cache lines.
inline int64_t packed_size(int64_t channels) {
  const Blocks blocks = blocks_of(channels);
  return round_up(channels * blocks.count * blocks.rows, 16);
}

// packed[block][input][row] of M, or of its transpose.
template <class T>
void pack_matrix(const T* matrix, int64_t channels, bool transpose, T* packed) {
  const Blocks blocks = blocks_of(channels);
  for (int64_t o = 0; o < blocks.count * blocks.rows; ++o)
    for (int64_t i = 0; i < channels; ++i)
      packed[(o / blocks.rows * channels + i) * blocks.rows + o % blocks.rows] =
          o >= channels ? T(0) : (transpose ? matrix[i * channels + o] : matrix[o * channels + i]);
}

template <class T, int NumRows, int NumVectors>
PYGLOW_HD void product_block(const T* weights, const Rows<const T>& x, const T* start, const Rows<T>& out,
                             int64_t out_row, int64_t valid_rows, int64_t channels, int64_t position) {
  Vec<T> sum[NumRows][NumVectors];
#pragma GCC unroll 16
  for (int k = 0; k < NumRows; ++k)
#pragma GCC unroll 2
    for (int v = 0; v < NumVectors; ++v) sum[k][v] = Vec<T>{};
  const T* x_row = x.data + position;
  for (int64_t c = 0; c < channels; ++c, x_row += x.stride, weights += NumRows) {
    Vec<T> value[NumVectors];
#pragma GCC unroll 2
    for (int v = 0; v < NumVectors; ++v) value[v] = load<T>(x_row + v * lanes<T>);
#pragma GCC unroll 16
    for (int k = 0; k < NumRows; ++k)
#pragma GCC unroll 2
      for (int v = 0; v < NumVectors; ++v) sum[k][v] = math::mix_term(sum[k][v], weights[k], value[v]);
  }
#pragma GCC unroll 16
  for (int k = 0; k < NumRows; ++k) {
    if (k >= valid_rows) break;
    // Last: a large offset in front of the sum would round every term to its own size.
    const T offset = start == nullptr ? T(0) : start[k];
#pragma GCC unroll 2
    for (int v = 0; v < NumVectors; ++v) store<T>(out.row(out_row + k) + position + v * lanes<T>, sum[k][v] + offset);
  }
}

template <class T, int NumRows>
void product_rows(const T* packed, const Rows<const T>& x, const T* start, const Rows<T>& out, int64_t channels,
                  int64_t length) {
  const Blocks blocks = blocks_of(channels);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t row = b * NumRows, valid = smaller(NumRows, channels - row);
    const T* weights = packed + b * channels * NumRows;
    const T* block_start = start == nullptr ? nullptr : start + row;
    int64_t i = 0;
    for (; i + 2 * lanes<T> <= length; i += 2 * lanes<T>)
      product_block<T, NumRows, 2>(weights, x, block_start, out, row, valid, channels, i);
    for (; i < length; i += lanes<T>)
      product_block<T, NumRows, 1>(weights, x, block_start, out, row, valid, channels, i);
  }
}

// out[o, i] = sum_c M[o, c] x[c, i] + start[o] for the tile's positions; start null means zero. out may not overlap x.
template <class T>
void product(const T* packed, const Rows<const T>& x, const T* start, const Rows<T>& out, int64_t channels,
             int64_t length) {
  with_rows(blocks_of(channels).rows,
            [&](auto rows) { product_rows<T, rows.value>(packed, x, start, out, channels, length); });
}

}  // namespace pyglow::cpu::PYGLOW_ISA
