// Orthogonal polar factor of small matrices that are nearly orthonormal, CUDA. Definition: lipfast/ops/polar.py
//
// One block takes all Newton-Schulz steps of one matrix. A matrix that is not near, or not finite, raises a flag, which
// the host reads: then the definition, which decomposes such matrices, serves the batch. It serves larger ones too.
#include "small_matrix.cuh"

namespace lipfast {
namespace {

constexpr double kNear = 0.5;  // |M^T M - I|_F, as in the definition

template <typename W, int C>
__global__ void __launch_bounds__(kThreads) polar_kernel(const W* __restrict__ matrix,  // (B, O, I)
                                                         W* __restrict__ out,           // (B, O, I)
                                                         int* __restrict__ far, int O, int I) {
  using M = Matrix<W, C>;
  using At = Shared<W, C>;
  const int64_t first = int64_t{blockIdx.x} * O * I;
  const bool is_tall = O >= I;
  const int tall = is_tall ? O : I, slim = is_tall ? I : O;
  W *const Q = M::at(0), *const E = M::at(1);
  const auto place = [&](int i, int j) { return is_tall ? i * M::kStride + j : j * M::kStride + i; };
  const auto defect = [&] {  // E = Q^T Q - I, which is returned too
    M own;
    own.add_product(Transposed<W, C>{Q}, At{Q}, tall);
    own.each([&](W& x, int i, int j) {
      x -= i == j && i < slim;
      E[i * M::kStride + j] = x;
    });
    return own;
  };
  M own;
  own.each([&](W&, int i, int j) { Q[place(i, j)] = i < O && j < I ? matrix[first + i * I + j] : W(0); });
  __syncthreads();
  own = defect();
  W size = frobenius(own);
  if (!(size <= kNear)) {  // or NaN; the whole block leaves
    if (threadIdx.x == 0) *far = 1;
    return;
  }
  while (true) {
    own = {};
    own.add_product(At{Q}, At{E}, slim);
    __syncthreads();
    own.each([&](W& x, int i, int j) { Q[i * M::kStride + j] -= x / 2; });
    __syncthreads();
    size = size * size * (W(0.75) + W(0.25) * size);
    if (size <= kEpsilon<W>) break;
    defect();
    __syncthreads();
  }
  own.each([&](W&, int i, int j) {
    if (i < O && j < I) out[first + i * I + j] = Q[place(i, j)];
  });
}

// False where some matrix is left to the definition.
template <typename W, int C>
bool take_steps(const Tensor& matrix, Tensor& out, int O, int I) {
  constexpr int kBytes = 2 * Matrix<W, C>::kBytes;
  if constexpr (kBytes <= kMostBytes) {
    auto* const kernel = polar_kernel<W, C>;
    if (!fits(kernel, kBytes, matrix)) return false;
    Tensor far = torch::stable::new_zeros(matrix, {1}, ScalarType::Int);
    const unsigned B = blocks_for(out.numel() / (O * I), 1);
    const cudaStream_t stream = stream_of(matrix);
    kernel<<<B, kThreads, kBytes, stream>>>(matrix.const_data_ptr<W>(), out.mutable_data_ptr<W>(),
                                            far.mutable_data_ptr<int>(), O, I);
    check_launch("polar");
    return read(far) == 0;
  }
  return false;
}

Tensor polar(Tensor matrix) {
  const DeviceGuard guard(matrix.get_device_index());
  const int64_t O = matrix.size(-2), I = matrix.size(-1), side = O > I ? O : I;
  const ScalarType dtype = matrix.scalar_type();
  if (side <= kMostSide) {
    const Tensor wide =
        torch::stable::contiguous(dtype == ScalarType::Double ? matrix : torch::stable::to(matrix, ScalarType::Float));
    Tensor out = torch::stable::new_empty(wide, wide.sizes());
    bool done = out.numel() == 0;
    for_side(side, [&](auto C) {
      const auto o = static_cast<int>(O), i = static_cast<int>(I);
      if (!done)
        done = dtype == ScalarType::Double ? take_steps<double, C>(wide, out, o, i)
                                           : take_steps<float, C>(wide, out, o, i);
    });
    if (done) return torch::stable::to(out, dtype);
  }
  return torch::stable::detail::to<Tensor>(definition_of("lipfast::polar_definition", matrix)[0]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) { m.impl("polar", TORCH_BOX(&polar)); }

}  // namespace lipfast
