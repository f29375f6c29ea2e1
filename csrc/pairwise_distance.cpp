// CPU kernel of lipfast/ops/pairwise_distance.py.
#include "host.h"

namespace lipfast {
namespace {

// 0 stands for p = inf.
int norm_of(double p) { return p == 1 || p == 2 ? int(p) : 0; }

// N, K and I of (*, K, I)
std::array<int64_t, 3> sizes_of(const Tensor& rows) {
  const int64_t D = rows.dim();
  STD_TORCH_CHECK(D >= 2, "pairwise_distance: rows must be (*, K, I)");
  int64_t N = 1;
  for (int64_t d = 0; d + 2 < D; ++d) N *= rows.size(d);
  return {N, rows.size(D - 2), rows.size(D - 1)};
}

int64_t blocks(int64_t size, int64_t side) { return (size + side - 1) / side; }

// Tasks of `work` operations each, a thread's share of which is worth waking it for.
int64_t grain(int64_t work) { return 1 + (int64_t(1) << 18) / (work + 1); }

}  // namespace

Tensor pairwise_distance(Tensor rows, double p) {
  const auto [N, K, I] = sizes_of(rows);
  const int dtype = dtype_of(rows);
  std::vector<int64_t> shape(rows.sizes().begin(), rows.sizes().end());
  shape.back() = K;
  Tensor out = torch::stable::new_empty(rows, shape);
  rows = torch::stable::contiguous(rows);
  const Distance a{rows.const_data_ptr(), out.mutable_data_ptr(), K, I, norm_of(p)};
  // Each block meets those after it, halfway around a ring: every pair once, and for all blocks as many.
  const int64_t B = blocks(K, kDistanceSide), reach = B / 2 + 1, side = K < kDistanceSide ? K : kDistanceSide;
  torch::stable::parallel_for(0, N * B * reach, grain(side * side * I), [&, N = N](int64_t begin, int64_t end) {
    void* own = scratch(0, kernels().distance_scratch());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / reach % B, step = task % reach, second = (first + step) % B;
      if (step > 0 && 2 * step == B && first > second) continue;  // halfway around: met from the other side
      kernels().distance(dtype, a, task / reach / B, kDistanceSide * (first < second ? first : second),
                         kDistanceSide * (first < second ? second : first), own);
    }
  });
  return out;
}

Tensor pairwise_distance_backward(Tensor grad, Tensor rows, Tensor distance, double p) {
  const auto [N, K, I] = sizes_of(rows);
  const int dtype = dtype_of(rows);
  STD_TORCH_CHECK(int64_t(grad.numel()) == N * K * K && int64_t(distance.numel()) == N * K * K &&
                      grad.scalar_type() == rows.scalar_type() && distance.scalar_type() == rows.scalar_type(),
                  "pairwise_distance: gradients do not fit");
  Tensor out = torch::stable::new_empty(rows, rows.sizes());
  grad = torch::stable::contiguous(grad);
  rows = torch::stable::contiguous(rows);
  distance = torch::stable::contiguous(distance);
  const int64_t pitch = (K + 31) / 32 * 32 + 16;  // an odd number of cache lines: rows share no cache set
  Tensor weights =
      torch::stable::new_empty(rows, {N, K, pitch}, dtype == kFloat64 ? ScalarType::Double : ScalarType::Float);
  const int norm = norm_of(p);
  const DistanceGradient a{grad.const_data_ptr(),
                           rows.const_data_ptr(),
                           distance.const_data_ptr(),
                           weights.mutable_data_ptr(),
                           out.mutable_data_ptr(),
                           K,
                           I,
                           pitch,
                           norm};
  const int64_t strips = blocks(K, kWeightRows);
  torch::stable::parallel_for(0, N * strips, grain(kWeightRows * K), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      kernels().distance_weights(dtype, a, task / strips, task % strips * kWeightRows);
  });
  const int64_t width = norm ? kGradientBytes / wide_bytes(dtype) : I > 0 ? I : 1, side = norm ? kGradientSide : 1;
  const int64_t across = blocks(I, width), down = blocks(K, side);
  torch::stable::parallel_for(0, N * down * across, grain(side * K * width), [&, I = I](int64_t begin, int64_t end) {
    void* own = scratch(0, norm ? kernels().distance_gradient_scratch() : I * wide_bytes(dtype));
    for (int64_t task = begin; task < end; ++task)
      kernels().distance_gradient(dtype, a, task / across / down, task / across % down * side, task % across * width,
                                  own);
  });
  return out;
}

}  // namespace lipfast

STABLE_TORCH_LIBRARY_IMPL(lipfast, CPU, m) {
  m.impl("pairwise_distance", TORCH_BOX(&lipfast::pairwise_distance));
  m.impl("pairwise_distance_backward", TORCH_BOX(&lipfast::pairwise_distance_backward));
}
