// What the products of a coupling net are made of: turns of samples, cuts of pixels, their workspace, and the sum of
// the taps of a last convolution.
#pragma once
#include <new>

#include "core.h"
#include "cpu/net/images.h"
#include "cpu/scratch.h"

namespace pyglow::cpu::PYGLOW_ISA {

constexpr int64_t cut_bytes = 1 << 20;  // of one hidden layer: two of them and more in a cache of 2 MB or so
constexpr int64_t least_pixels = 256;   // of a cut: narrower products are slow

// Samples that are handled at a time; their pixels are numbered from 0. A turn of several samples is one cut, one of a
// large sample several: of pixels [begin, end), `begin` at a block.
struct Turn {
  int64_t sample, samples, pixels;
  int64_t first;  // of its pixels among all
};
struct Cut {
  int64_t begin, end;
  PYGLOW_HD int64_t count() const { return end - begin; }
};

class Cuts {
 public:
  // Cuts are as large as the cache takes with `rows` numbers for each pixel.
  Cuts(int64_t samples, const Extent& extent, int64_t rows, int64_t element_size)
      : samples_(samples), plane_(extent.positions()) {
    if (plane_ == 0 || samples == 0) return;
    const int64_t most = larger(least_pixels, cut_bytes / element_size / larger(rows, 1));
    // Turns, and cuts, are of about equal size, so that the last one is not much smaller.
    const int64_t fitting = larger(1, most / plane_);
    turns_ = (samples + fitting - 1) / fitting;
    samples_at_once_ = (samples + turns_ - 1) / turns_;
    turns_ = (samples + samples_at_once_ - 1) / samples_at_once_;
    const int64_t cuts = (plane_ + most - 1) / most, part = (plane_ + cuts - 1) / cuts;
    cut_ = cuts == 1 ? samples_at_once_ * plane_ : (part + pixel_block - 1) / pixel_block * pixel_block;
  }

  int64_t turns() const { return turns_; }
  Turn turn(int64_t i) const {
    const int64_t n = i * samples_at_once_, samples = smaller(samples_at_once_, samples_ - n);
    return {.sample = n, .samples = samples, .pixels = samples * plane_, .first = n * plane_};
  }
  // Pixels of the largest turn and cut.
  int64_t most_in_turn() const { return turns_ == 0 ? 0 : turn(0).pixels; }
  int64_t most_in_cut() const { return smaller(cut_, most_in_turn()); }
  template <class F>
  void for_cuts(const Turn& turn, const F& f) const {
    for (int64_t p = 0; p < turn.pixels; p += cut_) f(Cut{p, smaller(turn.pixels, p + cut_)});
  }

 private:
  int64_t samples_, plane_;
  int64_t samples_at_once_ = 1, cut_ = 0, turns_ = 0;
};

constexpr int64_t line = 64;  // bytes; every matrix starts on one

// Arrays in one piece of memory: rooms are reserved, then all of them taken. A small piece stays with this thread, a
// large one is a block that whoever comes next may have.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (block_.data != nullptr) give_back(block_);
  }

  template <class T>
  struct Room {
    int64_t place = -1;
  };
  // Memory for so many elements, with some behind them that may be read.
  template <class T>
  Room<T> room(int64_t elements, int64_t margin = 0) {
    const int64_t before = round_up(margin * static_cast<int64_t>(sizeof(T)), line);
    const Room<T> found{size_ + before};
    size_ += 2 * before + round_up(elements * static_cast<int64_t>(sizeof(T)), line) + line;
    return found;
  }
  void take() {
    if (size_ < least_reused) {
      memory_ = static_cast<char*>(thread_scratch(Scratch::net, size_));
      return;
    }
    block_ = take_block(size_);
    if (block_.data == nullptr) throw std::bad_alloc();
    memory_ = static_cast<char*>(block_.data);
  }
  template <class T>
  T* operator[](Room<T> room) const {
    return reinterpret_cast<T*>(memory_ + room.place);
  }

 private:
  int64_t size_ = 0;
  char* memory_ = nullptr;
  Block block_{nullptr, 0};
};

