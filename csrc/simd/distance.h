// What distances and their gradients share: rows as panels of vectors, and the differences of two rows a run at a time.
#pragma once
#include "parts.h"

namespace lipfast {
namespace LIPFAST_ISA {

template <class S>
typename Simd<Wide<S>>::Vec load_wide(const S* from, int64_t count) {
  using V = Simd<Wide<S>>;
  if constexpr (sizeof(S) == sizeof(Wide<S>))
    if (count == V::kLanes) return V::load(from);
  Wide<S> at[V::kLanes] = {};
  for (int64_t l = 0; l < count; ++l) at[l] = Number<S>::wide(from[l]);
  return V::load(at);
}

template <class S>
void store_narrow(S* to, typename Simd<Wide<S>>::Vec v, int64_t count) {
  using V = Simd<Wide<S>>;
  if constexpr (sizeof(S) == sizeof(Wide<S>))
    if (count == V::kLanes) return V::store(to, v);
  for (int64_t l = 0; l < count; ++l) to[l] = Number<S>::narrow(v[l]);
}

// to[(v pitch + r) L + l] = number v L + l of row r; zero where there is none
template <class S>
void pack_rows(const S* rows, int64_t I, int64_t count, int64_t pitch, int64_t columns, Wide<S>* to) {
  using V = Simd<Wide<S>>;
  constexpr int64_t L = V::kLanes;
  for (int64_t r = 0; r < pitch; ++r)
    for (int64_t k = 0; k < columns; k += L)
      V::store(to + k * pitch + r * L, load_wide(rows + r * I + k, r < count ? least(L, columns - k) : 0));
}

template <class T>
struct Bits;
template <>
struct Bits<float> {
  typedef int32_t Vec __attribute__((vector_size(sizeof(Simd<float>::Vec))));
};
template <>
struct Bits<double> {
  typedef int64_t Vec __attribute__((vector_size(sizeof(Simd<double>::Vec))));
};

// Of absolute values, compared as integers: a NaN is above all numbers, and stays.
template <class T>
typename Simd<T>::Vec larger(typename Simd<T>::Vec a, typename Simd<T>::Vec b) {
  using B = typename Bits<T>::Vec;
  const B x = (B)a, y = (B)b;
  return (typename Simd<T>::Vec)(x > y ? x : y);
}

template <class T>
bool any(typename Bits<T>::Vec mask) {
  uint64_t part[sizeof(mask) / 8], some = 0;
  memcpy(part, &mask, sizeof(mask));
  for (const uint64_t p : part) some |= p;
  return some != 0;
}

// The largest lane of absolute values, NaN if one is.
template <class T>
T largest_lane(typename Simd<T>::Vec v) {
  T largest = 0;
  for (int l = 0; l < Simd<T>::kLanes; ++l)
    if (!(v[l] <= largest) && largest == largest) largest = v[l];
  return largest;
}

constexpr int64_t kRun = 64;  // columns whose differences are looked at together

// The differences of a run, zero beyond `count`; returns the largest absolute values.
template <class S>
typename Simd<Wide<S>>::Vec differences(const S* x, const S* y, int64_t count, Wide<S>* out) {
  using V = Simd<Wide<S>>;
  auto most = V::zero();
  for (int64_t k = 0; k < kRun; k += V::kLanes) {
    const int64_t lanes = count > k ? least<int64_t>(V::kLanes, count - k) : 0;
    const auto difference = load_wide(x + k, lanes) - load_wide(y + k, lanes);
    V::store(out + k, difference);
    most = larger<Wide<S>>(V::abs(difference), most);
  }
  return most;
}

}  // namespace LIPFAST_ISA
}  // namespace lipfast
