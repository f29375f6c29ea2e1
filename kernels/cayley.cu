// Cayley transform of small matrices, CUDA. Definition and contract: lipfast/ops/cayley.py
//
// One block inverts one matrix by Gauss-Jordan elimination in float64 and in registers: only a column and a row at a
// time pass through shared memory. Pivots are searched for where |A|_F calls for them. float64 input and larger
// matrices are left to the definition.
#include "small_matrix.cuh"

namespace lipfast {
namespace {

constexpr double kPlain =
    512;  // |A|_F up to which diagonal pivots err by less than float32: by 128 eps |A|_F^2 at most

// The row of the largest entry of a column among those that are not used.
template <int C>
__device__ int largest_row(const double* column, unsigned used, int N) {
  int chosen = 0;
  double largest = -1;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int i = threadIdx.x % 32 + 32 * c;
    if (i >= N || (used >> c & 1) || !(fabs(column[i]) > largest)) continue;
    chosen = i, largest = fabs(column[i]);
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const int other = __shfl_xor_sync(kFullWarp, chosen, offset);
    const double entry = __shfl_xor_sync(kFullWarp, largest, offset);
    if (entry > largest || (entry == largest && other < chosen)) chosen = other, largest = entry;
  }
  return chosen;
}

template <int C>
__global__ void __launch_bounds__(kThreads) cayley_kernel(const float* __restrict__ skew,  // (B, N, N)
                                                          float* __restrict__ out,         // (B, N, N)
                                                          int N) {
  using M = Matrix<double, C>;
  __shared__ double columns[2][32 * C], rows[2][32 * C];
  __shared__ int row_of[32 * C], step_of[32 * C];  // the pivot of every step, and in turn
  const int64_t first = int64_t{blockIdx.x} * N * N;
  const int lane = threadIdx.x % 32;
  M matrix;
  matrix.each([&](double& x, int i, int j) {
    if (i < N && j < N) x = 0.5 * (skew[first + i * N + j] - skew[first + j * N + i]);
  });
  const double size = frobenius(matrix);
  matrix.each([](double& x, int i, int j) { x += i == j; });
  unsigned used = 0;  // bit c: row lane + 32 c has been a pivot's
#pragma unroll
  for (int r = 0; r < M::kRows; ++r) {
    constexpr int kSteps = 32 / kWarps;
    for (int w = 0; w < kWarps && kWarps * r + w < N; ++w) {
      const int c = r / kSteps, l = r % kSteps * kWarps + w, k = 32 * c + l;  // column k is in lane l, at own[][c]
      double *const column = columns[w % 2], *const row = rows[w % 2];        // the last ones are being read still
      if (lane == l) {
#pragma unroll
        for (int q = 0; q < M::kRows; ++q) {
          column[M::row(q)] = matrix.own[q][c];
          matrix.own[q][c] = 0;
        }
      }
      int pivot = k;
      if (size > kPlain) {
        __syncthreads();
        pivot = largest_row<C>(column, used, N);
        if (pivot % 32 == lane) used |= 1u << pivot / 32;
      }
      __syncwarp();
#pragma unroll
      for (int q = 0; q < M::kRows; ++q) {
        if (M::row(q) != pivot) continue;  // a whole warp passes
        const double inverse = 1 / column[pivot];
#pragma unroll
        for (int n = 0; n < C; ++n) {
          row[M::column(n)] = M::column(n) == k ? inverse : matrix.own[q][n] * inverse;
          matrix.own[q][n] = 0;
        }
        if (lane == 0) row_of[k] = pivot, step_of[pivot] = k;
      }
      __syncthreads();
      matrix.add_product([&](int i, int) { return i == pivot ? 1 : -column[i]; }, [&](int, int j) { return row[j]; },
                         1);
    }
  }
  matrix.each([&](double& x, int i, int j) {
    if (i >= N || j >= N) return;
    const double Q =
        size <= kLargest<double> ? 2 * x - (step_of[i] == row_of[j]) : kInfinity<double> - kInfinity<double>;
    out[first + step_of[i] * N + row_of[j]] = static_cast<float>(Q);
  });
}

Tensor cayley(Tensor skew) {
  const DeviceGuard guard(skew.get_device_index());
  const int64_t N = skew.size(-1);
  const ScalarType dtype = skew.scalar_type();
  if (N > kMostSide || dtype == ScalarType::Double)
    return torch::stable::detail::to<Tensor>(definition_of("lipfast::cayley_definition", skew)[0]);
  const Tensor wide = torch::stable::contiguous(torch::stable::to(skew, ScalarType::Float));
  Tensor out = torch::stable::new_empty(wide, wide.sizes());
  if (out.numel() > 0) {
    for_side(N, [&](auto C) {
      cayley_kernel<C><<<blocks_for(out.numel() / (N * N), 1), kThreads, 0, stream_of(wide)>>>(
          wide.const_data_ptr<float>(), out.mutable_data_ptr<float>(), static_cast<int>(N));
    });
    check_launch("cayley");
  }
  return torch::stable::to(out, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) { m.impl("cayley", TORCH_BOX(&cayley)); }

}  // namespace lipfast
