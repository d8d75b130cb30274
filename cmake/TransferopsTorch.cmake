# Torch's version, headers and libraries, asked of Python. Torch's own CMake package is not used here: in a CUDA build it
# demands cuBLAS and cuSPARSE headers and a GPU architecture guess, and the stable ABI needs none of them.
find_package(Python REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "import torch, pathlib; print(torch.__version__, torch.version.cuda or '', pathlib.Path(torch.__file__).parent, sep=';')"
  OUTPUT_VARIABLE torch_facts ERROR_VARIABLE torch_error RESULT_VARIABLE torch_result OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT torch_result EQUAL 0)
  message(FATAL_ERROR
    "transferops: torch 2.11 or later must be installed before building, and ${Python_EXECUTABLE} has none.\n"
    "Run:  ${Python_EXECUTABLE} -m pip install torch\n"
    "then: ${Python_EXECUTABLE} -m pip install --no-build-isolation .\n"
    "(Without --no-build-isolation, pip builds in an environment of its own that has no torch.)\n${torch_error}")
endif()
list(GET torch_facts 0 TRANSFEROPS_TORCH_VERSION)
list(GET torch_facts 1 TRANSFEROPS_TORCH_CUDA_VERSION)
list(GET torch_facts 2 torch_root)
if(TRANSFEROPS_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "transferops: torch 2.11 or later is needed, found ${TRANSFEROPS_TORCH_VERSION}.\n"
    "Run: ${Python_EXECUTABLE} -m pip install --upgrade torch")
endif()
set(TRANSFEROPS_TORCH_INCLUDE_DIRS "${torch_root}/include")
set(TRANSFEROPS_TORCH_LIBRARIES)
foreach(name IN ITEMS torch torch_cpu c10)
  find_library(TRANSFEROPS_LIB_${name} ${name} PATHS "${torch_root}/lib" NO_DEFAULT_PATH REQUIRED)
  list(APPEND TRANSFEROPS_TORCH_LIBRARIES "${TRANSFEROPS_LIB_${name}}")
endforeach()
message(STATUS "transferops: torch ${TRANSFEROPS_TORCH_VERSION}, its CUDA: ${TRANSFEROPS_TORCH_CUDA_VERSION}")
