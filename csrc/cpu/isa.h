// The instruction sets that the CPU kernels are compiled for, and the choice made when the module runs.
#pragma once

namespace pyglow::cpu {

enum class Isa { portable, avx2, avx512 };

// The best one that is both compiled in and supported by this processor and system, or what PYGLOW_CPU asks for.
// Decided once; throws std::invalid_argument if PYGLOW_CPU cannot be honoured.
Isa selected_isa();

}  // namespace pyglow::cpu
