# src/cpu/*.cpp is compiled once per instruction set; the best that runs here is chosen at run time.
#
# Each set has its own namespace unswag::<UNSWAG_ISA_NS>, so that no linker can hand code for one set to another
# (tests/cpp/symbols_test.sh looks).  Kernels are always optimised, or a debug build would be too slow to test anything,
# but never with -ffast-math: NaN, inf and -0 have meaning here.  Under a sanitizer -O3 takes a compiler many minutes.
set(UNSWAG_KERNEL_LEVEL -O3)
if(UNSWAG_SANITIZE)
  set(UNSWAG_KERNEL_LEVEL -O1)
endif()
file(GLOB UNSWAG_KERNEL_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/cpu/*.cpp)
list(FILTER UNSWAG_KERNEL_SOURCES EXCLUDE REGEX "/threads\\.cpp$")
set(UNSWAG_KERNEL_OBJECTS)
set(UNSWAG_SYMBOLS)  # the arguments of tests/cpp/symbols_test.sh
set(UNSWAG_ROWS)  # the table of src/api/dispatch.cpp: ROW(portable) ROW(x86_64) ...

# Objects unswag_cpu_<ns>.  name: as users see it; the namespace ns is the same with _ for -.  sources: the list of that name.
# Further arguments: options.
function(unswag_kernels name sources)
  string(REPLACE - _ ns ${name})
  set(target unswag_cpu_${ns})
  add_library(${target} OBJECT ${${sources}})
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_compile_definitions(${target} PRIVATE UNSWAG_ISA_NS=${ns} UNSWAG_ISA_NAME="${name}")
  target_compile_options(${target} PRIVATE ${UNSWAG_KERNEL_LEVEL} -fno-math-errno -fno-trapping-math -ffp-contract=off ${ARGN})
  set(UNSWAG_SYMBOLS ${UNSWAG_SYMBOLS} --set ${ns} $<TARGET_OBJECTS:${target}> PARENT_SCOPE)
endfunction()

# The same as a row of the library.
macro(unswag_instruction_set name)
  unswag_kernels(${name} UNSWAG_KERNEL_SOURCES ${ARGN})
  string(REPLACE - _ ns ${name})
  list(APPEND UNSWAG_KERNEL_OBJECTS $<TARGET_OBJECTS:unswag_cpu_${ns}>)
  string(APPEND UNSWAG_ROWS " ROW(${ns})")
endmacro()

# Scheduling before registers are handed out interleaves the chains of the formulas (7 to 25 % on Zen 3); GCC leaves it off on x86.
set(schedule $<$<CXX_COMPILER_ID:GNU>:-fschedule-insns> $<$<CXX_COMPILER_ID:GNU>:-fsched-pressure>)

# Slowest first.
unswag_instruction_set(portable -DUNSWAG_ISA_PORTABLE)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  unswag_instruction_set(x86-64)
  unswag_instruction_set(avx2 -mavx2 -mfma -mf16c ${schedule})
  set(avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl ${schedule})
  unswag_instruction_set(avx512 ${avx512})
  # The processor converts to bf16 (avx512_bf16) and moves 16-bit elements together and apart (avx512_vbmi2).
  unswag_instruction_set(avx512-bf16 ${avx512} -mavx512bf16 -mavx512vbmi2)
endif()
