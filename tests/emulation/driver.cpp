// The C interface to the kernels of pyglow::cuda that emulator.py calls: for each an entry point that takes the bytes
// of the kernel's arguments, laid out as in core.h, and gives null or what went wrong. Scratch memory is of the exact
// size and filled with NaN bytes; without AddressSanitizer, which knows its end, the bytes behind it must stay as they
// are.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core.h"

namespace {

constexpr int64_t max_scratch_bytes = 16 << 20;
#ifdef EMU_ASAN
constexpr int64_t guard_bytes = 0;
#else
constexpr int64_t guard_bytes = 4096;
#endif

// What a call takes of device memory, freed after it.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  pyglow::cuda::Queue queue() { return {nullptr, &allocate, this}; }
  void expect_inside() const {
    for (int64_t i = 0; memory_ != nullptr && i < guard_bytes; ++i)
      if (static_cast<const unsigned char*>(memory_)[bytes_ + i] != 0xff)
        throw std::runtime_error("memory behind the scratch memory was written");
  }

 private:
  static void* allocate(int64_t bytes, void* context) {
    if (bytes > max_scratch_bytes) throw std::runtime_error("scratch memory of " + std::to_string(bytes) + " bytes");
    Scratch& scratch = *static_cast<Scratch*>(context);
    if (scratch.memory_ != nullptr) throw std::runtime_error("a second piece of scratch memory");
    scratch.bytes_ = bytes;
    scratch.memory_ = std::malloc(bytes + guard_bytes);
    return std::memset(scratch.memory_, 0xff, bytes + guard_bytes);
  }

  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

// Runs a kernel on arguments that are so many bytes.
template <class Args, class Kernel>
void run(const void* bytes, int64_t size, const Kernel& kernel) {
  if (size != sizeof(Args)) throw std::runtime_error("the arguments are not those of core.h");
  Args args;
  std::memcpy(&args, bytes, sizeof args);
  Scratch scratch;
  const int error = kernel(args, scratch.queue());
  if (error != 0) throw std::runtime_error(pyglow::cuda::error_string(error));
  scratch.expect_inside();
}

template <class F>
const char* guarded(const F& call) {
  thread_local std::string message;
  emu::launched.clear();
  try {
    call();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

// The kernel by its distance from the library's beginning, as the symbol table has it.
struct Launch {
  int64_t kernel, blocks, threads;
};

Launch launch_of(const emu::Launched& launched) {
  Dl_info library = {};
  dladdr(launched.kernel, &library);
  const int64_t offset = static_cast<const char*>(launched.kernel) - static_cast<const char*>(library.dli_fbase);
  return {offset, launched.blocks, launched.threads};
}

}  // namespace

extern "C" {

#define PYGLOW_ENTRY(kernel, Args)                                                                                  \
  const char* emulated_##kernel(int is_double, const void* bytes, int64_t size) {                                   \
    const auto call = [](const auto& args, const pyglow::cuda::Queue& q) { return pyglow::cuda::kernel(args, q); }; \
    return guarded([&] {                                                                                            \
      is_double ? run<pyglow::Args<double>>(bytes, size, call) : run<pyglow::Args<float>>(bytes, size, call);       \
    });                                                                                                             \
  }
PYGLOW_KERNELS(PYGLOW_ENTRY)
#undef PYGLOW_ENTRY

// How this thread's next calls run: threads in the order of `seed`, grids cut for so many multiprocessors, or not at
// all.
void emulated_settings(unsigned seed, int64_t number_of_multiprocessors, int only_recorded) {
  emu::schedule_seed = seed;
  multiprocessors = number_of_multiprocessors;
  emu::only_recorded = only_recorded != 0;
}

// Fills `out` with the launches of this thread's last call, as far as there is room, and returns how many they were.
int64_t emulated_launches(Launch* out, int64_t room) {
  const int64_t count = static_cast<int64_t>(emu::launched.size());
  for (int64_t i = 0; i < std::min(count, room); ++i) out[i] = launch_of(emu::launched[i]);
  return count;
}

}  // extern "C"
