// Convolutions with 9 taps and stride 1, or 16 taps and stride 2, by Winograd's F(2 x 2, 3 x 3) and F(2 x 2, 2 x 2):
// 16 products for four outputs instead of 36, 36 instead of 64 (Winograd 1980; Lavin and Gray 2016,
// https://arxiv.org/abs/1509.09308). With d a window of the input and g the kernel
//
//   2 x 2 outputs = A' [(G g G') * (B' d B)] A,       * entry by entry, summed over input channels.
//
// Stride 2 splits the input, or in the transpose the output, by the parity of row and column, and each part has a 2 x 2
// kernel of stride 1. |W| needs its own transform, so center and radius have separate factors. The weight gradient is
// the adjoint, G' [sum over tiles of (B' d B) * (A y A')] G. Rounding is not that of a plain sum: never for outward
// rounding.
#pragma once
#include "box.h"
#include "kernels.h"
#include "tile.h"

namespace lipfast {
namespace LIPFAST_ISA {

// The transforms of one dimension: two outputs from a window of N, as matrices applied to vectors of lanes. F(2, 3)
// needs 4 products instead of 6, F(2, 2) needs 3 instead of 4.
template <int N>
struct Winograd;

template <>
struct Winograd<4> {
  template <class V>
  static void input(const V* d, V* w) {
    w[0] = d[0] - d[2], w[1] = d[1] + d[2], w[2] = d[2] - d[1], w[3] = d[1] - d[3];
  }
  template <class V>
  static void output(const V* m, V* y) {
    y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
  }
  template <class V>
  static void weight(const V* g, V* u) {
    const V even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
    u[0] = g[0], u[1] = even + odd, u[2] = even - odd, u[3] = g[2];
  }
  // the adjoints of output and weight
  template <class V>
  static void gradient(const V* y, V* z) {
    z[0] = y[0], z[1] = y[0] + y[1], z[2] = y[0] - y[1], z[3] = -y[1];
  }
  template <class V>
  static void sums(const V* s, V* g) {
    const V even = (s[1] + s[2]) * 0.5f;
    g[0] = s[0] + even, g[1] = (s[1] - s[2]) * 0.5f, g[2] = even + s[3];
  }
};

template <>
struct Winograd<3> {
  template <class V>
  static void input(const V* d, V* w) {
    w[0] = d[0] - d[1], w[1] = d[1], w[2] = d[1] - d[2];
  }
  template <class V>
  static void output(const V* m, V* y) {
    y[0] = m[0] + m[1], y[1] = m[1] - m[2];
  }
  template <class V>
  static void weight(const V* g, V* u) {
    u[0] = g[0], u[1] = g[0] + g[1], u[2] = g[1];
  }
  template <class V>
  static void gradient(const V* y, V* z) {
    z[0] = y[0], z[1] = y[0] + y[1], z[2] = -y[1];
  }
  template <class V>
  static void sums(const V* s, V* g) {
    g[0] = s[0] + s[1], g[1] = s[1] + s[2];
  }
};

// out[M][M] = f applied to the columns, then to the rows of in[N][N]
template <int N, int M, class V, class F>
void both_ways(const V (&in)[N][N], V (&out)[M][M], F f) {
  V half[M][N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    V a[N], b[M];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) a[i] = in[i][j];
    f(a, b);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) half[i][j] = b[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) f(half[i], out[i]);
}

constexpr int64_t kNumbers = 1 << 17;  // of transformed windows at a time: about half of a second cache

// Numbers of one plane of transforms; a few cache lines off a multiple of the page, so that planes share no cache set.
inline int64_t plane(int64_t numbers) { return divide_up(numbers, 1024) * 1024 + 80; }
inline int64_t parities(const Map& f) { return f.step[0] * f.step[1]; }
inline int64_t entries(const Map& f) { return f.window * f.window; }
inline int64_t in_width(const Map& f) { return parities(f) * 2 * f.pad; }
inline int64_t read_rows(const Map& f, int64_t rows) { return (2 * divide_up(rows, 2) - 1) * f.step[0] + f.extent[0]; }

inline int64_t origin(const Map& f, const Phase& phase) {
  int64_t first = phase.offset[0];
  for (int64_t k = 0; k < phase.K; k += f.C) first = least<int64_t>(first, phase.offset[k]);
  return first;
}

// Calls use(parity, row, column, k) for every tap of channel 0; k: its place in phase.offset and phase.weight.
template <class F>
void for_taps(const Map& f, const Phase& phase, F&& use) {
  const int64_t first = origin(f, phase);
  for (int64_t k = 0; k < phase.K; k += f.C) {
    const int64_t at = (phase.offset[k] - first) / (2 * f.pad), row = at / f.cols, col = at % f.cols;
    use(row % f.step[0] * f.step[1] + col % f.step[1], row / f.step[0], col / f.step[1], k);
  }
}

// V[N N][tile][parity][2][pad] = B' d B for tile rows [begin, end); x: scratch image from the window of tile row 0 on
template <int N, class T>
void transform_input(const Map& f, const T* x, int64_t begin, int64_t end, T* V, int64_t size) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  const int64_t pixel = 2 * f.pad, width = in_width(f), down = f.step[0] * f.cols * pixel, right = f.step[1] * pixel;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t q = 0; q < parities(f); ++q)
      for (int64_t c = 0; c < pixel; c += S::kLanes) {
        const T* in = x + 2 * i * down + (q / f.step[1] * f.cols + q % f.step[1]) * pixel + c;
        T* out = V + (i - begin) * f.tiles * width + q * pixel + c;
        Vec w[N][N];
        auto column = [&](int j) {
          Vec d[N], t[N];
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) d[n] = S::load(in + n * down);
          Winograd<N>::input(d, t);
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) w[n][j] = t[n];
          in += right;
        };
#pragma GCC unroll 4
        for (int j = 0; j < N - 2; ++j) column(j);
        for (int64_t tile = 0; tile < f.tiles; ++tile, out += width) {
          column(N - 2);
          column(N - 1);
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) {
            Vec t[N];
            Winograd<N>::input(w[n], t);
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) S::store(out + (N * n + j) * size, t[j]);
#pragma GCC unroll 4
            for (int j = 0; j < N - 2; ++j) w[n][j] = w[n][j + 2];
          }
        }
      }
}

}  // namespace LIPFAST_ISA
}  // namespace lipfast
