// Certified radii, CUDA. Definition, contract and the proof that rounding is safe: lipfast/ops/certified_radius.py
#include "launch.cuh"

namespace lipfast {
namespace {

constexpr int kThreads = 256;

// The order of torch.argmax: a NaN before any number, then the larger, then the earlier.
template <typename W>
__device__ bool leads(W x, int i, W y, int j) {
  const bool x_nan = x != x, y_nan = y != y;
  if (x_nan || y_nan) return x_nan && (!y_nan || i < j);
  return x > y || (x == y && i < j);
}

__device__ void store_down(double* to, double x) { *to = x; }
__device__ void store_down(float* to, float x) { *to = x; }
__device__ void store_down(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rd(x); }
__device__ void store_down(__half* to, float x) { *to = __float2half_rd(x); }

// `width` lanes per sample, a power of two. They keep the row of logits in registers, kItems each; kItems = 0 reads it
// twice. The strides tell one constant, a matrix, and a matrix per sample apart.
template <typename T, int kItems>
__global__ void __launch_bounds__(kThreads)
    certified_radius_kernel(const T* __restrict__ logits,      // (B, K)
                            const T* __restrict__ lipschitz,   // (), (K, K) or (B, K, K)
                            T* __restrict__ radius,            // (B,)
                            int64_t* __restrict__ prediction,  // (B,)
                            int64_t B, int K, int width, int64_t sample_stride, int64_t row_stride,
                            int64_t column_stride) {
  using W = wide_t<T>;
  const int64_t place = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / width;
  const int64_t sample = place < B ? place : B - 1;  // surplus lanes stay, so that the shuffles are full
  const int lane = threadIdx.x % width;
  const T* z = logits + sample * K;
  const int items = kItems > 0 ? kItems : (K + width - 1) / width;
  W held[kItems > 0 ? kItems : 1];

  W top = -kInfinity<W>;
  int label = K;  // after every class, so that a class of -inf comes before none
  bool finite = true;
#pragma unroll
  for (int n = 0; n < items; ++n) {
    const int k = lane + n * width;
    const W logit = k < K ? widen(z[k]) : -kInfinity<W>;
    if constexpr (kItems > 0) held[n] = logit;
    if (k >= K) continue;
    finite = finite && logit - logit == 0;
    if (leads(logit, k, top, label)) top = logit, label = k;
  }
  for (int offset = width / 2; offset > 0; offset /= 2) {
    const W other = __shfl_xor_sync(kFullWarp, top, offset);
    const int other_label = __shfl_xor_sync(kFullWarp, label, offset);
    if (leads(other, other_label, top, label)) top = other, label = other_label;
  }

  const T* constants = lipschitz + sample * sample_stride + label * row_stride;
  W least = finite ? kInfinity<W> : W(0);
#pragma unroll
  for (int n = 0; n < items; ++n) {
    const int k = lane + n * width;
    if (k >= K || k == label) continue;
    W logit;
    if constexpr (kItems > 0)
      logit = held[n];
    else
      logit = widen(z[k]);
    const W constant = widen(constants[k * column_stride]);
    const W margin = top - logit;
    W quotient = 0;
    if (margin > 0 && constant >= 0 && constant <= kLargest<W>) {
      quotient = constant == 0 ? kLargest<W> : fmin(fmin(margin, kLargest<W>) / constant, kLargest<W>);
    }
    least = fmin(least, quotient);
  }
  least = join_lanes(least, width, [](W a, W b) { return fmin(a, b); });
  if (place < B && lane == 0) {
    const W shrunk = least * (1 - 4 * kEpsilon<W>);
    store_down(radius + sample, fmax(shrunk - kTiny<W>, W(0)));
    prediction[sample] = label;
  }
}

std::tuple<Tensor, Tensor> certified_radius(Tensor logits, Tensor lipschitz) {
  const DeviceGuard guard(logits.get_device_index());
  const Tensor z = torch::stable::contiguous(logits), constants = torch::stable::contiguous(lipschitz);
  const int64_t K = z.size(-1), B = z.numel() / K, L = constants.dim();
  STD_TORCH_CHECK(K < std::numeric_limits<int32_t>::max() / 2, "certified_radius: too many classes: ", K);
  STD_TORCH_CHECK(constants.numel() == (L == 0   ? 1
                                        : L == 2 ? K * K
                                                 : B * K * K) &&
                      constants.scalar_type() == z.scalar_type() &&
                      constants.get_device_index() == z.get_device_index(),
                  "certified_radius: lipschitz must fit logits in shape, dtype and device");
  const std::vector<int64_t> leading(z.sizes().begin(), z.sizes().end() - 1);
  Tensor radius = torch::stable::new_empty(z, leading);
  Tensor prediction = torch::stable::new_empty(z, leading, ScalarType::Long);
  if (B == 0) return {radius, prediction};
  int width = 2;
  while (width < 32 && width < K) width *= 2;
  for_floating_type(z, "certified_radius", [&](auto zero) {
    using T = decltype(zero);
    auto* kernel = K <= 32     ? certified_radius_kernel<T, 1>
                   : K <= 128  ? certified_radius_kernel<T, 4>
                   : K <= 1024 ? certified_radius_kernel<T, 32>
                               : certified_radius_kernel<T, 0>;
    kernel<<<blocks_for(B, kThreads / width), kThreads, 0, stream_of(z)>>>(
        static_cast<const T*>(z.const_data_ptr()), static_cast<const T*>(constants.const_data_ptr()),
        static_cast<T*>(radius.mutable_data_ptr()), prediction.mutable_data_ptr<int64_t>(), B, static_cast<int>(K),
        width, L > 2 ? K * K : 0, L > 0 ? K : 0, L > 0 ? 1 : 0);
  });
  check_launch("certified_radius");
  return {radius, prediction};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) { m.impl("certified_radius", TORCH_BOX(&certified_radius)); }

}  // namespace lipfast
