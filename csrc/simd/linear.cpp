// Products of rows of boxes with a matrix, its transpose, and with each other.
#include "parts.h"
#include "tile.h"

namespace lipfast {
namespace LIPFAST_ISA {
namespace {

constexpr int64_t kDepth = 192;  // terms summed at once: a packed panel and the rows of a tile stay in the first cache

struct Iota {
  int32_t at[kDepth];
  Iota() {
    for (int i = 0; i < kDepth; ++i) at[i] = i;
  }
};

template <class S, bool Outward>
void rows(const Rows& a, int64_t begin, int64_t end) {
  using T = Wide<S>;
  const S *l = static_cast<const S*>(a.lower), *u = static_cast<const S*>(a.upper);
  for (int64_t b = begin; b < end; ++b) {
    T* out = static_cast<T*>(a.box) + b * 2 * a.pad;
    for (int64_t k = 0; k < a.K; ++k)
      center_radius<T, Outward>(Number<S>::wide(l[b * a.K + k]), Number<S>::wide(u[b * a.K + k]), T(a.gamma), out[k],
                                out[a.pad + k]);
  }
}

// panel[k][j] = weight[j * lane + k * term]; one of the strides is 1
template <class S>
void pack(const S* weight, int64_t lane, int64_t term, int64_t lanes, int64_t K, Wide<S>* panel) {
  using T = Wide<S>;
  int64_t k = 0;
  if constexpr (sizeof(S) == 4)
    if (term == 1 && lanes == kBlock<T>) {  // few rows at a time: a power of two between them makes them share a set
      k = K / kPixels * kPixels;
      for (int64_t j = 0; j < kBlock<T>; j += kChannels)
        for (int64_t n = 0; n < k; n += kPixels)
          transpose<kPixels, kChannels>(weight + j * lane + n, lane, panel + n * kBlock<T> + j, kBlock<T>);
    }
  for (; k < K; ++k)
    for (int64_t j = 0; j < kBlock<T>; ++j)
      panel[k * kBlock<T> + j] = j < lanes ? Number<S>::wide(weight[j * lane + k * term]) : T(0);
}

// Sums of the products of w with m, and of |w| with r.
template <class T>
void dot(const T* w, const T* m, const T* r, int64_t K, T& center, T& radius) {
  using S = Simd<T>;
  constexpr int64_t L = S::kLanes, U = 4;
  typename S::Vec c[U] = {}, s[U] = {};
  int64_t k = 0;
  for (; k + U * L <= K; k += U * L)
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const auto v = S::load(w + k + u * L);
      c[u] = S::fma(v, S::load(m + k + u * L), c[u]);
      s[u] = S::fma(S::abs(v), S::load(r + k + u * L), s[u]);
    }
  T parts[2][L];
  S::store(parts[0], (c[0] + c[1]) + (c[2] + c[3]));
  S::store(parts[1], (s[0] + s[1]) + (s[2] + s[3]));
  center = radius = 0;
  for (int64_t l = 0; l < L; ++l) center += parts[0][l], radius += parts[1][l];
  for (; k < K; ++k) center += w[k] * m[k], radius += (w[k] < 0 ? -w[k] : w[k]) * r[k];
}

constexpr int64_t kFew = 3;  // rows for which packing the weight does not pay

template <class S, bool Outward>
void block(const Linear& a, int64_t n, int64_t begin, int64_t end, Wide<S>* panel) {
  using T = Wide<S>;
  constexpr int64_t J = kBlock<T>;
  static const Iota iota;
  const int64_t lanes = least(J, a.N - n * J);
  const T* box = static_cast<const T*>(a.box);
  T* y = panel + kDepth * J;
  Tile<T> t;
  t.x_radius = a.pad;
  t.y_radius = J;
  t.step = iota.at;
  t.w = panel;
  t.ldw = J;
  int64_t k = 0;
  const bool few = sizeof(S) == sizeof(T) && a.term == 1 && a.B <= kFew;
  if constexpr (sizeof(S) == sizeof(T))
    for (int64_t b = begin; few && b < end; ++b)
      for (int64_t j = 0; j < lanes; ++j) {
        T* to = y + (b - begin) * 2 * J + j;
        dot(static_cast<const T*>(a.weight) + (n * J + j) * a.lane, box + b * 2 * a.pad, box + (b * 2 + 1) * a.pad, a.K,
            to[0], to[J]);
      }
  if (!few) do {
      t.K = least(kDepth, a.K - k);
      pack(static_cast<const S*>(a.weight) + n * J * a.lane + k * a.term, a.lane, a.term, lanes, t.K, panel);
      for (int64_t b = begin; b < end; b += kPairs) {
        place(
            t, b, end, [&](int64_t p) { return box + p * 2 * a.pad + k; },
            [&](int64_t p) { return y + (p - begin) * 2 * J; });
        k ? sum<T, true, true>(t, lanes) : sum<T, true, false>(t, lanes);
      }
      k += kDepth;
    } while (k < a.K);
  const S* bias = static_cast<const S*>(a.bias);
  for (int64_t b = begin; b < end; ++b, y += 2 * J) {
    S *low = static_cast<S*>(a.low) + b * a.N + n * J, *high = static_cast<S*>(a.high) + b * a.N + n * J;
    for (int64_t j = 0; j < lanes; ++j)
      lower_upper<S, Outward>(y[j], y[J + j], bias ? Number<S>::wide(bias[n * J + j]) : T(0), T(a.gamma), false, low[j],
                              high[j]);
  }
}

template <class S>
void weight_block(const LinearWeight& a, int64_t n, Wide<S>* scratch) {
  using T = Wide<S>;
  constexpr int64_t J = kBlock<T>;
  const int64_t lanes = least(J, a.I - n * J), depth = least(kDepth, a.B);
  const T *grad = static_cast<const T*>(a.grad), *box = static_cast<const T*>(a.box);
  T *panel = scratch, *y = panel + depth * 2 * J;
  int32_t* step = reinterpret_cast<int32_t*>(y + a.O * 2 * J);
  for (int64_t b = 0; b < depth; ++b) step[b] = int32_t(b * 2 * a.grad_pad);
  Tile<T> t;
  t.x_radius = a.grad_pad;
  t.y_radius = J;
  t.step = step;
  t.w = panel;
  t.ldw = 2 * J;
  t.w_radius = J;
  int64_t b = 0;
  do {
    t.K = least(depth, a.B - b);
    for (int64_t k = 0; k < t.K; ++k)
      for (int64_t j = 0; j < lanes; ++j) {
        panel[k * 2 * J + j] = box[(b + k) * 2 * a.pad + n * J + j];
        panel[k * 2 * J + J + j] = box[((b + k) * 2 + 1) * a.pad + n * J + j];
      }
    for (int64_t o = 0; o < a.O; o += kPairs) {
      place(
          t, o, a.O, [&](int64_t p) { return grad + b * 2 * a.grad_pad + p; },
          [&](int64_t p) { return y + p * 2 * J; });
      b ? sum<T, false, true>(t, lanes) : sum<T, false, false>(t, lanes);
    }
    b += depth;
  } while (b < a.B);
  for (int64_t o = 0; o < a.O; ++o, y += 2 * J) {
    const S* w = static_cast<const S*>(a.weight) + o * a.I + n * J;
    S* out = static_cast<S*>(a.out) + o * a.I + n * J;
    for (int64_t j = 0; j < lanes; ++j) {
      const T v = Number<S>::wide(w[j]), sign = (v > 0) - (v < 0);
      out[j] = Number<S>::narrow(2 * (y[j] + sign * y[J + j]));
    }
  }
}

}  // namespace

void linear_rows(int dtype, const Rows& a, int64_t begin, int64_t end) {
  with_dtype(dtype, [&](auto s) {
    using S = decltype(s);
    a.gamma < 0 ? rows<S, false>(a, begin, end) : rows<S, true>(a, begin, end);
  });
}
int64_t linear_scratch(int, int64_t B) { return (kDepth + 2 * B) * kBlock<float>; }
void linear(int dtype, const Linear& a, int64_t n, int64_t begin, int64_t end, void* scratch) {
  with_dtype(dtype, [&](auto s) {
    using S = decltype(s);
    auto* panel = static_cast<Wide<S>*>(scratch);
    a.gamma < 0 ? block<S, false>(a, n, begin, end, panel) : block<S, true>(a, n, begin, end, panel);
  });
}
int64_t linear_weight_scratch(int, int64_t B, int64_t O) { return 2 * kBlock<float> * (least(B, kDepth) + O) + B + 16; }
void linear_weight(int dtype, const LinearWeight& a, int64_t n, void* scratch) {
  with_dtype(dtype, [&](auto s) { weight_block<decltype(s)>(a, n, static_cast<Wide<decltype(s)>*>(scratch)); });
}

}  // namespace LIPFAST_ISA
}  // namespace lipfast
