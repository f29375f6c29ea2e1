// What every launcher needs: the caller's stream, a grid size, a check that the launch took, the dtypes, a maximum that
// keeps NaN, and a reduction over the lanes of a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <vector>

// It lives in libtorch_cuda. Weak, so that the library loads under a CPU build of torch too.
#pragma weak aoti_torch_get_current_cuda_stream

namespace lipfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr unsigned kFullWarp = 0xffffffffu;

// Device code may read these, but not call std::numeric_limits.
template <typename W>
constexpr W kInfinity = std::numeric_limits<W>::infinity();
template <typename W>
constexpr W kLargest = std::numeric_limits<W>::max();
template <typename W>
constexpr W kTiny = std::numeric_limits<W>::min();
template <typename W>
constexpr W kEpsilon = std::numeric_limits<W>::epsilon();

inline cudaStream_t stream_of(const Tensor& t) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "lipfast: this PyTorch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "lipfast: too many blocks for a grid: ", blocks);
  return static_cast<unsigned>(blocks);
}

inline void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

// Calls f(T{}) with T the C++ type of the tensor's elements.
template <typename F>
void for_floating_type(const Tensor& t, const char* name, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    case ScalarType::Half:
      return f(__half{});
    default:
      STD_TORCH_CHECK(false, name, ": a floating dtype expected, got ", torch::headeronly::toString(t.scalar_type()));
  }
}

// The type in which sums over elements of T are formed.
template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <typename T>
using wide_t = typename Wide<T>::type;

template <typename T>
__device__ wide_t<T> widen(T x) {
  return static_cast<wide_t<T>>(x);
}

__device__ inline float larger(float a, float b) {  // NaN if either is
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
__device__ inline double larger(double a, double b) { return b > a || b != b ? b : a; }

// Joins the values of `width` neighbouring lanes, a power of two. Every lane of the warp must come here.
template <typename T, typename F>
__device__ T join_lanes(T x, int width, F join) {
  for (int offset = width / 2; offset > 0; offset /= 2) x = join(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

}  // namespace lipfast
