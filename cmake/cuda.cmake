# The CUDA kernels: target unswag::cuda, a library of its own, so that whoever uses unswag::unswag alone needs no CUDA toolkit.
# A program that links it has a row for CUDA devices, and starts without a driver too: the runtime is linked statically and
# looks for the driver at the first call.
set(UNSWAG_CUDA AUTO CACHE STRING "CUDA kernels: ON, OFF, or AUTO: when nvcc and an NVIDIA driver are found")
set_property(CACHE UNSWAG_CUDA PROPERTY STRINGS AUTO ON OFF)
# T4, A100, H100, and PTX for what is newer.
set(UNSWAG_CUDA_ARCHITECTURES "75-real;80-real;90" CACHE STRING "as CMAKE_CUDA_ARCHITECTURES")

if(NOT UNSWAG_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "UNSWAG_CUDA is '${UNSWAG_CUDA}'; use AUTO, ON or OFF")
endif()
if(UNSWAG_CUDA STREQUAL "AUTO" AND NOT EXISTS /proc/driver/nvidia/version)
  # WSL and some containers have the driver's library alone.
  find_library(UNSWAG_CUDA_DRIVER libcuda.so.1 PATHS /usr/lib/wsl/lib)
  mark_as_advanced(UNSWAG_CUDA_DRIVER)
  if(NOT UNSWAG_CUDA_DRIVER)
    message(STATUS "UnSwag ${PROJECT_VERSION}: CPU kernels only: no NVIDIA driver is found (UNSWAG_CUDA=ON builds CUDA kernels anyway)")
    return()
  endif()
endif()
if(NOT UNSWAG_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(UNSWAG_CUDA STREQUAL "ON" AND NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "UNSWAG_CUDA=ON, but nvcc is not found; install the CUDA toolkit or name it: -DCMAKE_CUDA_COMPILER=<path to nvcc>")
  endif()
endif()
if(UNSWAG_CUDA STREQUAL "OFF" OR NOT CMAKE_CUDA_COMPILER)
  message(STATUS "UnSwag ${PROJECT_VERSION}: CPU kernels only (UNSWAG_CUDA is ${UNSWAG_CUDA})")
  return()
endif()

if(CCACHE AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
message(STATUS "UnSwag ${PROJECT_VERSION}: CPU and CUDA kernels (nvcc ${CMAKE_CUDA_COMPILER_VERSION}, ${UNSWAG_CUDA_ARCHITECTURES})")

set(names)  # sm_75, ..., compute_90: what the library contains
foreach(architecture IN LISTS UNSWAG_CUDA_ARCHITECTURES)
  string(REGEX REPLACE "-.*" "" number ${architecture})
  if(NOT architecture MATCHES "-virtual$")
    list(APPEND names sm_${number})
  endif()
  if(NOT architecture MATCHES "-real$")
    list(APPEND names compute_${number})
  endif()
endforeach()
list(JOIN names "+" names)  # nvcc cuts definitions at commas

file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/cuda/*.cu)
add_library(unswag_cuda STATIC ${sources})
add_library(unswag::cuda ALIAS unswag_cuda)
set_target_properties(unswag_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF EXPORT_NAME cuda
                      CUDA_ARCHITECTURES "${UNSWAG_CUDA_ARCHITECTURES}" CUDA_VISIBILITY_PRESET hidden)
target_include_directories(unswag_cuda PRIVATE src)
target_compile_definitions(unswag_cuda PRIVATE UNSWAG_ISA_NS=cuda UNSWAG_CUDA_NAMES="${names}")
# Products and sums are fused only where a formula says fma: the bits are those of the CPU.
target_compile_options(unswag_cuda PRIVATE -fmad=false --threads=3)  # the architectures side by side
target_link_libraries(unswag_cuda PUBLIC unswag::unswag PRIVATE CUDA::cudart_static)
# src/api refers to it weakly, which does not fetch it from an archive.
target_link_options(unswag_cuda INTERFACE LINKER:--undefined=unswag_cuda_kernels)
