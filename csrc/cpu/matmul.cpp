// Matrix products for the coupling nets, C = A B. Compiled once per instruction set: the libraries' products are
// written for one maker's processors and may run at half speed on the other's.
//
// A is packed into panels [row block][k][rows of the block] once, by the caller's threads, or read where it lies in
// blocks of pixels. A task is a block of C, of one panel and of columns two vectors wide. Its columns of B, up to
// inner_block long, stay in the first-level cache while the panels of A stream past: where they lie if B is in blocks
// of pixels, or packed so for a range of tasks with the same columns if B is turned. The block of C lives in registers
// meanwhile: per k one broadcast value of A and two vectors of B per row, as in the C x C product. Every element of C
// is summed in the same order however the tasks are dealt out.
#include "cpu/matrix.h"
#include "cpu/mix_sums.h"
#include "math/activation.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

constexpr int64_t inner_block = 256;  // 32 kB of B
constexpr int column_vectors = 2;
template <class T>
constexpr int64_t block_columns = column_vectors * lanes<T>;
static_assert(pixel_block % block_columns<float> == 0);

// Panels are apart by more than their own size, as a transposed vector may be longer than a row of the panel.
template <class T>
PYGLOW_HD int64_t panel_size(const Blocks& blocks, int64_t inner) {
  return round_up(inner * blocks.rows + lanes<T>, 16);
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

template <class T>
PYGLOW_HD T sum_of(const Matrix<const T>& a, int64_t row, int64_t first_k, int64_t inner) {
  Vec<T> sum{};
  T rest{};
  for (int64_t k = 0; k < inner; k += pixel_block) {
    const T* const from = at(a, row, first_k + k);
    const int64_t count = smaller(pixel_block, inner - k);
    int64_t i = 0;
    for (; i + lanes<T> <= count; i += lanes<T>) sum += load<T>(from + i);
    for (; i < count; ++i) rest += from[i];
  }
  return sum_lanes<T>(sum) + rest;
}

// Rows from `first` on, of which `count` are left: those of the next panel may be loaded along.
template <class T>
void pack_panel(const Matrix<const T>& a, bool turned, int64_t first, int64_t count, int64_t inner, T* to,
                int64_t width) {
  if (turned) {
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t i = 0; i < width; ++i) to[k * width + i] = i < count ? a.data[k * a.row + first + i] : T(0);
    return;
  }
  for (int64_t k = 0; k < inner; k += pixel_block)
    transpose_rows<T>(at(a, first, k), row_at(a, k), count, smaller(pixel_block, inner - k), to + k * width, width);
}

// inner x columns of B to [k][block_columns], zero where there are fewer columns.
template <class T>
void pack_columns(const Matrix<const T>& b, bool turned, int64_t first_k, int64_t inner, int64_t first, int64_t count,
                  T* to) {
  constexpr int64_t width = block_columns<T>;
  if (turned) {
    for (int64_t k = 0; k < inner; k += pixel_block)
      transpose_rows<T>(at(b, first, first_k + k), row_at(b, first_k + k), count, smaller(pixel_block, inner - k),
                        to + k * width, width);
    return;
  }
  const T* row = at(b, first_k, first);
  for (int64_t k = 0; k < inner; ++k, row += row_at(b, first))
    for (int64_t j = 0; j < width; ++j) to[k * width + j] = j < count ? row[j] : T(0);
}

template <class T, int NumRows>
struct Block {
  Vec<T> sum[NumRows][column_vectors];
};

// c += A B for `count` values of k; element (i, k) of A is a[k * k_step + i * row_step].
template <class T, int NumRows, int64_t k_step, int64_t row_step>
PYGLOW_HD void multiply_run(Block<T, NumRows>& c, const T* a, const T* b, int64_t b_row, int64_t count) {
  for (int64_t k = 0; k < count; ++k, a += k_step, b += b_row) {
    const Vec<T> first = load<T>(b), second = load<T>(b + lanes<T>);
#pragma GCC unroll 16
    for (int i = 0; i < NumRows; ++i) {
      const Vec<T> value = broadcast<T>(a[i * row_step]);
      c.sum[i][0] += value * first;
      c.sum[i][1] += value * second;
    }
  }
}

