"""Interval propagation through a linear layer, Triton. Contract: lipfast/ops/interval_linear.py

Every kernel forms the transposed result, so that W is the left operand, which a warpgroup may take from registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipfast import rounding
from lipfast.kernels.launch import FULL, Tile, above, choose, ends, number, product_options, split

# Two accumulators of rows x columns. On sm_90: 128 of 255 registers a thread, 48 KB of shared memory a stage.
TILES = {
    (9, "half"): [Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4), Tile(64, 32, 64, 4, 4)],
    (9, "tf32"): [Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 4), Tile(64, 32, 32, 4, 4)],
    (9, "ieee"): [Tile(64, 64, 16, 4, 3), Tile(32, 32, 16, 4, 3)],
    (9, "double"): [Tile(32, 32, 16, 4, 3)],
    (8, "half"): [Tile(128, 64, 64, 8, 3), Tile(64, 32, 64, 4, 3)],
    (8, "tf32"): [Tile(128, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3)],
    (8, "ieee"): [Tile(64, 64, 16, 4, 3), Tile(32, 32, 16, 4, 3)],
    (8, "double"): [Tile(32, 32, 16, 4, 3)],
    **{(0, kind): [Tile(32, 16, 16, 4, 1)] for kind in ("half", "tf32", "ieee", "double")},
}
# Four operands a stage instead of three.
WEIGHT_TILES = {
    **TILES,
    (9, "half"): [Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3)],
    (9, "tf32"): [Tile(128, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3)],
    (8, "half"): [Tile(128, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3)],
    (8, "tf32"): [Tile(128, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3)],
}
GROUP = 8  # tiles of W that programs in flight together share in L2


def interval_linear(
    lower: Tensor,  # (*, I)
    upper: Tensor,  # (*, I)
    weight: Tensor,  # (O, I)
    bias: Tensor | None = None,  # (O,)
    outward: bool = False,
) -> tuple[Tensor, Tensor]:  # (*, O) twice
    gamma = rounding.gamma(weight.shape[1], lower.dtype, lower.device) if outward else None
    with torch.cuda.device_of(lower):
        center, radius = split(lower, upper, gamma)
        return _product(center, radius, weight.contiguous(), bias, gamma)


def _product(
    center: Tensor,  # (*, K)
    radius: Tensor,  # (*, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    gamma: float | None,
) -> tuple[Tensor, Tensor]:  # (*, N) twice
    N, K = weight.shape
    lower, upper = (center.new_empty(*center.shape[:-1], N) for _ in range(2))
    if lower.numel():
        M = lower.numel() // N
        tile = choose(TILES, center, N, M)
        grid = (triton.cdiv(N, tile.rows) * triton.cdiv(M, tile.columns),)
        interval_linear_kernel[grid](
            weight, center, radius, None if bias is None else bias.contiguous(), lower, upper,
            M, N, K, *weight.stride(), above(gamma or 0.0), OUTWARD=gamma is not None,
            BN=tile.rows, BM=tile.columns, BK=tile.depth, GROUP=GROUP, **product_options(tile, center, weight, lower),
        )  # fmt: skip
    return lower, upper


def interval_linear_backward(
    grad_lower: Tensor,  # (*, O)
    grad_upper: Tensor,  # (*, O)
    lower: Tensor,  # (*, I)
    upper: Tensor,  # (*, I)
    weight: Tensor,  # (O, I)
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    low, high, grad_weight = (lower.new_empty(0) for _ in range(3))
    with torch.cuda.device_of(lower):
        if need_input:  # the halves of both splits are those of dlower, dupper = (tm -+ tr)/2
            center, radius = split(grad_lower, grad_upper)
            low, high = _product(center, radius, weight.contiguous().mT, None, None)
        if need_weight:
            grad_weight = _weight_gradient(_columns(grad_lower, grad_upper), _columns(lower, upper), weight.contiguous())
    return low, high, grad_weight


def _columns(low: Tensor, high: Tensor) -> list[Tensor]:  # (*, S) -> (S, M) twice, M = the rows together
    """Center and radius with the summed dimension last. tf32 wants it contiguous in memory; 16-bit types do not care."""
    S = low.shape[-1]
    M = low[..., 0].numel() if S else 0
    if number(low.dtype) == "tf32":
        return [t[0] for t in split(low.reshape(1, M, S), high.reshape(1, M, S), transpose=True)]
    return [t.reshape(M, S).mT for t in split(low, high)]


def _weight_gradient(
    grads: list[Tensor],  # (O, M), halves of the sum and of the difference
    inputs: list[Tensor],  # (I, M)
    weight: Tensor,  # (O, I)
) -> Tensor:  # (O, I)
    (O, I), M = weight.shape, grads[0].shape[1]
    out = torch.empty_like(weight)
    if out.numel():
        tile = choose(WEIGHT_TILES, weight, O, I)
        programs = triton.cdiv(O, tile.rows) * triton.cdiv(I, tile.columns)
        parts, depth = sections(M, tile.depth, programs)
        partial = out if parts == 1 else weight.new_empty(parts, O, I, dtype=rounding.accumulator(weight.dtype))
        interval_linear_weight_kernel[programs, parts](
            *grads, *inputs, weight, partial, O, I, M, depth, *grads[0].stride(), *inputs[0].stride(),
            BN=tile.rows, BM=tile.columns, BK=tile.depth, GROUP=GROUP,
            **product_options(tile, weight, *grads, *inputs, partial),
        )  # fmt: skip
        if parts > 1:
            out = partial.sum(0).to(weight.dtype)
    return out


def sections(terms: int, depth: int, programs: int) -> tuple[int, int]:
    """Into how many parts, of how many terms, a long sum is cut so that the GPU is full. The sizes alone decide."""
    parts = max(1, min(2 * FULL // programs, terms // (8 * depth)))
    length = triton.cdiv(triton.cdiv(terms, parts), depth) * depth
    return max(1, triton.cdiv(terms, length) if length else 1), length


@triton.jit
def interval_linear_kernel(
    weight_ptr,  # (N, K) by its strides
    center_ptr,  # (M, K)
    radius_ptr,  # (M, K)
    bias_ptr,  # (N,) or None
    lower_ptr,  # (M, N)
    upper_ptr,  # (M, N)
    M, N, K, weight_row, weight_column, gamma,
    ACC: tl.constexpr, EPS: tl.constexpr, TINY: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    INDEX: tl.constexpr, OUTWARD: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = lower_ptr.dtype.element_ty
    n, m = tile_of(tl.program_id(0), N, M, BN, BM, GROUP, INDEX)
    k = tl.arange(0, BK)
    # Rows past the end wrap around to valid ones: no mask in the loop, and their results are not stored.
    w_at = (n % N)[:, None] * weight_row + (k * weight_column)[None, :]
    x_at = (m % M)[None, :] * K + k[:, None]
    center = tl.zeros((BN, BM), ACC)
    radius = tl.zeros((BN, BM), ACC)
    for start in range(0, K, BK):
        inside = k < K - start
        w = tl.load(weight_ptr + w_at, mask=inside[None, :], other=0.0)
        c = tl.load(center_ptr + x_at, mask=inside[:, None], other=0.0)
        r = tl.load(radius_ptr + x_at, mask=inside[:, None], other=0.0)
        if UPCAST:
            w, c, r = w.to(ACC), c.to(ACC), r.to(ACC)
        center = tl.dot(w, c, center, input_precision=PRECISION, out_dtype=ACC)
        radius = tl.dot(tl.abs(w), r, radius, input_precision=PRECISION, out_dtype=ACC)
        weight_ptr += BK * weight_column
        center_ptr += BK
        radius_ptr += BK
    if bias_ptr is not None:
        center += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(ACC)[:, None]
    low, high = ends(center, radius, gamma, DTYPE, EPS, TINY, OUTWARD)
    to = n[:, None] + m[None, :] * N
    kept = (n < N)[:, None] & (m < M)[None, :]
    tl.store(lower_ptr + to, low, mask=kept)
    tl.store(upper_ptr + to, high, mask=kept)


@triton.jit
def interval_linear_weight_kernel(
    grad_center_ptr,  # (O, M) by its strides, as are the next three
    grad_radius_ptr,  # (O, M)
    center_ptr,  # (I, M)
    radius_ptr,  # (I, M)
    weight_ptr,  # (O, I)
    out_ptr,  # (parts, O, I)
    O, I, M, depth, grad_row, grad_column, row, column,
    ACC: tl.constexpr, EPS: tl.constexpr, TINY: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    INDEX: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    o, i = tile_of(tl.program_id(0), O, I, BN, BM, GROUP, INDEX)
    part = tl.program_id(1)
    k = tl.arange(0, BK)
    g_at = (o % O)[:, None] * grad_row + (part * depth + k).to(INDEX)[None, :] * grad_column
    x_at = (i % I)[None, :] * row + (part * depth + k).to(INDEX)[:, None] * column
    center = tl.zeros((BN, BM), ACC)
    radius = tl.zeros((BN, BM), ACC)
    for start in range(part * depth, min(M, (part + 1) * depth), BK):
        inside = k < M - start
        gc = tl.load(grad_center_ptr + g_at, mask=inside[None, :], other=0.0)
        gr = tl.load(grad_radius_ptr + g_at, mask=inside[None, :], other=0.0)
        c = tl.load(center_ptr + x_at, mask=inside[:, None], other=0.0)
        r = tl.load(radius_ptr + x_at, mask=inside[:, None], other=0.0)
        if UPCAST:
            gc, gr, c, r = gc.to(ACC), gr.to(ACC), c.to(ACC), r.to(ACC)
        center = tl.dot(gc, c, center, input_precision=PRECISION, out_dtype=ACC)
        radius = tl.dot(gr, r, radius, input_precision=PRECISION, out_dtype=ACC)
        grad_center_ptr += BK * grad_column
        grad_radius_ptr += BK * grad_column
        center_ptr += BK * column
        radius_ptr += BK * column
    at = o[:, None] * I + i[None, :]
    kept = (o < O)[:, None] & (i < I)[None, :]
    w = tl.load(weight_ptr + at, mask=kept, other=0.0).to(ACC)
    total = 2 * (center + sign(w) * radius)  # the gradients came in halves
    tl.store(out_ptr + part.to(INDEX) * O * I + at, total.to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit
def tile_of(pid, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, INDEX: tl.constexpr):
    """Row and column indices of a program, in an order that keeps neighbours in time close in both."""
    tiles_r, tiles_c = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    first = pid // (GROUP * tiles_c) * GROUP
    size = min(tiles_r - first, GROUP)
    row = first + pid % (GROUP * tiles_c) % size
    column = pid % (GROUP * tiles_c) // size
    return (row * ROWS + tl.arange(0, ROWS)).to(INDEX), (column * COLUMNS + tl.arange(0, COLUMNS)).to(INDEX)


@triton.jit
def sign(w):
    return tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, w))


if torch.version.cuda is not None:
    torch.library.register_kernel("lipfast::interval_linear", "cuda")(interval_linear)
    torch.library.register_kernel("lipfast::interval_linear_backward", "cuda")(interval_linear_backward)
