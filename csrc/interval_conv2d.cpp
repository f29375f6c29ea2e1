// CPU kernel of lipfast/ops/interval_conv2d.py.
#include <algorithm>

#include "host.h"

namespace lipfast {
namespace {

using Pair = std::vector<int64_t>;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Geometry {
  int64_t B, C, H, W, O, OH, OW, KH, KW, G;
  Pair stride, padding, dilation;
};

// A convolution, or its transpose, as the kernels read it.
struct Plan {
  Map map{};
  std::vector<Phase> phases;
  std::vector<std::vector<int32_t>> offsets;
  std::vector<std::vector<int64_t>> weights;
};

struct Tap {
  int64_t row, col, weight;
};

// Taps of the phase (a, b): source pixel = phase pixel * step + tap.
std::vector<Tap> taps_of(const Geometry& g, bool transposed, int64_t a, int64_t b) {
  std::vector<Tap> taps;
  for (int64_t i = 0; i < g.KH; ++i)
    for (int64_t j = 0; j < g.KW; ++j) {
      int64_t row = i * g.dilation[0] - g.padding[0], col = j * g.dilation[1] - g.padding[1];
      if (transposed) {
        row = a - row, col = b - col;
        if (row % g.stride[0] || col % g.stride[1]) continue;
        row /= g.stride[0], col /= g.stride[1];
      }
      taps.push_back({row, col, i * g.KW + j});
    }
  return taps;
}

Plan plan(const Geometry& g, bool transposed, bool winograd, int dtype) {
  Plan p;
  Map& f = p.map;
  const bool depthwise = g.G > 1 && g.G == g.C && g.G == g.O;
  const int64_t groups = depthwise ? 1 : g.G;
  const int64_t area = g.KH * g.KW, inner = g.C / g.G * area;  // weight entries between input and output channels
  const int64_t window[2] = {(g.KH - 1) * g.dilation[0] + 1, (g.KW - 1) * g.dilation[1] + 1};
  if (transposed)
    f = {g.O, g.OH, g.OW, g.C, g.H, g.W, groups, depthwise};
  else
    f = {g.C, g.H, g.W, g.O, g.OH, g.OW, groups, depthwise};
  const int64_t size[2] = {f.OH, f.OW};
  int64_t longest[2];
  for (int d = 0; d < 2; ++d) {
    f.step[d] = transposed ? 1 : g.stride[d];
    f.stride[d] = transposed ? g.stride[d] : 1;
    longest[d] = divide_up(size[d], f.stride[d]);
    f.first[d] = transposed ? -((window[d] - 1 - g.padding[d] + g.stride[d] - 1) / g.stride[d]) : -g.padding[d];
    const int64_t last = transposed ? (g.stride[d] - 1 + g.padding[d]) / g.stride[d] : window[d] - 1 - g.padding[d];
    f.extent[d] = last - f.first[d] + 1;
  }
  f.rows = longest[0];
  f.cols = (longest[1] - 1) * f.step[1] + f.extent[1];
  if (winograd) {
    f.window = g.stride[0] == 1 ? 4 : 3;
    f.tiles = divide_up(longest[1], 2);
    f.cols = (2 * f.tiles - 1) * f.step[1] + f.extent[1];
  }
  const int64_t unit = winograd ? kernels().lanes(dtype) / 2 : 4;
  f.pad = divide_up(std::max<int64_t>(f.C, 1), unit) * unit;
  f.out_pad = divide_up(f.O, unit) * unit;
  f.lane = transposed ? area : inner;
  f.group_weight = g.O / g.G * inner;
  f.lanes = divide_up(f.O / f.groups, kernels().lanes(dtype)) * kernels().lanes(dtype);
  f.chunk = std::max<int64_t>(1, 16384 / (f.stride[0] * f.OW * 2 * f.groups * f.lanes));
  const int64_t channels = f.C / g.G, between = transposed ? inner : area;
  for (int64_t a = 0; a < f.stride[0]; ++a)
    for (int64_t b = 0; b < f.stride[1]; ++b) {
      const std::vector<Tap> taps = taps_of(g, transposed, a, b);
      auto& offset = p.offsets.emplace_back();
      auto& weight = p.weights.emplace_back();
      for (const Tap& t : taps)
        for (int64_t c = 0; c < channels; ++c) {
          offset.push_back(int32_t(((t.row - f.first[0]) * f.cols + t.col - f.first[1]) * 2 * f.pad + c));
          weight.push_back(t.weight + c * between);
        }
      Phase phase{{a, b},
                  {std::max<int64_t>(0, divide_up(f.OH - a, f.stride[0])),
                   std::max<int64_t>(0, divide_up(f.OW - b, f.stride[1]))}};
      phase.K = int64_t(offset.size());
      p.phases.push_back(phase);
    }
  for (size_t n = 0; n < p.phases.size(); ++n)
    p.phases[n].offset = p.offsets[n].data(), p.phases[n].weight = p.weights[n].data();
  f.phases = int64_t(p.phases.size());
  f.phase = p.phases.data();
  return p;
}

// 3 x 3 with stride 1, or 4 x 4 with stride 2. Few channels would not repay the transforms; outward rounding needs
// plain sums.
bool suits_winograd(const Geometry& g, bool outward) {
  const int64_t stride = g.stride[0], kernel = stride + 2;
  return !outward && stride <= 2 && g.stride[1] == stride && g.KH == kernel && g.KW == kernel && g.dilation[0] == 1 &&
         g.dilation[1] == 1 && g.G == 1 && g.C >= 16 && g.O >= 16 && g.OH * g.OW >= 36;
}

// What PyTorch's float32 convolutions do faster, both passes: a weight that leaves the second cache between one image
// and the next, whose few pixels do not repay reading it again.
bool rereads_weight(const Geometry& g, int dtype) {
  return dtype == kFloat32 && g.G == 1 && g.C * g.O * g.KH * g.KW >= 1 << 18 && g.OH * g.OW <= 64;
}
// The same of the forward pass: groups that leave three quarters of a vector empty, or more.
bool leaves_lanes_empty(const Geometry& g, int dtype) {
  return dtype == kFloat32 && g.G > 1 && g.G < g.C && g.O / g.G * 8 <= kernels().lanes(dtype);  // of two vectors
}

int64_t blocks_of(const Map& f, int64_t lanes) { return f.groups * divide_up(f.O / f.groups, lanes); }

// Rows of a band: its scratch images fill about half of a second cache, unless there are too few images for the
// threads.
int64_t band_rows(const Map& f, int64_t images) {
  const int64_t row = f.step[0] * f.cols * 2 * f.pad, threads = torch::stable::get_num_threads();
  const int64_t fit = std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(row, 1));
  const int64_t share = divide_up(f.rows, divide_up(threads, images));
  const int64_t bands = divide_up(f.rows, std::max<int64_t>(4, std::min(fit, share)));
  return divide_up(f.rows, bands);
}

void run(Plan& p, const Images& a, int64_t images, bool winograd, int dtype) {
  Map& f = p.map;
  const Kernels& k = kernels();
  const int64_t bytes = wide_bytes(dtype);
  const Convolver& way = winograd ? k.winograd : k.direct;
  const auto terms_of = [&](const Phase& phase) {
    return winograd ? 2 * f.window * f.window * f.step[0] * f.step[1] * f.C : phase.K;
  };
  int64_t terms = 0;
  for (const Phase& phase : p.phases) terms += terms_of(phase);
  const int64_t term = blocks_of(f, k.lanes(dtype)) * k.lanes(dtype) * bytes;
  char* panels = static_cast<char*>(scratch(1, terms * term));
  for (Phase& phase : p.phases) {
    phase.panel = panels;
    panels += terms_of(phase) * term;
  }
  way.pack(dtype, f, a.weight);
  const int64_t rows = divide_up(band_rows(f, images), 2) * 2, bands = divide_up(f.rows, rows);
  torch::stable::parallel_for(0, images * bands, 1, [&](int64_t begin, int64_t end) {
    void* own = scratch(0, way.band_scratch(dtype, f, rows) * bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % bands * rows;
      way.band(dtype, f, a, i / bands, first, std::min(first + rows, f.rows), own);
    }
  });
}

void run_weight(Plan& p, const Gradient& a, const void* weight, void* out, int64_t images, bool winograd, int dtype) {
  // Parts are summed apart. Neither their number nor their order depends on the number of threads, so the result does
  // not.
  constexpr int64_t kParts = 8, kPixels = 1024, kBytes = 1 << 26;  // at most, at least in a part, at most
  const Map& f = p.map;
  const Kernels& k = kernels();
  const Convolver& way = winograd ? k.winograd : k.direct;
  const int64_t bytes = wide_bytes(dtype), lanes = k.lanes(dtype);
  const int64_t terms = winograd ? f.window * f.window * f.step[0] * f.step[1] * f.C : p.phases[0].K;
  const int64_t size = blocks_of(f, lanes) * terms * 2 * lanes * bytes;
  const int64_t most = std::clamp<int64_t>(kBytes / size, 1, kParts);
  const int64_t share = std::max({int64_t(1), divide_up(images, most), divide_up(kPixels, f.OH * f.OW)});
  const int64_t parts = std::max<int64_t>(1, divide_up(images, share));
  char* sums = static_cast<char*>(scratch(1, parts * size));
  const int64_t rows = divide_up(band_rows(f, kParts), 2) * 2;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    void* own = scratch(0, way.weight_scratch(dtype, f, rows) * bytes);
    for (int64_t part = begin; part < end; ++part) {
      std::fill_n(sums + part * size, size, char(0));
      for (int64_t image = part * share; image < std::min((part + 1) * share, images); ++image)
        for (int64_t y = 0; y < f.rows; y += rows)
          way.weight(dtype, f, a, image, y, std::min(y + rows, f.rows), sums + part * size, own);
    }
  });
  way.weight_finish(dtype, f, sums, parts, weight, out);
}

