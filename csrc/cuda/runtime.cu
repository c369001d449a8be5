// What the bindings need to know of the CUDA runtime, without its headers.
#include <cuda_runtime_api.h>

#include "core.h"

namespace pyglow::cuda {

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace pyglow::cuda
