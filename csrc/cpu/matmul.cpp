// Matrix products for the coupling nets, C = A B. Compiled once per instruction set: the libraries' products are
// written for one maker's processors and may run at half speed on the other's.
//
// A is packed into panels [row block][k][rows of the block] once, by the caller's threads. A task is a block of
// columns, two vectors wide, with some or all row blocks: it packs its part of B, up to inner_block long, into
// [k][columns], which stays in the first-level cache while the panels of A stream past. A block of C lives in registers
// meanwhile: per k one broadcast value of A and two vectors of B per row, as in the C x C product. Every element of C
// is summed in the same order however the tasks are dealt out.
#include "cpu/isa.h"
#include "cpu/mix_sums.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

constexpr int64_t inner_block = 256;  // 32 kB of B
constexpr int column_vectors = 2;
template <class T>
constexpr int64_t block_columns = column_vectors * lanes<T>;

// Panels are apart by more than their own size, as a transposed vector is longer than a row of the panel.
template <class T>
PYGLOW_HD int64_t panel_size(int64_t inner) {
  return round_up(inner * block_rows + lanes<T>, 16);
}

// `count` rows at `from`, `stride` apart, k contiguous: to[k * width + i] = from[i * stride + k], zero for i >= count.
// What a whole vector spoils behind a row of `to` is written after it; behind the last row there is room for that.
template <class T>
PYGLOW_HD void transpose_rows(const T* from, int64_t stride, int64_t count, int64_t inner, T* to, int64_t width) {
  const int64_t blocks = (width + lanes<T> - 1) / lanes<T>;
  int64_t k = 0;
  for (; k + lanes<T> <= inner; k += lanes<T>)
    for (int64_t v = blocks - 1; v >= 0; --v) {
      const int64_t valid = smaller(larger(count - v * lanes<T>, 0), lanes<T>);
      transpose_block<T>({from + v * lanes<T> * stride, stride}, 0, k, valid, to + k * width + v * lanes<T>, width);
    }
  for (; k < inner; ++k)
    for (int64_t i = 0; i < width; ++i) to[k * width + i] = i < count ? from[i * stride + k] : T(0);
}

// count: of the rows from `first` on; those of the next panel may be loaded along.
template <class T>
void pack_panel(const Matrix<const T>& a, int64_t first, int64_t count, int64_t inner, T* to) {
  const T* const from = a.data + first * a.row;
  if (a.column == 1) return transpose_rows<T>(from, a.row, count, inner, to, block_rows);
  for (int64_t k = 0; k < inner; ++k)
    for (int64_t i = 0; i < block_rows; ++i) to[k * block_rows + i] = i < count ? from[i * a.row + k * a.column] : T(0);
}

// inner x columns of B to [k][block_columns], zero where there are fewer columns.
template <class T>
void pack_columns(const Matrix<const T>& b, int64_t first_k, int64_t inner, int64_t first, int64_t count, T* to) {
  const T* const from = b.data + first_k * b.row + first * b.column;
  constexpr int64_t width = block_columns<T>;
  if (b.row == 1) {  // k contiguous
    transpose_rows<T>(from, b.column, count, inner, to, width);
    return;
  }
  for (int64_t k = 0; k < inner; ++k) {
    const T* const row = from + k * b.row;
    T* const out = to + k * width;
    if (count == width) {
      for (int v = 0; v < column_vectors; ++v) store<T>(out + v * lanes<T>, load<T>(row + v * lanes<T>));
    } else {
      for (int64_t j = 0; j < width; ++j) out[j] = j < count ? row[j] : T(0);
    }
  }
}

template <class T>
struct Block {
  Vec<T> sum[block_rows][column_vectors];
};

template <class T>
PYGLOW_HD Block<T> multiply(const T* a, const T* b, int64_t inner) {
  Block<T> c;
#pragma GCC unroll 16
  for (int i = 0; i < block_rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < column_vectors; ++v) c.sum[i][v] = Vec<T>{};
  for (int64_t k = 0; k < inner; ++k, a += block_rows, b += block_columns<T>) {
    const Vec<T> first = load<T>(b), second = load<T>(b + lanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < block_rows; ++i) {
      const Vec<T> value = broadcast<T>(a[i]);
      c.sum[i][0] += value * first;
      c.sum[i][1] += value * second;
    }
  }
  return c;
}

