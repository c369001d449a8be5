// Chooses the instruction set at run time. Compiled for the baseline processor: it runs before anything is known.
#if defined(PYGLOW_HAVE_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "core.h"
#include "cpu/isa.h"

namespace pyglow::cpu {
namespace {

bool has_avx512() {
#ifdef PYGLOW_HAVE_AVX512
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

#if defined(PYGLOW_HAVE_AVX512_BF16) && defined(PYGLOW_HAVE_AMX) && defined(__linux__)
#define PYGLOW_MAY_HAVE_TILES
// Not by __builtin_cpu_supports, whose names for it are not known to all compilers. Linux gives a process the tiles
// only if it asks, as they make its threads' state larger.
bool has_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & amx_bf16) == 0 || (d & amx_tile) == 0) return false;
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

bool supported(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
#ifdef PYGLOW_HAVE_AVX2
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
      return false;
#endif
    case Isa::avx512:
      return has_avx512();
    case Isa::avx512_bf16:
#ifdef PYGLOW_HAVE_AVX512_BF16
      return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
      return false;
#endif
    case Isa::amx:
#ifdef PYGLOW_MAY_HAVE_TILES
      return supported(Isa::avx512_bf16) && has_tiles();
#else
      return false;
#endif
  }
  return false;
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::amx:
      return "amx";
  }
  return "";
}

constexpr Isa best_first[] = {Isa::amx, Isa::avx512_bf16, Isa::avx512, Isa::avx2, Isa::portable};

Isa select() {
  const char* wanted = std::getenv("PYGLOW_CPU");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (Isa isa : best_first)  // the name first: asking for what is not wanted may change the process
    if ((any || std::string(wanted) == name(isa)) && supported(isa)) return isa;
  std::string choices;
  for (Isa isa : best_first)
    if (supported(isa)) choices += (choices.empty() ? "" : ", ") + std::string(name(isa));
  throw std::invalid_argument("PYGLOW_CPU: expected one of " + choices + " on this machine, found " + wanted);
}

}  // namespace

Isa selected_isa() {
  static const Isa isa = select();
  return isa;
}

const char* instruction_set() { return name(selected_isa()); }

// One entry point for each kernel of core.h, forwarding to the selected instruction set.
#ifdef PYGLOW_HAVE_AVX2
#define PYGLOW_CASE_AVX2(kernel) \
  case Isa::avx2:                \
    return avx2::kernel(args, threads);
#else
#define PYGLOW_CASE_AVX2(kernel)
#endif
#ifdef PYGLOW_HAVE_AVX512
#define PYGLOW_CASE_AVX512(kernel) \
  case Isa::amx:                   \
  case Isa::avx512_bf16:           \
  case Isa::avx512:                \
    return avx512::kernel(args, threads);
#else
#define PYGLOW_CASE_AVX512(kernel)
#endif
#define PYGLOW_ON_SELECTED(kernel)            \
  switch (selected_isa()) {                   \
    PYGLOW_CASE_AVX512(kernel)                \
    PYGLOW_CASE_AVX2(kernel)                  \
    default:                                  \
      return portable::kernel(args, threads); \
  }
#define PYGLOW_FORWARD(kernel, Args)                                                                                  \
  template <class T>                                                                                                  \
  void kernel(const Args<T>& args, const Threads& threads){PYGLOW_ON_SELECTED(kernel)} PYGLOW_CPU_INSTANTIATE(kernel, \
                                                                                                              Args)
PYGLOW_KERNELS(PYGLOW_FORWARD)
PYGLOW_CPU_KERNELS(PYGLOW_FORWARD)

// The nets likewise, but for those in bfloat16 where there are instructions for it.
#ifdef PYGLOW_HAVE_AMX
#define PYGLOW_IF_AMX(kernel) \
  if (args.net.half && selected_isa() == Isa::amx) return amx::kernel(args, threads);
#else
#define PYGLOW_IF_AMX(kernel)
#endif
#ifdef PYGLOW_HAVE_AVX512_BF16
#define PYGLOW_IF_AVX512_BF16(kernel) \
  if (args.net.half && selected_isa() == Isa::avx512_bf16) return avx512_bf16::kernel(args, threads);
#else
#define PYGLOW_IF_AVX512_BF16(kernel)
#endif
#define PYGLOW_FORWARD_NET(kernel, Args)                                                                \
  template <class T>                                                                                    \
  void kernel(const Args<T>& args, const Threads& threads){PYGLOW_IF_AMX(kernel) PYGLOW_IF_AVX512_BF16( \
      kernel) PYGLOW_ON_SELECTED(kernel)} PYGLOW_CPU_INSTANTIATE(kernel, Args)
PYGLOW_NET_KERNELS(PYGLOW_FORWARD_NET)

}  // namespace pyglow::cpu
