// The sums over samples and positions of the channel mixing's gradients: grad_M = sum g x^T, grad_c = sum g.
//
// The tiles are dealt to a number of slots that depends on the shape alone. A slot is one task with partial sums of its
// own (no two threads write to one cache line), and the slots are added up in order, so the bits do not depend on
// threads.
//
// A 4 x 4 block of grad_M is summed over several tiles in vector registers, each lane its own positions, before the
// lanes are added up: short tiles would spend most of the time on that.
#pragma once
#include "cpu/product.h"

namespace pyglow::cpu::PYGLOW_ISA {

constexpr int64_t max_slots = 32;
constexpr int64_t max_partial_bytes = 16 << 20;
constexpr int64_t sum_length = 256;  // positions to sum in registers before the lanes are added up
constexpr int64_t max_group = 8;     // tiles

// What one tile adds: rows of g and of x, `length` positions, a whole number of vectors, zero where padded.
template <class T>
struct Factors {
  Rows<const T> g, x;
  int64_t length;
};

template <class T>
class MixSums {
 public:
  static constexpr int64_t side = 4;

  // `room` elements are kept free at the start of the memory, for the packed matrix.
  MixSums(const TileShape& shape, int64_t channels, int64_t room)
      : channels_(channels), tiles_(shape.count()), blocks_((channels + side - 1) / side) {
    group_ = smaller(larger(1, sum_length / shape.length), max_group);
    slot_size_ = round_up(blocks_ * blocks_ * side * side + channels, 16);
    const int64_t fitting = larger(1, max_partial_bytes / static_cast<int64_t>(slot_size_ * sizeof(T)));
    slots_ = smaller(smaller(max_slots, (tiles_ + group_ - 1) / group_), fitting);
    memory_ = static_cast<T*>(thread_scratch(Scratch::partials, (room + slots_ * slot_size_) * sizeof(T)));
    partials_ = memory_ + room;
    tiles_per_slot_ = slots_ == 0 ? 0 : round_up((tiles_ + slots_ - 1) / slots_, group_);
  }

  T* memory() const { return memory_; }

  // Runs all tiles: factors(index, memory, own) handles the tile of that index and returns what it adds. `memory` has
  // `shared` elements of scratch, free again for the next tile; `own` has 2 `room`, kept until the sums are formed.
  template <class F>
  void add_tiles(const Threads& threads, int64_t elements_per_tile, int64_t shared, int64_t room,
                 const F& factors) const {
    parallel(threads, slots_, grain_of(tiles_per_slot_ * elements_per_tile), [&](int64_t begin, int64_t end) {
      T* memory = static_cast<T*>(thread_scratch(Scratch::tile, (shared + 2 * group_ * room) * sizeof(T)));
      for (int64_t slot = begin; slot < end; ++slot) {
        clear(slot);
        const int64_t last = smaller((slot + 1) * tiles_per_slot_, tiles_);
        for (int64_t first = slot * tiles_per_slot_; first < last; first += group_) {
          Factors<T> group[max_group];
          const int64_t count = smaller(group_, last - first);
          for (int64_t t = 0; t < count; ++t) group[t] = factors(first + t, memory, memory + shared + 2 * t * room);
          add(slot, group, count);
        }
      }
    });
  }

  void total(T* grad_matrix, T* grad_offset) const {
    const auto slot_sum = [&](int64_t index) {
      double sum = 0;
      for (int64_t slot = 0; slot < slots_; ++slot) sum += partials_[slot * slot_size_ + index];
      return static_cast<T>(sum);
    };
    for (int64_t o = 0; o < channels_; ++o) {
      for (int64_t i = 0; i < channels_; ++i) {
        const int64_t block = o / side * blocks_ + i / side;
        grad_matrix[o * channels_ + i] = slot_sum(block * side * side + o % side * side + i % side);
      }
      grad_offset[o] = slot_sum(blocks_ * blocks_ * side * side + o);
    }
  }

 private:
  void clear(int64_t slot) const {
    for (int64_t i = 0; i < slot_size_; ++i) partials_[slot * slot_size_ + i] = T(0);
  }

  void add(int64_t slot, const Factors<T>* tiles, int64_t count) const {
    T* sums = partials_ + slot * slot_size_;
    for (int64_t o = 0; o < blocks_; ++o)
      for (int64_t i = 0; i < blocks_; ++i, sums += side * side) add_block(o * side, i * side, tiles, count, sums);
    for (int64_t c = 0; c < channels_; ++c) {
      Vec<T> sum{};
      for (int64_t t = 0; t < count; ++t)
        for (int64_t p = 0; p < tiles[t].length; p += lanes<T>) sum += load<T>(tiles[t].g.row(c) + p);
      sums[c] += sum_lanes<T>(sum);
    }
  }

  // sums[side * j + k] += sum over the tiles of g[o + j, p] x[i + k, p]. Past the edge the last row is summed again,
  // into an element that nobody reads.
  void add_block(int64_t o, int64_t i, const Factors<T>* tiles, int64_t count, T* sums) const {
    Vec<T> sum[side * side] = {};
    for (int64_t t = 0; t < count; ++t) {
      const T *g[side], *x[side];
#pragma GCC unroll 4
      for (int64_t k = 0; k < side; ++k) {
        g[k] = tiles[t].g.row(smaller(o + k, channels_ - 1));
        x[k] = tiles[t].x.row(smaller(i + k, channels_ - 1));
      }
      for (int64_t p = 0; p < tiles[t].length; p += lanes<T>) {
        Vec<T> value[side];
#pragma GCC unroll 4
        for (int64_t k = 0; k < side; ++k) value[k] = load<T>(x[k] + p);
#pragma GCC unroll 4
        for (int64_t j = 0; j < side; ++j) {
          const Vec<T> left = load<T>(g[j] + p);
#pragma GCC unroll 4
          for (int64_t k = 0; k < side; ++k) sum[side * j + k] += left * value[k];
        }
      }
    }
#pragma GCC unroll 8
    for (int64_t k = 0; k < side * side; k += lanes<T>)
      store<T>(sums + k, load<T>(sums + k) + sum_lanes_of_each<T>(sum + k));
  }

  int64_t channels_, tiles_, blocks_, group_, slot_size_, slots_, tiles_per_slot_;
  T *memory_, *partials_;
};

}  // namespace pyglow::cpu::PYGLOW_ISA
