// The CPU kernels as a program: runs what module.cpp asks for. Its argument is the file of the memory that both have;
// without one it prints the instruction set that it chose.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "calls.h"

namespace {

// As two threads share tasks that are enough for two, but one after the other and the later part first.
const pyglow::cpu::Threads in_two_parts = {
    [](int64_t tasks, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
      const int64_t middle = tasks / 2 >= grain ? tasks / 2 : 0;
      if (middle < tasks) body(context, middle, tasks);
      if (middle > 0) body(context, 0, middle);
    }};

template <class Args, class Run>
void with_arguments(const calls::Call& call, const Run& run) {
  Args args;
  if (call.bytes != sizeof args) throw std::logic_error("the two processors lay out a kernel's arguments differently");
  calls::receive(STDIN_FILENO, &args, call.bytes);
  run(args);
}

void answer(const calls::Call& call) {
  switch (call.kernel) {
#define PYGLOW_ANSWER(kernel, Args)                                                                            \
  case calls::Kernel::kernel:                                                                                  \
    if (call.is_double) {                                                                                      \
      with_arguments<pyglow::Args<double>>(call, [](const auto& a) { pyglow::cpu::kernel(a, in_two_parts); }); \
    } else {                                                                                                   \
      with_arguments<pyglow::Args<float>>(call, [](const auto& a) { pyglow::cpu::kernel(a, in_two_parts); });  \
    }                                                                                                          \
    break;
    PYGLOW_KERNELS(PYGLOW_ANSWER)
    PYGLOW_CPU_KERNELS(PYGLOW_ANSWER)
    PYGLOW_NET_KERNELS(PYGLOW_ANSWER)
#undef PYGLOW_ANSWER
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 1) {
    std::printf("%s\n", pyglow::cpu::instruction_set());
    return 0;
  }
  const int file = std::atoi(argv[1]), access = PROT_READ | PROT_WRITE;
  if (mmap(calls::memory, calls::memory_bytes, access, MAP_SHARED | MAP_FIXED, file, 0) != calls::memory) {
    std::perror("the memory that both processes have");
    return 1;
  }
  for (calls::Call call; calls::receive(STDIN_FILENO, &call, sizeof call);) {
    std::string error;
    try {
      answer(call);
    } catch (const std::logic_error&) {
      throw;  // which ends the process: the arguments were not read
    } catch (const std::exception& thrown) {
      error = thrown.what();
    }
    const int64_t length = static_cast<int64_t>(error.size());
    calls::send(STDOUT_FILENO, &length, sizeof length);
    calls::send(STDOUT_FILENO, error.data(), length);
  }
}
