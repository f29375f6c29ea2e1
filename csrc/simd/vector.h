// The widest vectors of the instruction set, under one name. No function here may be instantiated in two instruction
// sets under one symbol: everything lives in the namespace LIPFAST_ISA.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace lipfast {
namespace LIPFAST_ISA {

template <class T>
struct Simd;

#define LIPFAST_SIMD(T, V, prefix, suffix, absolute, fused)            \
  template <>                                                          \
  struct Simd<T> {                                                     \
    using Vec = V;                                                     \
    static constexpr int kLanes = sizeof(V) / sizeof(T);               \
    static Vec load(const T* p) { return prefix##_loadu_##suffix(p); } \
    static void store(T* p, Vec v) { prefix##_storeu_##suffix(p, v); } \
    static Vec all(T x) { return prefix##_set1_##suffix(x); }          \
    static Vec zero() { return prefix##_setzero_##suffix(); }          \
    static Vec abs(Vec v) { return absolute; }                         \
    static Vec root(Vec v) { return prefix##_sqrt_##suffix(v); }       \
    static Vec fma(Vec a, Vec b, Vec c) { return fused; }              \
  };

#if defined(LIPFAST_ISA_avx512)
constexpr int kPairs = 6;  // centers and radii of a register tile: 2 x 6 x 2 accumulators of 32 registers
LIPFAST_SIMD(float, __m512, _mm512, ps, _mm512_abs_ps(v), _mm512_fmadd_ps(a, b, c))
LIPFAST_SIMD(double, __m512d, _mm512, pd, _mm512_abs_pd(v), _mm512_fmadd_pd(a, b, c))
#elif defined(LIPFAST_ISA_avx2)
constexpr int kPairs = 3;
LIPFAST_SIMD(float, __m256, _mm256, ps, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v), _mm256_fmadd_ps(a, b, c))
LIPFAST_SIMD(double, __m256d, _mm256, pd, _mm256_andnot_pd(_mm256_set1_pd(-0.0), v), _mm256_fmadd_pd(a, b, c))
#else
constexpr int kPairs = 2;
LIPFAST_SIMD(float, __m128, _mm, ps, _mm_andnot_ps(_mm_set1_ps(-0.0f), v), a* b + c)
LIPFAST_SIMD(double, __m128d, _mm, pd, _mm_andnot_pd(_mm_set1_pd(-0.0), v), a* b + c)
#endif
#undef LIPFAST_SIMD

constexpr int kVectors = 2;  // of a block of lanes
template <class T>
constexpr int kBlock = kVectors * Simd<T>::kLanes;

template <class A>
constexpr A least(A a, A b) {
  return b < a ? b : a;
}
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace LIPFAST_ISA
}  // namespace lipfast
