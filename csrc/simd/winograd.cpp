// Winograd's convolution and its transpose; winograd.h says how.
#include "winograd.h"

#include "parts.h"

namespace lipfast {
namespace LIPFAST_ISA {
namespace {

// Rows of tiles at a time: as many as fit, but so that few register tiles are left partly empty.
int64_t tile_rows(const Map& f, int64_t most) {
  const int64_t fit = kNumbers / (entries(f) * (in_width(f) + 2 * f.lanes) * f.tiles);
  int64_t best = 1, waste = 1 << 20;
  for (int64_t rows = 1; rows <= least(most, fit); ++rows) {
    const int64_t empty = divide_up(rows * f.tiles, kPairs) * kPairs * 1024 / (rows * f.tiles);
    if (empty <= waste) best = rows, waste = empty;
  }
  return best;
}
// panel of each phase: (N N, blocks, parities, C, 2, lanes)
template <int N, class S>
void pack(const Map& f, const S* weight) {
  using T = Wide<S>;
  using V = Simd<T>;
  constexpr int64_t J = kBlock<T>, L = V::kLanes;
  const int64_t terms = parities(f) * f.C;
  auto transform = [](const auto* a, auto* b) { Winograd<N>::weight(a, b); };
  for (int64_t n = 0; n < f.phases; ++n)
    for (int64_t c = 0; c < f.C; ++c)
      for (int64_t o = 0; o < f.O; o += L) {
        typename V::Vec g[4][N - 1][N - 1] = {};
        for_taps(f, f.phase[n], [&](int64_t parity, int64_t i, int64_t j, int64_t k) {
          T lanes[L] = {};
          const S* w = weight + o * f.lane + f.phase[n].weight[k + c];
          for (int64_t l = 0; l < least(L, f.O - o); ++l) lanes[l] = Number<S>::wide(w[l * f.lane]);
          g[parity][i][j] = V::load(lanes);
        });
        for (int64_t parity = 0; parity < parities(f); ++parity) {
          typename V::Vec h[N][N - 1], u[2][N][N];
          for (int half = 0; half < 2; ++half) {
            for (int j = 0; j < N - 1; ++j) {
              typename V::Vec a[N - 1], b[N];
              for (int i = 0; i < N - 1; ++i) a[i] = half ? V::abs(g[parity][i][j]) : g[parity][i][j];
              transform(a, b);
              for (int i = 0; i < N; ++i) h[i][j] = b[i];
            }
            for (int i = 0; i < N; ++i) transform(h[i], u[half][i]);
          }
          T* out = static_cast<T*>(f.phase[n].panel) + (o / J * terms + parity * f.C + c) * 2 * J + o % J;
          for (int i = 0; i < N * N; ++i, out += f.lanes * terms * 2) {
            V::store(out, u[0][i / N][i % N]);
            V::store(out + J, u[1][i / N][i % N]);
          }
        }
      }
}

// Destination pixels y[pixel][2][lanes] = A' M A, for `rows` rows of the phase; M[N N][tile][2][lanes]
template <int N, class T>
void transform_output(const Map& f, const Phase& phase, const T* M, int64_t size, int64_t rows, T* y) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  const int64_t width = 2 * f.lanes, down = f.stride[0] * f.OW * width, right = f.stride[1] * width;
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < 2 * f.tiles; j += 2, M += width) {
      if (j >= phase.size[1]) continue;
      T* out = y + ((i * f.stride[0] + phase.start[0]) * f.OW + j * f.stride[1] + phase.start[1]) * width;
      const bool two_rows = i + 1 < rows, two_columns = j + 1 < phase.size[1];
      for (int64_t o = 0; o < width; o += S::kLanes) {
        Vec m[N][N], t[2][2];
#pragma GCC unroll 16
        for (int n = 0; n < N * N; ++n) m[n / N][n % N] = S::load(M + n * size + o);
        both_ways(m, t, [](const Vec* a, Vec* b) { Winograd<N>::output(a, b); });
        S::store(out + o, t[0][0]);
        if (two_columns) S::store(out + right + o, t[0][1]);
        if (two_rows) S::store(out + down + o, t[1][0]);
        if (two_rows && two_columns) S::store(out + down + right + o, t[1][1]);
      }
    }
}

// M[N N][tile][2][lanes]: products of the transforms, summed over channels
template <class T>
void multiply(const Map& f, const T* panel, const T* V, int64_t in_size, int64_t tiles, T* M, int64_t out_size,
              const int32_t* step) {
  constexpr int64_t J = kBlock<T>;
  Tile<T> t;
  t.x_radius = f.pad;
  t.y_radius = f.lanes;
  t.step = step;
  t.K = parities(f) * f.C;
  t.ldw = 2 * J;
  t.w_radius = J;
  for (int64_t n = 0; n < entries(f); ++n, V += in_size, M += out_size)
    for (int64_t o = 0; o < f.O; o += J, panel += t.K * 2 * J)
      for (int64_t i = 0; i < tiles; i += kPairs) {
        t.w = panel;
        place(
            t, i, tiles, [&](int64_t p) { return V + p * in_width(f); },
            [&](int64_t p) { return M + p * 2 * f.lanes + o; });
        sum<T, false, false>(t, f.O - o);
      }
}

template <int N, class S>
void band(const Map& f, const Images& a, int64_t image, int64_t begin, int64_t end, Wide<S>* x) {
  using T = Wide<S>;
  const int64_t top = begin * f.step[0] + f.first[0], rows = read_rows(f, end - begin), area = f.OH * f.OW;
  const int64_t in = image * f.C * f.H * f.W, out = image * f.O * area, down = f.step[0] * f.cols * 2 * f.pad;
  read_image<S, false>(static_cast<const S*>(a.lower) + in, static_cast<const S*>(a.upper) + in, f.C, f.H, f.W, top,
                       top + rows, f.first[1], f.cols, 0, x, f.pad);
  const int64_t tall = divide_up(end - begin, 2), chunk = tile_rows(f, tall);
  const int64_t in_size = plane(chunk * f.tiles * in_width(f)), out_size = plane(chunk * f.tiles * 2 * f.lanes);
  T* V = x + rows * f.cols * 2 * f.pad;
  T* M = V + entries(f) * in_size;
  T* y = M + entries(f) * out_size;
  int32_t* step = reinterpret_cast<int32_t*>(y + 2 * chunk * f.stride[0] * f.OW * 2 * f.lanes);
  for (int64_t k = 0; k < parities(f) * f.C; ++k) step[k] = int32_t(k / f.C * 2 * f.pad + k % f.C);
  for (int64_t i = 0; i < tall; i += chunk) {
    const int64_t stop = least(i + chunk, tall), row = begin + 2 * i, last = least(begin + 2 * stop, end);
    for (int64_t n = 0; n < f.phases; ++n) {
      const Phase& phase = f.phase[n];
      transform_input<N>(f, x + origin(f, phase), i, stop, V, in_size);
      multiply(f, static_cast<const T*>(phase.panel), V, in_size, (stop - i) * f.tiles, M, out_size, step);
      transform_output<N>(f, phase, M, out_size, least(last, phase.size[0]) - row, y);
    }
    const int64_t first = row * f.stride[0], pixels = (least(last * f.stride[0], f.OH) - first) * f.OW,
                  to = out + first * f.OW;
    write_pixels<S, false>(y, f.lanes, f.O, pixels, static_cast<const S*>(a.bias), 0, a.ordered,
                           static_cast<S*>(a.low) + to, static_cast<S*>(a.high) + to, area);
  }
}

}  // namespace

void winograd_pack(int dtype, const Map& f, const void* weight) {
  with_dtype(dtype, [&](auto s) {
    auto* w = static_cast<const decltype(s)*>(weight);
    f.window == 4 ? pack<4>(f, w) : pack<3>(f, w);
  });
}
int64_t winograd_band_scratch(int, const Map& f, int64_t rows) {
  const int64_t chunk = tile_rows(f, divide_up(rows, 2)), tiles = chunk * f.tiles;
  return read_rows(f, rows) * f.cols * 2 * f.pad +
         entries(f) * (plane(tiles * in_width(f)) + plane(tiles * 2 * f.lanes)) +
         2 * chunk * f.stride[0] * f.OW * 2 * f.lanes + parities(f) * f.C + 64;
}
void winograd_band(int dtype, const Map& f, const Images& a, int64_t image, int64_t begin, int64_t end, void* scratch) {
  with_dtype(dtype, [&](auto s) {
    using S = decltype(s);
    auto* x = static_cast<Wide<S>*>(scratch);
    f.window == 4 ? band<4, S>(f, a, image, begin, end, x) : band<3, S>(f, a, image, begin, end, x);
  });
}

}  // namespace LIPFAST_ISA
}  // namespace lipfast
