# The target `torch_stable`: headers and libraries of the stable ABI of the PyTorch that is installed.
#
# find_package(Torch) is not used: it fails where nvcc and torch disagree or torch is a CPU build, and sets flags of
# its own. Torch is looked for in this order: TORCH_DIR (CMake or LIPFAST_TORCH_DIR in the environment), the build
# interpreter's path, its site-packages (pip's build isolation hides only sys.path), an activated virtual environment.

if(NOT TORCH_DIR AND DEFINED ENV{LIPFAST_TORCH_DIR})
  set(TORCH_DIR "$ENV{LIPFAST_TORCH_DIR}")
endif()
if(NOT TORCH_DIR)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/find_torch.py"
    OUTPUT_VARIABLE TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT EXISTS "${TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR
    "lipfast: no PyTorch 2.10 or newer beside ${Python_EXECUTABLE}. Install one first (pip install torch==2.13.0), "
    "build with --no-build-isolation, or set LIPFAST_TORCH_DIR=<site-packages>/torch.")
endif()

file(READ "${TORCH_DIR}/include/torch/headeronly/version.h" header)
string(REGEX MATCH "TORCH_VERSION_MAJOR ([0-9]+)" _ "${header}")
set(TORCH_HEADERS "${CMAKE_MATCH_1}")
string(REGEX MATCH "TORCH_VERSION_MINOR ([0-9]+)" _ "${header}")
string(APPEND TORCH_HEADERS ".${CMAKE_MATCH_1}")

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${TORCH_DIR}/include")
# 2.10: the oldest torch that the binary runs under, whatever headers it was built with.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
# libtorch.so brings libtorch_cuda.so into the symbol scope where torch has CUDA.
target_link_options(torch_stable INTERFACE "-Wl,--no-as-needed")
target_link_libraries(torch_stable INTERFACE "${TORCH_DIR}/lib/libtorch.so" "${TORCH_DIR}/lib/libtorch_cpu.so")
message(STATUS "lipfast: torch ${TORCH_HEADERS} headers in ${TORCH_DIR}")
