// The entry points of the kernels, by device. Plain types only: neither torch nor CUDA is visible here.
#pragma once
#include <cstdint>

namespace pyglow::cpu {

// The instruction set whose kernels run on this machine: "portable", "avx2" or "avx512". The environment variable
// PYGLOW_CPU overrides the choice; throws std::invalid_argument if it names one that cannot run here.
const char* instruction_set();

}  // namespace pyglow::cpu

namespace pyglow::cuda {

// Return values are cudaError_t as int, zero for success.
int device_count(int* count);
int runtime_version(int* version);
const char* error_string(int error);

}  // namespace pyglow::cuda
