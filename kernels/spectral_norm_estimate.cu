// Power iteration on masked matrices, CUDA. Definition and contract: lipfast/ops/spectral_norm_estimate.py
//
// A float weight that all samples share and that fits on chip: one launch of the kernel in spectral_norm_estimate.cuh.
// Others (float64, one per sample, larger): torch's products, and after each of them the kernel below.
#include <optional>
#include <tuple>

#include "spectral_norm_estimate.cuh"

namespace lipfast {
namespace {

struct Vectors {  // one per sample, or one for all of them, or none
  Tensor held;
  const void* data = nullptr;
  int64_t stride = 0;
};

struct Task {
  Tensor weight;  // (*, O, I)
  Vectors input_mask, output_mask, start;
  Tensor sigma, left, right;  // (*), (*, O), (*, I), where * has B entries
  int64_t B, O, I, iterations;
};

__device__ double scale_of(double largest) {
  const int exponent = static_cast<int>(__double_as_longlong(largest) >> 52);
  return largest <= kLargest<double> ? __longlong_as_double((2046LL - min(max(exponent, 1), 2045)) << 52) : 1.0;
}

template <typename W, typename F>
__device__ W join_block(W x, F join) {
  __shared__ W parts[kThreads / 32];
  x = join_lanes(x, 32, join);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = join_lanes(parts[threadIdx.x % (kThreads / 32)], kThreads / 32, join);
  __syncthreads();  // before `parts` is used again
  return x;
}

// A block per sample: unit = mask from / length. Where the length is zero: a random vector, or zero if it is asked for.
template <typename W>
__global__ void __launch_bounds__(kThreads)
    spectral_norm_unit_kernel(const W* from,                  // (B, N), (N,) or none; may be `unit`
                              const bool* __restrict__ mask,  // (B, N), (N,) or none
                              W* unit,                        // (B, N)
                              W* __restrict__ length,         // (B,), or none: then zero becomes random
                              int64_t N, int64_t from_stride, int64_t mask_stride, bool is_start) {
  const int64_t n = blockIdx.x;
  const auto add = [](W a, W b) { return a + b; };
  const auto bit = [&](int64_t k) { return W(mask == nullptr || mask[n * mask_stride + k] ? 1 : 0); };
  const auto value = [&](int64_t k) { return from == nullptr ? W(0) : from[n * from_stride + k] * bit(k); };
  const auto each = [&](auto f) {
    for (int64_t k = threadIdx.x; k < N; k += kThreads) f(k);
  };
  W largest = 0, squares = 0;
  each([&](int64_t k) { largest = larger(largest, fabs(value(k))); });
  largest = join_block(largest, [](W a, W b) { return larger(a, b); });
  const W scale = scale_of(largest);
  each([&](int64_t k) { squares = fma(value(k) * scale, value(k) * scale, squares); });
  const W scaled = sqrt(join_block(squares, add));
  if (length != nullptr && threadIdx.x == 0) length[n] = scaled / scale;
  if (scaled != 0 && (!is_start || largest <= kLargest<W>)) {  // a NaN length too
    const W inverse = 1 / scaled;
    return each([&](int64_t k) { unit[n * N + k] = value(k) * scale * inverse; });
  }
  squares = 0;
  each([&](int64_t k) { squares = fma(random_at<W>(k) * bit(k), random_at<W>(k), squares); });
  squares = join_block(squares, add);
  const W inverse = squares == 0 || length != nullptr ? 0 : 1 / sqrt(squares);
  each([&](int64_t k) { unit[n * N + k] = random_at<W>(k) * bit(k) * inverse; });
}

struct Fit {  // of a weight on chip
  int clusters = 0, size = 0,
      bytes = 0;  // how many run at a time, 0 where none does; blocks of each; memory of a block
};

cudaLaunchConfig_t configured(const Fit& fit, cudaLaunchAttribute& attribute) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(fit.size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(fit.size);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = fit.bytes;
  config.attrs = &attribute;
  config.numAttrs = fit.size > 1;
  return config;
}

template <typename K>
Fit fit(K* kernel, int samples, int device, int64_t O, int64_t I) {
  if (O == 0 || I == 0 || O * I > 1 << 20) return {};  // above every device; the layout counts in 32 bits
  cudaFuncAttributes compiled;
  int most = 0;
  Fit fit;
  STD_TORCH_CHECK(cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess &&
                      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
                      cudaDeviceGetAttribute(&fit.clusters, cudaDevAttrMultiProcessorCount, device) == cudaSuccess,
                  "spectral_norm_estimate: the device does not answer");
  fit.size = compiled.ptxVersion < 90 ? 1 : Cluster::kSize;  // as the kernel was compiled, whatever runs it
  const Layout layout(static_cast<int>(O), static_cast<int>(I), fit.size, samples);
  fit.bytes = layout.total * static_cast<int>(sizeof(Floats));
  if (fit.bytes > most) return {};
  STD_TORCH_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, fit.bytes) == cudaSuccess,
                  "spectral_norm_estimate: the device refuses ", fit.bytes, " bytes of shared memory");
  if (fit.size == 1) return fit;
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = configured(fit, attribute);
  if (cudaOccupancyMaxActiveClusters(&fit.clusters, kernel, &config) != cudaSuccess) {
    cudaGetLastError();  // a slice of a device may have no room for a cluster
    return {};
  }
  return fit;
}

