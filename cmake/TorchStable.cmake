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
if(NOT EXISTS "${TORCH_DIR}/version.py")
  message(FATAL_ERROR
    "lipfast: no PyTorch beside ${Python_EXECUTABLE}; 2.10 or newer is needed. Install one first (pip install "
    "torch==2.13.0), build with --no-build-isolation, or set LIPFAST_TORCH_DIR=<site-packages>/torch.")
endif()

file(STRINGS "${TORCH_DIR}/version.py" version REGEX "^__version__ = ")
string(REGEX MATCH "([0-9]+\\.[0-9]+)[^'\"]*" version "${version}")
set(TORCH_HEADERS "${CMAKE_MATCH_1}")
if(TORCH_HEADERS VERSION_LESS 2.10)
  message(FATAL_ERROR "lipfast: PyTorch 2.10 or newer is needed, got ${version} in ${TORCH_DIR}.")
endif()

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${TORCH_DIR}/include")
# 2.10: the oldest torch that the binary runs under, whatever headers it was built with.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
# libtorch.so brings libtorch_cuda.so into the symbol scope where torch has CUDA.
target_link_options(torch_stable INTERFACE "-Wl,--no-as-needed")
target_link_libraries(torch_stable INTERFACE "${TORCH_DIR}/lib/libtorch.so" "${TORCH_DIR}/lib/libtorch_cpu.so")
message(STATUS "lipfast: torch ${TORCH_HEADERS} headers in ${TORCH_DIR}")
