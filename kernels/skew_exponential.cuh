// Kernels of the exponential of small skew matrices. One block takes one matrix, in two shared matrices: through
// polynomial and squarings, and back.
#pragma once

#include <cmath>

#include "small_matrix.cuh"

namespace lipfast {
namespace {

// The range of t, and the numbers of the polynomial, are the definition's.
constexpr int kDoublings = 4;
template <typename W>
struct Polynomial {
  static constexpr W kRange = 2;
  static constexpr W c1 = W(0.49999995097278185), c2 = W(0.041666492262851103), c3 = W(0.0013886871599986064),
                     c4 = W(2.46994886207e-5), c5 = W(2.51957043472e-7);
  static constexpr W d1 = W(0.16666681322774728), d2 = W(0.0083336235535711559), d3 = W(0.00019860071444424647),
                     d4 = W(0.11350704487929142);
};
template <>
struct Polynomial<double> {
  static constexpr double kRange = 0.25;
  static constexpr double c1 = 0.5, c2 = 0.041666666666655548, c3 = 0.0013888888880698436, c4 = 2.4801560969424587e-5,
                          c5 = 2.7518885868405878e-7;
  static constexpr double d1 = 0.16666666666667582, d2 = 0.0083333333345218965, d3 = 0.00019841274957552584,
                          d4 = 0.11114743142254963;
};

// The skew part times `scale`, to shared matrix 0.
template <typename W, int C>
__device__ void load_skew(const W* __restrict__ skew, W scale, int N) {
  const int64_t first = int64_t{blockIdx.x} * N * N;
  Matrix<W, C>::fill(0, [&](int i, int j) {
    return i < N && j < N ? (skew[first + i * N + j] / 2 - skew[first + j * N + i] / 2) * scale : W(0);
  });
}

template <typename W, int C>
__device__ void store(Matrix<W, C>& own, W* __restrict__ to, int N) {
  const int64_t first = int64_t{blockIdx.x} * N * N;
  own.each([&](W& x, int i, int j) {
    if (i < N && j < N) to[first + i * N + j] = x;
  });
}

// Sets shared matrix n, as fill does.
template <typename W, int C>
__device__ void share(Matrix<W, C>& own, int n) {
  __syncthreads();
  own.each([&](W& x, int i, int j) { Matrix<W, C>::at(n)[i * Matrix<W, C>::kStride + j] = x; });
  __syncthreads();
}

// One step of the squarings of Q, which passes through both shared matrices where a Newton step follows.
template <typename W, int C>
__device__ void square(Matrix<W, C>& own, bool newton, int N) {
  using M = Matrix<W, C>;
  const Shared<W, C> Q{M::at(0)}, product{M::at(1)};
  share(own, 0);
  own = {};
  own.add_product(Q, Q, N);
  if (!newton) return;
  share(own, 0);
  own = {};
  own.add_product(Transposed<W, C>{M::at(0)}, Q, N);
  share(own, 1);
  own = {};
  own.add_product(Q, product, N);
  own.each([&](W& x, int i, int j) { x = Q(i, j) + (Q(i, j) - x) / 2; });
}

// At least the largest t, where t^12 <= |A^6|_F^2 / 2.
template <typename W, int C>
__device__ W largest_angle(Matrix<W, C>& A6) {
  return pow(frobenius(A6) * sqrt(W(0.5)), W(1) / 6);
}

template <typename W>
__device__ W power_of_two(int64_t exponent) {
  return ldexp(W(1), static_cast<int>(max(exponent, int64_t{-1} << 20)));
}

// Raises `squarings` to what this block's matrix needs; one that is not finite needs none.
template <typename W, int C>
__global__ void __launch_bounds__(kThreads, 1)
    skew_exponential_squarings_kernel(const W* __restrict__ skew,  // (B, N, N)
                                      int* __restrict__ squarings, int N) {
  using M = Matrix<W, C>;
  const Shared<W, C> A{M::at(0)}, A2{M::at(1)}, A4{M::at(0)};
  load_skew<W, C>(skew, 1, N);
  M own;
  W largest = 0;
  own.each([&](W&, int i, int j) { largest = larger(largest, fabs(A(i, j))); });
  largest = join_block(largest, [](W a, W b) { return larger(a, b); });
  if (!(largest <= kLargest<W>)) return;
  int shift = 0, exponent = 0;
  frexp(largest, &shift);
  shift = max(shift, 0);
  load_skew<W, C>(skew, power_of_two<W>(-shift), N);  // so that powers stay in range
  own.add_product(A, A, N);
  share(own, 1);
  own = {};
  own.add_product(A2, A2, N);
  share(own, 0);
  own = {};
  own.add_product(A2, A4, N);
  frexp(largest_angle(own) / Polynomial<W>::kRange, &exponent);
  if (threadIdx.x == 0) atomicMax(squarings, shift + exponent);
}

template <typename W, int C>
__global__ void __launch_bounds__(kThreads, 1)
    skew_exponential_kernel(const W* __restrict__ skew,                     // (B, N, N), and so are the four results
                            const int* __restrict__ needed, int64_t given,  // if nothing else was needed
                            W* __restrict__ out, W* __restrict__ square_out, W* __restrict__ fourth_out,
                            W* __restrict__ root_out, int N) {
  using M = Matrix<W, C>;
  using P = Polynomial<W>;
  const Shared<W, C> A{M::at(0)}, A2{M::at(1)}, A4{M::at(0)}, sum{M::at(1)}, odd{M::at(1)};
  const int64_t first = int64_t{blockIdx.x} * N * N, count = needed == nullptr ? given : *needed;
  const W scale = power_of_two<W>(-count);
  load_skew<W, C>(skew, scale, N);
  M own;
  own.add_product(A, A, N);
  store(own, square_out, N);
  share(own, 1);
  own = {};
  own.add_product(A2, A2, N);
  store(own, fourth_out, N);
  share(own, 0);
  own = {};
  own.add_product(A2, A4, N);
  store(own, out, N);  // A^6 waits there
  const bool enough = needed != nullptr || largest_angle(own) <= P::kRange;
  __syncthreads();
  own.each([&](W& x, int i, int j) { M::at(1)[i * M::kStride + j] = P::c4 * A4(i, j) + P::c5 * x; });
  __syncthreads();
  own = {};
  own.add_product(A4, sum, N);
  store(own, root_out, N);
  M::fill(1, [&](int i, int j) {  // the odd part over A; the even part to where the root will be
    if (i >= N || j >= N) return W(0);
    const int64_t at = first + i * N + j;
    const W one = i == j, a2 = square_out[at], a4 = fourth_out[at], a6 = out[at], top = root_out[at];
    root_out[at] = one + (P::c1 * a2 + P::c2 * a4 + P::c3 * a6 + top);
    return one + (P::d1 * a2 + P::d2 * a4 + P::d3 * a6 + P::d4 * top);
  });
  load_skew<W, C>(skew, scale, N);
  own = {};
  own.add_product(A, odd, N);
  own.each([&](W& x, int i, int j) {
    if (i < N && j < N) x += root_out[first + i * N + j];
    if (!enough) x = kInfinity<W> - kInfinity<W>;
  });
  store(own, root_out, N);
  for (int64_t n = 0; n < count; ++n) square(own, n == count - 1 || n % kDoublings == kDoublings - 1, N);
  store(own, out, N);
}

constexpr int kKept = 6;  // matrices that the backward pass keeps in `work`, beside the roots after the first

// The derivative, in the definition's order and under its names.
template <typename W, int C>
__global__ void __launch_bounds__(kThreads, 1)
    skew_exponential_backward_kernel(const W* __restrict__ grad,  // (B, N, N), and so are the others
                                     const W* __restrict__ skew, const W* __restrict__ square_in,
                                     const W* __restrict__ fourth, const W* __restrict__ root,
                                     W* work,  // (max(count - 1, 0) + kKept, B, N, N)
                                     W* __restrict__ out, int64_t count, int N) {
  using M = Matrix<W, C>;
  using P = Polynomial<W>;
  const int64_t first = int64_t{blockIdx.x} * N * N, whole = int64_t{gridDim.x} * N * N;
  const W scale = power_of_two<W>(-count);
  const Shared<W, C> left{M::at(0)}, right{M::at(1)};
  const auto entry_of = [&](const W* matrix) { return [=](int i, int j) { return matrix[first + i * N + j]; }; };
  const auto symmetric = [](auto of) { return [=](int i, int j) { return (of(i, j) + of(j, i)) / 2; }; };
  const auto fill = [&](int n, auto entry) {
    M::fill(n, [&](int i, int j) { return i < N && j < N ? entry(i, j) : W(0); });
  };
  M own;
  const auto multiply = [&](auto a, auto b) {
    fill(0, a);
    fill(1, b);
    own = {};
    own.add_product(left, right, N);
  };

  fill(0, entry_of(root));
  own.each([&](W& x, int i, int j) { x = left(i, j); });
  for (int64_t n = 0; n + 1 < count; ++n) {
    square(own, n % kDoublings == kDoublings - 1, N);
    store(own, work + n * whole, N);
  }
  fill(1, entry_of(grad));
  for (int64_t n = count - 1; n >= 0; --n) {
    fill(0, entry_of(n == 0 ? root : work + (n - 1) * whole));
    own = {};
    own.add_product(Transposed<W, C>{M::at(0)}, right, N);
    own.add_product(right, Transposed<W, C>{M::at(0)}, N);
    share(own, 1);
  }
  W *const kept = work + (count > 1 ? count - 1 : 0) * whole, *const G_at = kept, *const A6_at = kept + whole,
           *const product_at = kept + 2 * whole, *const right_at = kept + 3 * whole, *const A4_at = kept + 4 * whole,
           *const Y_at = kept + 5 * whole;
  own.each([&](W& x, int i, int j) { x = right(i, j); });
  store(own, G_at, N);

  const auto A = [&](int i, int j) { return (skew[first + i * N + j] / 2 - skew[first + j * N + i] / 2) * scale; };
  const auto A2 = entry_of(square_in), A4 = entry_of(fourth), A6 = entry_of(A6_at), G = entry_of(G_at);
  const auto of_even = symmetric(G);
  const auto of_product = [=](int i, int j) { return (G(i, j) - G(j, i)) / 2; };
  multiply(A2, A4);
  store(own, A6_at, N);
  multiply(A, of_product);
  store(own, product_at, N);
  const auto product = symmetric(entry_of(product_at));
  const auto of_odd = [=](int i, int j) { return -product(i, j); };
  const auto of_top = [=](int i, int j) { return of_even(i, j) + P::d4 * of_odd(i, j); };
  multiply(of_top, A4);
  store(own, right_at, N);
  const auto of_top_A4 = entry_of(right_at);
  multiply(of_top, [=](int i, int j) { return P::c4 * A4(i, j) + P::c5 * A6(i, j); });
  store(own, A4_at, N);
  const auto of_A4 = [=, of_sum = entry_of(A4_at)](int i, int j) {
    return P::c2 * of_even(i, j) + P::d2 * of_odd(i, j) + P::c4 * of_top_A4(i, j) + of_sum(i, j);
  };
  const auto of_A6 = [=](int i, int j) {
    return P::c3 * of_even(i, j) + P::d3 * of_odd(i, j) + P::c5 * of_top_A4(i, j);
  };
  multiply(A2, symmetric(of_A6));
  store(own, Y_at, N);
  const auto Y = entry_of(Y_at);
  const auto both = symmetric([=](int i, int j) { return Y(i, j) + of_A4(i, j); });
  multiply(A2, [=](int i, int j) { return Y(i, j) / 2 + both(i, j); });
  share(own, 0);
  store(own, right_at, N);  // X takes the place of what is done with
  const auto X = entry_of(right_at);
  const auto of_A2 = [=](int i, int j) { return P::c1 * of_even(i, j) + P::d1 * of_odd(i, j) + (X(i, j) + X(j, i)); };
  multiply(A, [=](int i, int j) { return -2 * of_A2(i, j); });
  const auto even = symmetric(entry_of(root));
  fill(0, of_product);
  fill(1, [=](int i, int j) {  // the odd part over A
    return P::d4 * even(i, j) + (P::d1 - P::d4 * P::c1) * A2(i, j) + (P::d2 - P::d4 * P::c2) * A4(i, j) +
           (P::d3 - P::d4 * P::c3) * A6(i, j) + (1 - P::d4) * W(i == j);
  });
  own.add_product(left, right, N);
  share(own, 0);
  own.each([&](W& x, int i, int j) {
    if (i < N && j < N) out[first + i * N + j] = (x - left(j, i)) * (scale / 2);
  });
}

}  // namespace
}  // namespace lipfast