template <typename T>
bool iterate_on_chip(Task& task) {
  const int device = task.weight.get_device_index();
  auto* kernel = spectral_norm_estimate_kernel<T, kTile>;
  int64_t samples = kTile;
  Fit chosen = fit(kernel, kTile, device, task.O, task.I);
  if (chosen.clusters == 0) return false;
  if (chosen.clusters * samples < task.B) {  // not all at a time: twice as many in a cluster
    auto* const wider = spectral_norm_estimate_kernel<T, 2 * kTile>;
    const Fit of_wider = fit(wider, 2 * kTile, device, task.O, task.I);
    if (of_wider.clusters > 0) kernel = wider, samples = 2 * kTile, chosen = of_wider;
  }
  const auto* weight = static_cast<const T*>(task.weight.const_data_ptr());
  const bool aligned = task.I % 4 == 0 && reinterpret_cast<uintptr_t>(weight) % sizeof(Pack<T>) == 0;
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config = configured(chosen, attribute);
  config.gridDim = dim3(blocks_for((task.B + samples - 1) / samples * chosen.size, 1));
  config.stream = stream_of(task.weight);
  cudaLaunchKernelEx(&config, kernel, weight, static_cast<const bool*>(task.input_mask.data),
                     static_cast<const bool*>(task.output_mask.data), static_cast<const T*>(task.start.data),
                     static_cast<T*>(task.sigma.mutable_data_ptr()), task.left.mutable_data_ptr<float>(),
                     task.right.mutable_data_ptr<float>(), task.B, static_cast<int>(task.O), static_cast<int>(task.I),
                     task.iterations, task.input_mask.stride, task.output_mask.stride, task.start.stride, aligned);
  check_launch("spectral_norm_estimate");
  return true;
}

template <typename W>
void make_unit(const Vectors& from, const Vectors& mask, Tensor& unit, Tensor* length, int64_t B, int64_t N,
               bool is_start) {
  spectral_norm_unit_kernel<W><<<blocks_for(B, 1), kThreads, 0, stream_of(unit)>>>(
      static_cast<const W*>(from.data), static_cast<const bool*>(mask.data), static_cast<W*>(unit.mutable_data_ptr()),
      length == nullptr ? nullptr : static_cast<W*>(length->mutable_data_ptr()), N, from.stride, mask.stride, is_start);
  check_launch("spectral_norm_estimate");
}

Tensor product(const Tensor& matrix, const Tensor& vector) {  // (*, O, I), (*, I) -> (*, O)
  using namespace torch::stable;
  return contiguous(matrix.dim() == 2 ? matmul(vector, transpose(matrix, 0, 1))
                                      : squeeze(matmul(matrix, unsqueeze(vector, -1)), -1));
}

