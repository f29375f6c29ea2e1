// What was built, for `lipfast info`. The only pybind11 of the project: operators reach Python through torch.ops.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "What was built.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = LIPFAST_COMPILER;
        info["torch_headers"] = LIPFAST_TORCH_HEADERS;
        info["torch_oldest"] = "2.10";
        info["instruction_sets"] = py::make_tuple("default", "avx2", "avx512");
        const bool cuda = std::string(LIPFAST_ARCHS).size() > 0;
        info["cuda"] = cuda ? py::object(py::str(LIPFAST_CUDA_VERSION)) : py::none();
        info["cuda_archs"] = py::str(LIPFAST_ARCHS).attr("split")();
        return info;
      },
      "Compiler, torch headers, instruction sets and CUDA architectures of this build.");
}
