// Gradients of distances: to row i the sum over j of w_ij (x_i - x_j), p = 2, or w_ij sign(x_i - x_j), p = 1.
#include "distance.h"

namespace lipfast {
namespace LIPFAST_ISA {
namespace {

// Where weight / apart is nothing to multiply with: its rounding is no longer relative.
template <class T>
auto lost(typename Simd<T>::Vec weight, typename Simd<T>::Vec apart) {
  using V = Simd<T>;
  const auto size = V::abs(weight / apart);
  return (apart != V::zero()) & (((weight != V::zero()) & (size < V::all(kTiny<T>))) | (size > V::all(kLargest<T>)));
}

// Weights of the pairs of a row, zero where they are lost; at the end of the row whether one is.
template <class S, int norm>
void weigh(const DistanceGradient& a, const S* grad, const S* distance, int64_t i, int64_t count, Wide<S>* weights) {
  using T = Wide<S>;
  using V = Simd<T>;
  constexpr int64_t kStrip = 64, L = V::kLanes;
  T across[kWeightRows][kStrip] = {};
  typename V::Vec some[kWeightRows] = {};
  for (int64_t j = 0; j < a.K; j += kStrip) {
    const int64_t others = least(kStrip, a.K - j);
    int64_t c = 0;
    if constexpr (sizeof(S) == 4)
      for (; count == kWeightRows && c + kChannels <= others; c += kChannels)
        transpose<kWeightRows, kChannels>(grad + (j + c) * a.K + i, a.K, across[0] + c, kStrip);
    for (; c < others; ++c)
      for (int64_t r = 0; r < count; ++r) across[r][c] = Number<S>::wide(grad[(j + c) * a.K + i + r]);
    for (int64_t r = 0; r < count; ++r)
      for (c = 0; c < others; c += L) {
        const int64_t at = (i + r) * a.K + j + c, lanes = least(L, others - c);
        auto weight = load_wide(grad + at, lanes) + V::load(across[r] + c);
        if constexpr (norm == 2) {
          const auto apart = load_wide(distance + at, lanes);
          const auto gone = lost<T>(weight, apart);
          some[r] = gone ? V::all(1) : some[r];
          weight = gone | (apart == V::zero()) ? V::zero() : weight / apart;
        }
        V::store(weights + r * a.pitch + j + c, weight);
      }
  }
  for (int64_t r = 0; r < count; ++r) {
    T& any = weights[(r + 1) * a.pitch - 1] = 0;
    for (int64_t l = 0; l < L; ++l) any += some[r][l];
  }
}

template <class T, int norm>
typename Simd<T>::Vec extend(typename Simd<T>::Vec sum, typename Simd<T>::Vec w, typename Simd<T>::Vec x,
                             typename Simd<T>::Vec y) {
  using V = Simd<T>;
  if constexpr (norm == 2) return V::fma(w, x - y, sum);
  return (sum + (x > y ? w : V::zero())) - (x < y ? w : V::zero());
}

// kPairs rows of a panel `pitch` high, and kVectors vectors of columns, against `others` rows of another panel.
template <class T, int norm>
__attribute__((noinline)) void add_tile(const T* x, int64_t pitch, const T* y, int64_t others, const T* const* weights,
                                        T* sums) {
  using V = Simd<T>;
  constexpr int L = V::kLanes;
  typename V::Vec sum[kPairs][kVectors], own[kPairs][kVectors];
  const T* w[kPairs];
#pragma GCC unroll 8
  for (int p = 0; p < kPairs; ++p) {
    w[p] = weights[p];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sum[p][v] = V::load(sums + (v * pitch + p) * L);
      own[p][v] = V::load(x + (v * pitch + p) * L);
    }
  }
  for (int64_t c = 0; c < others; ++c) {
    typename V::Vec other[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) other[v] = V::load(y + (v * others + c) * L);
#pragma GCC unroll 8
    for (int p = 0; p < kPairs; ++p) {
      const auto weight = V::all(w[p][c]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[p][v] = extend<T, norm>(sum[p][v], weight, own[p][v], other[v]);
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < kPairs; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) V::store(sums + (v * pitch + p) * L, sum[p][v]);
}

// One pair whose quotient is lost: each difference is divided by the distance first.
template <class T>
void add_pair(const T* x, int64_t pitch, const T* y, int64_t others, T share, T distance, int64_t vectors, T* sums) {
  using V = Simd<T>;
  for (int64_t v = 0; v < vectors; ++v, x += pitch * V::kLanes, y += others * V::kLanes, sums += pitch * V::kLanes) {
    const auto slope = (V::load(x) - V::load(y)) / V::all(distance);
    V::store(sums, V::fma(V::all(share), slope, V::load(sums)));
  }
}

template <class S, int norm>
void block(const DistanceGradient& a, int64_t n, int64_t i, int64_t k, Wide<S>* x) {
  using T = Wide<S>;
  constexpr int64_t L = Simd<T>::kLanes, most = kGradientBytes / sizeof(T);
  const S *rows = static_cast<const S*>(a.rows) + n * a.K * a.I + k,
          *grad = static_cast<const S*>(a.grad) + n * a.K * a.K,
          *distance = static_cast<const S*>(a.distance) + n * a.K * a.K;
  const T* weights = static_cast<const T*>(a.weights) + (n * a.K + i) * a.pitch;
  const int64_t count = least(kGradientSide, a.K - i), pitch = divide_up(count, kPairs) * kPairs;
  const int64_t columns = least(most, a.I - k), vectors = divide_up(columns, kVectors * L) * kVectors;
  T *sums = x + kGradientSide * most, *y = sums + kGradientSide * most;
  pack_rows(rows + i * a.I, a.I, count, pitch, columns, x);
  memset(sums, 0, pitch * vectors * L * sizeof(T));
  for (int64_t j = 0; j < a.K; j += kGradientSide) {
    const int64_t others = least(kGradientSide, a.K - j);
    pack_rows(rows + j * a.I, a.I, others, others, columns, y);
    for (int64_t v = 0; v < vectors; v += kVectors)
      for (int64_t r = 0; r < count; r += kPairs) {
        const T* w[kPairs];  // rows missing from the last tile take the last one's
        for (int64_t p = 0; p < kPairs; ++p) w[p] = weights + least(r + p, count - 1) * a.pitch + j;
        add_tile<T, norm>(x + (v * pitch + r) * L, pitch, y + v * others * L, others, w, sums + (v * pitch + r) * L);
      }
    for (int64_t r = 0; norm == 2 && r < count; ++r)
      for (int64_t c = 0; weights[(r + 1) * a.pitch - 1] != 0 && c < others; ++c) {
        const int64_t there = (i + r) * a.K + j + c, back = (j + c) * a.K + i + r;
        const T apart = Number<S>::wide(distance[there]);
        const T share = Number<S>::wide(grad[there]) + Number<S>::wide(grad[back]);
        if (lost<T>(Simd<T>::all(share), Simd<T>::all(apart))[0])
          add_pair(x + r * L, pitch, y + c * L, others, share, apart, vectors, sums + r * L);
      }
  }
  S* out = static_cast<S*>(a.out) + (n * a.K + i) * a.I + k;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < columns; c += L)
      store_narrow(out + r * a.I + c, Simd<T>::load(sums + c * pitch + r * L), least(L, columns - c));
}

// The difference in the first column where it is largest, or NaN; `first` is that column.
template <class S>
Wide<S> largest_difference(const S* x, const S* y, int64_t I, int64_t& first) {
  using T = Wide<S>;
  using B = typename Bits<T>::Vec;
  T run[kRun], largest = -1, difference = 0;
  first = 0;
  for (int64_t k = 0; k < I && largest == largest; k += kRun) {
    const auto most = differences(x + k, y + k, least(kRun, I - k), run);
    if (!any<T>((B)most > (B)Simd<T>::all(largest))) continue;
    largest = largest_lane<T>(most);
    int64_t l = 0;
    while (run[l] == run[l] && run[l] != largest && -run[l] != largest) ++l;
    first = k + l;
    difference = run[l];
  }
  return difference;
}

template <class S>
void largest_row(const DistanceGradient& a, int64_t n, int64_t i, Wide<S>* sums) {
  using T = Wide<S>;
  const S* rows = static_cast<const S*>(a.rows) + n * a.K * a.I;
  const T* weights = static_cast<const T*>(a.weights) + (n * a.K + i) * a.pitch;
  memset(sums, 0, a.I * sizeof(T));
  for (int64_t j = 0; j < a.K; ++j) {
    int64_t k;
    const T difference = largest_difference(rows + i * a.I, rows + j * a.I, a.I, k);
    sums[k] += weights[j] * T((difference > 0) - (difference < 0));
  }
  S* out = static_cast<S*>(a.out) + (n * a.K + i) * a.I;
  for (int64_t k = 0; k < a.I; ++k) out[k] = Number<S>::narrow(sums[k]);
}

}  // namespace

void distance_weights(int dtype, const DistanceGradient& a, int64_t n, int64_t i) {
  with_dtype(dtype, [&](auto s) {
    using S = decltype(s);
    const S *grad = static_cast<const S*>(a.grad) + n * a.K * a.K,
            *distance = static_cast<const S*>(a.distance) + n * a.K * a.K;
    auto* weights = static_cast<Wide<S>*>(a.weights) + (n * a.K + i) * a.pitch;
    const int64_t count = least(kWeightRows, a.K - i);
    a.norm == 2 ? weigh<S, 2>(a, grad, distance, i, count, weights) : weigh<S, 1>(a, grad, distance, i, count, weights);
  });
}
int64_t distance_gradient_scratch() { return 3 * kGradientSide * kGradientBytes; }
void distance_gradient(int dtype, const DistanceGradient& a, int64_t n, int64_t i, int64_t k, void* scratch) {
  with_dtype(dtype, [&](auto s) {
    using S = decltype(s);
    auto* own = static_cast<Wide<S>*>(scratch);
    if (a.norm == 1) return block<S, 1>(a, n, i, k, own);
    if (a.norm == 2) return block<S, 2>(a, n, i, k, own);
    return largest_row<S>(a, n, i, own);
  });
}

}  // namespace LIPFAST_ISA
}  // namespace lipfast