// On a weight of type W; leaves sigma in that type.
template <typename W>
void iterate(Task& task) {
  const Tensor transposed = torch::stable::transpose(task.weight, -2, -1);
  const auto normalise = [&](Tensor& t, const Vectors& mask, Tensor* length) {
    make_unit<W>(Vectors{t, t.const_data_ptr(), t.size(-1)}, mask, t, length, task.B, t.size(-1), false);
  };
  make_unit<W>(task.start, task.input_mask, task.right, nullptr, task.B, task.I, true);
  for (int64_t t = 0; t < task.iterations; ++t) {
    task.left = product(task.weight, task.right);
    normalise(task.left, task.output_mask, nullptr);
    task.right = product(transposed, task.left);
    normalise(task.right, task.input_mask, nullptr);
  }
  task.left = product(task.weight, task.right);
  task.sigma = torch::stable::new_empty(task.weight, {task.sigma.sizes().begin(), task.sigma.sizes().end()});
  normalise(task.left, task.output_mask, &task.sigma);
}

std::vector<int64_t> broadcast(std::vector<int64_t> a, std::vector<int64_t> b) {
  if (a.size() < b.size()) std::swap(a, b);
  b.insert(b.begin(), a.size() - b.size(), 1);
  for (size_t d = 0; d < a.size(); ++d) {
    STD_TORCH_CHECK(a[d] == b[d] || a[d] == 1 || b[d] == 1, "spectral_norm_estimate: leading sizes must broadcast");
    if (a[d] == 1) a[d] = b[d];
  }
  return a;
}

std::tuple<Tensor, Tensor, Tensor> spectral_norm_estimate(Tensor weight, std::optional<Tensor> input_mask,
                                                          std::optional<Tensor> output_mask,
                                                          std::optional<Tensor> start, int64_t iterations) {
  const DeviceGuard guard(weight.get_device_index());
  const ScalarType dtype = weight.scalar_type(), wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  Task task = {torch::stable::contiguous(weight)};
  task.O = weight.size(-2), task.I = weight.size(-1), task.iterations = iterations;
  std::vector<int64_t> lead(weight.sizes().begin(), weight.sizes().end() - 2);
  for (const auto* t : {&input_mask, &output_mask, &start})
    if (t->has_value()) lead = broadcast(lead, {(*t)->sizes().begin(), (*t)->sizes().end() - 1});
  const auto with = [&](int64_t N) {
    std::vector<int64_t> sizes = lead;
    sizes.push_back(N);
    return sizes;
  };
  task.sigma = torch::stable::new_empty(task.weight, lead);
  task.left = torch::stable::new_empty(task.weight, with(task.O), wide);
  task.right = torch::stable::new_empty(task.weight, with(task.I), wide);
  task.B = task.sigma.numel();
  if (task.B == 0) return {task.sigma, task.left, task.right};
  const auto vectors = [&](const std::optional<Tensor>& t, int64_t N, ScalarType type) {
    if (!t.has_value()) return Vectors{};
    STD_TORCH_CHECK(t->size(-1) == N && t->scalar_type() == type && t->get_device_index() == weight.get_device_index(),
                    "spectral_norm_estimate: masks and start must fit weight in shape, dtype and device");
    Tensor whole = *t;
    if (whole.numel() != N && whole.numel() != task.B * N) {
      whole = torch::stable::new_empty(whole, with(N));
      torch::stable::copy_(whole, *t);
    }
    whole = torch::stable::contiguous(whole);
    return Vectors{whole, whole.const_data_ptr(), whole.numel() == N ? 0 : N};
  };
  task.input_mask = vectors(input_mask, task.I, ScalarType::Bool);
  task.output_mask = vectors(output_mask, task.O, ScalarType::Bool);
  task.start = vectors(start, task.I, dtype);
  bool done = false;
  for_floating_type(weight, "spectral_norm_estimate", [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) < sizeof(double)) done = weight.dim() == 2 && iterate_on_chip<T>(task);
  });
  if (done) return {task.sigma, task.left, task.right};
  task.weight = torch::stable::to(task.weight, wide);
  if (start.has_value()) task.start = vectors(torch::stable::to(*start, wide), task.I, wide);
  if (wide == ScalarType::Double)
    iterate<double>(task);
  else
    iterate<float>(task);
  return {torch::stable::to(task.sigma, dtype), task.left, task.right};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) { m.impl("spectral_norm_estimate", TORCH_BOX(&spectral_norm_estimate)); }

}  // namespace lipfast
