// Entry points of the sources in this folder, which are compiled once per instruction set: plain C types only.
//
// A box is held as center m and radius r in the accumulating type T (float, or double for double). Scratch images are
// [row][column][2][channels]: the channels of m, then those of r, `pad` numbers each.
#pragma once
#include <stdint.h>

namespace lipfast {

enum Dtype : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

// A linear map from an image (C, H, W) to an image (O, OH, OW): a convolution, or the transpose of one. The destination
// splits into phases, one per residue modulo `stride`: every pixel of a phase sums the same taps.
struct Phase {
  int64_t start[2];       // first destination row and column
  int64_t size[2];        // rows and columns of the phase
  int64_t K;              // terms of one sum: taps x channels of a group
  const int32_t* offset;  // (K) into the scratch image, from the pixel's window
  const int64_t* weight;  // (K) into the weight, from the entry of the lane
  void* panel;            // (groups, blocks, K, lanes), packed weight
};
struct Map {
  int64_t C, H, W, O, OH, OW, groups;
  bool depthwise;              // one input for each output channel; groups is 1 then
  int64_t step[2];             // source pixels between neighbours of a phase
  int64_t stride[2];           // destination pixels between neighbours of a phase
  int64_t first[2];            // source row and column of the window of destination pixel 0
  int64_t extent[2];           // rows and columns of the window
  int64_t rows;                // of destination pixels in the longest phase
  int64_t cols;                // of the scratch image
  int64_t pad, out_pad;        // channels of source and destination, rounded up
  int64_t lanes;               // destination channels of a group, rounded up to whole blocks
  int64_t lane, group_weight;  // weight entries between two destination channels, and between groups
  int64_t window, tiles;       // Winograd: side of a window, and tiles in a row
  int64_t chunk;               // phase rows that are summed before they are written out
  int64_t phases;
  const Phase* phase;
};
struct Images {
  const void *lower, *upper;  // (B, C, H, W)
  const void *weight, *bias;  // bias (O,) or null
  void *low, *high;           // (B, O, OH, OW)
  double gamma;               // of outward rounding; negative: round to nearest
  bool ordered;               // lower <= upper holds and must stay so
};
struct Gradient {
  const void *lower, *upper;            // (B, C, H, W)
  const void *grad_lower, *grad_upper;  // (B, O, OH, OW)
};

struct Rows {
  const void *lower, *upper;  // (B, K)
  void* box;                  // (B, 2, pad)
  int64_t B, K, pad;
  double gamma;
};
// out[b, n] = sum over k of box[b, k] weight[n lane + k term]
struct Linear {
  const void *box, *weight, *bias;
  void *low, *high;  // (B, N)
  int64_t B, N, K, pad, lane, term;
  double gamma;
};
// weight gradient (O, I) of boxes (B, 2, grad_pad) and (B, 2, pad)
struct LinearWeight {
  const void *grad, *box, *weight;
  void* out;
  int64_t B, O, I, grad_pad, pad;
};

// Certified radii: the constants of a sample b and a class y begin at lipschitz + b sample_step + y row_step, `step`
// apart.
struct Radius {
  const void *logits, *lipschitz;  // logits (B, K)
  void* radius;                    // (B,), as the next two; where null, not asked for
  int64_t *prediction, *closest;
  int64_t K, sample_step, row_step, step;
};

// l_p distances of the rows (N, K, I) of each of N matrices, and the gradient to the rows; `norm` is p, or 0 for inf.
constexpr int64_t kDistanceSide = 64, kGradientSide = 60, kWeightRows = 16;  // rows of a task
constexpr int64_t kGradientBytes = 2048;                                     // of a row in a task
struct Distance {
  const void* rows;
  void* out;  // (N, K, K)
  int64_t K, I;
  int norm;
};
struct DistanceGradient {
  const void *grad, *rows, *distance;
  void *weights, *out;  // (N, K, pitch) in the accumulating type, and (N, K, I)
  int64_t K, I, pitch;  // pitch: K rounded up to whole vectors, and more
  int norm;
};

// A way to run a convolution.
struct Convolver {
  void (*pack)(int dtype, const Map&, const void* weight);
  int64_t (*band_scratch)(int dtype, const Map&, int64_t rows);  // numbers
  void (*band)(int dtype, const Map&, const Images&, int64_t image, int64_t begin, int64_t end, void* scratch);
  int64_t (*weight_scratch)(int dtype, const Map&, int64_t rows);
  void (*weight)(int dtype, const Map&, const Gradient&, int64_t image, int64_t begin, int64_t end, void* sums,
                 void* scratch);
  void (*weight_finish)(int dtype, const Map&, const void* sums, int64_t parts, const void* weight, void* out);
};

struct Kernels {
  const char* name;
  int64_t (*lanes)(int dtype);  // destination channels of one block
  Convolver direct, winograd;
  void (*rows)(int dtype, const Rows&, int64_t begin, int64_t end);
  int64_t (*linear_scratch)(int dtype, int64_t B);
  void (*linear)(int dtype, const Linear&, int64_t block, int64_t begin, int64_t end, void* scratch);
  int64_t (*linear_weight_scratch)(int dtype, int64_t B, int64_t O);
  void (*linear_weight)(int dtype, const LinearWeight&, int64_t block, void* scratch);
  void (*radius)(int dtype, const Radius&, int64_t begin, int64_t end);
  // Rows from i with rows from j, i <= j; then the weights of rows from i, and gradients to rows from i and columns
  // from k, or for p = inf to row i. Scratch in bytes; for p = inf it is I numbers.
  int64_t (*distance_scratch)();
  void (*distance)(int dtype, const Distance&, int64_t n, int64_t i, int64_t j, void* scratch);
  void (*distance_weights)(int dtype, const DistanceGradient&, int64_t n, int64_t i);
  int64_t (*distance_gradient_scratch)();
  void (*distance_gradient)(int dtype, const DistanceGradient&, int64_t n, int64_t i, int64_t k, void* scratch);
};
namespace isa_default {
const Kernels& kernels();
}
namespace isa_avx2 {
const Kernels& kernels();
}
namespace isa_avx512 {
const Kernels& kernels();
}

}  // namespace lipfast
