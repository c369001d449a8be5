# Included by builds that a test makes. Most of what the bindings take to compile is torch's headers, which six sources read
# at once here, and optimisation. Kernels are compiled as always, unless PYGLOW_UNOPTIMISED names their targets.
cmake_language(DEFER CALL set_target_properties _C PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 6)
foreach(target _C ${PYGLOW_UNOPTIMISED})
  cmake_language(EVAL CODE "cmake_language(DEFER CALL target_compile_options ${target} PRIVATE -O0)")
endforeach()