// Rows of planes should not share one set of a cache: no power of two apart.
template <class T>
int64_t plane_stride(int64_t pixels) {
  return round_up(pixels, line / static_cast<int64_t>(sizeof(T))) + line / static_cast<int64_t>(sizeof(T));
}

// A convolution with few output channels: the product of its weight by taps (taps C, in) with its input, cut by cut,
// and for each channel and pixel the sum of its taps, each from the pixel that the tap sees. Where a sample has several
// cuts, the last columns of one are kept for sums of the next.
template <class T>
class TapSum {
 public:
  static int64_t elements(int64_t channels, int64_t taps, int64_t reach, const Cuts& cuts) {
    return channels * taps * stride_of(reach, cuts);
  }

  TapSum(const Shifts& shifts, bool transposed, int64_t channels, const T* bias, const Cuts& cuts, T* memory)
      : shifts_(shifts),
        transposed_(transposed),
        channels_(channels),
        bias_(bias),
        stride_(stride_of(shifts.reach(), cuts)),
        columns_(memory) {}

  void begin() { done_ = window_ = 0; }

  // Where the product for a cut goes, (channels taps, count).
  Matrix<T> product(const Cut& cut) const { return by_rows(columns_ + (cut.begin - window_), stride_); }

  // Sums all pixels that see no pixel behind the cut; write(channel, first pixel, count, sums) takes them.
  template <class F>
  void add(const Cut& cut, bool is_last, const Threads& threads, const F& write) {
    const int64_t known = (cut.end - shifts_.reach()) / pixel_block * pixel_block;
    const int64_t end = is_last ? cut.end : larger(done_, known);
    const int64_t taps = shifts_.taps();
    for_blocks(done_, end, channels_ * taps, threads, [&](int64_t p, int64_t count) {
      const Shifts::Seen seen = shifts_.from(p / pixel_block);
      const T* const columns = columns_ + (p - window_);
      const auto out = write(p, count);
      for (int64_t c = 0; c < channels_; ++c) {
        Vec<T> sum[pixel_block / lanes<T>];
        for (auto& v : sum) v = broadcast<T>(bias_ == nullptr ? T(0) : bias_[c]);
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t place = shifts_.place(tap, transposed_);
          const T* const from = columns + (c * taps + tap) * stride_ + seen.offset[place];
          const uint32_t bits = seen.inside[place];
#pragma GCC unroll 8
          for (int64_t v = 0; v < pixel_block / lanes<T>; ++v)
            sum[v] += load_where(from + v * lanes<T>, bits >> (v * lanes<T>));
        }
        T values[pixel_block];
        for (int64_t v = 0; v < pixel_block / lanes<T>; ++v) store<T>(values + v * lanes<T>, sum[v]);
        out(c, values);
      }
    });
    done_ = end;
    if (is_last) return;
    const int64_t kept = larger(window_, done_ - shifts_.reach());
    parallel(threads, channels_ * taps, grain_of(cut.end - kept), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        T* const data = columns_ + row * stride_;
        __builtin_memmove(data, data + (kept - window_), (cut.end - kept) * sizeof(T));
      }
    });
    window_ = kept;
  }

 private:
  static int64_t stride_of(int64_t reach, const Cuts& cuts) {
    const bool carries = cuts.most_in_cut() < cuts.most_in_turn();
    return plane_stride<T>(cuts.most_in_cut() + (carries ? 2 * reach + pixel_block : 0));
  }

  const Shifts& shifts_;
  bool transposed_;
  int64_t channels_;
  const T* bias_;
  int64_t stride_;
  T* columns_;
  int64_t done_ = 0, window_ = 0;  // pixels that are summed; the pixel of column 0
};

}  // namespace pyglow::cpu::PYGLOW_ISA
