#include "parts.h"

namespace lipfast {
namespace LIPFAST_ISA {
namespace {

int64_t lanes(int dtype) { return dtype == kFloat64 ? kBlock<double> : kBlock<float>; }

}  // namespace

const Kernels& kernels() {
  static const Kernels table = {
      LIPFAST_ISA_NAME,
      lanes,
      {conv_pack, conv_band_scratch, conv_band, conv_weight_scratch, conv_weight, conv_weight_finish},
      {winograd_pack, winograd_band_scratch, winograd_band, winograd_weight_scratch, winograd_weight,
       winograd_weight_finish},
      linear_rows,
      linear_scratch,
      linear,
      linear_weight_scratch,
      linear_weight,
      radius,
      distance_scratch,
      distance,
      distance_weights,
      distance_gradient_scratch,
      distance_gradient};
  return table;
}

}  // namespace LIPFAST_ISA
}  // namespace lipfast
