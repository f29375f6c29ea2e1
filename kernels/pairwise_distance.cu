// Distances between all pairs of rows, CUDA. Definition and contract: lipfast/ops/pairwise_distance.py
//
// A first kernel sums over columns: a block takes a square tile of pairs that reaches above the diagonal and a range of
// columns, so that few rows of many columns fill the chip too. A second one adds the ranges in their order, takes the
// root and mirrors; pairs whose squares left the range of the type it computes again, scaled.
#include "launch.cuh"

namespace lipfast {
namespace {

constexpr int kThreads = 256;
constexpr int kInf = 0;             // kNorm of p = inf; 1 and 2 are themselves
constexpr int kTileNumbers = 2048;  // of a tile of rows in shared memory

template <typename W>
struct alignas(16) Pack {  // what one load moves
  static constexpr int kSize = 16 / sizeof(W);
  W at[kSize];
};

template <int kNorm, typename W>
__device__ W extend(W sum, W difference) {
  if constexpr (kNorm == 1) return sum + fabs(difference);
  if constexpr (kNorm == 2) return fma(difference, difference, sum);
  return larger(sum, fabs(difference));
}

template <int kNorm, typename W>
__device__ W join(W a, W b) {
  if constexpr (kNorm == kInf) return larger(a, b);
  return a + b;
}

// 4 x 4 pairs per thread: rows thread_row + {0, 1, 2, 3} kSide and likewise columns. Where a tile has fewer pairs than
// 16 per thread, kSlices groups of threads share the columns of a chunk.
template <typename W, int kNorm, int kTile>
__global__ void __launch_bounds__(kThreads, sizeof(W) == 4 ? 2 : 1)
    pairwise_sums_kernel(const W* __restrict__ rows,  // (N, K, I)
                         W* __restrict__ sums,        // (S, N, K, K), where i <= j
                         int64_t N, int K, int64_t I, int tiles, int64_t range, bool aligned) {
  constexpr int kSide = kTile / 4, kSlices = kThreads / (kSide * kSide), kColumns = kTileNumbers / kTile;
  constexpr int kPack = Pack<W>::kSize, kRowPacks = kColumns / kPack, kLoads = kTileNumbers / kPack / kThreads;
  constexpr int kStride =
      kColumns + kPack;  // an odd number of packs: the rows that a warp reads start in different banks
  constexpr int kFold = 64 * kSlices / kColumns;  // chunks between two compensated additions
  constexpr bool kCompensate = sizeof(W) == 4 && kNorm != kInf;
  __shared__ Pack<W> shared[2 * kTile * kStride / kPack];
  W* const tile = shared[0].at;

  const int64_t n = blockIdx.x / tiles;
  const int t = static_cast<int>(blockIdx.x % tiles);
  int tile_column = static_cast<int>((sqrt(8.0 * t + 1) - 1) / 2);  // t = column (column + 1)/2 + row, row <= column
  while (tile_column * (tile_column + 1) / 2 > t) --tile_column;
  while ((tile_column + 1) * (tile_column + 2) / 2 <= t) ++tile_column;
  const int tile_row = t - tile_column * (tile_column + 1) / 2;
  const bool diagonal = tile_row == tile_column;
  const int first[2] = {tile_row * kTile, tile_column * kTile};
  const W* const batch = rows + n * K * I;
  const int64_t begin = blockIdx.y * range, end = begin + range < I ? begin + range : I;

  const int slice = threadIdx.x / (kSide * kSide);
  const int thread_row = threadIdx.x / kSide % kSide, thread_column = threadIdx.x % kSide;
  W sum[4][4] = {}, total[4][4] = {}, lost[4][4] = {};
  Pack<W> next[2][kLoads];

  const auto fetch = [&](int64_t chunk) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (side == 1 && diagonal) continue;
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        const int place = threadIdx.x + load * kThreads;
        const int row = first[side] + place / kRowPacks;
        const int64_t column = chunk + place % kRowPacks * kPack;
        const W* const from = batch + row * I + column;
        if (aligned && row < K && column < end) {
          next[side][load] = *reinterpret_cast<const Pack<W>*>(from);
        } else {
#pragma unroll
          for (int e = 0; e < kPack; ++e) next[side][load].at[e] = row < K && column + e < end ? from[e] : W(0);
        }
      }
    }
  };
  const auto store = [&] {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (side == 1 && diagonal) continue;
#pragma unroll
      for (int load = 0; load < kLoads; ++load) {
        const int place = threadIdx.x + load * kThreads;
        shared[((side * kTile + place / kRowPacks) * kStride) / kPack + place % kRowPacks] = next[side][load];
      }
    }
  };
  const auto fold = [&] {  // what a sum loses by rounding is kept and added with the next
#pragma unroll
    for (int pair = 0; pair < 16; ++pair) {
      W &sum_ = sum[pair / 4][pair % 4], &total_ = total[pair / 4][pair % 4], &lost_ = lost[pair / 4][pair % 4];
      const W share = sum_ - lost_, grown = total_ + share;
      lost_ = grown <= kLargest<W> ? (grown - total_) - share : W(0);  // Inf - Inf would be NaN
      total_ = grown;
      sum_ = 0;
    }
  };

  if (begin < end) fetch(begin);
  int chunks = 0;
  for (int64_t chunk = begin; chunk < end; chunk += kColumns) {
    __syncthreads();
    store();
    __syncthreads();
    if (chunk + kColumns < end) fetch(chunk + kColumns);
    const Pack<W>* const left = shared + thread_row * kStride / kPack;
    const Pack<W>* const right = shared + ((diagonal ? 0 : kTile) + thread_column) * kStride / kPack;
#pragma unroll 2
    for (int pack = slice; pack < kRowPacks; pack += kSlices) {
      Pack<W> x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = left[i * kSide * kStride / kPack + pack];
        y[i] = right[i * kSide * kStride / kPack + pack];
      }
#pragma unroll
      for (int e = 0; e < kPack; ++e)
#pragma unroll
        for (int pair = 0; pair < 16; ++pair)
          sum[pair / 4][pair % 4] = extend<kNorm>(sum[pair / 4][pair % 4], x[pair / 4].at[e] - y[pair % 4].at[e]);
    }
    if (kCompensate && ++chunks % kFold == 0) fold();
  }
  if (kCompensate) fold();

  W* const out = sums + (blockIdx.y * N + n) * K * K;
  if constexpr (kSlices > 1) __syncthreads();  // before the tile's memory is used again
