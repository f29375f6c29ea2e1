// Storage types and their rounding. Not _Float16: GCC 12 turns it into library calls.
#pragma once
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace lipfast {
namespace LIPFAST_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline uint32_t bits_of(float v) {
  uint32_t b;
  memcpy(&b, &v, 4);
  return b;
}
inline float float_of(uint32_t b) {
  float v;
  memcpy(&v, &b, 4);
  return v;
}

template <class S>
struct Number;

template <>
struct Number<double> {
  using Wide = double;
  static double wide(double v) { return v; }
  static double narrow(double v) { return v; }
  static double down(double v) { return v; }
};
template <>
struct Number<float> {
  using Wide = float;
  static float wide(float v) { return v; }
  static float narrow(float v) { return v; }
  static float down(float v) { return v; }
};

// The number below, in a sign-magnitude format; not for NaN and not for -Inf.
inline uint16_t below(uint16_t b) { return b & 0x8000 ? b + 1 : b ? b - 1 : 0x8001; }

template <>
struct Number<bf16> {
  using Wide = float;
  static float wide(bf16 v) { return float_of(uint32_t(v.bits) << 16); }
  static bf16 narrow(float v) {  // to nearest, ties to even
    const uint32_t u = bits_of(v);
    return {uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
  }
  static bf16 down(float v) {
    const bf16 n = narrow(v);
    return wide(n) > v ? bf16{below(n.bits)} : n;
  }
};
template <>
struct Number<f16> {
  using Wide = float;
  static float wide(f16 v) {
    const uint32_t m = uint32_t(v.bits & 0x7fff) << 13, sign = uint32_t(v.bits & 0x8000) << 16;
    const uint32_t finite = bits_of(float_of(m) * 0x1p112f);  // also right for subnormal numbers
    return float_of(sign | (m >= 0x0f800000u ? m | 0x7f800000u : finite));
  }
  static f16 narrow(float v) {  // to nearest, ties to even
    const uint32_t u = bits_of(v), x = u & 0x7fffffffu;
    const uint32_t normal = (x + 0xfffu + ((x >> 13) & 1u) - 0x38000000u) >> 13;
    const uint32_t subnormal = bits_of(float_of(x) + 0.5f) - 0x3f000000u;  // the addition rounds
    uint32_t h = x < 0x38800000u ? subnormal : normal;
    h = x >= 0x477ff000u ? 0x7c00u : h;
    h = x > 0x7f800000u ? 0x7e00u : h;
    return {uint16_t(h | ((u >> 16) & 0x8000u))};
  }
  static f16 down(float v) {
    const f16 n = narrow(v);
    return wide(n) > v ? f16{below(n.bits)} : n;
  }
};
template <class S>
using Wide = typename Number<S>::Wide;

// -0.0 must not turn into a step: a negated value rounds as its mirror image.
template <class S>
S up(Wide<S> v) {
  S n = Number<S>::down(-v);
  if constexpr (sizeof(S) == 2)
    n.bits ^= 0x8000;
  else
    n = -n;
  return n;
}

template <class F>
void with_dtype(int dtype, F&& f) {
  switch (dtype) {
    case kFloat64:
      return f(double());
    case kFloat32:
      return f(float());
    case kBFloat16:
      return f(bf16());
    default:
      return f(f16());
  }
}

}  // namespace LIPFAST_ISA
}  // namespace lipfast
