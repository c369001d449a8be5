// Matrix products for the coupling nets, C = A B. Compiled once per instruction set: the libraries' products are
// written for one maker's processors and may run at half speed on the other's.
//
// A is packed once, by the caller's threads, or read where it lies in blocks of pixels. A task is a block of C, of one
// panel of A's rows and of columns two vectors wide. Its columns of B, up to inner_block long, stay in the first-level
// cache while the panels of A stream past: where they lie if B is in blocks of pixels, else packed for a range of tasks
// with the same columns. The block of C lives in registers meanwhile: per k one broadcast value of A and two vectors of
// B per row, as in the C x C product. 16-bit numbers are multiplied in pairs of k, by vectors or by tiles, or widened
// to floats. Every element of C is summed in the same order however the tasks are dealt out.
#include "cpu/net/packing.h"
#include "cpu/net/results.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

#if defined(__AMX_BF16__)
constexpr bool has_tiles = true;
#else
constexpr bool has_tiles = false;
#endif
template <class S>
constexpr bool in_tiles = in_pairs<S> && has_tiles;
constexpr int64_t tile_rows = 16;  // of a tile of sums, 16 wide; a block of C is two by two of them

// 32 kB of B. Of 16-bit numbers all of it: a block of C that is rounded cannot be added to.
template <class S>
constexpr int64_t inner_block = sizeof(S) == 2 ? INT64_MAX : 256;

template <class S>
Blocks blocks_of_rows(int64_t rows) {
  if constexpr (in_tiles<S>) return {(rows + 2 * tile_rows - 1) / (2 * tile_rows), 2 * tile_rows};
  return blocks_of(rows);
}

// A packed: panels [k][rows of the block], apart by more than their own size, as a transposed vector may be longer than
// a row of the panel; or in pairs, blocks of 32 k as activations lie.
template <class S>
PYGLOW_HD int64_t panel_size(const Blocks& blocks, int64_t inner) {
  if constexpr (in_pairs<S>) return blocks.rows * pixel_block;  // within a block of k
  return round_up(inner * blocks.rows + lanes<Sum<S>>, 16);
}

// `count` rows from `first` on, by rows, to a panel [k][width]; those of the next panel may be loaded along.
template <class S>
void pack_panel(const Sum<S>* a, int64_t stride, bool turned, int64_t first, int64_t count, int64_t inner,
                Packed<S>* to, int64_t width) {
  using T = Sum<S>;
  if (turned) {
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t i = 0; i < width; ++i)
        to[k * width + i] = i < count ? rounded(a[k * stride + first + i], S{}) : T(0);
    return;
  }
  transpose_rows<T>(a + first * stride, stride, count, inner, to, width);
  if constexpr (sizeof(S) == 2)
    for (int64_t i = 0; i < inner * width; ++i) to[i] = rounded(to[i], S{});
}

// The same rows to blocks of 32 k, `block` apart, zero where there are no more rows or k.
template <class S>
void pack_pairs(const Sum<S>* a, int64_t stride, bool turned, int64_t first, int64_t count, int64_t inner, S* to,
                int64_t block, int64_t width) {
  for (int64_t k = 0; k < inner; k += pixel_block, to += block) {
    const int64_t valid = smaller(pixel_block, inner - k);
    for (int64_t i = 0; i < width; ++i) {
      S* const row = to + i * pixel_block;
      const Sum<S>* const from = turned ? a + k * stride + first + i : a + (first + i) * stride + k;
      const int64_t step = turned ? stride : 1, given = i < count ? valid : 0;
      for (int64_t j = 0; j < given; ++j) narrow(from[j * step], row[j]);
      for (int64_t j = given; j < pixel_block; ++j) row[j] = S{};
    }
  }
}

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

