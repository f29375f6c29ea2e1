"""beta-Abs with bias and position, Triton. Contract: lipfast/ops/beta_abs.py

Eight planes of folded channels share one plane of bytes, a bit each, so a program visits the same tile of eight planes and
writes its tile of bytes whole. The channels that are not folded are cut into eight planes too. Tiles are pixels x channels, of
any strides; those of an image whose channels lie last load and store full vectors.

Arithmetic is in float32 (float64 for float64), with one rounding at the end. Sums over a tile go to a buffer, which torch
adds up: their order depends on the shapes alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipfast.kernels.launch import index_type
from lipfast.ops.beta_abs import backward_fake, backward_reference, fake, folded, plane

FORWARD = 2048  # bytes of a tile of one plane: a vector for each thread
BACKWARD = 8192  # the same: the more pixels, the fewer partial sums
PIXELS = 512  # of a tile, at most
CHANNELS = 64  # of a tile where they lie last: a full line of memory in half precision
PLANES = 8  # the same where the pixels of a channel lie together


def beta_abs(
    x: Tensor,  # (B, C, ...)
    beta: float = 0.5,
    bias: Tensor | None = None,  # (C,)
    position: Tensor | None = None,  # (H, W)
    keep_signs: bool = True,
) -> tuple[Tensor, Tensor]:  # (B, C, ...), (B, plane, ...)
    out, signs = fake(x, beta, bias, position, keep_signs)
    source, to, bits = (_lines(t) for t in (x, out, signs))
    if out.numel():
        n = folded(beta, x.shape[1])
        parts, options = _cut(to, n, FORWARD)
        with torch.cuda.device_of(x):
            beta_abs_kernel[(parts * options["TILES"],)](
                source, None if bias is None else bias.contiguous(), None if position is None else position.contiguous(),
                to, bits if bits.numel() else None, *_sizes(to, n), *source.stride(), *to.stride(), *bits.stride(),
                INDEX=index_type(source, to, bits), num_warps=4, num_stages=1, **options,
            )  # fmt: skip
    return _whole(to, out), _whole(bits, signs)


def beta_abs_backward(
    grad: Tensor,  # (B, C, ...)
    signs: Tensor,  # (B, plane, ...)
    n: int,
    need_x: bool,
    need_bias: bool,
    need_position: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, C, ...), (C,), (H, W)
    if not grad.numel():
        return backward_reference(grad, signs, n, need_x, need_bias, need_position)
    turned, bias, position = backward_fake(grad, signs, n, need_x, need_bias, need_position)
    source, bits = _lines(grad), _lines(signs)
    to = _lines(turned) if need_x else source
    parts, options = _cut(to, n, BACKWARD)
    B, C, P = source.shape
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    of_bias = grad.new_empty((parts, C), dtype=wide) if need_bias else None
    of_position = grad.new_empty((options["TILES"], B, P), dtype=wide) if need_position else None
    with torch.cuda.device_of(grad):
        beta_abs_backward_kernel[(parts * options["TILES"],)](
            source, bits if bits.numel() else None, to if need_x else None, of_bias, of_position,
            *_sizes(to, n), *source.stride(), *bits.stride(), *to.stride(),
            INDEX=index_type(source, to, bits), num_warps=8, num_stages=1, **options,
        )  # fmt: skip
    if of_bias is not None:
        bias = of_bias.sum(0).to(grad.dtype)
    if of_position is not None:
        position = of_position.sum((0, 1)).to(grad.dtype).view(position.shape)
    return _whole(to, turned) if need_x else turned, bias, position


def _lines(t: Tensor) -> Tensor:
    """(B, C, P), a copy where the pixels have no common stride."""
    return t.flatten(2) if t.ndim > 2 else t[..., None]


def _whole(lines: Tensor, t: Tensor) -> Tensor:
    return t if lines.data_ptr() == t.data_ptr() else t.copy_(lines.view_as(t))


def _cut(x: Tensor, n: int, size: int) -> tuple[int, dict]:
    """How many tiles of T pixels, and into how many of J channels the two planes go; with what they are compiled for."""
    B, C, P = x.shape
    planes = plane(n), plane(C - n)
    J = min(CHANNELS if x.stride(1) == 1 else PLANES, triton.next_power_of_2(max(planes)))
    T = min(size // x.itemsize // J, PIXELS)
    tiles = sum(triton.cdiv(p, J) for p in planes)
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    return triton.cdiv(B * P, T), {"TILES": tiles, "ALIGNED": _aligned(n), "ACC": wide, "T": T, "J": J}


def _sizes(x: Tensor, n: int) -> tuple[int, ...]:
    B, C, P = x.shape
    return B, C, P, n // _aligned(n), plane(n), plane(C - n)


def _aligned(n: int) -> int:
    """The largest of 1, 2, 4, 8, 16 that divides n: the compiler sees it in a product alone."""
    return min(16, n & -n) or 16


@triton.jit
def beta_abs_kernel(
    x_ptr,  # (B, C, P)
    bias_ptr,  # (C,) or None
    position_ptr,  # (P,) or None
    out_ptr,  # (B, C, P)
    signs_ptr,  # (B, plane, P) or None
    B, C, P, units, folding, keeping,
    x_b, x_c, x_p,
    out_b, out_c, out_p,
    signs_b, signs_c, signs_p,
    ACC: tl.constexpr, INDEX: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr, T: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    b, p, pixels = pixels_of(B, P, INDEX, TILES, T)
    j, first, end, width, folds = channels_of(C, units, folding, keeping, ALIGNED, TILES, J)
    from_pixel, to_pixel = b * x_b + p * x_p, b * out_b + p * out_p
    if position_ptr is not None:
        offset = tl.load(position_ptr + p, mask=pixels, other=0.0).to(ACC)[:, None]
    bits = tl.zeros((T, J), tl.int32)
    for k in tl.static_range(8):
        c = first + k * width + j
        inside = pixels[:, None] & ((j < width) & (c < end))[None, :]
        y = tl.load(x_ptr + from_pixel[:, None] + (c.to(INDEX) * x_c)[None, :], mask=inside, other=0.0).to(ACC)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + c, mask=(j < width) & (c < end), other=0.0).to(ACC)[None, :]
        bits |= (inside & (y < 0)).to(tl.int32) << k
        y = tl.where(folds, tl.abs(y), y)
        if position_ptr is not None:
            y += offset
        to = out_ptr + to_pixel[:, None] + (c.to(INDEX) * out_c)[None, :]
        tl.store(to, y.to(out_ptr.dtype.element_ty), mask=inside)
    if signs_ptr is not None:
        to = signs_ptr + (b * signs_b + p * signs_p)[:, None] + (j.to(INDEX) * signs_c)[None, :]
        tl.store(to, bits.to(tl.uint8), mask=pixels[:, None] & ((j < width) & folds)[None, :])


@triton.jit
def beta_abs_backward_kernel(
    grad_ptr,  # (B, C, P)
    signs_ptr,  # (B, plane, P), or None where nothing folds
    turned_ptr,  # (B, C, P) or None
    bias_ptr,  # (parts, C) or None
    position_ptr,  # (TILES, B, P) or None
    B, C, P, units, folding, keeping,
    grad_b, grad_c, grad_p,
    signs_b, signs_c, signs_p,
    turned_b, turned_c, turned_p,
    ACC: tl.constexpr, INDEX: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr, T: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    b, p, pixels = pixels_of(B, P, INDEX, TILES, T)
    j, first, end, width, folds = channels_of(C, units, folding, keeping, ALIGNED, TILES, J)
    from_pixel, to_pixel = b * grad_b + p * grad_p, b * turned_b + p * turned_p
    bits = tl.zeros((T, J), tl.int32)
    if signs_ptr is not None:
        source = signs_ptr + (b * signs_b + p * signs_p)[:, None] + (j.to(INDEX) * signs_c)[None, :]
        bits = tl.load(source, mask=pixels[:, None] & ((j < width) & folds)[None, :], other=0).to(tl.int32)
    total = tl.zeros((T, J), ACC)
    for k in tl.static_range(8):
        c = first + k * width + j
        here = (j < width) & (c < end)
        inside = pixels[:, None] & here[None, :]
        g = tl.load(grad_ptr + from_pixel[:, None] + (c.to(INDEX) * grad_c)[None, :], mask=inside, other=0.0).to(ACC)
        total += g
        g = tl.where((bits >> k) & 1 == 1, -g, g)
        if turned_ptr is not None:
            to = turned_ptr + to_pixel[:, None] + (c.to(INDEX) * turned_c)[None, :]
            tl.store(to, g.to(turned_ptr.dtype.element_ty), mask=inside)
        if bias_ptr is not None:
            tl.store(bias_ptr + (tl.program_id(0) // TILES).to(INDEX) * C + c, tl.sum(g, 0), mask=here)
    if position_ptr is not None:
        tile = (tl.program_id(0) % TILES).to(INDEX)
        tl.store(position_ptr + (tile * B + b) * P + p, tl.sum(total, 1), mask=pixels)


@triton.jit
def pixels_of(B, P, INDEX: tl.constexpr, TILES: tl.constexpr, T: tl.constexpr):
    t = (tl.program_id(0) // TILES).to(INDEX) * T + tl.arange(0, T)
    return t // P, t % P, t < B.to(INDEX) * P


@triton.jit
def channels_of(C, units, folding, keeping, ALIGNED: tl.constexpr, TILES: tl.constexpr, J: tl.constexpr):
    """A tile's place in its planes, the channels from the first to the end that they cut, their width, and if they fold."""
    tile = tl.program_id(0) % TILES
    folds = tile < tl.cdiv(folding, J)
    n = units * ALIGNED
    j = tl.where(folds, tile, tile - tl.cdiv(folding, J)) * J + tl.arange(0, J)
    return j, tl.where(folds, 0, n), tl.where(folds, n, C), tl.where(folds, folding, keeping), folds


if torch.version.cuda is not None:
    torch.library.register_kernel("lipfast::beta_abs_pass", "cuda")(beta_abs)
    torch.library.register_kernel("lipfast::beta_abs_backward", "cuda")(beta_abs_backward)
