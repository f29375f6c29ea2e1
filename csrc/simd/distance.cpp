// Distances of all pairs of rows: differences first, 4 x 4 pairs in registers, a vector of columns at a time.
#include "distance.h"

namespace lipfast {
namespace LIPFAST_ISA {
namespace {

constexpr int kRows = 4;  // of a tile, on either side
#if defined(LIPFAST_ISA_avx512)
constexpr int kTall = 4;  // rows whose sums with four others fit the registers
#else
constexpr int kTall = 2;
#endif
constexpr int64_t kTiles = kDistanceSide / kRows;
template <class T>
constexpr int64_t kDepth = 4096 / sizeof(T);  // columns summed at once

template <class T>
constexpr T kLeast = sizeof(T) == 8 ? T(0x1p-1000) : T(0x1p-100);  // below, the underflow of squares could show

template <class T, int norm>
typename Simd<T>::Vec extend(typename Simd<T>::Vec sum, typename Simd<T>::Vec difference) {
  using V = Simd<T>;
  if constexpr (norm == 1) return sum + V::abs(difference);
  if constexpr (norm == 2) return V::fma(difference, difference, sum);
  return larger<T>(V::abs(difference), sum);
}

template <class T, int norm>
typename Simd<T>::Vec join(typename Simd<T>::Vec a, typename Simd<T>::Vec b) {
  if constexpr (norm == 0) return larger<T>(a, b);
  return a + b;
}

template <int... lane>
struct Lanes {};
template <int count, int... lane>
struct Count : Count<count - 1, count - 1, lane...> {};
template <int... lane>
struct Count<0, lane...> {
  using type = Lanes<lane...>;
};

// In each block of 2 h lanes: the first h join the two halves of a, the others those of b.
template <class T, int norm, int h, int... lane>
inline __attribute__((always_inline)) typename Simd<T>::Vec fold(typename Simd<T>::Vec a, typename Simd<T>::Vec b,
                                                                 Lanes<lane...>) {
  constexpr int L = Simd<T>::kLanes;
  using B = typename Bits<T>::Vec;
  const B low = {(lane & h ? L + lane - h : lane)...}, high = {(lane & h ? L + lane : lane + h)...};
  return join<T, norm>(__builtin_shuffle(a, b, low), __builtin_shuffle(a, b, high));
}

// Lane n of the result joins the lanes of sums[n].
template <class T, int norm, int h = Simd<T>::kLanes / 2>
inline __attribute__((always_inline)) typename Simd<T>::Vec across(typename Simd<T>::Vec* sums) {
  if constexpr (h > 0) {
#pragma GCC unroll 8
    for (int m = 0; m < h; ++m)
      sums[m] = fold<T, norm, h>(sums[m], sums[m + h], typename Count<Simd<T>::kLanes>::type());
    return across<T, norm, h / 2>(sums);
  }
  return sums[0];
}

template <class T, int norm>
__attribute__((noinline)) void sum_tile(const T* x, const T* y, int64_t vectors, bool add, T* sums) {
  using V = Simd<T>;
  constexpr int L = V::kLanes;
#pragma GCC unroll 2
  for (int top = 0; top < kRows; top += kTall, sums += kTall * kRows) {
    typename V::Vec sum[kTall * kRows] = {};
    for (int64_t v = 0; v < vectors; ++v) {
      const T *left = x + (v * kRows + top) * L, *right = y + v * kRows * L;
#pragma GCC unroll 4
      for (int j = 0; j < kRows; ++j) {
        const auto other = V::load(right + j * L);
#pragma GCC unroll 4
        for (int i = 0; i < kTall; ++i)
          sum[i * kRows + j] = extend<T, norm>(sum[i * kRows + j], V::load(left + i * L) - other);
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < kTall * kRows; n += L) {
      const auto joined = across<T, norm>(sum + n);
      V::store(sums + n, add ? join<T, norm>(joined, V::load(sums + n)) : joined);
    }
  }
}

// The l_2 distance of a pair whose squares leave the range of T.
template <class S>
Wide<S> scaled(const S* x, const S* y, int64_t I) {
  using T = Wide<S>;
  using V = Simd<T>;
  T run[kRun];
  auto most = V::zero();
  for (int64_t k = 0; k < I; k += kRun) most = larger<T>(differences(x + k, y + k, least(kRun, I - k), run), most);
  const T largest = largest_lane<T>(most);
  if (largest == 0 || largest > kLargest<T>) return largest;
  auto sum = V::zero();
  for (int64_t k = 0; k < I; k += kRun) {
    differences(x + k, y + k, least(kRun, I - k), run);
    for (int64_t l = 0; l < kRun; l += V::kLanes) {
      const auto part = V::load(run + l) / V::all(largest);
      sum = V::fma(part, part, sum);
    }
  }
  for (int l = 1; l < V::kLanes; ++l) sum[0] += sum[l];
  return largest * V::root(sum)[0];
}

// Whether a tile has a sum of squares that rounding may have spoilt.
template <class T>
bool any_outside(const T* sums) {
  using V = Simd<T>;
  typename Bits<T>::Vec outside = {};
  for (int n = 0; n < kRows * kRows; n += V::kLanes) {
    const auto v = V::load(sums + n);
    outside |= (v < V::all(kLeast<T>)) | (v > V::all(kLargest<T>));
  }
  return any<T>(outside);
}

template <class S, int norm>
void finish(const Distance& a, const S* rows, S* out, int64_t i, int64_t j, const Wide<S>* sums) {
  using T = Wide<S>;
  using V = Simd<T>;
  T distance[kRows * kRows], turned[kRows * kRows];
  for (int n = 0; n < kRows * kRows; n += V::kLanes)
    V::store(distance + n, norm == 2 ? V::root(V::load(sums + n)) : V::load(sums + n));
  const bool outside = norm == 2 && any_outside(sums);
  const int64_t high = least<int64_t>(kRows, a.K - i), wide = least<int64_t>(kRows, a.K - j);
  for (int64_t r = 0; outside && r < high; ++r)
    for (int64_t c = i == j ? r + 1 : 0; c < wide; ++c)
      if (const T sum = sums[r * kRows + c]; sum < kLeast<T> || sum > kLargest<T>)
        distance[r * kRows + c] = scaled(rows + (i + r) * a.I, rows + (j + c) * a.I, a.I);
  for (int r = 0; i == j && r < kRows; ++r)
    for (int c = 0; c < r; ++c) distance[r * kRows + c] = distance[c * kRows + r];
  transpose<kRows, kRows>(distance, kRows, turned, kRows);
  const auto write = [&](const T* tile, int64_t from, int64_t to, int64_t count, int64_t length) {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < length; ++c) out[(from + r) * a.K + to + c] = Number<S>::narrow(tile[r * kRows + c]);
  };
  if (high == kRows && wide == kRows) {  // constants make vectors of the inner loop
    write(distance, i, j, kRows, kRows);
    return write(turned, j, i, kRows, kRows);
  }
  write(distance, i, j, high, wide);
  write(turned, j, i, wide, high);
}

template <class S, int norm>
void block(const Distance& a, int64_t n, int64_t i, int64_t j, Wide<S>* x) {
  using T = Wide<S>;
  constexpr int64_t L = Simd<T>::kLanes, depth = kDepth<T>;
  const S* rows = static_cast<const S*>(a.rows) + n * a.K * a.I;
  const int64_t high = divide_up(least(kDistanceSide, a.K - i), kRows),
                wide = divide_up(least(kDistanceSide, a.K - j), kRows);
  T *y = i == j ? x : x + kDistanceSide * depth, *sums = x + 2 * kDistanceSide * depth;
  int64_t k = 0;
  do {
    const int64_t columns = least(depth, a.I - k), vectors = divide_up(columns, L), tile = vectors * kRows * L;
    const auto pack = [&](int64_t first, int64_t tiles, T* to) {
      for (int64_t t = 0; t < tiles; ++t, first += kRows)
        pack_rows(rows + first * a.I + k, a.I, least<int64_t>(kRows, a.K - first), kRows, columns, to + t * tile);
    };
    pack(i, high, x);
    if (i != j) pack(j, wide, y);
    for (int64_t r = 0; r < high; ++r)
      for (int64_t c = i == j ? r : 0; c < wide; ++c)
        sum_tile<T, norm>(x + r * tile, y + c * tile, vectors, k > 0, sums + (r * kTiles + c) * kRows * kRows);
    k += depth;
  } while (k < a.I);
  for (int64_t r = 0; r < high; ++r)
    for (int64_t c = i == j ? r : 0; c < wide; ++c)
      finish<S, norm>(a, rows, static_cast<S*>(a.out) + n * a.K * a.K, i + r * kRows, j + c * kRows,
                      sums + (r * kTiles + c) * kRows * kRows);
}

}  // namespace

int64_t distance_scratch() { return 2 * kDistanceSide * 4096 + kDistanceSide * kDistanceSide * 8; }
void distance(int dtype, const Distance& a, int64_t n, int64_t i, int64_t j, void* scratch) {
  with_dtype(dtype, [&](auto s) {
    using S = decltype(s);
    auto* own = static_cast<Wide<S>*>(scratch);
    if (a.norm == 1) return block<S, 1>(a, n, i, j, own);
    if (a.norm == 2) return block<S, 2>(a, n, i, j, own);
    return block<S, 0>(a, n, i, j, own);
  });
}

}  // namespace LIPFAST_ISA
}  // namespace lipfast