#if defined(__AVX512BF16__)
// The same in pairs of k, of one block of them.
template <class T, int NumRows>
PYGLOW_HD void multiply_pairs(Block<T, NumRows>& c, const BFloat16* a, const BFloat16* b, int64_t pairs) {
  for (int64_t k = 0; k < pairs; ++k, a += 2, b += 2 * block_columns<T>) {
    __m512bh first, second;
    __builtin_memcpy(&first, b, sizeof first);
    __builtin_memcpy(&second, b + block_columns<T>, sizeof second);
#pragma GCC unroll 16
    for (int i = 0; i < NumRows; ++i) {
      int pair;
      __builtin_memcpy(&pair, a + i * pixel_block, sizeof pair);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
      c.sum[i][0] = (Vec<T>)_mm512_dpbf16_ps((__m512)c.sum[i][0], value, first);
      c.sum[i][1] = (Vec<T>)_mm512_dpbf16_ps((__m512)c.sum[i][1], value, second);
    }
  }
}
#endif

// A in blocks of 32 k, `a_block` apart, or (a_block 0) packed in panels.
template <class S, int NumRows>
PYGLOW_HD Block<Sum<S>, NumRows> multiply(const Packed<S>* a, int64_t a_block, const Packed<S>* b, int64_t b_row,
                                          int64_t inner) {
  using T = Sum<S>;
  Block<T, NumRows> c;
#pragma GCC unroll 16
  for (int i = 0; i < NumRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < column_vectors; ++v) c.sum[i][v] = Vec<T>{};
  if constexpr (in_pairs<S>) {
#if defined(__AVX512BF16__)
    for (int64_t k = 0; k < inner; k += pixel_block, a += a_block, b += pixel_block * b_row)
      multiply_pairs<T, NumRows>(c, a, b, (smaller(pixel_block, inner - k) + 1) / 2);
#endif
    return c;
  } else {
    if (a_block == 0) {
      multiply_run<T, NumRows, NumRows, 1>(c, a, b, b_row, inner);
      return c;
    }
    for (int64_t k = 0; k < inner; k += pixel_block, a += a_block, b += pixel_block * b_row)
      multiply_run<T, NumRows, 1, pixel_block>(c, a, b, b_row, smaller(pixel_block, inner - k));
    return c;
  }
}

#if defined(__AMX_BF16__)
// Tiles 0 to 3 are the block of C, 4 and 5 rows of A, 6 and 7 columns of B: 32 k at a time, 16 rows of pairs.
// Without a destructor: one would bring the runtime of exceptions into these objects, which they must not share.
inline void open_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shape;
  for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = tile_rows;
  // _tile_loadconfig is declared to read 8 bytes: a compiler might leave the others unwritten.
  asm volatile("ldtilecfg %0" ::"m"(shape));
}
inline void close_tiles() { _tile_release(); }

