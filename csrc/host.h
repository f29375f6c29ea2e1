// What every CPU op needs on its way from tensors to kernels, and nothing else.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "simd/kernels.h"

namespace lipfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The widest instruction set that this machine has, or the one that LIPFAST_CPU_CAPABILITY names if it has that.
const Kernels& kernels();

// 64-byte aligned memory of this thread, kept for its next call. `which`: 0 for one task, 1 and 2 for what all tasks
// of a call read (the calling thread runs tasks too).
void* scratch(int which, int64_t bytes);

int dtype_of(const Tensor& t);
inline int64_t wide_bytes(int dtype) { return dtype == kFloat64 ? 8 : 4; }

// The op's definition in Python, where PyTorch's own kernels take less time; bench/NOTES.md records where.
template <typename... A>
auto definition_of(const char* name, const A&... arguments) {
  std::array<StableIValue, 12> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

// gamma of lipfast.rounding for plain sums on the CPU; -1 where no outward rounding is asked for.
double gamma_of(bool outward, int64_t terms, int dtype);

}  // namespace lipfast
