"""Interval propagation through a two-dimensional convolution, Triton. Contract: lipfast/ops/interval_conv2d.py

An implicit matrix product: W (output channels x terms) times gathered pixels (terms x pixels). Centers and radii lie
channels-last, so that the terms of one tap are contiguous; the pass that forms them turns (C, pixels) around on its way and
so costs no bytes of its own. Each is then read once per tap (from L2), 2 C numbers for 4 C O operations a pixel.

The gradient of the input is a convolution of the same form. Pixels that agree modulo the stride meet the same taps: each
such phase is one launch with its own taps, and no product with an inserted zero is formed.
"""

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipfast import rounding
from lipfast.kernels.interval_linear import sections, sign
from lipfast.kernels.launch import Tile, above, choose, ends, product_options, split

TILES = {
    (9, "half"): [Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 32, 64, 4, 3)],
    (9, "tf32"): [Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3), Tile(64, 32, 32, 4, 3)],
    (9, "ieee"): [Tile(64, 64, 16, 4, 3), Tile(32, 32, 16, 4, 3)],
    (9, "double"): [Tile(32, 32, 16, 4, 3)],
    (8, "half"): [Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 3)],
    (8, "tf32"): [Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3)],
    (8, "ieee"): [Tile(64, 64, 16, 4, 3), Tile(32, 32, 16, 4, 3)],
    (8, "double"): [Tile(32, 32, 16, 4, 3)],
    **{(0, kind): [Tile(32, 16, 16, 4, 1)] for kind in ("half", "tf32", "ieee", "double")},
}
# Fewer channels than a tile is deep: several taps share a step.
FEW_CHANNELS = {
    **{(arch, kind): [Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3)] for arch in (8, 9) for kind in ("half", "tf32")},
    **{(arch, kind): [Tile(32, 32, 16, 4, 3)] for arch in (8, 9) for kind in ("ieee", "double")},
    **{(0, kind): [Tile(32, 16, 16, 4, 1)] for kind in ("half", "tf32", "ieee", "double")},
}
# One tile per kind: the sum over the pixels is cut until the GPU is full.
WEIGHT_TILES = {
    (9, "half"): [Tile(64, 64, 64, 4, 3)],
    (9, "tf32"): [Tile(64, 64, 32, 4, 3)],
    (8, "half"): [Tile(64, 64, 32, 4, 3)],
    (8, "tf32"): [Tile(64, 32, 32, 4, 3)],
    **{(arch, kind): [Tile(32, 32, 16, 4, 3)] for arch in (8, 9) for kind in ("ieee", "double")},
    **{(0, kind): [Tile(32, 16, 16, 4, 1)] for kind in ("half", "tf32", "ieee", "double")},
}


def interval_conv2d(
    lower: Tensor,  # (B, C, H, W)
    upper: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (O, C / groups, KH, KW)
    bias: Tensor | None,  # (O,)
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    outward: bool = False,
) -> tuple[Tensor, Tensor]:  # (B, O, H', W') twice
    O, _, KH, KW = weight.shape
    B, _, H, W = lower.shape
    gamma = rounding.gamma(weight[0].numel(), lower.dtype, lower.device) if outward else None
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip((H, W), (KH, KW), stride, padding, dilation, strict=True)
    ]
    out = lower.new_empty(B, O, *size), lower.new_empty(B, O, *size)
    if out[0].numel():
        w = weight.unflatten(0, (groups, -1)).permute(0, 1, 3, 4, 2).contiguous()  # (G, O/G, KH, KW, C/G)
        sides = [(n, -p, s, d, 0, 1) for n, s, p, d in zip(size, stride, padding, dilation, strict=True)]
        with torch.cuda.device_of(lower):
            _product(*_channels_last(lower, upper, gamma), w, bias, gamma, out, *sides)
    return out


def _channels_last(low: Tensor, high: Tensor, gamma: float | None = None) -> tuple[Tensor, Tensor]:
    """Center and radius as (B, H, W, C)."""
    B, C, H, W = low.shape
    last = [t.permute(0, 2, 3, 1) for t in (low, high)]
    if all(t.is_contiguous() for t in last):
        return split(*last, gamma)
    center, radius = split(low.reshape(B, C, H * W), high.reshape(B, C, H * W), gamma, transpose=True)
    return center.view(B, H, W, C), radius.view(B, H, W, C)


