# cmake -DNM=nm -DISA=avx2 "-DOBJECTS=a.o;b.o" [-DSTAMP=file] -P check_isa_symbols.cmake
# Fails if an object defines a weak or unique symbol whose mangled name does not contain its instruction set. The token
# appears there with its length in front (4avx2): as the enclosing namespace, or in a template argument, and in both
# cases no object of another instruction set can define the same name. DW.ref... are addresses for exceptions, no code.
string(LENGTH "${ISA}" length)
set(token "${length}${ISA}")
set(shared "")
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only --format=posix ${object} OUTPUT_VARIABLE text COMMAND_ERROR_IS_FATAL ANY)
  string(REPLACE ";" " " text "${text}")
  string(REPLACE "\n" ";" lines "${text}")
  foreach(line IN LISTS lines)
    # posix format: name, type, ...; types W, w, V, v are weak and u is unique.
    if(line MATCHES "^([^ ]+) [WwVvu]( |$)")
      set(symbol "${CMAKE_MATCH_1}")
      if(NOT symbol MATCHES "${token}|^DW\\.ref\\.")
        string(APPEND shared "\n  ${symbol}  in ${object}")
      endif()
    endif()
  endforeach()
endforeach()
if(shared)
  message(
    FATAL_ERROR
      "These weak symbols are compiled for ${ISA} but do not name it, so the linker may merge them with the copy of "
      "another instruction set, and the module would stop with an illegal instruction on an older CPU. Put the function "
      "into the inline namespace PYGLOW_ISA, make it static, or mark it always_inline:${shared}")
endif()
if(STAMP)
  file(TOUCH "${STAMP}")
endif()
