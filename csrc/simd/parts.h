// What the sources of one instruction set offer to its table.
#pragma once
#include "box.h"
#include "kernels.h"

namespace lipfast {
namespace LIPFAST_ISA {

void conv_pack(int dtype, const Map&, const void* weight);
int64_t conv_band_scratch(int dtype, const Map&, int64_t rows);
void conv_band(int dtype, const Map&, const Images&, int64_t image, int64_t begin, int64_t end, void* scratch);
int64_t conv_weight_scratch(int dtype, const Map&, int64_t rows);
void conv_weight(int dtype, const Map&, const Gradient&, int64_t image, int64_t begin, int64_t end, void* sums,
                 void* scratch);
void conv_weight_finish(int dtype, const Map&, const void* sums, int64_t parts, const void* weight, void* out);

void winograd_pack(int dtype, const Map&, const void* weight);
int64_t winograd_band_scratch(int dtype, const Map&, int64_t rows);
void winograd_band(int dtype, const Map&, const Images&, int64_t image, int64_t begin, int64_t end, void* scratch);
int64_t winograd_weight_scratch(int dtype, const Map&, int64_t rows);
void winograd_weight(int dtype, const Map&, const Gradient&, int64_t image, int64_t begin, int64_t end, void* sums,
                     void* scratch);
void winograd_weight_finish(int dtype, const Map&, const void* sums, int64_t parts, const void* weight, void* out);

void linear_rows(int dtype, const Rows&, int64_t begin, int64_t end);
int64_t linear_scratch(int dtype, int64_t B);
void linear(int dtype, const Linear&, int64_t block, int64_t begin, int64_t end, void* scratch);
int64_t linear_weight_scratch(int dtype, int64_t B, int64_t O);
void linear_weight(int dtype, const LinearWeight&, int64_t block, void* scratch);

void radius(int dtype, const Radius&, int64_t begin, int64_t end);

int64_t distance_scratch();
void distance(int dtype, const Distance&, int64_t n, int64_t i, int64_t j, void* scratch);
void distance_weights(int dtype, const DistanceGradient&, int64_t n, int64_t i);
int64_t distance_gradient_scratch();
void distance_gradient(int dtype, const DistanceGradient&, int64_t n, int64_t i, int64_t k, void* scratch);

}  // namespace LIPFAST_ISA
}  // namespace lipfast