def _product(
    center: Tensor,  # (B, H, W, G C)
    radius: Tensor,  # (B, H, W, G C)
    weight: Tensor,  # (G, N, TH, TW, C)
    bias: Tensor | None,  # (G N,)
    gamma: float | None,
    out: tuple[Tensor, Tensor],  # (B, G N, OH, OW) twice
    rows: tuple[int, ...],  # see interval_conv2d_kernel: (pixels, base, per pixel, per tap, first, every)
    columns: tuple[int, ...],
) -> None:
    (B, H, W, _), (G, N, TH, TW, C) = center.shape, weight.shape
    pixels = B * rows[0] * columns[0]
    if pixels:
        tile = choose(TILES, center, N, G * pixels)
        if tile.depth > C:
            tile = choose(FEW_CHANNELS, center, N, G * pixels)
        grid = (triton.cdiv(N, tile.rows) * triton.cdiv(pixels, tile.columns), G)
        interval_conv2d_kernel[grid](
            weight, center, radius, None if bias is None else bias.contiguous(), *out,
            B, C, H, W, N, *out[0].shape[2:], TH * TW, *rows, *columns, above(gamma or 0.0), OUTWARD=gamma is not None,
            TW=max(TW, 1), FLAT=C < tile.depth, BN=tile.rows, BP=tile.columns, BK=tile.depth,
            **product_options(tile, center, weight, out[0]),
        )  # fmt: skip