template <class T>
PYGLOW_HD void put(const Block<T>& block, const ProductArgs<T>& args, bool add, bool last, int64_t row, int64_t rows,
                   T* c, int64_t stride) {
#pragma GCC unroll 16
  for (int i = 0; i < block_rows; ++i) {
    if (i >= rows) return;
#pragma GCC unroll 2
    for (int v = 0; v < column_vectors; ++v) {
      T* const to = c + i * stride + v * lanes<T>;
      Vec<T> value = add ? load<T>(to) + block.sum[i][v] : block.sum[i][v];
      if (last && args.bias != nullptr) {
        value += broadcast<T>(args.bias[row + i]);
        value = value < T(0) ? Vec<T>{} : value;  // NaN is kept
      }
      store<T>(to, value);
    }
  }
}

template <class T>
void multiply_columns(const ProductArgs<T>& args, int64_t first_panel, int64_t last_panel, int64_t column) {
  constexpr int64_t width = block_columns<T>;
  T* const right = static_cast<T*>(
      thread_scratch(Scratch::tile, (inner_block * width + 2 * lanes<T> + block_rows * width) * sizeof(T)));
  T* const edge = right + inner_block * width + 2 * lanes<T>;
  const int64_t columns = smaller(width, args.columns - column), size = panel_size<T>(args.inner);
  for (int64_t k = 0; k < args.inner; k += inner_block) {
    const int64_t inner = smaller(inner_block, args.inner - k);
    pack_columns<T>(args.b, k, inner, column, columns, right);
    const bool add = args.accumulate || k > 0, last = k + inner == args.inner;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t row = panel * block_rows, rows = smaller(block_rows, args.rows - row);
      const Block<T> block = multiply<T>(args.packed_a + panel * size + k * block_rows, right, inner);
      T* const c = args.c + row * args.stride + column;
      if (columns == width) {
        put<T>(block, args, add, last, row, rows, c, args.stride);
        continue;
      }
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) edge[i * width + j] = add ? c[i * args.stride + j] : T(0);
      put<T>(block, args, add, last, row, rows, edge, width);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) c[i * args.stride + j] = edge[i * width + j];
    }
  }
}

}  // namespace

template <class T>
int64_t packed_size(int64_t rows, int64_t inner) {
  return (rows + block_rows - 1) / block_rows * panel_size<T>(inner);
}

template <class T>
void pack_left(const Matrix<const T>& a, int64_t rows, int64_t inner, T* packed, const Threads& threads) {
  const int64_t panels = (rows + block_rows - 1) / block_rows;
  parallel(threads, panels, grain_of(block_rows * inner), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t row = panel * block_rows;
      pack_panel<T>(a, row, rows - row, inner, packed + panel * panel_size<T>(inner));
    }
  });
}

template <class T>
void matrix_product(const ProductArgs<T>& args, const Threads& threads) {
  if (args.rows == 0 || args.columns == 0) return;
  const int64_t panels = (args.rows + block_rows - 1) / block_rows;
  const int64_t blocks = (args.columns + block_columns<T> - 1) / block_columns<T>;
  // Few columns, as in the gradient of a thin weight: the rows are dealt out too.
  const int64_t parts = blocks >= 16 ? 1 : smaller(panels, (15 + blocks) / blocks);
  parallel(threads, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts;
      multiply_columns<T>(args, part * panels / parts, (part + 1) * panels / parts, task / parts * block_columns<T>);
    }
  });
}

#define PYGLOW_INSTANTIATE(T)                                                               \
  template int64_t packed_size<T>(int64_t, int64_t);                                        \
  template void pack_left<T>(const Matrix<const T>&, int64_t, int64_t, T*, const Threads&); \
  template void matrix_product<T>(const ProductArgs<T>&, const Threads&);
PYGLOW_INSTANTIATE(float)
PYGLOW_INSTANTIATE(double)

}  // namespace pyglow::cpu::PYGLOW_ISA
