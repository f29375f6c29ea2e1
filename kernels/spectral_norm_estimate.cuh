// Power iteration on one weight for all samples, in one launch.
// The weight is cut into the shared memories of a cluster of blocks, some rows for each, and stays there for all
// iterations. A block multiplies its rows by the right vectors; the transposed product leaves a part of every entry in
// every block, and each block adds the parts of its own slice and hands the sums to all. Masks are bits.
#pragma once

#include <cooperative_groups.h>

#include "launch.cuh"

namespace lipfast {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 8;  // rows and samples of a thread's part of a product

template <typename T>
struct alignas(4 * sizeof(T)) Pack {  // what one load moves
  T at[4];
};
using Floats = Pack<float>;

// Eight blocks are the most that every device with clusters runs. Before sm_90 there are none: a block is by itself.
struct Cluster {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kSize = 1;
  __device__ static void sync() { __syncthreads(); }
  template <typename T>
  __device__ static T* at(T* p, int) {
    return p;
  }
#else
  static constexpr int kSize = 8;
  __device__ static void sync() { cooperative_groups::this_cluster().sync(); }
  template <typename T>
  __device__ static T* at(T* p, int rank) {
    return cooperative_groups::this_cluster().map_shared_rank(p, rank);
  }
#endif
};

struct Norm {
  float largest,
      squares;  // of a vector's entries, and the sum of their squares after multiplication by scale_of(largest)
};

// The shared memory of a block, in packs.
struct Layout {
  int rows, packs, slice, input_words, output_words;  // the slice of a right vector is what is added here
  int vectors, products, norms, bits, total;
  __host__ __device__ Layout(int O, int I, int size, int samples)
      : rows(((O + size - 1) / size + kTile - 1) / kTile * kTile),
        packs((I + 3) / 4),
        slice((packs + size - 1) / size),
        input_words((packs + 7) / 8),
        output_words((rows * size + 31) / 32),
        vectors(rows * packs),
        products(vectors + samples * packs + samples / 2),  // see `vector`
        norms(products + rows * (samples / 4 + 1)),  // a pack more than the samples spreads the rows over the banks
        bits(norms + size * samples),
        total(bits + samples * (input_words + output_words) / 4) {}
};

// A power of two that brings the largest entry near 1, so that squares stay in range; 1 where there is none.
__device__ float scale_of(float largest) {
  const int exponent = __float_as_int(largest) >> 23;
  return largest <= kLargest<float> ? __int_as_float((254 - min(max(exponent, 1), 253)) << 23) : 1.0f;
}

template <typename W>
__device__ W random_at(int64_t k) {
  unsigned bits = static_cast<unsigned>(k) + 1;
  bits = ((bits >> 16) ^ bits) * 0x7FEB352Du;
  bits = ((bits >> 15) ^ bits) * 0x31848BABu;
  bits = ((bits >> 14) ^ bits) * 0x2C1B3C6Du;
  return W((bits >> 8) | 1) * W(0x1p-23) - 1;
}

template <typename T, int kSamples>
__global__ void __launch_bounds__(kThreads, 1)
    spectral_norm_estimate_kernel(const T* __restrict__ weight,          // (O, I)
                                  const bool* __restrict__ input_mask,   // (B, I), (I,) or none
                                  const bool* __restrict__ output_mask,  // (B, O), (O,) or none
                                  const T* __restrict__ start,           // (B, I), (I,) or none
                                  T* __restrict__ sigma,                 // (B,)
                                  float* __restrict__ left,              // (B, O)
                                  float* __restrict__ right,             // (B, I)
                                  int64_t B, int O, int I, int64_t iterations, int64_t input_stride,
                                  int64_t output_stride, int64_t start_stride, bool aligned) {
  constexpr int kSides = kSamples / kTile, kSplit = 32 / kSides;  // lanes that share the columns of a product
  constexpr int kLanes = kThreads / kSamples;                     // threads of a sample, neighbours in a warp
  constexpr int kSize = Cluster::kSize;
  extern __shared__ Floats shared[];
  const Layout at(O, I, kSize, kSamples);
  const int rows = at.rows, packs = at.packs;
  Floats* const vectors = shared + at.vectors;  // (samples, packs): right vectors, or this block's part of their sums
  float* const products = reinterpret_cast<float*>(shared + at.products);  // (rows, samples): left vectors
  Norm* const left_norms = reinterpret_cast<Norm*>(shared + at.norms);     // (blocks, samples)
  Norm* const right_norms = left_norms + kSize * kSamples;
  unsigned* const input_bits = reinterpret_cast<unsigned*>(shared + at.bits);  // (samples, words)
  unsigned* const output_bits = input_bits + kSamples * at.input_words;
  const int sample = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, warp = threadIdx.x / 32;
  const int64_t group = int64_t(blockIdx.x) / kSize * kSamples;
  const int64_t n = min(group + sample, B - 1);  // surplus samples repeat the last
  const int rank = static_cast<int>(blockIdx.x % kSize);
  const int first_row = rank * rows, first_pack = min(rank * at.slice, packs);
  const int end_pack = min(first_pack + at.slice, packs);

  // The second eight samples lie half of the banks further: the lanes of a product read both.
  const auto vector = [&](int s) { return vectors + s * packs + s / kTile * 4; };
  const auto product = [&](int row, int s) { return products + row * (kSamples + 4) + s; };
  const auto bit_of = [](const unsigned* bits, int k) { return float(bits[k / 32] >> k % 32 & 1); };
  const auto input_bit = [&](int k) { return bit_of(input_bits + sample * at.input_words, k); };
  const auto output_bit = [&](int k) { return bit_of(output_bits + sample * at.output_words, k); };
  // A thread's own entries of its sample, and their places: of the rows here, of the slice here, of the right vector.
  const auto own_rows = [&](auto f) {
    for (int row = lane; row < rows; row += kLanes) f(*product(row, sample), first_row + row);
  };
  const auto own_packs = [&](int from, int to, auto f) {
    for (int p = from + lane; p < to; p += kLanes) {
      Floats pack = vector(sample)[p];
#pragma unroll
      for (int e = 0; e < 4; ++e) f(pack.at[e], 4 * p + e);
      vector(sample)[p] = pack;
    }
  };
  const auto own_slice = [&](auto f) { own_packs(first_pack, end_pack, f); };
  const auto own_vector = [&](auto f) { own_packs(0, packs, f); };

  const auto add = [](float a, float b) { return a + b; };
  const auto most = [](float a, float b) { return larger(a, b); };
  const auto publish = [&](auto own, Norm* norms) {  // to all blocks
    float largest = 0, squares = 0;
    own([&](float& v, int) { largest = larger(largest, fabsf(v)); });
    largest = join_lanes(largest, kLanes, most);
    const float scale = scale_of(largest);
    own([&](float& v, int) { squares = fmaf(v * scale, v * scale, squares); });
    squares = join_lanes(squares, kLanes, add);
    if (lane < kSize) Cluster::at(norms, lane)[rank * kSamples + sample] = {largest, squares};
  };
  const auto joined = [&](const Norm* norms) {  // of the whole vector; the root of its squares
    const Norm part = norms[lane % kSize * kSamples + sample];
    const float largest = join_lanes(part.largest, kSize, most);
    const float ratio = scale_of(largest) / scale_of(part.largest);  // without a meaning where the part is zero
    const float squares = part.squares == 0 ? 0 : part.squares * ratio * ratio;
    return Norm{largest, sqrtf(join_lanes(squares, kSize, add))};
  };
  const auto make_unit = [&](auto own, const Norm* norms, auto bit, int N, bool is_start) {
    const Norm whole = joined(norms);
    const float scale = scale_of(whole.largest), inverse = 1 / whole.squares;
    const bool vanished = whole.squares == 0 || (is_start && !(whole.largest <= kLargest<float>));
    if (!vanished) own([&](float& v, int) { v = v * scale * inverse; });
    if (!__any_sync(kFullWarp, vanished)) return;  // a whole warp leaves together, so the shuffles below stay full
    float squares = 0;
    for (int k = lane; k < N; k += kLanes) squares = fmaf(random_at<float>(k) * bit(k), random_at<float>(k), squares);
    squares = join_lanes(squares, kLanes, add);
    const float random_inverse = squares == 0 ? 0 : 1 / sqrtf(squares);
    if (vanished) own([&](float& v, int k) { v = random_at<float>(k) * bit(k) * random_inverse; });
  };
  const auto hand_out = [&](auto f) {  // f(pack) to every block
    for (int p = first_pack + lane; p < end_pack; p += kLanes) {
      Floats sums = f(p);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.at[e] *= input_bit(4 * p + e);
      for (int r = 0; r < kSize; ++r) Cluster::at(vector(sample), r)[p] = sums;
    }
  };

  const auto multiply = [&] {  // products = weight vectors
    const int side = threadIdx.x % kSides, split = threadIdx.x % 32 / kSides;
    for (int tile = warp; tile < rows / kTile; tile += kThreads / 32) {
      float sum[kTile * kTile] = {};
      for (int p = split; p < packs; p += kSplit) {
        Floats x[kTile];
#pragma unroll
        for (int s = 0; s < kTile; ++s) x[s] = vector(side * kTile + s)[p];
#pragma unroll
        for (int row = 0; row < kTile; ++row) {
          const Floats w = shared[(tile * kTile + row) * packs + p];
#pragma unroll
          for (int e = 0; e < 4; ++e)
#pragma unroll
            for (int s = 0; s < kTile; ++s) sum[row * kTile + s] = fmaf(w.at[e], x[s].at[e], sum[row * kTile + s]);
        }
      }
      // Each step adds the sums of two lanes and leaves one half of them to each.
#pragma unroll
      for (int step = 1; step < kSplit; step *= 2) {
        const int half = kTile * kTile / 2 / step, offset = kSplit / 2 / step;
        const bool upper = (split & offset) != 0;
#pragma unroll
        for (int i = 0; i < half; ++i) {
          const float given = upper ? sum[i] : sum[i + half], kept = upper ? sum[i + half] : sum[i];
          sum[i] = kept + __shfl_xor_sync(kFullWarp, given, offset * kSides);
        }
      }
#pragma unroll
      for (int i = 0; i < kTile * kTile / kSplit; ++i) {
        const int entry = split * (kTile * kTile / kSplit) + i;
        *product(tile * kTile + entry / kTile, side * kTile + entry % kTile) = sum[i];
      }
    }
  };
  const auto multiply_transposed = [&] {  // vectors = (weight here)^T products
    for (int place = threadIdx.x; place < packs * kSides; place += kThreads) {
      const int side = place % kSides, p = place / kSides;
      Floats sum[kTile] = {};
#pragma unroll 4
      for (int row = 0; row < rows; ++row) {
        const Floats w = shared[row * packs + p];
        const auto* const y = reinterpret_cast<const Floats*>(product(row, side * kTile));
        const Floats y_low = y[0], y_high = y[1];
#pragma unroll
        for (int s = 0; s < kTile; ++s)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            sum[s].at[e] = fmaf(w.at[e], s < 4 ? y_low.at[s % 4] : y_high.at[s % 4], sum[s].at[e]);
      }
#pragma unroll
      for (int s = 0; s < kTile; ++s) vector(side * kTile + s)[p] = sum[s];
    }
  };

#pragma unroll 8
  for (int place = threadIdx.x; place < rows * packs; place += kThreads) {
    const int row = first_row + place / packs, column = place % packs * 4;
    const T* const from = weight + int64_t(row) * I + column;
    Pack<T> four = {};
    if (aligned && row < O) four = *reinterpret_cast<const Pack<T>*>(from);
    Floats w;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!aligned && row < O && column + e < I) four.at[e] = from[e];
      w.at[e] = widen(four.at[e]);
    }
    shared[place] = w;
  }
  const auto pack_bits = [&](const bool* mask, int64_t stride, int N, unsigned* bits, int words) {
    for (int word = warp; word < kSamples * words; word += kThreads / 32) {
      const int64_t s = min(group + word / words, B - 1);
      const int k = word % words * 32 + threadIdx.x % 32;
      const unsigned kept = __ballot_sync(kFullWarp, k < N && (mask == nullptr || mask[s * stride + k]));
      if (threadIdx.x % 32 == 0) bits[word] = kept;
    }
  };
  pack_bits(input_mask, input_stride, I, input_bits, at.input_words);
  pack_bits(output_mask, output_stride, O, output_bits, at.output_words);
  Cluster::sync();  // all blocks run now: their memory may be written

  hand_out([&](int p) {
    Floats values = {};
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (start != nullptr && 4 * p + e < I) values.at[e] = widen(start[n * start_stride + 4 * p + e]);
    return values;
  });
  publish(own_slice, right_norms);
  Cluster::sync();
  make_unit(own_vector, right_norms, input_bit, I, true);
  __syncthreads();
  for (int64_t t = 0;; ++t) {
    multiply();
    __syncthreads();
    own_rows([&](float& v, int k) { v *= output_bit(k); });
    publish(own_rows, left_norms);
    Cluster::sync();
    if (t == iterations) break;
    make_unit(own_rows, left_norms, output_bit, O, false);
    __syncthreads();
    multiply_transposed();
    Cluster::sync();
    hand_out([&](int p) {
      Floats sums = {};
#pragma unroll
      for (int r = 0; r < kSize; ++r) {
        const Floats part = Cluster::at(vector(sample), r)[p];
#pragma unroll
        for (int e = 0; e < 4; ++e) sums.at[e] += part.at[e];
      }
      return sums;
    });
    publish(own_slice, right_norms);
    Cluster::sync();
    make_unit(own_vector, right_norms, input_bit, I, false);
    __syncthreads();
  }
  const Norm whole = joined(left_norms);
  if (group + sample >= B) return;  // no block reads another's memory any more
  const float scale = scale_of(whole.largest), inverse = whole.squares == 0 ? 0 : 1 / whole.squares;
  if (rank == 0 && lane == 0) sigma[n] = static_cast<T>(whole.squares / scale);
  own_rows([&](float& v, int k) {
    if (k < O) left[n * O + k] = v * scale * inverse;
  });
  own_slice([&](float& v, int k) {
    if (k < I) right[n * I + k] = v;
  });
}

}  // namespace
}  // namespace lipfast
