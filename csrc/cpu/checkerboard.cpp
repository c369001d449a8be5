// Checkerboards in two and together again, as core.h has it; compiled once per instruction set.
#include "cpu/isa.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

// A mask of every second lane, from the first on.
template <class T>
auto even_lanes() {
  decltype(Vec<T>{} < Vec<T>{}) mask;
  for (int i = 0; i < static_cast<int>(lanes<T>); ++i) mask[i] = i % 2 == 0 ? -1 : 0;
  return mask;
}

// to[w] = even[w] where w is even, else odd[w]; both are read at every w.
template <class T>
void interleave(const T* even, const T* odd, T* to, int64_t width) {
  const auto is_even = even_lanes<T>();
  int64_t w = 0;
  for (; w + lanes<T> <= width; w += lanes<T>) store<T>(to + w, is_even ? load<T>(even + w) : load<T>(odd + w));
  for (; w < width; ++w) to[w] = w % 2 == 0 ? even[w] : odd[w];
}

// The same with zeros for one of them.
template <class T>
void spread(const T* values, T* evens, T* odds, int64_t width) {
  const auto is_even = even_lanes<T>();
  int64_t w = 0;
  for (; w + lanes<T> <= width; w += lanes<T>) {
    const Vec<T> value = load<T>(values + w);
    store<T>(evens + w, is_even ? value : Vec<T>{});
    store<T>(odds + w, is_even ? Vec<T>{} : value);
  }
  for (; w < width; ++w) {
    evens[w] = w % 2 == 0 ? values[w] : T(0);
    odds[w] = w % 2 == 0 ? T(0) : values[w];
  }
}

// f(sample, channel, place of the pair's upper row in a whole, place of its row in a half, whether position 0 of the
// upper row has the parity) for each pair of rows: counted on, as divisions would cost more than short rows.
template <class F>
void for_row_pairs(const Board& board, const Threads& threads, const F& f) {
  const int64_t rows = board.row_pairs * board.middle, tasks = board.samples * board.channels * rows;
  parallel(threads, tasks, grain_of(2 * board.width), [&](int64_t begin, int64_t end) {
    int64_t n = begin / rows / board.channels, c = begin / rows % board.channels, row = begin % rows;
    int64_t pair = row / board.middle, m = row % board.middle;
    for (int64_t index = begin; index < end; ++index) {
      f(n, c, (2 * pair * board.middle + m) * board.width, row * board.width, (board.parity + m) % 2 == 0);
      ++row;
      if (++m == board.middle) m = 0, ++pair;
      if (row == rows) row = pair = 0, ++c;
      if (c == board.channels) c = 0, ++n;
    }
  });
}

template <class T>
T* at(const Planes<T>& planes, int64_t sample, int64_t channel, int64_t offset) {
  return planes.data + sample * planes.sample + channel * planes.channel + offset;
}

}  // namespace

template <class T>
void checkerboard_split(const CheckerboardSplitArgs<T>& args, const Threads& threads) {
  const Board& board = args.board;
  for_row_pairs(board, threads, [&](int64_t n, int64_t c, int64_t upper, int64_t half, bool first) {
    const T* const above = at(args.whole, n, c, upper);
    const T* const below = above + board.middle * board.width;
    interleave(first ? above : below, first ? below : above, at(args.kept, n, c, half), board.width);
    if (args.other.data != nullptr)
      interleave(first ? below : above, first ? above : below, at(args.other, n, c, half), board.width);
  });
}

template <class T>
void checkerboard_merge(const CheckerboardMergeArgs<T>& args, const Threads& threads) {
  const Board& board = args.board;
  for_row_pairs(board, threads, [&](int64_t n, int64_t c, int64_t upper, int64_t half, bool first) {
    T* const above = at(args.whole, n, c, upper);
    T* const below = above + board.middle * board.width;
    const T* const kept = at(args.kept, n, c, half);
    T* const begins = first ? above : below;  // with a kept position
    T* const follows = first ? below : above;
    if (args.other.data != nullptr) {
      const T* const other = at(args.other, n, c, half);
      interleave(kept, other, begins, board.width);
      interleave(other, kept, follows, board.width);
      return;
    }
    spread(kept, begins, follows, board.width);
  });
}

PYGLOW_CPU_INSTANTIATE(checkerboard_split, CheckerboardSplitArgs)
PYGLOW_CPU_INSTANTIATE(checkerboard_merge, CheckerboardMergeArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
