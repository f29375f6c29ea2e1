// CPU kernel of lipfast/ops/certified_radius.py, which holds the proof that rounding is safe.
#include "host.h"

namespace lipfast {
namespace {

std::vector<int64_t> leading(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() > 0, "certified_radius: logits must have classes");
  return {logits.sizes().begin(), logits.sizes().end() - 1};
}

void run(Tensor logits, Tensor lipschitz, void* radius, int64_t* prediction, int64_t* closest) {
  const int64_t K = logits.size(-1), B = K > 0 ? logits.numel() / K : 0, L = lipschitz.dim();
  STD_TORCH_CHECK(K > 1 && K < (1 << 24) && lipschitz.scalar_type() == logits.scalar_type() &&
                      int64_t(lipschitz.numel()) == (L == 0   ? 1
                                                     : L == 2 ? K * K
                                                              : B * K * K),
                  "certified_radius: lipschitz must fit logits in shape and dtype");
  const int dtype = dtype_of(logits);
  logits = torch::stable::contiguous(logits);
  lipschitz = torch::stable::contiguous(lipschitz);
  const Radius a{logits.const_data_ptr(),
                 lipschitz.const_data_ptr(),
                 radius,
                 prediction,
                 closest,
                 K,
                 L > 2 ? K * K : 0,
                 L > 0 ? K : 0,
                 L > 0};
  torch::stable::parallel_for(0, B, 16 + 32768 / K,
                              [&](int64_t begin, int64_t end) { kernels().radius(dtype, a, begin, end); });
}

}  // namespace

std::tuple<Tensor, Tensor> certified_radius(Tensor logits, Tensor lipschitz) {
  Tensor radius = torch::stable::new_empty(logits, leading(logits));
  Tensor prediction = torch::stable::new_empty(logits, leading(logits), ScalarType::Long);
  run(logits, lipschitz, radius.mutable_data_ptr(), prediction.mutable_data_ptr<int64_t>(), nullptr);
  return {radius, prediction};
}

Tensor certified_radius_closest(Tensor logits, Tensor lipschitz) {
  Tensor closest = torch::stable::new_empty(logits, leading(logits), ScalarType::Long);
  run(logits, lipschitz, nullptr, nullptr, closest.mutable_data_ptr<int64_t>());
  return closest;
}

}  // namespace lipfast

STABLE_TORCH_LIBRARY_IMPL(lipfast, CPU, m) {
  m.impl("certified_radius", TORCH_BOX(&lipfast::certified_radius));
  m.impl("certified_radius_closest", TORCH_BOX(&lipfast::certified_radius_closest));
}