// To c, rows `c_row` apart; `both`: more than the first 16 rows.
inline void multiply_tiles(const BFloat16* a, int64_t a_block, const BFloat16* b, int64_t inner, bool both, float* c,
                           int64_t c_row) {
  constexpr int64_t width = block_columns<float>, row = sizeof(BFloat16) * pixel_block, pairs = 2 * row;
  asm volatile("" ::: "memory");  // tile loads come after what was packed, which the compiler is not told
  _tile_zero(0);
  _tile_zero(1);
  if (both) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < inner; k += pixel_block, a += a_block, b += pixel_block * width) {
    _tile_loadd(6, b, pairs);
    _tile_loadd(7, b + width, pairs);
    _tile_loadd(4, a, row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (!both) continue;
    _tile_loadd(5, a + tile_rows * pixel_block, row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  const int64_t bytes = c_row * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + width / 2, bytes);
  if (!both) return;
  _tile_stored(2, c + tile_rows * c_row, bytes);
  _tile_stored(3, c + tile_rows * c_row + width / 2, bytes);
}
#else
inline void open_tiles() {}
inline void close_tiles() {}
#endif

// Blocks of columns of a task. Tiles multiply A faster than the second-level cache delivers it, and would wait if they
// used it for one block of B alone.
template <class S>
constexpr int64_t blocks_of_task = in_tiles<S> ? 4 : 1;

// The blocks [first, last) of panels in the columns of a task.
template <class S, class Out, int NumRows>
void multiply_columns(const ProductArgs<S, Out>& args, const Blocks& blocks, int64_t first, int64_t last,
                      int64_t begin) {
  using T = Sum<S>;
  constexpr int64_t width = block_columns<T>, most = blocks_of_task<S> * width;
  const int64_t size = panel_size<S>(blocks, args.inner), end = smaller(args.columns, begin + most);
  const int64_t longest = round_up(smaller(inner_block<S>, args.inner), pixel_block);
  char* const memory = static_cast<char*>(
      thread_scratch(Scratch::tile, longest * most * sizeof(Packed<S>) + 2 * NumRows * width * sizeof(T)));
  T* const sums = reinterpret_cast<T*>(memory);
  T* const more = sums + NumRows * width;
  Packed<S>* const packed = reinterpret_cast<Packed<S>*>(more + NumRows * width);
  const bool in_place = sizeof(S) != 2 && !args.turned && args.b.shifts == nullptr && begin + width <= end;
  const bool simple = is_simple(args.after);
  const T leak = leak_of(args.after);
  for (int64_t k = 0; k < args.inner; k += inner_block<S>) {
    const int64_t inner = smaller(inner_block<S>, args.inner - k);
    const bool is_last = k + inner == args.inner, add = args.accumulate || k > 0;
    for (int64_t column = begin; column < end && !in_place; column += width) {
      const int64_t columns = smaller(width, end - column);
      Packed<S>* const to = packed + (column - begin) * longest;
      args.turned ? pack_turned<S>(args.b, k, inner, column, columns, to)
                  : pack_columns<S>(args.b, k, inner, column, columns, to);
    }
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t row = panel * NumRows, rows = smaller(NumRows, args.rows - row);
      const Packed<S>* left = args.a.data;
      if constexpr (in_pairs<S>) {
        left += row * pixel_block;
      } else {
        left += args.a.block == 0 ? panel * size + k * NumRows : k / pixel_block * args.a.block + row * pixel_block;
      }
      if (args.row_sums != nullptr && begin == 0)  // one task per row has these columns
        for (int64_t i = 0; i < rows; ++i) args.row_sums[row + i] += sum_of(args.summed, row + i, k, inner);
      for (int64_t column = begin; column < end; column += width) {
        const int64_t columns = smaller(width, end - column);
        const Packed<S>* right = packed + (column - begin) * longest;
        int64_t right_row = width;
        if constexpr (sizeof(S) != 2) {
          if (in_place) {
            right = at(args.b.matrix, k, column);
            right_row = row_at(args.b.matrix, column);
          }
        }
        const Target<S, Out> target{args, row, rows, column, columns, add, is_last};
        if constexpr (in_tiles<S>) {
#if defined(__AMX_BF16__)
          if constexpr (sizeof(Out) == sizeof(float)) {  // nothing follows the product, so the tiles go straight to C
            if (simple && leak == T(1) && args.after.bias == nullptr && !add && columns == width && rows == NumRows) {
              multiply_tiles(left, args.a.block, right, inner, true, at(args.c, row, column), row_at(args.c, column));
              continue;
            }
          }
          multiply_tiles(left, args.a.block, right, inner, rows > tile_rows, sums, width);
#endif
        } else {
          const Block<T, NumRows> block = multiply<S, NumRows>(left, args.a.block, right, right_row, inner);
          if constexpr (sizeof(S) != 2) {
            if (simple && columns == width) {
              put_block(target, block, leak);
              continue;
            }
          }
          put<false, T, NumRows>(block, {false, nullptr, nullptr, 0, T(0)}, NumRows, sums, width);
        }
        if (simple && columns == width && !add) {
          leak == T(0) ? put_at_once<false>(target, leak, sums) : put_at_once<true>(target, leak, sums);
        } else {
          put_slowly(target, sums, more);
        }
      }
    }
  }
}

template <class S, class Out>
int64_t tasks_of(const ProductArgs<S, Out>& args) {
  constexpr int64_t width = blocks_of_task<S> * block_columns<Sum<S>>;
  return blocks_of_rows<S>(args.rows).count * ((args.columns + width - 1) / width);
}

