// Exponential of small skew matrices, CUDA. Definition and contract: lipfast/ops/skew_exponential.py
//
// Where the number of squarings is not given, a kernel finds what the largest matrix needs and hands it to the next one
// on the device; the host reads it behind both, for the backward pass. Larger matrices are left to the definition.
#include <optional>
#include <tuple>

#include "skew_exponential.cuh"

namespace lipfast {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// False where it does not fit the device.
template <typename W, int C>
bool exponentiate(const Tensor& skew, const std::optional<int64_t>& squarings, int N, Results& results) {
  constexpr int kBytes = 2 * Matrix<W, C>::kBytes;
  if constexpr (kBytes <= kMostBytes) {
    auto* const kernel = skew_exponential_kernel<W, C>;
    auto* const first = skew_exponential_squarings_kernel<W, C>;
    if (!fits(kernel, kBytes, skew) || !fits(first, kBytes, skew)) return false;
    auto& [out, square, fourth, root, count] = results;
    const auto* from = skew.const_data_ptr<W>();
    const unsigned B = blocks_for(skew.numel() / (N * N), 1);
    const cudaStream_t stream = stream_of(skew);
    std::optional<Tensor> needed;
    if (!squarings) {
      needed = torch::stable::new_zeros(skew, {1}, ScalarType::Int);
      first<<<B, kThreads, kBytes, stream>>>(from, needed->mutable_data_ptr<int>(), N);
      check_launch("skew_exponential");
    }
    const int* const raised = needed ? needed->const_data_ptr<int>() : nullptr;
    kernel<<<B, kThreads, kBytes, stream>>>(from, raised, squarings.value_or(0), out.mutable_data_ptr<W>(),
                                            square.mutable_data_ptr<W>(), fourth.mutable_data_ptr<W>(),
                                            root.mutable_data_ptr<W>(), N);
    check_launch("skew_exponential");
    *count.mutable_data_ptr<int64_t>() = needed ? read(*needed) : *squarings;
    return true;
  }
  return false;
}

Results skew_exponential_forward(Tensor skew, std::optional<int64_t> squarings) {
  const DeviceGuard guard(skew.get_device_index());
  const int64_t N = skew.size(-1);
  const ScalarType dtype = skew.scalar_type();
  if (N <= kMostSide) {
    const Tensor wide =
        torch::stable::contiguous(dtype == ScalarType::Double ? skew : torch::stable::to(skew, ScalarType::Float));
    const auto fresh = [&] { return torch::stable::new_empty(wide, wide.sizes()); };
    Results results = {fresh(), fresh(), fresh(), fresh(),
                       torch::stable::full({}, static_cast<double>(squarings.value_or(0)), ScalarType::Long)};
    bool done = wide.numel() == 0;
    for_side(N, [&](auto C) {
      const auto n = static_cast<int>(N);
      if (!done)
        done = dtype == ScalarType::Double ? exponentiate<double, C>(wide, squarings, n, results)
                                           : exponentiate<float, C>(wide, squarings, n, results);
    });
    if (done) {
      std::get<0>(results) = torch::stable::to(std::get<0>(results), dtype);
      return results;
    }
  }
  const auto stack = definition_of("lipfast::skew_exponential_forward_definition", skew, squarings);
  const auto result = [&](int n) { return torch::stable::detail::to<Tensor>(stack[n]); };
  return {result(0), result(1), result(2), result(3), result(4)};
}

template <typename W, int C>
bool differentiate(const std::array<Tensor, 5>& inputs, Tensor& out, int64_t count, int N) {
  constexpr int kBytes = 2 * Matrix<W, C>::kBytes;
  if constexpr (kBytes <= kMostBytes) {
    auto* const kernel = skew_exponential_backward_kernel<W, C>;
    if (!fits(kernel, kBytes, out)) return false;
    const auto& [grad, skew, square, fourth, root] = inputs;
    const int64_t roots = count > 1 ? count - 1 : 0;
    Tensor work = torch::stable::new_empty(out, {(roots + kKept) * static_cast<int64_t>(out.numel())});
    kernel<<<blocks_for(out.numel() / (N * N), 1), kThreads, kBytes, stream_of(out)>>>(
        grad.const_data_ptr<W>(), skew.const_data_ptr<W>(), square.const_data_ptr<W>(), fourth.const_data_ptr<W>(),
        root.const_data_ptr<W>(), work.mutable_data_ptr<W>(), out.mutable_data_ptr<W>(), count, N);
    check_launch("skew_exponential");
    return true;
  }
  return false;
}

Tensor skew_exponential_backward(Tensor grad, Tensor skew, Tensor square, Tensor fourth, Tensor root,
                                 Tensor squarings) {
  const DeviceGuard guard(skew.get_device_index());
  const int64_t N = skew.size(-1);
  const ScalarType dtype = skew.scalar_type(), type = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  if (N <= kMostSide && squarings.is_cpu()) {
    std::array<Tensor, 5> inputs = {grad, skew, square, fourth, root};
    for (Tensor& t : inputs) {
      STD_TORCH_CHECK(t.numel() == skew.numel() && t.get_device_index() == skew.get_device_index(),
                      "skew_exponential: gradient and results do not fit");
      t = torch::stable::contiguous(torch::stable::to(t, type));
    }
    Tensor out = torch::stable::new_empty(inputs[1], inputs[1].sizes());
    bool done = out.numel() == 0;
    const int64_t count = *squarings.const_data_ptr<int64_t>();
    for_side(N, [&](auto C) {
      const auto n = static_cast<int>(N);
      if (!done)
        done = type == ScalarType::Double ? differentiate<double, C>(inputs, out, count, n)
                                          : differentiate<float, C>(inputs, out, count, n);
    });
    if (done) return torch::stable::to(out, dtype);
  }
  return torch::stable::detail::to<Tensor>(
      definition_of("lipfast::skew_exponential_backward_definition", grad, skew, square, fourth, root, squarings)[0]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) {
  m.impl("skew_exponential_forward", TORCH_BOX(&skew_exponential_forward));
  m.impl("skew_exponential_backward", TORCH_BOX(&skew_exponential_backward));
}

}  // namespace lipfast
