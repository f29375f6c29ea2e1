// The weight gradient of Winograd's convolution; winograd.h says how.
#include "parts.h"
#include "winograd.h"

namespace lipfast {
namespace LIPFAST_ISA {
namespace {

int64_t sum_rows(const Map& f, int64_t most) {
  const int64_t fit = kNumbers / (entries(f) * (in_width(f) + 2 * f.out_pad) * f.tiles);
  return divide_up(most, divide_up(most, fit > 1 ? fit : 1));
}

// Z[N N][tile][2][out_pad] = A y A' for tile rows [begin, end) of the output's scratch image y
template <int N, class T>
void transform_gradient(const Map& f, const T* y, int64_t begin, int64_t end, T* Z, int64_t size) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  const int64_t width = 2 * f.out_pad, row = 2 * f.tiles * width;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = 0; j < f.tiles; ++j, Z += width)
      for (int64_t o = 0; o < width; o += S::kLanes) {
        const T* in = y + 2 * i * row + 2 * j * width + o;
        const Vec t[2][2] = {{S::load(in), S::load(in + width)}, {S::load(in + row), S::load(in + row + width)}};
        Vec z[N][N];
        both_ways(t, z, [](const Vec* a, Vec* b) { Winograd<N>::gradient(a, b); });
#pragma GCC unroll 16
        for (int n = 0; n < N * N; ++n) S::store(Z + n * size + o, z[n / N][n % N]);
      }
}

// sums (N N, blocks, parities, C, 2, lanes) += transformed windows x transformed gradients, summed over tiles
template <int N, class S>
void weight(const Map& f, const Gradient& a, int64_t image, int64_t begin, int64_t end, Wide<S>* sums, Wide<S>* x) {
  using T = Wide<S>;
  constexpr int64_t J = kBlock<T>;
  const int64_t top = begin * f.step[0] + f.first[0], rows = read_rows(f, end - begin),
                tall = divide_up(end - begin, 2);
  const int64_t in = image * f.C * f.H * f.W, out = image * f.O * f.OH * f.OW;
  read_image<S, false>(static_cast<const S*>(a.lower) + in, static_cast<const S*>(a.upper) + in, f.C, f.H, f.W, top,
                       top + rows, f.first[1], f.cols, 0, x, f.pad);
  T* y = x + rows * f.cols * 2 * f.pad;
  read_image<S, false>(static_cast<const S*>(a.grad_lower) + out, static_cast<const S*>(a.grad_upper) + out, f.O, f.OH,
                       f.OW, begin, begin + 2 * tall, 0, 2 * f.tiles, 0, y, f.out_pad);
  const int64_t chunk = sum_rows(f, tall), in_size = plane(chunk * f.tiles * in_width(f)),
                out_size = plane(chunk * f.tiles * 2 * f.out_pad);
  T* V = y + 2 * tall * 2 * f.tiles * 2 * f.out_pad;
  T* Z = V + entries(f) * in_size;
  int32_t* step = reinterpret_cast<int32_t*>(Z + entries(f) * out_size);
  for (int64_t n = 0; n < chunk * f.tiles; ++n) step[n] = int32_t(n * in_width(f));
  Tile<T> t;
  t.x_radius = f.pad;
  t.y_radius = J;
  t.step = step;
  t.ldw = 2 * f.out_pad;
  t.w_radius = f.out_pad;
  for (int64_t i = 0; i < tall; i += chunk) {
    const int64_t stop = least(i + chunk, tall);
    transform_input<N>(f, x, i, stop, V, in_size);
    transform_gradient<N>(f, y, i, stop, Z, out_size);
    t.K = (stop - i) * f.tiles;
    T* to = sums;
    for (int64_t n = 0; n < entries(f); ++n)
      for (int64_t o = 0; o < f.O; o += J)
        for (int64_t q = 0; q < parities(f); ++q, to += f.C * 2 * J)
          for (int64_t c = 0; c < f.C; c += kPairs) {
            t.w = Z + n * out_size + o;
            place(
                t, c, f.C, [&](int64_t p) { return V + n * in_size + q * 2 * f.pad + p; },
                [&](int64_t p) { return to + p * 2 * J; });
            sum<T, false, true>(t, f.O - o);
          }
  }
}

template <int N, class S>
void weight_finish(const Map& f, const Wide<S>* sums, int64_t parts, const S* weight, S* out) {
  using T = Wide<S>;
  using V = Simd<T>;
  using Vec = typename V::Vec;
  constexpr int64_t J = kBlock<T>, L = V::kLanes;
  const int64_t terms = parities(f) * f.C, entry = f.lanes * terms * 2;
  for (int64_t o = 0; o < f.O; o += L)
    for (int64_t c = 0; c < f.C; ++c) {
      T result[2][4][N - 1][N - 1][L];
      for (int half = 0; half < 2; ++half)
        for (int64_t q = 0; q < parities(f); ++q) {
          Vec s[N][N], h[N - 1][N], g[N - 1];
          const T* from = sums + (o / J * terms + q * f.C + c) * 2 * J + o % J + half * J;
          for (int n = 0; n < N * N; ++n) {
            s[n / N][n % N] = V::load(from + n * entry);
            for (int64_t part = 1; part < parts; ++part) s[n / N][n % N] += V::load(from + (part * N * N + n) * entry);
          }
          for (int j = 0; j < N; ++j) {
            Vec a[N];
            for (int i = 0; i < N; ++i) a[i] = s[i][j];
            Winograd<N>::sums(a, g);
            for (int i = 0; i < N - 1; ++i) h[i][j] = g[i];
          }
          for (int i = 0; i < N - 1; ++i) {
            Winograd<N>::sums(h[i], g);
            for (int j = 0; j < N - 1; ++j) V::store(result[half][q][i][j], g[j]);
          }
        }
      for (int64_t l = 0; l < least(L, f.O - o); ++l)
        for_taps(f, f.phase[0], [&](int64_t q, int64_t i, int64_t j, int64_t k) {
          const int64_t at = (o + l) * f.lane + f.phase[0].weight[k + c];
          const T w = Number<S>::wide(weight[at]), sign = (w > 0) - (w < 0);
          out[at] = Number<S>::narrow(2 * (result[0][q][i][j][l] + sign * result[1][q][i][j][l]));
        });
    }
}

}  // namespace

