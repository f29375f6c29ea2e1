// Convolutions as direct sums of products, for every stride, padding, dilation and group.
#include "parts.h"
#include "tile.h"

namespace lipfast {
namespace LIPFAST_ISA {
namespace {

int64_t scratch_rows(const Map& f, int64_t rows) { return (rows - 1) * f.step[0] + f.extent[0]; }

template <class S>
void pack(const Map& f, const S* weight) {
  using T = Wide<S>;
  const int64_t O = f.O / f.groups;
  for (int64_t n = 0; n < f.phases; ++n) {
    T* out = static_cast<T*>(f.phase[n].panel);
    for (int64_t g = 0; g < f.groups; ++g)
      for (int64_t o = 0; o < O; o += kBlock<T>)
        for (int64_t k = 0; k < f.phase[n].K; ++k, out += kBlock<T>) {
          const S* w = weight + g * f.group_weight + o * f.lane + f.phase[n].weight[k];
          const int64_t lanes = least<int64_t>(kBlock<T>, O - o);
          for (int64_t j = 0; j < lanes; ++j) out[j] = Number<S>::wide(w[j * f.lane]);
          for (int64_t j = lanes; j < kBlock<T>; ++j) out[j] = 0;
        }
  }
}

// Sums of the phase's rows [begin, end); x: their scratch image, y: destination rows from begin * stride on.
template <class T>
void phase_sums(const Map& f, const Phase& phase, int64_t begin, int64_t end, const T* x, T* y) {
  const int64_t C = f.C / f.groups, O = f.O / f.groups, cols = phase.size[1], pixels = (end - begin) * cols;
  const T* panel = static_cast<const T*>(phase.panel);
  Tile<T> t;
  t.x_radius = f.pad;
  t.y_radius = f.groups * f.lanes;
  t.step = phase.offset;
  t.K = phase.K;
  t.ldw = kBlock<T>;
  for (int64_t g = 0; g < f.groups; ++g)
    for (int64_t o = 0; o < O; o += kBlock<T>, panel += phase.K * kBlock<T>) {
      t.w = panel;
      for (int64_t p = 0; p < pixels; p += kPairs) {
        int64_t i = p / cols, j = p % cols;
        t.count = least<int64_t>(kPairs, pixels - p);
        for (int64_t q = 0; q < kPairs; ++q) {
          t.x[q] = x + (i * f.step[0] * f.cols + j * f.step[1]) * 2 * f.pad + (f.depthwise ? o : g * C);
          t.y[q] = y + ((i * f.stride[0] + phase.start[0]) * f.OW + phase.start[1] + j * f.stride[1]) * 2 * t.y_radius +
                   g * f.lanes + o;
          if (q + 1 < t.count && ++j == cols) ++i, j = 0;
        }
        f.depthwise ? sum<T, true, false, true>(t, O - o) : sum<T, true, false>(t, O - o);
      }
    }
}

template <class S, bool Outward>
void band(const Map& f, const Images& a, int64_t image, int64_t begin, int64_t end, Wide<S>* x) {
  using T = Wide<S>;
  const int64_t top = begin * f.step[0] + f.first[0], rows = scratch_rows(f, end - begin), area = f.OH * f.OW;
  const S *lower = static_cast<const S*>(a.lower) + image * f.C * f.H * f.W,
          *upper = static_cast<const S*>(a.upper) + image * f.C * f.H * f.W;
  S *low = static_cast<S*>(a.low) + image * f.O * area, *high = static_cast<S*>(a.high) + image * f.O * area;
  read_image<S, Outward>(lower, upper, f.C, f.H, f.W, top, top + rows, f.first[1], f.cols, T(a.gamma), x, f.pad);
  T* y = x + rows * f.cols * 2 * f.pad + kBlock<T>;
  for (int64_t i = begin; i < end; i += f.chunk) {
    const int64_t stop = least(i + f.chunk, end), out = i * f.stride[0];
    const T* window = x + (i - begin) * f.step[0] * f.cols * 2 * f.pad;
    for (int64_t n = 0; n < f.phases; ++n) phase_sums(f, f.phase[n], i, least(stop, f.phase[n].size[0]), window, y);
    const int64_t pixels = (least(stop * f.stride[0], f.OH) - out) * f.OW;
    for (int64_t g = 0, o = 0; g < f.groups; ++g, o += f.O / f.groups)
      write_pixels<S, Outward>(y + g * f.lanes, f.groups * f.lanes, f.O / f.groups, pixels,
                               a.bias ? static_cast<const S*>(a.bias) + o : nullptr, T(a.gamma), a.ordered,
                               low + o * area + out * f.OW, high + o * area + out * f.OW, area);
  }
}

// Pixels whose products are summed in registers; their part of the two scratch images stays in the first cache.
constexpr int64_t kRun = 64;

template <class S>
void weight(const Map& f, const Gradient& a, int64_t image, int64_t begin, int64_t end, Wide<S>* sums, Wide<S>* x) {
  using T = Wide<S>;
  const Phase& phase = f.phase[0];
  const int64_t C = f.C / f.groups, O = f.O / f.groups, pixels = (end - begin) * f.OW;
  const int64_t top = begin * f.step[0] + f.first[0], rows = scratch_rows(f, end - begin);
  const int64_t in = image * f.C * f.H * f.W, out = image * f.O * f.OH * f.OW + begin * f.OW;
  read_image<S, false>(static_cast<const S*>(a.lower) + in, static_cast<const S*>(a.upper) + in, f.C, f.H, f.W, top,
                       top + rows, f.first[1], f.cols, 0, x, f.pad);
  T* y = x + rows * f.cols * 2 * f.pad + kBlock<T>;
  read_pixels<S, false>(static_cast<const S*>(a.grad_lower) + out, static_cast<const S*>(a.grad_upper) + out, f.O,
                        f.OH * f.OW, pixels, 0, y, f.out_pad);
  int32_t* step = reinterpret_cast<int32_t*>(y + pixels * 2 * f.out_pad + kBlock<T>);
  for (int64_t i = 0, p = 0; p < pixels; ++i)
    for (int64_t j = 0; j < f.OW; ++j, ++p) step[p] = (i * f.step[0] * f.cols + j * f.step[1]) * 2 * f.pad;
  Tile<T> t;
  t.x_radius = f.pad;
  t.y_radius = kBlock<T>;
  t.ldw = 2 * f.out_pad;
  t.w_radius = f.out_pad;
  for (int64_t g = 0; g < f.groups; ++g)
    for (int64_t o = 0; o < O; o += kBlock<T>, sums += phase.K * 2 * kBlock<T>)
      for (int64_t p = 0; p < pixels; p += kRun) {
        t.step = step + p;
        t.K = least(kRun, pixels - p);
        t.w = y + p * 2 * f.out_pad + g * O + o;
        for (int64_t k = 0; k < phase.K; k += kPairs) {
          place(
              t, k, phase.K, [&](int64_t n) { return x + phase.offset[n] + (f.depthwise ? o : g * C); },
              [&](int64_t n) { return sums + n * 2 * kBlock<T>; });
          f.depthwise ? sum<T, false, true, true>(t, O - o) : sum<T, false, true>(t, O - o);
        }
      }
}

template <class S>
void weight_finish(const Map& f, const Wide<S>* sums, int64_t parts, const S* weight, S* out) {
  using T = Wide<S>;
  const Phase& phase = f.phase[0];
  const int64_t O = f.O / f.groups, size = f.groups * divide_up(O, kBlock<T>) * phase.K * 2 * kBlock<T>;
  for (int64_t g = 0; g < f.groups; ++g)
    for (int64_t o = 0; o < O; o += kBlock<T>)
      for (int64_t k = 0; k < phase.K; ++k, sums += 2 * kBlock<T>)
        for (int64_t j = 0; j < least<int64_t>(kBlock<T>, O - o); ++j) {
          T center = 0, radius = 0;
          for (int64_t n = 0; n < parts; ++n) center += sums[n * size + j], radius += sums[n * size + kBlock<T> + j];
          const int64_t at = g * f.group_weight + (o + j) * f.lane + phase.weight[k];
          const T w = Number<S>::wide(weight[at]), sign = (w > 0) - (w < 0);
          out[at] = Number<S>::narrow(2 * (center + sign * radius));
        }
}

}  // namespace

void conv_pack(int dtype, const Map& f, const void* weight) {
  with_dtype(dtype, [&](auto s) { pack(f, static_cast<const decltype(s)*>(weight)); });
}
int64_t conv_band_scratch(int, const Map& f, int64_t rows) {
  return scratch_rows(f, rows) * f.cols * 2 * f.pad + f.chunk * f.stride[0] * f.OW * 2 * f.groups * f.lanes +
         4 * kBlock<float>;
}
void conv_band(int dtype, const Map& f, const Images& a, int64_t image, int64_t begin, int64_t end, void* scratch) {
  with_dtype(dtype, [&](auto s) {
    using S = decltype(s);
    auto* x = static_cast<Wide<S>*>(scratch);
    a.gamma < 0 ? band<S, false>(f, a, image, begin, end, x) : band<S, true>(f, a, image, begin, end, x);
  });
}
int64_t conv_weight_scratch(int, const Map& f, int64_t rows) {
  return scratch_rows(f, rows) * f.cols * 2 * f.pad + rows * f.OW * (2 * f.out_pad + 1) + 4 * kBlock<float>;
}
void conv_weight(int dtype, const Map& f, const Gradient& a, int64_t image, int64_t begin, int64_t end, void* sums,
                 void* scratch) {
  with_dtype(dtype, [&](auto s) {
    using S = decltype(s);
    weight<S>(f, a, image, begin, end, static_cast<Wide<S>*>(sums), static_cast<Wide<S>*>(scratch));
  });
}
void conv_weight_finish(int dtype, const Map& f, const void* sums, int64_t parts, const void* weight, void* out) {
  with_dtype(dtype, [&](auto s) {
    using S = decltype(s);
    weight_finish(f, static_cast<const Wide<S>*>(sums), parts, static_cast<const S*>(weight), static_cast<S*>(out));
  });
}

}  // namespace LIPFAST_ISA
}  // namespace lipfast