// A in blocks of pixels, `a_block` apart, or (a_block 0) packed.
template <class T, int NumRows>
PYGLOW_HD Block<T, NumRows> multiply(const T* a, int64_t a_block, const T* b, int64_t b_row, int64_t inner) {
  Block<T, NumRows> c;
#pragma GCC unroll 16
  for (int i = 0; i < NumRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < column_vectors; ++v) c.sum[i][v] = Vec<T>{};
  if (a_block == 0) {
    multiply_run<T, NumRows, NumRows, 1>(c, a, b, b_row, inner);
    return c;
  }
  for (int64_t k = 0; k < inner; k += pixel_block, a += a_block, b += pixel_block * b_row)
    multiply_run<T, NumRows, 1, pixel_block>(c, a, b, b_row, smaller(pixel_block, inner - k));
  return c;
}

// What happens to a block of C besides the product.
template <class T>
struct Epilogue {
  bool add;
  const T* bias;  // of the block's rows, or null
  const T* mask;  // at the block, or null
  int64_t mask_row;
  T leak;
};

template <bool Leaky, class T, int NumRows>
PYGLOW_HD void put(const Block<T, NumRows>& block, const Epilogue<T>& epilogue, int64_t rows, T* c, int64_t stride) {
#pragma GCC unroll 16
  for (int i = 0; i < NumRows; ++i) {
    if (i >= rows) return;
#pragma GCC unroll 2
    for (int v = 0; v < column_vectors; ++v) {
      T* const to = c + i * stride + v * lanes<T>;
      Vec<T> value = epilogue.add ? load<T>(to) + block.sum[i][v] : block.sum[i][v];
      if (epilogue.bias != nullptr)
        value = math::leaky_relu<Leaky>(value + broadcast<T>(epilogue.bias[i]), epilogue.leak);
      if (epilogue.mask != nullptr) {
        const Vec<T> result = load<T>(epilogue.mask + i * epilogue.mask_row + v * lanes<T>);
        value = math::leaky_relu_backward<Leaky>(value, result, epilogue.leak);
      }
      store<T>(to, value);
    }
  }
}

// Of the last columns, which are fewer than a block has, by way of `edge` (NumRows, block_columns).
template <bool Leaky, class T, int NumRows>
void put_edge(const Block<T, NumRows>& block, const Epilogue<T>& epilogue, int64_t rows, int64_t columns, T* c,
              int64_t stride, T* edge) {
  constexpr int64_t width = block_columns<T>;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) edge[i * width + j] = epilogue.add ? c[i * stride + j] : T(0);
  put<Leaky, T, NumRows>(block, {epilogue.add, epilogue.bias, nullptr, 0, epilogue.leak}, rows, edge, width);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      T value = edge[i * width + j];
      if (epilogue.mask != nullptr)
        value = math::leaky_relu_backward<Leaky>(value, epilogue.mask[i * epilogue.mask_row + j], epilogue.leak);
      c[i * stride + j] = value;
    }
}

template <bool Leaky, class T, int NumRows>
PYGLOW_HD void put_columns(const Block<T, NumRows>& block, const Epilogue<T>& epilogue, int64_t rows, int64_t columns,
                           T* c, int64_t stride, T* edge) {
  columns == block_columns<T> ? put<Leaky, T, NumRows>(block, epilogue, rows, c, stride)
                              : put_edge<Leaky, T, NumRows>(block, epilogue, rows, columns, c, stride, edge);
}

