# Decides whether the CUDA kernels are built: torch must have CUDA and nvcc must be there, of torch's major version.
set(TRANSFEROPS_HAS_CUDA OFF)
set(TRANSFEROPS_CUDA_VERSION "")
set(TRANSFEROPS_BUILT_ARCHITECTURES "")
if(TRANSFEROPS_CUDA STREQUAL "OFF")
  message(STATUS "transferops: CPU only (TRANSFEROPS_CUDA=OFF)")
  return()
endif()
if(NOT TRANSFEROPS_TORCH_CUDA_VERSION)
  if(TRANSFEROPS_CUDA STREQUAL "ON")
    message(FATAL_ERROR "transferops: TRANSFEROPS_CUDA=ON, but torch ${TRANSFEROPS_TORCH_VERSION} is a CPU build. "
      "Install a CUDA build of torch, or leave TRANSFEROPS_CUDA at AUTO.")
  endif()
  message(STATUS "transferops: CPU only (torch is a CPU build)")
  return()
endif()

find_package(CUDAToolkit QUIET)
if(NOT CUDAToolkit_FOUND OR NOT CUDAToolkit_NVCC_EXECUTABLE)
  if(TRANSFEROPS_CUDA STREQUAL "ON")
    message(FATAL_ERROR "transferops: TRANSFEROPS_CUDA=ON, but no nvcc was found. Install the CUDA toolkit "
      "${TRANSFEROPS_TORCH_CUDA_VERSION} or set CUDAToolkit_ROOT to it.")
  endif()
  message(WARNING "transferops: torch has CUDA ${TRANSFEROPS_TORCH_CUDA_VERSION}, but no nvcc was found: building for "
    "the CPU only. Install the CUDA toolkit or set CUDAToolkit_ROOT to it, then build again.")
  return()
endif()

string(REGEX MATCH "^[0-9]+" torch_cuda_major "${TRANSFEROPS_TORCH_CUDA_VERSION}")
if(NOT CUDAToolkit_VERSION_MAJOR EQUAL torch_cuda_major)
  message(FATAL_ERROR
    "transferops: nvcc is CUDA ${CUDAToolkit_VERSION} (${CUDAToolkit_NVCC_EXECUTABLE}), but torch "
    "${TRANSFEROPS_TORCH_VERSION} was built with CUDA ${TRANSFEROPS_TORCH_CUDA_VERSION}; the major versions must agree.\n"
    "Set CUDAToolkit_ROOT to a CUDA ${torch_cuda_major} toolkit, install a torch built with CUDA "
    "${CUDAToolkit_VERSION_MAJOR}, or set TRANSFEROPS_CUDA=OFF for a CPU build.")
endif()

# The nvcc on PATH may be a wrapper script; the toolkit's own is the one whose headers and libraries were found.
set(CMAKE_CUDA_COMPILER "${CUDAToolkit_NVCC_EXECUTABLE}" CACHE FILEPATH "")
set(CMAKE_CUDA_ARCHITECTURES "${TRANSFEROPS_CUDA_ARCHITECTURES}" CACHE STRING "")
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
# Given as an option because CMake before 3.27 does not know C++20 for CUDA.
string(APPEND CMAKE_CUDA_FLAGS " -std=c++20 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden")
foreach(name IN ITEMS torch_cuda c10_cuda)
  find_library(TRANSFEROPS_LIB_${name} ${name} PATHS "${torch_root}/lib" NO_DEFAULT_PATH REQUIRED)
  list(APPEND TRANSFEROPS_TORCH_LIBRARIES "${TRANSFEROPS_LIB_${name}}")
endforeach()
set(TRANSFEROPS_HAS_CUDA ON)
set(TRANSFEROPS_CUDA_VERSION "${CUDAToolkit_VERSION}")
list(JOIN TRANSFEROPS_CUDA_ARCHITECTURES " " TRANSFEROPS_BUILT_ARCHITECTURES)
message(STATUS "transferops: CUDA ${CUDAToolkit_VERSION}, architectures ${TRANSFEROPS_BUILT_ARCHITECTURES}")
