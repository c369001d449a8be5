#include "bindings/memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pyglow::bindings {
namespace {

constexpr std::size_t page = std::size_t(1) << 12;
constexpr std::size_t huge_page = std::size_t(1) << 21;

struct Block {
  void* data;
  std::size_t size;

  explicit Block(std::size_t bytes) : size(std::max(page, (bytes + page - 1) / page * page)) {
    data = std::aligned_alloc(page, size);
#ifdef __linux__
    // One fault for 512 pages. What does not fill a huge page stays out: it would be resident as a whole.
    const auto begin = reinterpret_cast<std::uintptr_t>(data);
    const auto first = (begin + huge_page - 1) / huge_page * huge_page, last = (begin + size) / huge_page * huge_page;
    if (data != nullptr && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { std::free(data); }
};

// Never destroyed: tensors may outlive everything static.
class Blocks final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    std::unique_ptr<Block> block = idle_for(bytes);
    if (!block) {
      block = std::make_unique<Block>(bytes);
      if (block->data == nullptr) {
        drop_idle(0);
        block = std::make_unique<Block>(bytes);
      }
      TORCH_CHECK_WITH(OutOfMemoryError, block->data != nullptr, "not enough memory: ", bytes, " bytes were asked for");
    }
    void* const data = block->data;
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, block.release(), &take_back, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }

  std::size_t idle_size() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return idle_size_;
  }

  // The oldest, until no more than `most` bytes are left; freed outside the lock.
  void drop_idle(std::size_t most) {
    std::deque<std::unique_ptr<Block>> dropped;
    const std::lock_guard<std::mutex> lock(mutex_);
    while (idle_size_ > most) {
      idle_size_ -= idle_.front()->size;
      dropped.push_back(std::move(idle_.front()));
      idle_.pop_front();
    }
  }

 private:
  static void take_back(void* context);

  // The smallest of those up to twice as large.
  std::unique_ptr<Block> idle_for(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it) {
      const std::size_t size = (*it)->size;
      if (size >= bytes && size / 2 <= bytes && (best == idle_.end() || size <= (*best)->size)) best = it;
    }
    if (best == idle_.end()) return nullptr;
    std::unique_ptr<Block> block = std::move(*best);
    idle_.erase(best);
    idle_size_ -= block->size;
    return block;
  }

  void add_idle(std::unique_ptr<Block> block) {
    if (block->size > most_idle) return;  // it would drive out all others, and then itself
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      idle_size_ += block->size;
      idle_.push_back(std::move(block));
    }
    drop_idle(most_idle);
  }

  std::mutex mutex_;
  std::deque<std::unique_ptr<Block>> idle_;  // the oldest first
  std::size_t idle_size_ = 0;
};

Blocks& blocks() {
  static Blocks* const all = new Blocks;
  return *all;
}

void Blocks::take_back(void* context) {
  std::unique_ptr<Block> block(static_cast<Block*>(context));
  c10::profiledCPUMemoryReporter().Delete(block->data);
  blocks().add_idle(std::move(block));
}

}  // namespace

at::Tensor empty_reused(at::IntArrayRef sizes, const at::TensorOptions& options, at::MemoryFormat format) {
  const std::size_t element = options.dtype().itemsize();
  const bool large = at::detail::computeStorageNbytesContiguous(sizes, element) >= least_reused;
  if (!large || options.device().type() != c10::kCPU) return at::empty(sizes, options, format);
  return at::Tensor(at::detail::empty_generic(sizes, &blocks(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                              c10::typeMetaToScalarType(options.dtype()), format));
}

std::size_t idle_bytes() { return blocks().idle_size(); }
void release_idle() { blocks().drop_idle(0); }

}  // namespace pyglow::bindings