// The blocks [first, last) of panels, `size` apart, in one block of columns.
template <class T, int NumRows>
void multiply_columns(const ProductArgs<T>& args, int64_t size, int64_t first, int64_t last, int64_t column) {
  constexpr int64_t width = block_columns<T>;
  T* const packed = static_cast<T*>(thread_scratch(Scratch::tile, (inner_block + NumRows) * width * sizeof(T)));
  T* const edge = packed + inner_block * width;
  const int64_t columns = smaller(width, args.columns - column);
  const bool in_place = !args.turned && columns == width;
  for (int64_t k = 0; k < args.inner; k += inner_block) {
    const int64_t inner = smaller(inner_block, args.inner - k);
    if (!in_place) pack_columns<T>(args.b, args.turned, k, inner, column, columns, packed);
    const T* const right = in_place ? at(args.b, k, column) : packed;
    const int64_t right_row = in_place ? row_at(args.b, column) : width;
    const bool is_last = k + inner == args.inner;
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t row = panel * NumRows, rows = smaller(NumRows, args.rows - row);
      Epilogue<T> epilogue{
          .add = args.accumulate || k > 0, .bias = nullptr, .mask = nullptr, .mask_row = 0, .leak = args.leak};
      if (is_last && args.bias != nullptr) epilogue.bias = args.bias + row;
      if (is_last && args.mask.data != nullptr) {
        epilogue.mask = at(args.mask, row, column);
        epilogue.mask_row = row_at(args.mask, column);
      }
      const bool a_in_place = args.packed_a == nullptr;
      const T* const left = a_in_place ? at(args.a, row, k) : args.packed_a + panel * size + k * NumRows;
      const Block<T, NumRows> block =
          multiply<T, NumRows>(left, a_in_place ? args.a.block : 0, right, right_row, inner);
      if (args.row_sums != nullptr && column == 0)  // one task per row has these columns
        for (int64_t i = 0; i < rows; ++i) args.row_sums[row + i] += sum_of<T>(args.a, row + i, k, inner);
      T* const c = at(args.c, row, column);
      const int64_t c_row = row_at(args.c, column);
      args.leak == T(0) ? put_columns<false, T, NumRows>(block, epilogue, rows, columns, c, c_row, edge)
                        : put_columns<true, T, NumRows>(block, epilogue, rows, columns, c, c_row, edge);
    }
  }
}

template <class T>
int64_t tasks_of(const ProductArgs<T>& args) {
  return blocks_of(args.rows).count * ((args.columns + block_columns<T> - 1) / block_columns<T>);
}

template <class T>
void multiply_tasks(const ProductArgs<T>& args, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const Blocks blocks = blocks_of(args.rows);
  const int64_t panels = blocks.count, size = panel_size<T>(blocks, args.inner);
  with_rows(blocks.rows, [&](auto rows) {
    for (int64_t task = begin; task < end;) {
      const int64_t column = task / panels, last = smaller(end, (column + 1) * panels);
      multiply_columns<T, rows.value>(args, size, task - column * panels, last - column * panels,
                                      column * block_columns<T>);
      task = last;
    }
  });
}

}  // namespace

template <class T>
int64_t packed_size(int64_t rows, int64_t inner) {
  const Blocks blocks = blocks_of(rows);
  return blocks.count * panel_size<T>(blocks, inner);
}

template <class T>
void pack_left(const Matrix<const T>& a, bool turned, int64_t rows, int64_t inner, T* packed, const Threads& threads) {
  const Blocks blocks = blocks_of(rows);
  const int64_t size = panel_size<T>(blocks, inner);
  parallel(threads, blocks.count, grain_of(blocks.rows * inner), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t row = panel * blocks.rows;
      pack_panel<T>(a, turned, row, rows - row, inner, packed + panel * size, blocks.rows);
    }
  });
}

// The tasks of all products are dealt out at once: a product of a few rows and columns has too few of its own for
// threads to have equally many.
template <class T>
void matrix_products(const ProductArgs<T>* products, int64_t count, const Threads& threads) {
  int64_t tasks = 0, inner = 0;
  for (int64_t i = 0; i < count; ++i) {
    tasks += tasks_of<T>(products[i]);
    inner = larger(inner, products[i].inner);
  }
  parallel(threads, tasks, grain_of(block_rows * inner), [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t own = tasks_of<T>(products[i]);
      multiply_tasks<T>(products[i], larger(begin, 0), smaller(end, own));
      begin -= own;
      end -= own;
    }
  });
}

#define PYGLOW_INSTANTIATE(T)                                                                     \
  template int64_t packed_size<T>(int64_t, int64_t);                                              \
  template void pack_left<T>(const Matrix<const T>&, bool, int64_t, int64_t, T*, const Threads&); \
  template void matrix_products<T>(const ProductArgs<T>*, int64_t, const Threads&);
PYGLOW_INSTANTIATE(float)
PYGLOW_INSTANTIATE(double)

}  // namespace pyglow::cpu::PYGLOW_ISA