#pragma unroll
  for (int pair = 0; pair < 16; ++pair) {
    const int i = thread_row + pair / 4 * kSide, j = thread_column + pair % 4 * kSide;
    const W value = kCompensate ? total[pair / 4][pair % 4] : sum[pair / 4][pair % 4];
    if constexpr (kSlices > 1) {
      tile[(slice * kTile + i) * kTile + j] = value;
    } else if (first[0] + i < K && first[1] + j < K) {
      out[int64_t(first[0] + i) * K + first[1] + j] = value;
    }
  }
  if constexpr (kSlices > 1) {
    __syncthreads();
    for (int pair = threadIdx.x; pair < kTile * kTile; pair += kThreads) {
      W value = tile[pair];
      for (int s = 1; s < kSlices; ++s) value = join<kNorm>(value, tile[s * kTile * kTile + pair]);
      const int i = first[0] + pair / kTile, j = first[1] + pair % kTile;
      if (i < K && j < K) out[int64_t(i) * K + j] = value;
    }
  }
}

// The l_2 distance of two rows by a whole warp, scaled by a power of two near the largest difference.
template <typename W>
__device__ W scaled_distance(const W* x, const W* y, int64_t I) {
  const int lane = threadIdx.x % 32;
  W largest = 0;
  for (int64_t k = lane; k < I; k += 32) largest = larger(largest, fabs(x[k] - y[k]));
  largest = join_lanes(largest, 32, [](W a, W b) { return larger(a, b); });
  if (!(largest > 0 && largest <= kLargest<W>)) return largest;  // one value for the whole warp
  const int exponent = ilogb(largest);
  double sum = 0;
  for (int64_t k = lane; k < I; k += 32) {
    const double scaled = scalbn(static_cast<double>(x[k] - y[k]), -exponent);
    sum = fma(scaled, scaled, sum);
  }
  sum = join_lanes(sum, 32, [](double a, double b) { return a + b; });
  return scalbn(sqrt(static_cast<W>(sum)), exponent);
}

// `width` lanes per pair, a power of two, add its ranges.
template <typename W, int kNorm>
__global__ void __launch_bounds__(kThreads)
    pairwise_distances_kernel(const W* __restrict__ rows,  // (N, K, I)
                              const W* __restrict__ sums,  // (S, N, K, K), where i <= j
                              W* __restrict__ out,         // (N, K, K)
                              int64_t N, int K, int64_t I, int ranges, int width) {
  const int64_t pairs = N * K * K, place = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / width;
  const int64_t pair = place < pairs ? place : pairs - 1;  // surplus lanes stay, so that the shuffles are full
  const int lane = threadIdx.x % width;
  const int64_t n = pair / K / K, row = pair / K % K, column = pair % K;
  const int64_t i = row < column ? row : column, j = row < column ? column : row;
  W sum = 0;
  for (int s = lane; s < ranges; s += width) sum = join<kNorm>(sum, sums[s * pairs + (n * K + i) * K + j]);
  sum = join_lanes(sum, width, [](W a, W b) { return join<kNorm>(a, b); });
  W distance = sum;
  if constexpr (kNorm == 2) {
    distance = sqrt(sum);
    // below, the rounding of a million squares to subnormal numbers could show
    constexpr W kLeast = W(sizeof(W) == 4 ? 0x1p-100 : 0x1p-1000);
    const bool outside = i != j && (sum < kLeast || sum > kLargest<W>);
    for (unsigned waiting = __ballot_sync(kFullWarp, outside); waiting != 0;) {
      const int64_t chosen = __shfl_sync(kFullWarp, pair, __ffs(waiting) - 1);
      const int64_t from = chosen / K / K * K;
      const W scaled = scaled_distance(rows + (from + chosen / K % K) * I, rows + (from + chosen % K) * I, I);
      if (pair == chosen) distance = scaled;
      waiting &= ~__ballot_sync(kFullWarp, pair == chosen);
    }
  }
  if (place < pairs && lane == 0) out[pair] = distance;
}

