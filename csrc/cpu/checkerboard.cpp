// Checkerboards in two and together again, as core.h has it; compiled once per instruction set.
#include "cpu/isa.h"
#include "cpu/tiles.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

// to[w] = even[w] where w is even, else odd[w].
template <class T>
void interleave(const T* even, const T* odd, T* to, int64_t width) {
  for (int64_t w = 0; w < width; ++w) {
    const T a = even[w], b = odd[w];
    to[w] = w % 2 == 0 ? a : b;
  }
}

// f(values of sample n and channel c, their first row pair's place in a whole, in a half, and whether position 0 of its
// first row has the parity) for each pair of rows.
template <class F>
void for_row_pairs(const Board& board, const Threads& threads, const F& f) {
  const int64_t rows = board.row_pairs * board.middle, tasks = board.samples * board.channels * rows;
  parallel(threads, tasks, grain_of(2 * board.width), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t plane = index / rows, row = index % rows, pair = row / board.middle, m = row % board.middle;
      const int64_t upper = (2 * pair * board.middle + m) * board.width;
      f(plane / board.channels, plane % board.channels, upper, row * board.width, (board.parity + m) % 2 == 0);
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
    for (int64_t w = 0; w < board.width; ++w) {
      const T value = kept[w];
      begins[w] = w % 2 == 0 ? value : T(0);
      follows[w] = w % 2 == 0 ? T(0) : value;
    }
  });
}

PYGLOW_CPU_INSTANTIATE(checkerboard_split, CheckerboardSplitArgs)
PYGLOW_CPU_INSTANTIATE(checkerboard_merge, CheckerboardMergeArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
