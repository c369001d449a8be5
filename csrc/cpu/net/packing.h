// How the factors of a product are laid out for it, in what order and in which numbers.
//
// B is packed a block of columns at a time, [k][column], which is when a convolution's input is gathered: it is never
// written out as columns. 16-bit numbers go in pairs of k, [k / 2][column][2], or are widened to floats.
#pragma once
#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include "cpu/mix_sums.h"
#include "cpu/net/windows.h"

namespace pyglow::cpu::PYGLOW_ISA {

constexpr int column_vectors = 2;
template <class T>
constexpr int64_t block_columns = column_vectors * lanes<T>;
static_assert(pixel_block % block_columns<float> == 0);

// A vector of 16-bit numbers is as long as a block of columns.
using VecH = uint16_t __attribute__((vector_size(PYGLOW_VECTOR_BYTES)));
constexpr int64_t half_lanes = PYGLOW_VECTOR_BYTES / 2;
static_assert(half_lanes == block_columns<float>);

// Conversions between the types of numbers.
PYGLOW_HD float widen(float x) { return x; }
PYGLOW_HD double widen(double x) { return x; }
PYGLOW_HD float widen(BFloat16 x) { return math::widen(x); }
PYGLOW_HD void narrow(float x, float& y) { y = x; }
PYGLOW_HD void narrow(double x, double& y) { y = x; }
PYGLOW_HD void narrow(float x, BFloat16& y) { math::narrow(x, y); }
// A number as it is once it is packed: rounded to the packed type.
PYGLOW_HD float rounded(float x, BFloat16) {
  BFloat16 y;
  math::narrow(x, y);
  return math::widen(y);
}
PYGLOW_HD float rounded(float x, float) { return x; }
PYGLOW_HD double rounded(double x, double) { return x; }

// A block of columns of one row.
template <class T>
PYGLOW_HD void load_row(const T* from, Vec<T> (&v)[column_vectors]) {
  for (int j = 0; j < column_vectors; ++j) v[j] = load<T>(from + j * lanes<T>);
}
template <class T>
PYGLOW_HD void store_row(const Vec<T> (&v)[column_vectors], T* to) {
  for (int j = 0; j < column_vectors; ++j) store<T>(to + j * lanes<T>, v[j]);
}
PYGLOW_HD void load_row(const BFloat16* from, Vec<float> (&v)[column_vectors]) {
  float row[block_columns<float>];
  for (int64_t i = 0; i < block_columns<float>; ++i) row[i] = widen(from[i]);
  load_row(row, v);
}
PYGLOW_HD void store_row(const Vec<float> (&v)[column_vectors], BFloat16* to) {
#if defined(__AVX512BF16__)
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
  __builtin_memcpy(to, &both, sizeof both);
#else
  float row[block_columns<float>];
  store_row(v, row);
  for (int64_t i = 0; i < block_columns<float>; ++i) narrow(row[i], to[i]);
#endif
}

// Lane i is from[i] where bit i is set, else zero. All of it may be read, also what another task writes meanwhile:
// those lanes are dropped.
#if defined(__AVX512F__)
template <class T>
PYGLOW_HD Vec<T> load_where(const T* from, uint32_t bits) {
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(bits), from);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(bits), from);
}
#else
template <class T>
PYGLOW_HD Vec<T> load_where(const T* from, uint32_t bits) {
  using Mask = decltype(Vec<T>{} < Vec<T>{});
  Mask lane;
  for (int i = 0; i < static_cast<int>(lanes<T>); ++i) lane[i] = 1 << i;
  const Mask inside = (lane & (Mask{} + static_cast<int>(bits & ((1u << lanes<T>)-1)))) != 0;
  return inside ? load<T>(from) : Vec<T>{};
}
#endif
PYGLOW_HD VecH load_where(const BFloat16* from, uint32_t bits) {
#if defined(__AVX512BW__)
  const __m512i v = _mm512_maskz_loadu_epi16(bits, from);
  VecH result;
  __builtin_memcpy(&result, &v, sizeof v);
  return result;
#else
  VecH lane, v;
  for (int i = 0; i < static_cast<int>(half_lanes); ++i) lane[i] = static_cast<uint16_t>(1u << i);
  __builtin_memcpy(&v, from, sizeof v);
  return (lane & (VecH{} + static_cast<uint16_t>(bits))) != 0 ? v : VecH{};
#endif
}