int64_t winograd_weight_scratch(int, const Map& f, int64_t rows) {
  const int64_t tall = divide_up(rows, 2), tiles = sum_rows(f, tall) * f.tiles;
  return read_rows(f, rows) * f.cols * 2 * f.pad + 4 * tall * f.tiles * 2 * f.out_pad +
         entries(f) * (plane(tiles * in_width(f)) + plane(tiles * 2 * f.out_pad)) + tiles + 64;
}
void winograd_weight(int dtype, const Map& f, const Gradient& a, int64_t image, int64_t begin, int64_t end, void* sums,
                     void* scratch) {
  with_dtype(dtype, [&](auto s) {
    using S = decltype(s);
    auto *to = static_cast<Wide<S>*>(sums), *x = static_cast<Wide<S>*>(scratch);
    f.window == 4 ? weight<4, S>(f, a, image, begin, end, to, x) : weight<3, S>(f, a, image, begin, end, to, x);
  });
}
void winograd_weight_finish(int dtype, const Map& f, const void* sums, int64_t parts, const void* weight, void* out) {
  with_dtype(dtype, [&](auto s) {
    using S = decltype(s);
    auto* from = static_cast<const Wide<S>*>(sums);
    auto* w = static_cast<const S*>(weight);
    f.window == 4 ? weight_finish<4>(f, from, parts, w, static_cast<S*>(out))
                  : weight_finish<3>(f, from, parts, w, static_cast<S*>(out));
  });
}

}  // namespace LIPFAST_ISA
}  // namespace lipfast
