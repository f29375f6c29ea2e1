// Matrices of up to 128 rows and columns, each in the shared memory and the registers of one block of threads.
// In registers every matrix is cut alike: thread `lane` of warp `w` has the entries (w + 8 r, lane + 32 c). In shared
// memory it is padded with zeros to a side of 32 C, so that no product needs a bound, and an odd stride lets a warp
// read a column as quickly as a row.
#pragma once

#include <array>
#include <type_traits>

#include "launch.cuh"

namespace lipfast {
namespace {

constexpr int kMostSide = 128, kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMostBytes = 226 << 10;  // of shared memory, on the devices that have most of it

extern __shared__ double shared[];

template <typename W, int C>
struct Matrix {
  static constexpr int kStride = 32 * C + 1, kRows = 32 * C / kWarps;
  static constexpr int kBytes = 32 * C * kStride * static_cast<int>(sizeof(W));
  W own[kRows][C] = {};  // indices known to the compiler only, or they leave the registers

  __device__ static W* at(int n) { return reinterpret_cast<W*>(shared) + n * 32 * C * kStride; }
  __device__ static int row(int r) { return threadIdx.x / 32 + kWarps * r; }
  __device__ static int column(int c) { return threadIdx.x % 32 + 32 * c; }

  template <typename F>
  __device__ void each(F f) {  // f(entry, its row, its column)
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < C; ++c) f(own[r][c], row(r), column(c));
  }

  // Sets shared matrix n to entry(row, column): behind all that others read there, before all that they will.
  template <typename F>
  __device__ static void fill(int n, F entry) {
    __syncthreads();
#pragma unroll 2
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < C; ++c) at(n)[row(r) * kStride + column(c)] = entry(row(r), column(c));
    __syncthreads();
  }

  // Adds the product of left(i, k) and right(k, j) over k < K.
  template <typename L, typename R>
  __device__ void add_product(L left, R right, int K) {
#pragma unroll 2
    for (int k = 0; k < K; ++k) {
      W b[C];
#pragma unroll
      for (int c = 0; c < C; ++c) b[c] = right(k, column(c));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const W a = left(row(r), k);
#pragma unroll
        for (int c = 0; c < C; ++c) own[r][c] = fma(a, b[c], own[r][c]);
      }
    }
  }
};

template <typename W, int C>
struct Shared {  // a matrix in shared memory, for add_product
  const W* at;
  __device__ W operator()(int i, int j) const { return at[i * Matrix<W, C>::kStride + j]; }
};
template <typename W, int C>
struct Transposed {
  const W* at;
  __device__ W operator()(int i, int j) const { return at[j * Matrix<W, C>::kStride + i]; }
};

// Joins a value of every thread, which all come here; what they wrote to shared memory before is seen after.
template <typename W, typename F>
__device__ W join_block(W x, F join) {
  __shared__ W parts[kWarps];
  x = join_lanes(x, 32, join);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = join_lanes(parts[threadIdx.x % kWarps], kWarps, join);
  __syncthreads();  // before `parts` is used again
  return x;
}

template <typename W, int C>
__device__ W frobenius(Matrix<W, C>& matrix) {
  W squares = 0;
  matrix.each([&](W& x, int, int) { squares = fma(x, x, squares); });
  return sqrt(join_block(squares, [](W a, W b) { return a + b; }));
}

// Calls f(C) for the least C whose matrices hold N rows and columns.
template <typename F>
void for_side(int64_t N, F f) {
  if (N <= 32) return f(std::integral_constant<int, 1>{});
  if (N <= 64) return f(std::integral_constant<int, 2>{});
  if (N <= 96) return f(std::integral_constant<int, 3>{});
  return f(std::integral_constant<int, 4>{});
}

// Whether a block may have so much shared memory on the device; if so, the kernel may ask for it.
template <typename K>
bool fits(K* kernel, int bytes, const Tensor& t) {
  int most = 0;
  const auto limit = cudaDevAttrMaxSharedMemoryPerBlockOptin;
  STD_TORCH_CHECK(cudaDeviceGetAttribute(&most, limit, t.get_device_index()) == cudaSuccess,
                  "lipfast: the device does not answer");
  return bytes + 1024 <= most &&  // which is for parts that the kernel itself declares
         cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess;
}

// A number that the device has; waits for it.
inline int read(const Tensor& t) {
  int value = 0;
  const cudaStream_t stream = stream_of(t);
  STD_TORCH_CHECK(
      cudaMemcpyAsync(&value, t.const_data_ptr(), sizeof value, cudaMemcpyDeviceToHost, stream) == cudaSuccess &&
          cudaStreamSynchronize(stream) == cudaSuccess,
      "lipfast: the device does not answer");
  return value;
}

// The op's definition in Python, for what no kernel here serves.
template <typename... A>
auto definition_of(const char* name, const A&... arguments) {
  std::array<StableIValue, 8> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

}  // namespace
}  // namespace lipfast
