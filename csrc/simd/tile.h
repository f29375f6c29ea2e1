// The one inner loop: sums of products of pairs (center, radius), held in registers.
#pragma once
#include "vector.h"

namespace lipfast {
namespace LIPFAST_ISA {

// For kPairs pixels p and a block of lanes j
//   y[p][j]          (+)= sum over k of  x[p][step[k]]           w[k ldw + j]
//   y[p][y_radius+j] (+)= sum over k of  x[p][step[k] + x_radius] v[k, j],  v = |w|, or w[k ldw + w_radius + j]
// where Lanewise (depthwise convolutions) reads x[p][step[k] + j] instead of one number for all lanes.
// Of the results the first `count` are stored. Lanes are independent: what stands in an unused one does not matter.
template <class T>
struct Tile {
  const T* x[kPairs];
  T* y[kPairs];
  int64_t count;
  int64_t x_radius, y_radius;
  const int32_t* step;
  int64_t K;
  const T* w;
  int64_t ldw, w_radius;
};

template <class T, int P, int V, bool Abs, bool Add, bool Lanewise>
__attribute__((noinline)) void sum_tile(const Tile<T>& t) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  constexpr int L = S::kLanes;
  Vec center[P][V], radius[P][V];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      center[p][v] = Add ? S::load(t.y[p] + v * L) : S::zero();
      radius[p][v] = Add ? S::load(t.y[p] + t.y_radius + v * L) : S::zero();
    }
  const T* x[P];
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p) x[p] = t.x[p];
  const T* w = t.w;
  const int64_t x_radius = t.x_radius, ldw = t.ldw, w_radius = t.w_radius;
  for (const int32_t *s = t.step, *end = s + t.K; s != end; ++s, w += ldw) {
    const int64_t m = *s, r = m + x_radius;
    Vec b[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) b[v] = S::load(w + v * L);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      Vec a = Lanewise ? S::zero() : S::all(x[p][m]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        if (Lanewise) a = S::load(x[p] + m + v * L);
        center[p][v] = S::fma(a, b[v], center[p][v]);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) b[v] = Abs ? S::abs(b[v]) : S::load(w + w_radius + v * L);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      Vec a = Lanewise ? S::zero() : S::all(x[p][r]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        if (Lanewise) a = S::load(x[p] + r + v * L);
        radius[p][v] = S::fma(a, b[v], radius[p][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
    if (p < t.count)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        S::store(t.y[p] + v * L, center[p][v]);
        S::store(t.y[p] + t.y_radius + v * L, radius[p][v]);
      }
}

template <class T, int P, bool Abs, bool Add, bool Lanewise>
void sum_lanes(const Tile<T>& t, int64_t lanes) {
  lanes <= Simd<T>::kLanes ? sum_tile<T, P, 1, Abs, Add, Lanewise>(t) : sum_tile<T, P, 2, Abs, Add, Lanewise>(t);
}

template <class T, bool Abs, bool Add, bool Lanewise = false>
void sum(const Tile<T>& t, int64_t lanes) {
  t.count <= kPairs / 2 ? sum_lanes<T, kPairs / 2, Abs, Add, Lanewise>(t, lanes)
                        : sum_lanes<T, kPairs, Abs, Add, Lanewise>(t, lanes);
}

// Pixels that are missing from the last tile repeat its first one.
template <class T, class X, class Y>
void place(Tile<T>& t, int64_t begin, int64_t end, X&& x, Y&& y) {
  t.count = least<int64_t>(kPairs, end - begin);
  for (int64_t p = 0; p < kPairs; ++p) {
    t.x[p] = x(p < t.count ? begin + p : begin);
    t.y[p] = y(p < t.count ? begin + p : begin);
  }
}

}  // namespace LIPFAST_ISA
}  // namespace lipfast