Geometry geometry(const Tensor& lower, const Tensor& upper, const Tensor& weight, Pair stride, Pair padding,
                  Pair dilation, int64_t groups) {
  STD_TORCH_CHECK(lower.dim() == 4 && upper.dim() == 4 && weight.dim() == 4 && stride.size() == 2 &&
                      padding.size() == 2 && dilation.size() == 2,
                  "interval_conv2d: expected (B, C, H, W) images and pairs");
  Geometry g{lower.size(0),  lower.size(1),  lower.size(2), lower.size(3), weight.size(0), 0,       0,
             weight.size(2), weight.size(3), groups,        stride,        padding,        dilation};
  for (int d = 0; d < 2; ++d)
    STD_TORCH_CHECK(stride[d] > 0 && padding[d] >= 0 && dilation[d] > 0, "interval_conv2d: bad geometry");
  g.OH = (g.H + 2 * padding[0] - dilation[0] * (g.KH - 1) - 1) / stride[0] + 1;
  g.OW = (g.W + 2 * padding[1] - dilation[1] * (g.KW - 1) - 1) / stride[1] + 1;
  bool fits = groups > 0 && g.C == weight.size(1) * groups && g.O % groups == 0 && g.OH > 0 && g.OW > 0;
  for (int d = 0; d < 4; ++d) fits = fits && lower.size(d) == upper.size(d);
  STD_TORCH_CHECK(fits, "interval_conv2d: shapes do not fit");
  STD_TORCH_CHECK(upper.scalar_type() == lower.scalar_type() && weight.scalar_type() == lower.scalar_type(),
                  "interval_conv2d: dtypes differ");
  return g;
}

}  // namespace

