// Between boxes (lower, upper) as tensors hold them and (center, radius) as sums need them. The algebra of outward
// rounding, and why each constant suffices, stands in lipfast/rounding.py.
#pragma once
#include "number.h"
#include "vector.h"

namespace lipfast {
namespace LIPFAST_ISA {

template <class T>
constexpr T kSpacing = sizeof(T) == 8 ? T(0x1p-52) : T(0x1p-23);
template <class T>
constexpr T kTiny = sizeof(T) == 8 ? T(0x1p-1022) : T(0x1p-126);
template <class T>
constexpr T kLargest = sizeof(T) == 8 ? T(0x1.fffffffffffffp+1023) : T(0x1.fffffep+127f);

template <class T, bool Outward>
void center_radius(T lower, T upper, T gamma, T& m, T& r) {
  m = lower * T(0.5) + upper * T(0.5);
  if constexpr (Outward) {
    const T above = upper - m, under = m - lower, magnitude = m < 0 ? -m : m;
    r = (above > under ? above : under) * (1 + 4 * kSpacing<T>)+gamma * magnitude + kTiny<T>;
  } else {
    r = upper * T(0.5) - lower * T(0.5);
  }
}

// Without outward rounding a negative spread can only come from cancellation (Winograd); `ordered` removes it.
template <class S, bool Outward>
void lower_upper(Wide<S> mid, Wide<S> spread, Wide<S> bias, Wide<S> gamma, bool ordered, S& low, S& high) {
  using T = Wide<S>;
  mid += bias;
  if constexpr (Outward) {
    spread = spread * (1 + 2 * gamma) + 4 * kSpacing<T> * (mid < 0 ? -mid : mid) + kTiny<T>;
    low = Number<S>::down(mid - spread);
    high = up<S>(mid + spread);
  } else {
    spread = ordered && spread < 0 ? T(0) : spread;
    low = Number<S>::narrow(mid - spread);
    high = Number<S>::narrow(mid + spread);
  }
}

constexpr int kPixels = 16, kChannels = 8;  // of a block that is transposed at once

// out[i][j] = in[j][i] for a whole block of `rows` x `cols` of out
template <int rows, int cols, class T>
void transpose(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  if constexpr (sizeof(T) == 4) {
#pragma GCC unroll 4
    for (int i = 0; i < rows; i += 4)
#pragma GCC unroll 4
      for (int j = 0; j < cols; j += 4) {
        __m128 a = _mm_loadu_ps(in + j * in_stride + i), b = _mm_loadu_ps(in + (j + 1) * in_stride + i);
        __m128 c = _mm_loadu_ps(in + (j + 2) * in_stride + i), d = _mm_loadu_ps(in + (j + 3) * in_stride + i);
        _MM_TRANSPOSE4_PS(a, b, c, d);
        _mm_storeu_ps(out + i * out_stride + j, a);
        _mm_storeu_ps(out + (i + 1) * out_stride + j, b);
        _mm_storeu_ps(out + (i + 2) * out_stride + j, c);
        _mm_storeu_ps(out + (i + 3) * out_stride + j, d);
      }
  } else {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < cols; ++j) out[i * out_stride + j] = in[j * in_stride + i];
  }
}

// Channels x pixels of a tensor, to pixels x channels of a scratch image. `plane`: numbers between two channels.
template <class S, bool Outward>
void read_pixels(const S* lower, const S* upper, int64_t C, int64_t plane, int64_t pixels, Wide<S> gamma, Wide<S>* out,
                 int64_t pad) {
  using T = Wide<S>;
  for (int64_t c = 0; c < C; c += kChannels)
    for (int64_t p = 0; p < pixels; p += kPixels) {
      T m[kChannels][kPixels], r[kChannels][kPixels];
      const int64_t cs = least<int64_t>(kChannels, C - c), ps = least<int64_t>(kPixels, pixels - p);
      T* to = out + p * 2 * pad + c;
      if (cs == kChannels && ps == kPixels) {
        for (int i = 0; i < kChannels; ++i) {
          const S *l = lower + (c + i) * plane + p, *u = upper + (c + i) * plane + p;
          __builtin_prefetch(l + kChannels * plane, 0, 2);
          __builtin_prefetch(u + kChannels * plane, 0, 2);
          for (int j = 0; j < kPixels; ++j)
            center_radius<T, Outward>(Number<S>::wide(l[j]), Number<S>::wide(u[j]), gamma, m[i][j], r[i][j]);
        }
        transpose<kPixels, kChannels>(m[0], kPixels, to, 2 * pad);
        transpose<kPixels, kChannels>(r[0], kPixels, to + pad, 2 * pad);
        continue;
      }
      for (int64_t i = 0; i < cs; ++i) {
        const S *l = lower + (c + i) * plane + p, *u = upper + (c + i) * plane + p;
        for (int64_t j = 0; j < ps; ++j)
          center_radius<T, Outward>(Number<S>::wide(l[j]), Number<S>::wide(u[j]), gamma, to[j * 2 * pad + i],
                                    to[j * 2 * pad + pad + i]);
      }
    }
}

// Pixels x channels of sums, to channels x pixels of two tensors.
template <class S, bool Outward>
void write_pixels(const Wide<S>* in, int64_t pad, int64_t O, int64_t pixels, const S* bias, Wide<S> gamma, bool ordered,
                  S* low, S* high, int64_t plane) {
  using T = Wide<S>;
  for (int64_t o = 0; o < O; o += kChannels)
    for (int64_t p = 0; p < pixels; p += kPixels) {
      T m[kChannels][kPixels], r[kChannels][kPixels];
      const int64_t os = least<int64_t>(kChannels, O - o), ps = least<int64_t>(kPixels, pixels - p);
      const T* from = in + p * 2 * pad + o;
      if (os == kChannels && ps == kPixels) {
        transpose<kChannels, kPixels>(from, 2 * pad, m[0], kPixels);
        transpose<kChannels, kPixels>(from + pad, 2 * pad, r[0], kPixels);
        for (int i = 0; i < kChannels; ++i) {
          const T b = bias ? Number<S>::wide(bias[o + i]) : T(0);
          S *l = low + (o + i) * plane + p, *h = high + (o + i) * plane + p;
          __builtin_prefetch(l + kChannels * plane, 1, 2);
          __builtin_prefetch(h + kChannels * plane, 1, 2);
          for (int j = 0; j < kPixels; ++j) lower_upper<S, Outward>(m[i][j], r[i][j], b, gamma, ordered, l[j], h[j]);
        }
        continue;
      }
      for (int64_t i = 0; i < os; ++i) {
        const T b = bias ? Number<S>::wide(bias[o + i]) : T(0);
        S *l = low + (o + i) * plane + p, *h = high + (o + i) * plane + p;
        for (int64_t j = 0; j < ps; ++j)
          lower_upper<S, Outward>(from[j * 2 * pad + i], from[j * 2 * pad + pad + i], b, gamma, ordered, l[j], h[j]);
      }
    }
}

// Rows [begin, end) x columns [left, left + cols) of an image (C, H, W), zero outside of it.
template <class S, bool Outward>
void read_image(const S* lower, const S* upper, int64_t C, int64_t H, int64_t W, int64_t begin, int64_t end,
                int64_t left, int64_t cols, Wide<S> gamma, Wide<S>* out, int64_t pad) {
  const int64_t pixel = 2 * pad, row = cols * pixel, bytes = sizeof(Wide<S>);
  const int64_t from = left > 0 ? left : 0, to = least(W, left + cols), top = begin > 0 ? begin : 0,
                stop = least(H, end);
  if (from >= to || top >= stop) {
    memset(out, 0, (end - begin) * row * bytes);
    return;
  }
  memset(out, 0, (top - begin) * row * bytes);
  memset(out + (stop - begin) * row, 0, (end - stop) * row * bytes);
  for (int64_t y = top; y < stop; ++y) {
    memset(out + (y - begin) * row, 0, (from - left) * pixel * bytes);
    memset(out + (y - begin) * row + (to - left) * pixel, 0, (left + cols - to) * pixel * bytes);
  }
  for (int64_t c = 0; c < C; c += kChannels)  // a few channels at a time: their planes are read in sequence
    for (int64_t y = top; y < stop; ++y) {
      const int64_t at = (c * H + y) * W + from;
      read_pixels<S, Outward>(lower + at, upper + at, least<int64_t>(kChannels, C - c), H * W, to - from, gamma,
                              out + (y - begin) * row + (from - left) * pixel + c, pad);
    }
}

}  // namespace LIPFAST_ISA
}  // namespace lipfast
