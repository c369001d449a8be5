// The sums over samples and positions of the channel mixing's gradients: grad_M = sum g x^T, grad_c = sum g.
//
// The tiles are dealt to a number of slots that depends on the shape alone. A slot is one task with partial sums of its
// own (no two threads write to one cache line), and the slots are added up in order, so the bits do not depend on
// threads.
#pragma once
#include "cpu/product.h"

namespace pyglow::cpu::PYGLOW_ISA {

constexpr int64_t max_slots = 32;
constexpr int64_t max_partial_bytes = 16 << 20;

template <class T>
class MixSums {
 public:
  // `room` elements are kept free at the start of the memory, for the packed matrix.
  MixSums(const TileShape& shape, int64_t channels, int64_t room) : channels_(channels), tiles_(shape.count()) {
    slot_size_ = round_up(channels * (channels + 1), 16);
    const int64_t fitting = larger(1, max_partial_bytes / static_cast<int64_t>(slot_size_ * sizeof(T)));
    slots_ = smaller(smaller(max_slots, tiles_), fitting);
    memory_ = static_cast<T*>(thread_scratch(Scratch::partials, (room + slots_ * slot_size_) * sizeof(T)));
    partials_ = memory_ + room;
    tiles_per_slot_ = slots_ == 0 ? 0 : (tiles_ + slots_ - 1) / slots_;
  }

  T* memory() const { return memory_; }
  int64_t slots() const { return slots_; }
  int64_t tiles_per_slot() const { return tiles_per_slot_; }
  int64_t first_tile(int64_t slot) const { return smaller(slot * tiles_per_slot_, tiles_); }

  void clear(int64_t slot) const {
    for (int64_t i = 0; i < slot_size_; ++i) partials_[slot * slot_size_ + i] = T(0);
  }

  void add(int64_t slot, const Rows<const T>& g, const Rows<const T>& x, int64_t length) const {
    T* sums = partials_ + slot * slot_size_;
    add_outer_product(g, x, channels_, length, sums);
    for (int64_t c = 0; c < channels_; ++c) {
      Vec<T> sum{};
      for (int64_t i = 0; i < length; i += lanes<T>) sum += load<T>(g.row(c) + i);
      sums[channels_ * channels_ + c] += sum_lanes<T>(sum);
    }
  }

  void total(T* grad_matrix, T* grad_offset) const {
    for (int64_t i = 0; i < channels_ * (channels_ + 1); ++i) {
      double sum = 0;
      for (int64_t slot = 0; slot < slots_; ++slot) sum += partials_[slot * slot_size_ + i];
      const int64_t square = channels_ * channels_;
      (i < square ? grad_matrix[i] : grad_offset[i - square]) = static_cast<T>(sum);
    }
  }

 private:
  int64_t channels_, tiles_, slot_size_, slots_, tiles_per_slot_;
  T *memory_, *partials_;
};

}  // namespace pyglow::cpu::PYGLOW_ISA
