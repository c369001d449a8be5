// The CPU kernels of core.h for the bindings: each is run by the program in kernels.cpp, which has been started. All
// memory of torch's tensors, from the moment the module is loaded, is memory that the program has too.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

#include "calls.h"

namespace {

[[noreturn]] void fail(const std::string& what) { TORCH_CHECK(false, "the kernels' process: ", what); }

// What PYGLOW_KERNELS names: the file of the memory, and pipes to the program and from it.
struct Program {
  int memory = -1, to = -1, from = -1;
};
const Program& program() {
  static const Program found = [] {
    Program named;
    const char* const text = std::getenv("PYGLOW_KERNELS");
    if (text == nullptr || std::sscanf(text, "%d %d %d", &named.memory, &named.to, &named.from) != 3)
      fail("nothing says where it is");
    return named;
  }();
  return found;
}

// Blocks of powers of two, which are used again for the same size. The first bytes of a block are its size's power.
class Memory final : public c10::Allocator {
 public:
  Memory() {
    const int file = program().memory, access = PROT_READ | PROT_WRITE, kind = MAP_SHARED | MAP_FIXED_NOREPLACE;
    if (ftruncate(file, calls::memory_bytes) != 0 ||
        mmap(calls::memory, calls::memory_bytes, access, kind, file, 0) != calls::memory)
      fail("no memory to share");
  }
  c10::DataPtr allocate(std::size_t bytes) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    int power = 7;
    while (power < 48 && std::size_t{1} << power < bytes + margin) ++power;
    std::vector<char*>& unused = unused_[power];
    if (unused.empty()) {
      const int64_t size = int64_t{1} << power;
      TORCH_CHECK_WITH(OutOfMemoryError, size <= calls::memory_bytes - taken_, "not enough memory: ", bytes,
                       " bytes were asked for");
      unused.push_back(static_cast<char*>(calls::memory) + taken_);
      taken_ += size;
    }
    char* const block = unused.back();
    unused.pop_back();
    *reinterpret_cast<int*>(block) = power;
    return {block + margin, block + margin, &give_back, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }

 private:
  static constexpr std::size_t margin = 64;  // which keeps data aligned as torch's own is
  static void give_back(void* data);

  std::mutex mutex_;
  int64_t taken_ = 0;
  std::vector<char*> unused_[49];
};

// Never destroyed: tensors may outlive everything static.
Memory& memory() {
  static Memory* const all = new Memory;
  return *all;
}

void Memory::give_back(void* data) {
  const std::lock_guard<std::mutex> lock(memory().mutex_);
  char* const block = static_cast<char*>(data) - margin;
  memory().unused_[*reinterpret_cast<int*>(block)].push_back(block);
}

void run(const calls::Call& call, const void* args) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  calls::send(program().to, &call, sizeof call);
  calls::send(program().to, args, call.bytes);
  int64_t length = 0;
  if (!calls::receive(program().from, &length, sizeof length)) fail("it ended in a kernel");
  std::string error(length, ' ');
  calls::receive(program().from, error.data(), length);
  if (length > 0) throw std::runtime_error(error);
}

const bool installed = [] {
  c10::SetCPUAllocator(&memory(), 1);
  return true;
}();

}  // namespace

namespace pyglow::cpu {

#define PYGLOW_ASK(kernel, Args)                                                   \
  template <class T>                                                               \
  void kernel(const Args<T>& args, const Threads&) {                               \
    static_assert(std::is_trivially_copyable_v<Args<T>>);                          \
    run({calls::Kernel::kernel, sizeof(T) == sizeof(double), sizeof args}, &args); \
  }                                                                                \
  PYGLOW_CPU_INSTANTIATE(kernel, Args)
PYGLOW_KERNELS(PYGLOW_ASK)
PYGLOW_CPU_KERNELS(PYGLOW_ASK)
PYGLOW_NET_KERNELS(PYGLOW_ASK)

const char* instruction_set() { return "portable"; }

// Blocks that wait for another use: as many bytes as any tensor has, and none of them wait.
Block take_block(int64_t bytes) { return {memory().raw_allocate(static_cast<std::size_t>(bytes)), bytes}; }
void give_back(const Block& block) { memory().raw_deallocate(block.data); }
int64_t idle_bytes() { return 0; }
void release_idle() {}

}  // namespace pyglow::cpu