def interval_conv2d_backward(
    grad_lower: Tensor,  # (B, O, H', W')
    grad_upper: Tensor,  # (B, O, H', W')
    lower: Tensor,  # (B, C, H, W)
    upper: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (O, C / groups, KH, KW)
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    low, high, grad_weight = (lower.new_empty(0) for _ in range(3))
    if not (need_input or need_weight):
        return low, high, grad_weight
    with torch.cuda.device_of(lower):
        center, radius = _channels_last(grad_lower, grad_upper)
        if need_input:
            low, high = (torch.empty(lower.shape, dtype=lower.dtype, device=lower.device) for _ in range(2))
            if low.numel():
                w = weight.unflatten(0, (groups, -1)).permute(0, 2, 3, 4, 1)  # (G, C/G, KH, KW, O/G)
                geometry = list(zip(lower.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True))
                for rows, tap_rows in _phases(*geometry[0]):
                    for columns, tap_columns in _phases(*geometry[1]):
                        taps = w[:, :, tap_rows, tap_columns].contiguous()
                        _product(center, radius, taps, None, None, (low, high), rows, columns)
        if need_weight:
            inputs = _channels_last(lower, upper)
            grad_weight = _weight_gradient((center, radius), inputs, weight, stride, padding, dilation, groups)
    return low, high, grad_weight


def _phases(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[tuple[tuple[int, ...], slice]]:
    """Per phase of the pixels of one side: its geometry and its taps.

    Pixel y meets output (y + padding - k dilation)/stride where that is whole. Among y = phase, phase + stride, ... the same
    taps k = first, first + period, ... qualify, and the output moves by one per pixel and by -period dilation/stride per tap.
    """
    period = stride // gcd(stride, dilation)
    phases: list[tuple[tuple[int, ...], slice]] = []
    for phase in range(min(stride, size)):
        pixels = (size - phase + stride - 1) // stride
        first = next((k for k in range(min(period, kernel)) if (phase + padding - k * dilation) % stride == 0), kernel)
        base = (phase + padding - first * dilation) // stride
        phases.append(((pixels, base, 1, -(period * dilation // stride), phase, stride), slice(first, None, period)))
    return phases


def _weight_gradient(
    grads: tuple[Tensor, Tensor],  # (B, H', W', O), halves of the sum and of the difference
    inputs: tuple[Tensor, Tensor],  # (B, H, W, C)
    weight: Tensor,  # (O, C / groups, KH, KW)
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:  # (O, C / groups, KH, KW)
    O, C, KH, KW = weight.shape
    B, OH, OW, _ = grads[0].shape
    H, W = inputs[0].shape[1:3]
    N, K = O // groups, KH * KW * C
    w = weight.permute(0, 2, 3, 1).contiguous()  # (O, KH, KW, C)
    if w.numel():
        tile = choose(WEIGHT_TILES, w, N, K)
        programs = triton.cdiv(N, tile.rows) * triton.cdiv(K, tile.columns)
        parts, depth = sections(B * OH * OW, tile.depth, programs * groups)
        partial = w.new_empty(parts, *w.shape, dtype=rounding.accumulator(w.dtype))
        interval_conv2d_weight_kernel[programs, groups, parts](
            *grads, *inputs, w, partial, B * OH * OW, C, H, W, N, K, depth, *stride, *padding, *dilation,
            KW=KW, OH=max(OH, 1), OW=max(OW, 1), BN=tile.rows, BM=tile.columns, BK=tile.depth,
            **product_options(tile, w, *grads, *inputs, partial),
        )  # fmt: skip
        w = partial.sum(0).to(w.dtype)
    return w.permute(0, 3, 1, 2).contiguous()


@triton.jit
def interval_conv2d_kernel(
    weight_ptr,  # (G, N, taps, C)
    center_ptr,  # (B, H, W, G C)
    radius_ptr,  # (B, H, W, G C)
    bias_ptr,  # (G N,) or None
    lower_ptr,  # (B, G N, OH, OW)
    upper_ptr,  # (B, G N, OH, OW)
    B, C, H, W, N, OH, OW, taps,
    # Pixel y of Y reads row y_base + y y_pixel + tap y_tap of the H and writes row y_first + y y_every of the OH.
    Y, y_base, y_pixel, y_tap, y_first, y_every,
    X, x_base, x_pixel, x_tap, x_first, x_every,
    gamma,
    ACC: tl.constexpr, EPS: tl.constexpr, TINY: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    INDEX: tl.constexpr, OUTWARD: tl.constexpr, TW: tl.constexpr, FLAT: tl.constexpr,
    BN: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = lower_ptr.dtype.element_ty
    group = tl.program_id(1)
    tiles_n = tl.cdiv(N, BN)
    n = (tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)).to(INDEX)
    p = tl.program_id(0) // tiles_n * BP + tl.arange(0, BP)
    valid = p < B * Y * X
    b, y, x = p // (Y * X), p // X % Y, p % X
    row, column = y_base + y * y_pixel, x_base + x * x_pixel
    GC = tl.num_programs(1) * C
    # The pixel under tap (0, 0); it may lie outside the image, but is read only where `inside`.
    x_at = ((b.to(INDEX) * H + row) * W + column) * GC + group * C
    w_at = ((group * N + n % N) * taps * C)[:, None]
    k = tl.arange(0, BK)
    center = tl.zeros((BN, BP), ACC)
    radius = tl.zeros((BN, BP), ACC)
    chunks = tl.cdiv(C, BK)
    steps = tl.cdiv(taps * C, BK) if FLAT else taps * chunks
    for step in range(0, steps):
        if FLAT:  # few channels: several taps in one step
            tap, c = (step * BK + k) // C, (step * BK + k) % C
            wanted = (step * BK + k) < taps * C
            dy, dx = (tap // TW * y_tap)[:, None], (tap % TW * x_tap)[:, None]
        else:
            tap, c = step // chunks, step % chunks * BK + k
            wanted = c < C
            dy, dx = tap // TW * y_tap, tap % TW * x_tap
        row_t, column_t = row[None, :] + dy, column[None, :] + dx
        inside = (row_t >= 0) & (row_t < H) & (column_t >= 0) & (column_t < W) & valid[None, :] & wanted[:, None]
        at = x_at[None, :] + ((dy * W + dx) * GC + c[:, None])
        w = tl.load(weight_ptr + w_at + (tap * C + c)[None, :], mask=wanted[None, :], other=0.0)
        m = tl.load(center_ptr + at, mask=inside, other=0.0)
        r = tl.load(radius_ptr + at, mask=inside, other=0.0)
        if UPCAST:
            w, m, r = w.to(ACC), m.to(ACC), r.to(ACC)
        center = tl.dot(w, m, center, input_precision=PRECISION, out_dtype=ACC)
        radius = tl.dot(tl.abs(w), r, radius, input_precision=PRECISION, out_dtype=ACC)
    if bias_ptr is not None:
        center += tl.load(bias_ptr + group * N + n, mask=n < N, other=0.0).to(ACC)[:, None]
    low, high = ends(center, radius, gamma, DTYPE, EPS, TINY, OUTWARD)
    pixel = b.to(INDEX) * tl.num_programs(1) * N * OH * OW + (y_first + y * y_every) * OW + x_first + x * x_every
    to = (group * N + n)[:, None] * OH * OW + pixel[None, :]
    kept = (n < N)[:, None] & valid[None, :]
    tl.store(lower_ptr + to, low, mask=kept)
    tl.store(upper_ptr + to, high, mask=kept)


@triton.jit
def interval_conv2d_weight_kernel(
    grad_center_ptr,  # (B, OH, OW, G N)
    grad_radius_ptr,  # (B, OH, OW, G N)
    center_ptr,  # (B, H, W, G C)
    radius_ptr,  # (B, H, W, G C)
    weight_ptr,  # (G, N, K), K = KH KW C
    out_ptr,  # (parts, G, N, K)
    pixels, C, H, W, N, K, depth, y_stride, x_stride, y_padding, x_padding, y_dilation, x_dilation,
    ACC: tl.constexpr, EPS: tl.constexpr, TINY: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    INDEX: tl.constexpr, KW: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    group, part = tl.program_id(1), tl.program_id(2)
    GN, GC = tl.num_programs(1) * N, tl.num_programs(1) * C
    tiles_n = tl.cdiv(N, BN)
    n = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    k = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    tap, c = k // C, k % C
    dy, dx = tap // KW * y_dilation - y_padding, tap % KW * x_dilation - x_padding
    x_at = (dy * W + dx) * GC + group * C + c
    center = tl.zeros((BN, BM), ACC)
    radius = tl.zeros((BN, BM), ACC)
    last = min(pixels, (part + 1) * depth)
    for start in range(part * depth, last, BK):
        p = start + tl.arange(0, BK)
        valid = p < last
        y, x = p // OW % OH * y_stride, p % OW * x_stride
        row, column = y[:, None] + dy[None, :], x[:, None] + dx[None, :]
        inside = (row >= 0) & (row < H) & (column >= 0) & (column < W) & valid[:, None] & (k < K)[None, :]
        first = (((p // (OH * OW)).to(INDEX) * H + y) * W + x) * GC
        g_at = p.to(INDEX)[None, :] * GN + (group * N + n)[:, None]
        seen = valid[None, :] & (n < N)[:, None]
        gc = tl.load(grad_center_ptr + g_at, mask=seen, other=0.0)
        gr = tl.load(grad_radius_ptr + g_at, mask=seen, other=0.0)
        m = tl.load(center_ptr + first[:, None] + x_at[None, :], mask=inside, other=0.0)
        r = tl.load(radius_ptr + first[:, None] + x_at[None, :], mask=inside, other=0.0)
        if UPCAST:
            gc, gr, m, r = gc.to(ACC), gr.to(ACC), m.to(ACC), r.to(ACC)
        center = tl.dot(gc, m, center, input_precision=PRECISION, out_dtype=ACC)
        radius = tl.dot(gr, r, radius, input_precision=PRECISION, out_dtype=ACC)
    at = (group * N + n)[:, None] * K + k[None, :]
    kept = (n < N)[:, None] & (k < K)[None, :]
    w = tl.load(weight_ptr + at, mask=kept, other=0.0).to(ACC)
    total = 2 * (center + sign(w) * radius)  # the gradients came in halves
    tl.store(out_ptr + part.to(INDEX) * GN * K + at, total, mask=kept)


if torch.version.cuda is not None:
    torch.library.register_kernel("lipfast::interval_conv2d", "cuda")(interval_conv2d)
    torch.library.register_kernel("lipfast::interval_conv2d_backward", "cuda")(interval_conv2d_backward)
