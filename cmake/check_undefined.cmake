# cmake -DNM=nm -DMODULE=_C.so -P check_undefined.cmake
# Fails if the linked module lacks a function of its own: the linker lets it pass, since torch's and Python's symbols are
# undefined too, and the module would only fail when it is imported.
execute_process(COMMAND ${NM} -D --undefined-only ${MODULE} OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^ \n]*6pyglow[^ \n]*" missing "${text}")
if(missing)
  list(JOIN missing "\n  " names)
  file(REMOVE "${MODULE}")
  message(FATAL_ERROR "No source in csrc defines these functions of core.h:\n  ${names}")
endif()