template <class S, class Out>
void multiply_tasks(const ProductArgs<S, Out>& args, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const Blocks blocks = blocks_of_rows<S>(args.rows);
  const int64_t panels = blocks.count;
  const auto run = [&](auto rows) {
    for (int64_t task = begin; task < end;) {
      const int64_t column = task / panels, last = smaller(end, (column + 1) * panels);
      multiply_columns<S, Out, rows.value>(args, blocks, task - column * panels, last - column * panels,
                                           column * blocks_of_task<S> * block_columns<Sum<S>>);
      task = last;
    }
  };
  if constexpr (in_tiles<S>) {
    open_tiles();
    run(NumRowsOf<2 * tile_rows>());
    close_tiles();
  } else {
    with_rows(blocks.rows, run);
  }
}

}  // namespace

template <class S>
int64_t packed_size(int64_t rows, int64_t inner) {
  const Blocks blocks = blocks_of_rows<S>(rows);
  const int64_t size = blocks.count * panel_size<S>(blocks, inner);
  return in_pairs<S> ? size * ((inner + pixel_block - 1) / pixel_block) : size;
}

template <class S>
Left<S> pack_left(const Sum<S>* a, bool turned, int64_t rows, int64_t inner, Packed<S>* packed,
                  const Threads& threads) {
  const Blocks blocks = blocks_of_rows<S>(rows);
  const int64_t size = panel_size<S>(blocks, inner), stride = turned ? rows : inner;
  const int64_t block = in_pairs<S> ? blocks.count * size : 0;
  parallel(threads, blocks.count, grain_of(blocks.rows * inner), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t row = panel * blocks.rows;
      if constexpr (in_pairs<S>) {
        pack_pairs<S>(a, stride, turned, row, rows - row, inner, packed + panel * size, block, blocks.rows);
      } else {
        pack_panel<S>(a, stride, turned, row, rows - row, inner, packed + panel * size, blocks.rows);
      }
    }
  });
  return {packed, block};
}

template <class S>
Left<S> left_of(const Matrix<const S>& a, int64_t rows, int64_t inner, Packed<S>* packed, const Threads& threads) {
  if constexpr (!packs_activations<S>) {
    return {a.data, a.block};
  } else {
    const Blocks blocks = blocks_of_rows<S>(rows);
    const int64_t size = panel_size<S>(blocks, inner);
    parallel(threads, blocks.count, grain_of(blocks.rows * inner), [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel)
        for (int64_t k = 0; k < inner; ++k)
          for (int64_t i = 0; i < blocks.rows; ++i) {
            const int64_t row = panel * blocks.rows + i;
            packed[panel * size + k * blocks.rows + i] = row < rows ? widen(*at(a, row, k)) : 0;
          }
    });
    return {packed, 0};
  }
}

// The tasks of all products are dealt out at once: a product of a few rows and columns has too few of its own for
// threads to have equally many.
template <class S, class Out>
void matrix_products(const ProductArgs<S, Out>* products, int64_t count, const Threads& threads) {
  int64_t tasks = 0, inner = 0;
  for (int64_t i = 0; i < count; ++i) {
    tasks += tasks_of(products[i]);
    inner = larger(inner, products[i].inner);
  }
  parallel(threads, tasks, grain_of(block_rows * inner), [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t own = tasks_of(products[i]);
      multiply_tasks(products[i], larger(begin, 0), smaller(end, own));
      begin -= own;
      end -= own;
    }
  });
}

#define PYGLOW_INSTANTIATE(S)                                                                        \
  template int64_t packed_size<S>(int64_t, int64_t);                                                 \
  template Left<S> pack_left<S>(const Sum<S>*, bool, int64_t, int64_t, Packed<S>*, const Threads&);  \
  template Left<S> left_of<S>(const Matrix<const S>&, int64_t, int64_t, Packed<S>*, const Threads&); \
  template void matrix_products<S, S>(const ProductArgs<S, S>*, int64_t, const Threads&);
#if !defined(PYGLOW_HALF_ONLY)
PYGLOW_INSTANTIATE(float)
PYGLOW_INSTANTIATE(double)
#endif
PYGLOW_INSTANTIATE(BFloat16)
template void matrix_products<BFloat16, float>(const ProductArgs<BFloat16, float>*, int64_t, const Threads&);

}  // namespace pyglow::cpu::PYGLOW_ISA
