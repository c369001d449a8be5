// Switching between the stacks of emulated threads, in assembly of x86-64 Linux, and telling the sanitizers about it:
// builds with one of them define EMU_ASAN or EMU_TSAN.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>

#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMU_TSAN
#include <sanitizer/tsan_interface.h>
// The emulator's own bookkeeping runs on the stacks of racing threads: it may not be watched itself.
#define EMU_HIDDEN inline __attribute__((no_sanitize("thread"), noinline))
#else
#define EMU_HIDDEN inline
#endif

extern "C" void emu_switch(void** save, void* load);
// Saves what the calling convention preserves, and returns on the other stack.
asm(R"(
.pushsection .text.emu_switch,"axG",@progbits,emu_switch,comdat
.weak emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
.popsection
)");

namespace emu {

constexpr size_t stack_bytes = 64 * 1024, guard_bytes = 4096;

// A stack and where its owner stopped; for the scheduler, the stack of the operating system's thread.
struct Context {
  void* pointer = nullptr;
  char* stack = nullptr;
  void* fake_stack = nullptr;    // AddressSanitizer
  void* tsan_fiber = nullptr;    // ThreadSanitizer
  const void* bottom = nullptr;  // of the scheduler's stack, learnt from AddressSanitizer
  size_t size = 0;
};

// Maps a stack whose lowest page faults; null if there is no memory.
EMU_HIDDEN char* new_stack() {
  void* const memory =
      mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  mprotect(memory, guard_bytes, PROT_NONE);
  return static_cast<char*>(memory);
}

// Lays out a stack so that the first switch to it enters `entry`, which never returns.
EMU_HIDDEN bool prepare(Context& context, void (*entry)()) {
#ifdef EMU_TSAN
  // On a reused stack the variables of two blocks would look like one variable that they race for.
  if (context.stack != nullptr) munmap(context.stack, stack_bytes);
  context.stack = nullptr;
#endif
  if (context.stack == nullptr) context.stack = new_stack();
  if (context.stack == nullptr) return false;
#ifdef EMU_ASAN
  __asan_unpoison_memory_region(context.stack + guard_bytes, stack_bytes - guard_bytes);
#endif
  void** top = reinterpret_cast<void**>(context.stack + stack_bytes - 64);
  *--top = nullptr;  // in place of a return address: the entry finds the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context.pointer = top;
  context.fake_stack = nullptr;
  return true;
}

EMU_HIDDEN void enter(Context& scheduler, Context& fiber) {
#ifdef EMU_ASAN
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, fiber.stack + guard_bytes, stack_bytes - guard_bytes);
#endif
#ifdef EMU_TSAN
  __tsan_switch_to_fiber(fiber.tsan_fiber, 0);  // what the scheduler did happened before, but not the other way round
#endif
  emu_switch(&scheduler.pointer, fiber.pointer);
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
}

// First thing on a fiber's stack.
EMU_HIDDEN void entered(Context& scheduler) {
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.size);
#endif
  (void)scheduler;
}

EMU_HIDDEN void leave(Context& fiber, Context& scheduler, bool for_good) {
#ifdef EMU_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, scheduler.bottom, scheduler.size);
#endif
#ifdef EMU_TSAN
  __tsan_switch_to_fiber(scheduler.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  (void)for_good;
  emu_switch(&fiber.pointer, scheduler.pointer);
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler.bottom, &scheduler.size);
#endif
}

}  // namespace emu
