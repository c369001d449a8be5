// CPU schedule of the inverses of matrices, a matrix at a time in a thread's own memory; compiled once per instruction
// set.
#include "cpu/isa.h"
#include "cpu/tiles.h"
#include "math/channel_mix.h"
#include "math/exchange.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

using math::exchange_panel;

// A matrix while it is exchanged. Rows are whole panels long; what is behind their last column stays zero.
struct Table {
  double* data;      // [row][stride]
  double* sources;   // [exchange_panel][stride]: the rows of a panel's pivots, negative, as they were before it
  double* pivots;    // [step]: their sizes
  int64_t* row_of;   // [step]: of the pivot
  int64_t* step_of;  // [row]: whose pivot it has; -1: none yet
  int64_t size, stride;

  static int64_t stride_of(int64_t size) { return round_up(size, exchange_panel); }
  static int64_t bytes(int64_t size) {
    return ((size + exchange_panel) * stride_of(size) + size) * static_cast<int64_t>(sizeof(double)) +
           2 * size * static_cast<int64_t>(sizeof(int64_t));
  }
  Table(void* memory, int64_t size) : data(static_cast<double*>(memory)), size(size), stride(stride_of(size)) {
    sources = data + size * stride;
    pivots = sources + exchange_panel * stride;
    row_of = reinterpret_cast<int64_t*>(pivots + size);
    step_of = row_of + size;
  }
  double* row(int64_t i) const { return data + i * stride; }
};

// Finds the pivot of a step and exchanges it within its panel, which begins at column `first`; false: there is none.
bool exchange(const Table& table, int64_t step, int64_t first) {
  double best = -1;
  int64_t pivot = 0;
  for (int64_t i = 0; i < table.size; ++i) {
    if (table.step_of[i] >= 0) continue;
    const double size = math::pivot_size(table.row(i)[step]);
    if (size > best) {
      best = size;
      pivot = i;
    }
  }
  table.pivots[step] = best;
  if (!math::is_pivot(best)) return false;
  table.row_of[step] = pivot;
  table.step_of[pivot] = step;
  double pivot_row[exchange_panel], keep[exchange_panel];  // nothing stays of the pivot's column
  const double reciprocal = 1 / table.row(pivot)[step];
  for (int64_t s = 0; s < exchange_panel; ++s) {
    const bool is_own = first + s == step;
    keep[s] = is_own ? 0 : 1;
    pivot_row[s] = is_own ? reciprocal : math::exchanged_pivot_row(table.row(pivot)[first + s], reciprocal);
  }
  for (int64_t i = 0; i < table.size; ++i) {
    double* const own = table.row(i) + first;
    const double factor = table.row(i)[step];
    for (int64_t s = 0; s < exchange_panel; s += lanes<double>) {
      const Vec<double> kept = load<double>(keep + s) * load<double>(own + s);
      store<double>(own + s, math::mix_term(kept, factor, load<double>(pivot_row + s)));
    }
  }
  __builtin_memcpy(table.row(pivot) + first, pivot_row, sizeof pivot_row);
  return true;
}

// The columns beside a panel of `width` columns whose steps are done.
void exchange_others(const Table& table, int64_t first, int64_t width) {
  for (int64_t t = 0; t < exchange_panel; ++t) {
    double* const to = table.sources + t * table.stride;
    const double* const from = t < width ? table.row(table.row_of[first + t]) : nullptr;
    for (int64_t j = 0; j < table.stride; ++j) to[j] = from == nullptr ? 0 : -from[j];
  }
  for (int64_t i = 0; i < table.size; ++i) {
    double* const own = table.row(i);
    const bool is_new = table.step_of[i] >= first;  // of a pivot's row nothing stays
    double factors[exchange_panel];
    __builtin_memcpy(factors, own + first, sizeof factors);
    for (int64_t j = 0; j < table.stride; j += lanes<double>) {
      if (j == first) {
        j += exchange_panel - lanes<double>;
        continue;
      }
      Vec<double> sum = is_new ? Vec<double>{} : load<double>(own + j);
#pragma GCC unroll 8
      for (int t = 0; t < exchange_panel; ++t)
        sum = math::mix_term(sum, factors[t], load<double>(table.sources + t * table.stride + j));
      store<double>(own + j, sum);
    }
  }
}

template <class T>
void invert(const Table& table, const T* matrix, T* inverse, T* log_det) {
  const int64_t n = table.size;
  for (int64_t i = 0; i < n; ++i) {
    table.step_of[i] = -1;
    for (int64_t j = 0; j < table.stride; ++j) table.row(i)[j] = j < n ? static_cast<double>(matrix[i * n + j]) : 0;
  }
  for (int64_t first = 0; first < n; first += exchange_panel) {
    const int64_t width = smaller(exchange_panel, n - first);
    for (int64_t step = first; step < first + width; ++step) {
      if (exchange(table, step, first)) continue;
      for (int64_t k = 0; k < n * n; ++k) inverse[k] = static_cast<T>(NAN);
      *log_det = static_cast<T>(math::log_det_without(table.pivots[step]));
      return;
    }
    exchange_others(table, first, width);
  }
  double sum = 0;
  for (int64_t k = 0; k < n; ++k) {
    sum += math::log(table.pivots[k]);
    for (int64_t j = 0; j < n; ++j) inverse[k * n + j] = static_cast<T>(table.row(table.row_of[k])[table.step_of[j]]);
  }
  *log_det = static_cast<T>(sum);
}

}  // namespace

template <class T>
void invert_matrices(const InvertMatricesArgs<T>& args, const Threads& threads) {
  const int64_t n = args.channels;
  parallel(threads, args.count, grain_of(n * n * (n / exchange_panel + 1)), [&](int64_t begin, int64_t end) {
    const Table table(thread_scratch(Scratch::tile, static_cast<std::size_t>(Table::bytes(n)) + 1), n);
    for (int64_t k = begin; k < end; ++k)
      invert(table, args.matrices + k * n * n, args.inverses + k * n * n, args.log_dets + k);
  });
}

PYGLOW_CPU_INSTANTIATE(invert_matrices, InvertMatricesArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