template <typename W, int kNorm, int kTile>
void launch(const Tensor& rows, Tensor& out, int64_t N, int K, int64_t I) {
  constexpr int64_t kColumns = kTileNumbers / kTile;
  const int64_t side = (K + kTile - 1) / kTile, tiles = side * (side + 1) / 2, chunks = (I + kColumns - 1) / kColumns;
  int processors = 0;
  STD_TORCH_CHECK(
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, rows.get_device_index()) == cudaSuccess,
      "pairwise_distance: the device does not answer");
  // Eight blocks per processor even out the last round; a range of fewer than four chunks is not worth a block.
  const int64_t wanted = (8 * processors + N * tiles - 1) / (N * tiles), most = chunks > 4 ? chunks / 4 : 1;
  const int64_t parts = wanted < most ? wanted : most, range = (chunks + parts - 1) / parts * kColumns;
  const int64_t ranges = I > 0 ? (I + range - 1) / range : 1;
  const auto* from = static_cast<const W*>(rows.const_data_ptr());
  const bool aligned = I % Pack<W>::kSize == 0 && reinterpret_cast<uintptr_t>(from) % sizeof(Pack<W>) == 0;
  Tensor sums = torch::stable::new_empty(rows, {ranges, N, K, K});
  auto* partial = static_cast<W*>(sums.mutable_data_ptr());
  const dim3 grid(blocks_for(N * tiles, 1), static_cast<unsigned>(ranges));
  pairwise_sums_kernel<W, kNorm, kTile>
      <<<grid, kThreads, 0, stream_of(rows)>>>(from, partial, N, K, I, static_cast<int>(tiles), range, aligned);
  check_launch("pairwise_distance");
  int width = 1;
  while (width < 32 && width < ranges) width *= 2;
  pairwise_distances_kernel<W, kNorm><<<blocks_for(N * K * K, kThreads / width), kThreads, 0, stream_of(rows)>>>(
      from, partial, static_cast<W*>(out.mutable_data_ptr()), N, K, I, static_cast<int>(ranges), width);
  check_launch("pairwise_distance");
}

template <typename W, int kNorm>
void launch(const Tensor& rows, Tensor& out, int64_t N, int K, int64_t I) {
  return K <= 16 ? launch<W, kNorm, 16>(rows, out, N, K, I) : launch<W, kNorm, 64>(rows, out, N, K, I);
}

Tensor pairwise_distance(Tensor rows, double p) {
  const DeviceGuard guard(rows.get_device_index());
  const ScalarType dtype = rows.scalar_type();
  const Tensor wide =
      torch::stable::contiguous(dtype == ScalarType::Double ? rows : torch::stable::to(rows, ScalarType::Float));
  const int64_t D = wide.dim(), K = wide.size(D - 2), I = wide.size(D - 1);
  STD_TORCH_CHECK(K < 1 << 21, "pairwise_distance: too many rows: ", K);  // tiles are counted in 32 bits
  std::vector<int64_t> sizes(wide.sizes().begin(), wide.sizes().end());
  sizes.back() = K;
  Tensor out = torch::stable::new_empty(wide, sizes);
  const int64_t N = K > 0 ? out.numel() / (K * K) : 0;
  if (N > 0) {
    for_floating_type(wide, "pairwise_distance", [&](auto zero) {
      using W = wide_t<decltype(zero)>;
      const auto k = static_cast<int>(K);
      if (p == 1) return launch<W, 1>(wide, out, N, k, I);
      if (p == 2) return launch<W, 2>(wide, out, N, k, I);
      return launch<W, kInf>(wide, out, N, k, I);
    });
  }
  return dtype == wide.scalar_type() ? out : torch::stable::to(out, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lipfast, CUDA, m) { m.impl("pairwise_distance", TORCH_BOX(&pairwise_distance)); }

}  // namespace lipfast
