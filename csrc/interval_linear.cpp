// CPU kernel of lipfast/ops/interval_linear.py.
#include "host.h"

namespace lipfast {
namespace {

// Numbers of a row of centers or radii: an odd number of cache lines, so that the rows of a tile share no cache set.
int64_t pad_of(int64_t K) { return (K + 31) / 32 * 32 + 16; }

// (B, 2, pad): center and radius of each row, in memory of this thread.
void* box_of(const Tensor& lower, const Tensor& upper, int64_t B, int64_t K, double gamma, int which) {
  const int dtype = dtype_of(lower);
  void* box = scratch(which, B * 2 * pad_of(K) * wide_bytes(dtype) + 256);  // a tile reads past the last row
  const Rows rows{lower.const_data_ptr(), upper.const_data_ptr(), box, B, K, pad_of(K), gamma};
  torch::stable::parallel_for(0, B, 1 + 32768 / (K + 1),
                              [&](int64_t begin, int64_t end) { kernels().rows(dtype, rows, begin, end); });
  return box;
}

void multiply(const Linear& a, int dtype) {
  constexpr int64_t kRows = 240;  // sums of so many rows are kept beside the panel of the weight
  const Kernels& k = kernels();
  const int64_t blocks = (a.N + k.lanes(dtype) - 1) / k.lanes(dtype), strips = (a.B + kRows - 1) / kRows;
  torch::stable::parallel_for(0, blocks * strips, 1, [&](int64_t begin, int64_t end) {
    void* own = scratch(0, k.linear_scratch(dtype, kRows) * wide_bytes(dtype));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks * kRows;
      k.linear(dtype, a, i % blocks, b, b + kRows < a.B ? b + kRows : a.B, own);
    }
  });
}

int64_t check(const Tensor& lower, const Tensor& upper, const Tensor& weight) {
  STD_TORCH_CHECK(
      weight.dim() == 2 && lower.dim() >= 1 && lower.size(-1) == weight.size(1) && upper.numel() == lower.numel(),
      "interval_linear: shapes do not fit");
  STD_TORCH_CHECK(upper.scalar_type() == lower.scalar_type() && weight.scalar_type() == lower.scalar_type(),
                  "interval_linear: dtypes differ");
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < lower.dim(); ++d) rows *= lower.size(d);
  return rows;
}

// Gradients that PyTorch's products do faster. Half types stay: the definition rounds to them before it sums.
bool is_large(int64_t B, int64_t O, int64_t I, int dtype) {
  return (dtype == kFloat64 || dtype == kFloat32) && B * O * I * wide_bytes(dtype) > int64_t(1) << 32;
}

}  // namespace

std::tuple<Tensor, Tensor> interval_linear(Tensor lower, Tensor upper, Tensor weight, std::optional<Tensor> bias,
                                           bool outward) {
  const int64_t B = check(lower, upper, weight), O = weight.size(0), I = weight.size(1);
  STD_TORCH_CHECK(!bias || (bias->numel() == O && bias->scalar_type() == lower.scalar_type()),
                  "interval_linear: bias does not fit");
  const int dtype = dtype_of(lower);
  const double gamma = gamma_of(outward, I, dtype);
  lower = torch::stable::contiguous(lower);
  upper = torch::stable::contiguous(upper);
  weight = torch::stable::contiguous(weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  std::vector<int64_t> shape(lower.sizes().begin(), lower.sizes().end());
  shape.back() = O;
  Tensor low = torch::stable::new_empty(lower, shape), high = torch::stable::new_empty(lower, shape);
  if (B * O == 0) return {low, high};
  const void* box = box_of(lower, upper, B, I, gamma, 1);
  multiply({box, weight.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr, low.mutable_data_ptr(),
            high.mutable_data_ptr(), B, O, I, pad_of(I), I, 1, gamma},
           dtype);
  return {low, high};
}

std::tuple<Tensor, Tensor, Tensor> interval_linear_backward(Tensor grad_lower, Tensor grad_upper, Tensor lower,
                                                            Tensor upper, Tensor weight, bool need_input,
                                                            bool need_weight) {
  const int64_t B = check(lower, upper, weight), O = weight.size(0), I = weight.size(1);
  STD_TORCH_CHECK(int64_t(grad_lower.numel()) == B * O && int64_t(grad_upper.numel()) == B * O &&
                      grad_lower.scalar_type() == lower.scalar_type() &&
                      grad_upper.scalar_type() == lower.scalar_type(),
                  "interval_linear: gradients do not fit");
  const int dtype = dtype_of(lower);
  if (is_large(B, O, I, dtype)) {
    const auto grads = definition_of("lipfast::interval_linear_backward_definition", grad_lower, grad_upper, lower,
                                     upper, weight, need_input, need_weight);
    return {torch::stable::detail::to<Tensor>(grads[0]), torch::stable::detail::to<Tensor>(grads[1]),
            torch::stable::detail::to<Tensor>(grads[2])};
  }
  const Kernels& k = kernels();
  grad_lower = torch::stable::contiguous(grad_lower);
  grad_upper = torch::stable::contiguous(grad_upper);
  weight = torch::stable::contiguous(weight);
  auto empty = [&](const Tensor& like, bool needed) {
    return needed ? torch::stable::new_empty(like, like.sizes())
                  : torch::stable::new_empty(like, std::vector<int64_t>{0});
  };
  Tensor low = empty(lower, need_input), high = empty(upper, need_input), grad_weight = empty(weight, need_weight);
  const void* grad = box_of(grad_lower, grad_upper, B, O, -1, 1);
  if (need_input && B * I > 0)  // the gradient of the box is the box of the gradient through the transpose
    multiply({grad, weight.const_data_ptr(), nullptr, low.mutable_data_ptr(), high.mutable_data_ptr(), B, I, O,
              pad_of(O), 1, I, -1},
             dtype);
  if (need_weight && O * I > 0) {
    const void* box = box_of(torch::stable::contiguous(lower), torch::stable::contiguous(upper), B, I, -1, 2);
    const LinearWeight a{grad,      box,      weight.const_data_ptr(), grad_weight.mutable_data_ptr(), B, O, I,
                         pad_of(O), pad_of(I)};
    torch::stable::parallel_for(0, (I + k.lanes(dtype) - 1) / k.lanes(dtype), 1, [&](int64_t begin, int64_t end) {
      void* own = scratch(0, k.linear_weight_scratch(dtype, B, O) * wide_bytes(dtype));
      for (int64_t n = begin; n < end; ++n) k.linear_weight(dtype, a, n, own);
    });
  }
  return {low, high, grad_weight};
}

}  // namespace lipfast

STABLE_TORCH_LIBRARY_IMPL(lipfast, CPU, m) {
  m.impl("interval_linear", TORCH_BOX(&lipfast::interval_linear));
  m.impl("interval_linear_backward", TORCH_BOX(&lipfast::interval_linear_backward));
}
