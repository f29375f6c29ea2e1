// Certified radii: a sample per lane.
#include "parts.h"

namespace lipfast {
namespace LIPFAST_ISA {
namespace {

template <class T>
constexpr T kInfinity = T(__builtin_inf());

constexpr int64_t kRun = 16;  // classes read at once

// out[n][l] = number k + n of row l; where step is 0, its only number
template <class S, int L>
void gather(const S* const* rows, int64_t k, int64_t count, int64_t step, Wide<S> (&out)[kRun][L]) {
  Wide<S> in[L][kRun];
  for (int l = 0; l < L; ++l)
    if (step == 1 && count == kRun)
      for (int n = 0; n < kRun; ++n) in[l][n] = Number<S>::wide(rows[l][k + n]);
    else
      for (int64_t n = 0; n < count; ++n) in[l][n] = Number<S>::wide(rows[l][(k + n) * step]);
  transpose<kRun, L>(in[0], kRun, out[0], L);
}

// The best number of each lane, and the first class that has it.
template <class T>
struct Best {
  typename Simd<T>::Vec value, place = Simd<T>::zero();
  template <class B>
  void meet(typename Simd<T>::Vec x, T k, B better) {
    value = better ? x : value;
    place = better ? Simd<T>::all(k) : place;
  }
};

// The order of torch.argmax: the first NaN, else the first of the largest. `wrong` is NaN where a number is not finite.
template <class S, int L>
Best<Wide<S>> largest(const S* const* logits, int64_t K, typename Simd<Wide<S>>::Vec& wrong) {
  using V = Simd<Wide<S>>;
  Wide<S> z[kRun][L];
  Best<Wide<S>> best{V::all(-kInfinity<Wide<S>>)};
  wrong = V::zero();
  for (int64_t k = 0; k < K; k += kRun) {
    const int64_t count = least(kRun, K - k);
    gather(logits, k, count, 1, z);
    for (int64_t n = 0; n < count; ++n) {
      const auto x = V::load(z[n]);
      wrong += x - x;
      best.meet(x, Wide<S>(k + n), (x > best.value) | ((x != x) & (best.value == best.value)));
    }
  }
  return best;
}

template <class S, int L>
Best<Wide<S>> least_quotient(const S* const* logits, const S* const* constants, int64_t K, int64_t step,
                             const Best<Wide<S>>& top) {
  using T = Wide<S>;
  using V = Simd<T>;
  const auto most = V::all(kLargest<T>), zero = V::zero(), infinity = V::all(kInfinity<T>);
  T z[kRun][L], c[kRun][L];
  Best<T> best{infinity};
  for (int64_t k = 0; k < K; k += kRun) {
    const int64_t count = least(kRun, K - k);
    gather(logits, k, count, 1, z);
    if (step || k == 0) gather(constants, k, count, step, c);
    for (int64_t n = 0; n < count; ++n) {
      const auto margin = top.value - V::load(z[n]), constant = V::load(c[n]);
      auto quotient = (margin < most ? margin : most) / V::abs(constant);  // Inf where the constant is 0 or -0
      quotient = quotient < most ? quotient : most;
      quotient = (margin > zero) & (constant >= zero) & (constant <= most) ? quotient : zero;
      quotient = top.place == V::all(T(k + n)) ? infinity : quotient;
      best.meet(quotient, T(k + n), quotient < best.value);
    }
  }
  return best;
}

template <class S>
void radii(const Radius& a, int64_t begin, int64_t end) {
  using T = Wide<S>;
  using V = Simd<T>;
  constexpr int L = V::kLanes;
  for (int64_t b = begin; b < end; b += L) {
    const S *logits[L], *constants[L];
    for (int l = 0; l < L; ++l) logits[l] = static_cast<const S*>(a.logits) + least(b + l, end - 1) * a.K;
    typename V::Vec wrong;
    Best<T> top = largest<S, L>(logits, a.K, wrong);
    for (int l = 0; l < L; ++l)
      constants[l] = static_cast<const S*>(a.lipschitz) + least(b + l, end - 1) * a.sample_step +
                     int64_t(top.place[l]) * a.row_step;
    top.value += wrong;
    const Best<T> closest = least_quotient<S, L>(logits, constants, a.K, a.step, top);
    for (int l = 0; l < least<int64_t>(L, end - b); ++l) {
      const T radius = closest.value[l] * (1 - 4 * kSpacing<T>)-kTiny<T>;
      if (a.radius) static_cast<S*>(a.radius)[b + l] = Number<S>::down(radius > 0 ? radius : T(0));
      if (a.prediction) a.prediction[b + l] = int64_t(top.place[l]);
      if (a.closest) a.closest[b + l] = int64_t(closest.place[l]);
    }
  }
}

}  // namespace

void radius(int dtype, const Radius& a, int64_t begin, int64_t end) {
  with_dtype(dtype, [&](auto s) { radii<decltype(s)>(a, begin, end); });
}

}  // namespace LIPFAST_ISA
}  // namespace lipfast