template <class S>
constexpr int64_t vector_elements = PYGLOW_VECTOR_BYTES / sizeof(S);

template <class S>
PYGLOW_HD void copy_where(const S* from, uint32_t bits, S* to) {
  const auto v = load_where(from, bits);
  __builtin_memcpy(to, &v, sizeof v);
}

PYGLOW_HD void widen_row(const BFloat16* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

// The sum of a row from pixel first_k on, where a block begins.
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
PYGLOW_HD float sum_of(const Matrix<const BFloat16>& a, int64_t row, int64_t first_k, int64_t inner) {
  float sums[pixel_block] = {};
  for (int64_t k = 0; k < inner; k += pixel_block) {
    const BFloat16* const from = at(a, row, first_k + k);
    const int64_t count = smaller(pixel_block, inner - k);
    if (count == pixel_block) {
      for (int64_t i = 0; i < pixel_block; ++i) sums[i] += math::widen(from[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) sums[i] += math::widen(from[i]);
    }
  }
  for (int64_t half = pixel_block / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// The rows of a right matrix from `first` on, one after the other, at the columns from `column` on: where the values
// are and, by bits, which of them are not zero. There are `columns`, in one block of pixels.
template <class S>
class RowsAt {
 public:
  PYGLOW_HD RowsAt(const Right<S>& b, int64_t first, int64_t column, int64_t columns)
      : valid_(columns >= pixel_block ? ~0u : (1u << columns) - 1) {
    if (b.shifts == nullptr) {
      from_ = at(b.matrix, first, column);
      row_ = row_at(b.matrix, column);
      return;
    }
    taps_ = b.shifts->taps();
    const int64_t pixel = b.first + column;
    const Shifts::Seen seen = b.shifts->from(pixel / pixel_block);
    skipped_ = static_cast<int>(pixel % pixel_block);
    step_ = b.transposed ? -1 : 1;
    offset_ = seen.offset + (b.transposed ? taps_ - 1 : 0);
    inside_ = seen.inside + (b.transposed ? taps_ - 1 : 0);
    tap_ = first % taps_;
    from_ = b.matrix.data + first / taps_ * b.matrix.row + column;
    row_ = b.matrix.row;
  }

  struct Row {
    const S* from;
    uint32_t bits;
  };
  PYGLOW_HD Row next() {
    if (taps_ == 0) {
      const Row row{from_, valid_};
      from_ += row_;
      return row;
    }
    const int64_t i = step_ * tap_;
    const Row row{from_ + offset_[i], inside_[i] >> skipped_ & valid_};
    const bool is_last = ++tap_ == taps_;
    from_ += is_last ? row_ : 0;
    tap_ = is_last ? 0 : tap_;
    return row;
  }

 private:
  const S* from_;
  uint32_t valid_;
  int skipped_ = 0;
  int64_t row_, taps_ = 0, tap_ = 0, step_ = 1;
  const int64_t* offset_ = nullptr;
  const uint32_t* inside_ = nullptr;
};

// `count` rows from `first` on of a block of pixels to rows of whole blocks, zero behind its `pixels`.
template <class S>
void copy_block(const Right<S>& b, int64_t first, int64_t count, int64_t pixel, int64_t pixels, S* to) {
  RowsAt<S> source(b, first, pixel, pixels);
  for (int64_t row = 0; row < count; ++row, to += pixel_block) {
    const auto [from, bits] = source.next();
    for (int64_t i = 0; i < pixel_block; i += vector_elements<S>) copy_where(from + i, bits >> i, to + i);
  }
}

// Two rows of 16-bit numbers, as pairs.
#if defined(__AVX512BW__)
PYGLOW_HD void store_pairs(__m512i even, __m512i odd, BFloat16* to) {
  alignas(64) static constexpr auto order = [] {
    struct {
      uint16_t low[32], high[32];
    } found{};
    for (int i = 0; i < 32; ++i) {
      found.low[i] = static_cast<uint16_t>(i / 2 + 32 * (i % 2));
      found.high[i] = static_cast<uint16_t>(16 + i / 2 + 32 * (i % 2));
    }
    return found;
  }();
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, _mm512_load_si512(order.low), odd));
  _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(even, _mm512_load_si512(order.high), odd));
}
#endif

// Rows of B to [k][block_columns], zero where there are fewer columns. Pairs go on in zeros to a whole block of k.
template <class S>
void pack_columns(const Right<S>& b, int64_t first_k, int64_t inner, int64_t column, int64_t columns, Packed<S>* to) {
  constexpr int64_t width = block_columns<Sum<S>>;
  RowsAt<S> rows(b, first_k, column, columns);
  if constexpr (sizeof(S) != 2) {
    for (int64_t k = 0; k < inner; ++k, to += width) {
      const auto [from, bits] = rows.next();
      copy_where(from, bits, to);
      copy_where(from + lanes<S>, bits >> lanes<S>, to + lanes<S>);
    }
  } else if constexpr (!in_pairs<S>) {
    for (int64_t k = 0; k < inner; ++k, to += width) {
      alignas(PYGLOW_VECTOR_BYTES) S row[half_lanes];
      const auto [from, bits] = rows.next();
      copy_where(from, bits, row);
      widen_row(row, width, to);
    }
  } else {
#if defined(__AVX512BW__)
    const __m512i zero = _mm512_setzero_si512();
    int64_t k = 0;
    for (; k + 2 <= inner; k += 2, to += 2 * width) {
      const auto even = rows.next(), odd = rows.next();
      store_pairs(_mm512_maskz_loadu_epi16(even.bits, even.from), _mm512_maskz_loadu_epi16(odd.bits, odd.from), to);
    }
    if (k < inner) {
      const auto [from, bits] = rows.next();
      store_pairs(_mm512_maskz_loadu_epi16(bits, from), zero, to);
      k += 2, to += 2 * width;
    }
    for (; k < round_up(inner, pixel_block); k += 2, to += 2 * width) store_pairs(zero, zero, to);
#endif
  }
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

// The same of B turned: its columns are `count` rows of the matrix from `first` on, its k the pixels from `first_k` on,
// where a block of pixels begins.
template <class S>
void pack_turned(const Right<S>& b, int64_t first_k, int64_t inner, int64_t first, int64_t count, Packed<S>* to) {
  constexpr int64_t width = block_columns<Sum<S>>;
  alignas(64) S rows[width * pixel_block];
  for (int64_t i = count * pixel_block; i < width * pixel_block; ++i) rows[i] = S{};
  for (int64_t k = 0; k < inner; k += pixel_block, to += width * pixel_block) {
    const int64_t pixels = smaller(pixel_block, inner - k);
    if (b.shifts == nullptr) {  // from where they lie
      const S* const from = at(b.matrix, first, first_k + k);
      const int64_t stride = row_at(b.matrix, first_k + k);
      if constexpr (sizeof(S) != 2) {
        transpose_rows<S>(from, stride, count, pixels, to, width);
        continue;
      } else if constexpr (in_pairs<S>) {
        static_assert(pixel_block / 2 == lanes<float>, "whole vectors: no pair is read as a float");
        if (pixels == pixel_block && stride % 2 == 0) {
          transpose_rows<float>(reinterpret_cast<const float*>(from), stride / 2, count, pixel_block / 2,
                                reinterpret_cast<float*>(to), width);
          continue;
        }
      }
    }
    copy_block(b, first, count, first_k + k, pixels, rows);
    if constexpr (sizeof(S) != 2) {
      transpose_rows<S>(rows, pixel_block, width, pixels, to, width);
    } else if constexpr (in_pairs<S>) {
      transpose_rows<float>(reinterpret_cast<const float*>(rows), pixel_block / 2, width, pixel_block / 2,
                            reinterpret_cast<float*>(to), width);
    } else {
      alignas(64) float wide[width * pixel_block];
      widen_row(rows, width * pixel_block, wide);
      transpose_rows<float>(wide, pixel_block, width, pixels, to, width);
    }
  }
}

}  // namespace pyglow::cpu::PYGLOW_ISA
