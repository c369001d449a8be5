// The sums over samples and positions of the channel mixing's gradients: grad_M = sum g x^T, grad_c = sum g.
//
// A tile's x is transposed into panels [position][channel] of one or two vectors of channels. A block of up to
// block_rows rows of g times a panel then stays in registers while the positions stream past: as in the product, one
// broadcast value of g per fused multiply-add, and no sum over lanes at the end.
#pragma once
#include "cpu/product.h"

namespace pyglow::cpu::PYGLOW_ISA {

constexpr int64_t max_slots = 32;
constexpr int64_t max_partial_bytes = 8 << 20;  // with the packed matrix and the tiles, 16 MB are not exceeded
constexpr int64_t sum_length = 64;  // positions added up in a register: rounding grows with the length of a sum

// What one tile adds: rows of g and of x, `length` positions, a whole number of vectors, zero where padded.
template <class T>
struct Factors {
  Rows<const T> g, x;
  int64_t length;
};

template <class T>
class MixSums {
 public:
  // `room` elements are kept free at the start of the memory, for the packed matrix.
  MixSums(const TileShape& shape, int64_t channels, int64_t room)
      : channels_(channels),
        padded_(round_up(channels, lanes<T>)),
        blocks_(blocks_of(channels)),
        slots_(shape, blocks_.count * blocks_.rows * padded_ + channels, most_slots(channels)) {
    memory_ = static_cast<T*>(thread_scratch(Scratch::partials, (room + slots_.count * slots_.size) * sizeof(T)));
    slots_.partials = memory_ + room;
  }

  T* memory() const { return memory_; }

  // Runs all tiles: factors(tile, memory) handles a tile and returns what it adds; `work` elements are touched.
  // `memory` has `room` elements of scratch.
  template <class F>
  void add_tiles(const Threads& threads, int64_t work, int64_t room, const F& factors) const {
    const int64_t behind = round_up(room, 16), size = behind + padded_ * slots_.shape.length;
    slots_.template add_tiles<T>(threads, work, size, [&](const Tile& tile, T* memory, T* sums) {
      add(factors(tile, memory), memory + behind, sums);
    });
  }

  void total(T* grad_matrix, T* grad_offset) const {
    const auto slot_sum = [&](int64_t index) { return static_cast<T>(slots_.total(index)); };
    const int64_t rows = blocks_.count * blocks_.rows;
    for (int64_t o = 0; o < channels_; ++o) {
      for (int64_t i = 0; i < channels_; ++i) {
        const int64_t panel = i / panel_width, width = panel_size(panel);
        grad_matrix[o * channels_ + i] = slot_sum((panel * panel_width * rows) + o * width + i % panel_width);
      }
      grad_offset[o] = slot_sum(rows * padded_ + o);
    }
  }

 private:
  static constexpr int64_t panel_width = 2 * lanes<T>;  // of all panels but perhaps the last

  static int64_t most_slots(int64_t channels) {
    const Blocks blocks = blocks_of(channels);
    const int64_t sums = blocks.count * blocks.rows * round_up(channels, lanes<T>) + channels;
    return smaller(max_slots, larger(1, max_partial_bytes / larger(1, sums * static_cast<int64_t>(sizeof(T)))));
  }
  int64_t panel_size(int64_t panel) const { return smaller(panel_width, padded_ - panel * panel_width); }

  // Adds a tile. Panel by panel: it stays in the first-level cache while all rows of g pass.
  void add(const Factors<T>& tile, T* transposed, T* sums) const {
    const int64_t rows = blocks_.count * blocks_.rows;
    for (int64_t panel = 0; panel * panel_width < padded_; ++panel) {
      const int64_t width = panel_size(panel), first = panel * panel_width;
      for (int64_t i = 0; i < width; i += lanes<T>)
        for (int64_t p = 0; p < tile.length; p += lanes<T>)
          transpose_block<T>(tile.x, first + i, p, channels_ - first - i, transposed + p * width + i, width);
      T* const panel_sums = sums + first * rows;
      width == lanes<T> ? add_panel<1>(tile, transposed, panel_sums) : add_panel<2>(tile, transposed, panel_sums);
    }
    for (int64_t c = 0; c < channels_; ++c) {
      Vec<T> sum{};
      for (int64_t p = 0; p < tile.length; p += lanes<T>) sum += load<T>(tile.g.row(c) + p);
      sums[rows * padded_ + c] += sum_lanes<T>(sum);
    }
  }

  template <int NumVectors>
  void add_panel(const Factors<T>& tile, const T* panel, T* sums) const {
    with_rows(blocks_.rows, [&](auto rows) { add_rows<rows.value, NumVectors>(tile, panel, sums); });
  }

  // sums[o][i] += sum over the positions of g[o, p] panel[p][i]. Past the edge the last row is summed again, into
  // elements that nobody reads.
  template <int NumRows, int NumVectors>
  void add_rows(const Factors<T>& tile, const T* panel, T* sums) const {
    constexpr int64_t width = NumVectors * lanes<T>;
    for (int64_t o = 0; o < blocks_.count * NumRows; o += NumRows, sums += NumRows * width) {
      const T* g[NumRows];
#pragma GCC unroll 16
      for (int k = 0; k < NumRows; ++k) g[k] = tile.g.row(smaller(o + k, channels_ - 1));
      const T* x = panel;
      for (int64_t begin = 0; begin < tile.length; begin += sum_length) {
        Vec<T> sum[NumRows][NumVectors] = {};
        const int64_t end = smaller(begin + sum_length, tile.length);
#pragma GCC unroll 4
        for (int64_t p = begin; p < end; ++p, x += width) {
          Vec<T> value[NumVectors];
#pragma GCC unroll 2
          for (int v = 0; v < NumVectors; ++v) value[v] = load<T>(x + v * lanes<T>);
#pragma GCC unroll 16
          for (int k = 0; k < NumRows; ++k)
#pragma GCC unroll 2
            for (int v = 0; v < NumVectors; ++v) sum[k][v] = math::mix_term(sum[k][v], g[k][p], value[v]);
        }
#pragma GCC unroll 16
        for (int k = 0; k < NumRows; ++k)
#pragma GCC unroll 2
          for (int v = 0; v < NumVectors; ++v) {
            T* const at = sums + k * width + v * lanes<T>;
            store<T>(at, load<T>(at) + sum[k][v]);
          }
      }
    }
  }

  int64_t channels_, padded_;
  Blocks blocks_;
  Slots<T> slots_;
  T* memory_;
};

}  // namespace pyglow::cpu::PYGLOW_ISA
