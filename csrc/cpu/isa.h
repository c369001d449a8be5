// The instruction sets that the CPU kernels are compiled for, and the choice made when the module runs.
#pragma once
#include "core.h"

namespace pyglow::cpu {

// The last two are avx512 with another kernel for the nets in bfloat16.
enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

// The best one that is both compiled in and supported by this processor and system, or what PYGLOW_CPU asks for.
// Decided once; throws std::invalid_argument if PYGLOW_CPU cannot be honoured.
Isa selected_isa();

// The kernels of each instruction set: those of core.h, compiled from the same sources.
#define PYGLOW_DECLARE(kernel, Args) \
  template <class T>                 \
  void kernel(const Args<T>& args, const Threads& threads);
#define PYGLOW_DECLARE_IN(isa)       \
  namespace isa {                    \
  PYGLOW_KERNELS(PYGLOW_DECLARE)     \
  PYGLOW_CPU_KERNELS(PYGLOW_DECLARE) \
  PYGLOW_NET_KERNELS(PYGLOW_DECLARE) \
  }
#define PYGLOW_DECLARE_NETS_IN(isa)  \
  namespace isa {                    \
  PYGLOW_NET_KERNELS(PYGLOW_DECLARE) \
  }
PYGLOW_DECLARE_IN(portable)
PYGLOW_DECLARE_IN(avx2)
PYGLOW_DECLARE_IN(avx512)
PYGLOW_DECLARE_NETS_IN(avx512_bf16)
PYGLOW_DECLARE_NETS_IN(amx)
#undef PYGLOW_DECLARE_NETS_IN
#undef PYGLOW_DECLARE_IN
#undef PYGLOW_DECLARE

}  // namespace pyglow::cpu
