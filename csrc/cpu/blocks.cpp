// A pool of memory blocks, kept between their uses. Compiled for the baseline processor.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <deque>
#include <mutex>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "core.h"

namespace pyglow::cpu {
namespace {

constexpr int64_t page = int64_t{1} << 12;
constexpr int64_t huge_page = int64_t{1} << 21;
// The most bytes that are kept unused. A step that takes more than the second takes long beside its fresh pages.
constexpr int64_t most_within_step = int64_t{1} << 26, most_after_step = int64_t{1} << 25;
constexpr int remembered_steps = 16;  // a training step may look like several steps to the pool

Block fresh_block(int64_t bytes) {
  const int64_t size = std::max(page, (bytes + page - 1) / page * page);
  void* const data = std::aligned_alloc(page, size);
#ifdef __linux__
  // A huge page is one page fault for 512 pages. Only whole ones are asked for: one used in part would take all of it.
  const auto begin = reinterpret_cast<int64_t>(data);
  const int64_t first = (begin + huge_page - 1) / huge_page * huge_page, last = (begin + size) / huge_page * huge_page;
  if (data != nullptr && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return {data, size};
}

// The pool takes for a step what lies between two lows of its use: a step ends when three quarters of the most that it
// had in use have been given back, and the next begins when twice what is left is in use. What a step needs is its most
// less what is left.
class Steps {
 public:
  void take(int64_t bytes) {
    in_use_ += bytes;
    if (ended_ && in_use_ > 2 * left_) {
      needed_[next_++ % remembered_steps] = most_ - left_;
      ended_ = false;
      most_ = 0;
    }
    most_ = std::max(most_, in_use_);
  }

  void give_back(int64_t bytes) {
    in_use_ -= bytes;
    if (4 * in_use_ > most_) return;
    left_ = ended_ ? std::min(left_, in_use_) : in_use_;
    ended_ = true;
  }

  int64_t most_idle() const {
    if (!ended_) return most_within_step;
    const int64_t needed = std::max(most_ - left_, *std::max_element(needed_.begin(), needed_.end()));
    return std::min(most_after_step, needed);
  }

 private:
  int64_t in_use_ = 0, most_ = 0, left_ = 0;
  bool ended_ = false;
  std::array<int64_t, remembered_steps> needed_{};
  unsigned next_ = 0;
};

// Never destroyed: tensors may outlive everything static.
class Pool {
 public:
  Block take(int64_t bytes) {
    Block block = idle_for(bytes);
    if (block.data == nullptr) block = fresh_block(bytes);
    if (block.data == nullptr) {
      drop_idle(0);
      block = fresh_block(bytes);
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    if (block.data != nullptr) steps_.take(block.size);
    return block;
  }

  void give_back(Block block) {
    int64_t most = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      steps_.give_back(block.size);
      most = steps_.most_idle();
      if (block.size <= most_within_step) {  // else it would drive out all others, and then itself
        idle_size_ += block.size;
        idle_.push_back(block);
        block.data = nullptr;
      }
    }
    std::free(block.data);
    drop_idle(most);
  }

  int64_t idle_size() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return idle_size_;
  }

  // Drops the oldest blocks until no more than `most` bytes are left; they are freed outside the lock.
  void drop_idle(int64_t most) {
    std::deque<Block> dropped;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (idle_size_ > most) {
        idle_size_ -= idle_.front().size;
        dropped.push_back(idle_.front());
        idle_.pop_front();
      }
    }
    for (const Block& block : dropped) std::free(block.data);
  }

 private:
  // The smallest block that is large enough, and at most twice as large.
  Block idle_for(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it) {
      const int64_t size = it->size;
      if (size >= bytes && size / 2 <= bytes && (best == idle_.end() || size <= best->size)) best = it;
    }
    if (best == idle_.end()) return {nullptr, 0};
    const Block block = *best;
    idle_.erase(best);
    idle_size_ -= block.size;
    return block;
  }

  std::mutex mutex_;
  std::deque<Block> idle_;  // the oldest first
  int64_t idle_size_ = 0;
  Steps steps_;
};

Pool& pool() {
  static Pool* const all = new Pool;
  return *all;
}

}  // namespace

Block take_block(int64_t bytes) { return pool().take(bytes); }
void give_back(const Block& block) { pool().give_back(block); }
int64_t idle_bytes() { return pool().idle_size(); }

void release_idle() {
  pool().drop_idle(0);
#ifdef __GLIBC__
  malloc_trim(0);  // malloc by itself keeps what was freed below something in use
#endif
}

}  // namespace pyglow::cpu
