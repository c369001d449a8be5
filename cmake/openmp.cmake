# Makes at::parallel_for run in parallel. Its loop is an inline OpenMP region, so the bindings are compiled with OpenMP,
# but never linked with an OpenMP runtime: a second one would give the process two thread pools. The symbols stay
# undefined here and resolve to the copy that libtorch_cpu brings along.
#
# torch for Linux brings GCC's libgomp. Clang's OpenMP code calls LLVM's libomp instead, which no Linux torch contains,
# so a module compiled by Clang on Linux runs its CPU kernels on one thread. On macOS torch contains libomp, and the
# same idea holds with Clang.
function(pyglow_enable_openmp target)
  set(parallel 0)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(${target} PRIVATE -fopenmp)
    set(parallel 1)
  elseif(APPLE AND EXISTS "${PYGLOW_TORCH_DIR}/lib/libomp.dylib" AND EXISTS "${PYGLOW_TORCH_DIR}/include/omp.h")
    target_compile_options(${target} PRIVATE -Xclang -fopenmp)
    set(parallel 1)
  else()
    message(WARNING "${CMAKE_CXX_COMPILER_ID} would bring a second OpenMP runtime beside torch's libgomp: the CPU kernels "
                    "are built to run on one thread. Build with GCC (CXX=g++) for threads.")
  endif()
  target_compile_definitions(${target} PRIVATE PYGLOW_PARALLEL=${parallel})
endfunction()