std::tuple<Tensor, Tensor> interval_conv2d(Tensor lower, Tensor upper, Tensor weight, std::optional<Tensor> bias,
                                           Pair stride, Pair padding, Pair dilation, int64_t groups, bool outward) {
  const Geometry g = geometry(lower, upper, weight, stride, padding, dilation, groups);
  STD_TORCH_CHECK(!bias || (int64_t(bias->numel()) == g.O && bias->scalar_type() == lower.scalar_type()),
                  "interval_conv2d: bias does not fit");
  const int dtype = dtype_of(lower);
  if (!outward && (rereads_weight(g, dtype) || leaves_lanes_empty(g, dtype))) {
    const auto box = definition_of("lipfast::interval_conv2d_definition", lower, upper, weight, bias, stride, padding,
                                   dilation, groups, outward);
    return {torch::stable::detail::to<Tensor>(box[0]), torch::stable::detail::to<Tensor>(box[1])};
  }
  const double gamma = gamma_of(outward, g.C / g.G * g.KH * g.KW, dtype);
  lower = torch::stable::contiguous(lower);
  upper = torch::stable::contiguous(upper);
  weight = torch::stable::contiguous(weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  const std::vector<int64_t> shape{g.B, g.O, g.OH, g.OW};
  Tensor low = torch::stable::new_empty(lower, shape), high = torch::stable::new_empty(lower, shape);
  if (g.B * g.O == 0) return {low, high};
  const bool winograd = suits_winograd(g, outward);
  Plan p = plan(g, false, winograd, dtype);
  run(p,
      {lower.const_data_ptr(), upper.const_data_ptr(), weight.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr,
       low.mutable_data_ptr(), high.mutable_data_ptr(), gamma, true},
      g.B, winograd, dtype);
  return {low, high};
}

std::tuple<Tensor, Tensor, Tensor> interval_conv2d_backward(Tensor grad_lower, Tensor grad_upper, Tensor lower,
                                                            Tensor upper, Tensor weight, Pair stride, Pair padding,
                                                            Pair dilation, int64_t groups, bool need_input,
                                                            bool need_weight) {
  const Geometry g = geometry(lower, upper, weight, stride, padding, dilation, groups);
  const int64_t size = g.B * g.O * g.OH * g.OW;
  STD_TORCH_CHECK(int64_t(grad_lower.numel()) == size && int64_t(grad_upper.numel()) == size &&
                      grad_lower.scalar_type() == lower.scalar_type() &&
                      grad_upper.scalar_type() == lower.scalar_type(),
                  "interval_conv2d: gradients do not fit");
  const int dtype = dtype_of(lower);
  if (rereads_weight(g, dtype)) {
    const auto grads = definition_of("lipfast::interval_conv2d_backward_definition", grad_lower, grad_upper, lower,
                                     upper, weight, stride, padding, dilation, groups, need_input, need_weight);
    return {torch::stable::detail::to<Tensor>(grads[0]), torch::stable::detail::to<Tensor>(grads[1]),
            torch::stable::detail::to<Tensor>(grads[2])};
  }
  grad_lower = torch::stable::contiguous(grad_lower);
  grad_upper = torch::stable::contiguous(grad_upper);
  weight = torch::stable::contiguous(weight);
  auto empty = [&](const Tensor& like, bool needed) {
    return needed ? torch::stable::new_empty(like, like.sizes())
                  : torch::stable::new_empty(like, std::vector<int64_t>{0});
  };
  Tensor low = empty(lower, need_input), high = empty(upper, need_input), grad_weight = empty(weight, need_weight);
  if (need_input && g.B * g.C > 0) {  // the gradient of the box is the box of the gradient through the transpose
    const bool winograd = suits_winograd(g, false);
    Plan p = plan(g, true, winograd, dtype);
    run(p,
        {grad_lower.const_data_ptr(), grad_upper.const_data_ptr(), weight.const_data_ptr(), nullptr,
         low.mutable_data_ptr(), high.mutable_data_ptr(), -1, false},
        g.B, winograd, dtype);
  }
  if (need_weight && grad_weight.numel() > 0) {
    lower = torch::stable::contiguous(lower);
    upper = torch::stable::contiguous(upper);
    const bool winograd =
        suits_winograd(g, false) && g.OH * g.OW >= 128 && g.C * g.O <= 8192;  // else too few tiles for too many sums
    Plan p = plan(g, false, winograd, dtype);
    run_weight(
        p, {lower.const_data_ptr(), upper.const_data_ptr(), grad_lower.const_data_ptr(), grad_upper.const_data_ptr()},
        weight.const_data_ptr(), grad_weight.mutable_data_ptr(), g.B, winograd, dtype);
  }
  return {low, high, grad_weight};
}

}  // namespace lipfast

STABLE_TORCH_LIBRARY_IMPL(lipfast, CPU, m) {
  m.impl("interval_conv2d", TORCH_BOX(&lipfast::interval_conv2d));
  m.impl("interval_conv2d_backward", TORCH_BOX(&lipfast::interval_conv2d_backward));
}
