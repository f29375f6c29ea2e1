"""What every Triton launcher needs: tiles, the precision of a product, centers and radii, and rounding outward.

The products run on centers and radii that :func:`split` writes once. They then stream into shared memory as they are, W is
loaded once per tile, and only |W| is formed in registers: the register operand of the tensor core. Forming all three there
would repeat that work for every tile of W, and |W| would have to go back to shared memory.

In the interpreter (TRITON_INTERPRET=1) bfloat16 is a bare integer and casts to it truncate. So every kernel widens what it
loads before any arithmetic (UPCAST before a product, where a GPU wants the half operands as they are), and the rounding
below asks of a cast only that it lands on a neighbour.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
FULL = 96  # programs that keep most of a large GPU (132 multiprocessors) busy
_ROUNDED_UP = 1 + 2.0**-20  # a Python float reaches a kernel as the nearest float32; this one is then not below it
_FLAT = (1, 1024)
_TRANSPOSED = (64, 64)


class Tile(NamedTuple):
    """One program's part of a product: ROWS x COLUMNS results, DEPTH terms at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def number(dtype: torch.dtype) -> str:
    """How products of ``dtype`` are formed; float32 follows torch's own setting."""
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "double" if dtype == torch.float64 else "half"


def family(device: torch.device) -> int:
    """9 where warpgroups multiply from shared memory (sm_90, sm_100), 8 for other GPUs, 0 in the interpreter."""
    if INTERPRETED:
        return 0
    return 9 if torch.cuda.get_device_capability(device)[0] in (9, 10) else 8


def choose(tiles: dict[tuple[int, str], list[Tile]], like: Tensor, rows: int, columns: int) -> Tile:
    """The largest tile, first in its list, that is not mostly empty and of which there are enough to fill the GPU."""
    options = tiles[family(like.device), number(like.dtype)]
    fits = lambda t: t.rows < 2 * rows and t.columns < 2 * columns
    fills = lambda t: triton.cdiv(rows, t.rows) * triton.cdiv(columns, t.columns) >= FULL
    return next((t for t in options if fits(t) and fills(t)), options[-1])


def product_options(tile: Tile, like: Tensor, *others: Tensor) -> dict:
    """What every product kernel is compiled for. Offsets take 64 bits only where a tensor needs them."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return {
        "ACC": tl.float64 if like.dtype == torch.float64 else tl.float32,
        "EPS": torch.finfo(wide).eps,
        "TINY": torch.finfo(wide).tiny,
        "PRECISION": "tf32" if number(like.dtype) == "tf32" else "ieee",
        "UPCAST": INTERPRETED,
        "INDEX": index_type(like, *others),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def index_type(*tensors: Tensor) -> tl.dtype:
    # 2^30, not 2^31: offsets may overshoot by a tile before their mask drops them
    reach = lambda t: 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return tl.int64 if max(reach(t) for t in tensors) >= 2**30 else tl.int32


def split(low: Tensor, high: Tensor, gamma: float | None = None, transpose: bool = False) -> tuple[Tensor, Tensor]:
    """(low + high)/2 and (high - low)/2 in the dtype of ``low``; ``transpose`` turns (B, R, S) into (B, S, R).

    With ``gamma`` the radius covers the box around the center as rounded, and gamma times the center's magnitude on top
    (:func:`lipfast.rounding.image`), rounded up.
    """
    low, high = low.contiguous(), high.contiguous()
    B, R, S = low.shape if transpose else (1, 1, low.numel())
    center = low.new_empty(B, S, R) if transpose else torch.empty_like(low)
    radius = torch.empty_like(center)
    rows, columns = _TRANSPOSED if transpose else _FLAT
    if low.numel():
        options = product_options(Tile(rows, columns, 0, 4, 1), low)
        for name in ("PRECISION", "UPCAST"):
            options.pop(name)
        split_kernel[(B * triton.cdiv(R, rows) * triton.cdiv(S, columns),)](
            low, high, center, radius, R, S, above(gamma or 0.0), OUTWARD=gamma is not None, TRANSPOSE=transpose,
            ROWS=rows, COLUMNS=columns, **options,
        )  # fmt: skip
    return center, radius


def above(gamma: float) -> float:
    return gamma * _ROUNDED_UP


@triton.jit
def split_kernel(
    low_ptr,  # (B, R, S)
    high_ptr,  # (B, R, S)
    center_ptr,  # (B, R, S) or (B, S, R)
    radius_ptr,  # (B, R, S) or (B, S, R)
    R, S, gamma,
    ACC: tl.constexpr, EPS: tl.constexpr, TINY: tl.constexpr, INDEX: tl.constexpr, OUTWARD: tl.constexpr,
    TRANSPOSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = center_ptr.dtype.element_ty
    tiles_r, tiles_s = tl.cdiv(R, ROWS), tl.cdiv(S, COLUMNS)
    pid = tl.program_id(0)
    start = (pid // (tiles_r * tiles_s)).to(INDEX) * R * S
    r = (pid // tiles_s % tiles_r * ROWS + tl.arange(0, ROWS)).to(INDEX)
    s = (pid % tiles_s).to(INDEX) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < R)[:, None] & (s < S)[None, :]
    source = start + r[:, None] * S + s[None, :]
    low = tl.load(low_ptr + source, mask=inside, other=0.0).to(ACC)
    high = tl.load(high_ptr + source, mask=inside, other=0.0).to(ACC)

    center = (low * 0.5 + high * 0.5).to(DTYPE)
    if OUTWARD:
        c = center.to(ACC)
        e = tl.maximum(high - c, c - low, propagate_nan=tl.PropagateNan.ALL)
        radius = round_up(e + e * (4 * EPS) + gamma * tl.abs(c) + TINY, DTYPE)
    else:
        radius = (high * 0.5 - low * 0.5).to(DTYPE)

    if TRANSPOSE:
        to = start + s[:, None] * R + r[None, :]
        tl.store(center_ptr + to, tl.trans(center), mask=tl.trans(inside))
        tl.store(radius_ptr + to, tl.trans(radius), mask=tl.trans(inside))
    else:
        tl.store(center_ptr + source, center, mask=inside)
        tl.store(radius_ptr + source, radius, mask=inside)


@triton.jit
def ends(mid, spread, gamma, DTYPE: tl.constexpr, EPS: tl.constexpr, TINY: tl.constexpr, OUTWARD: tl.constexpr):
    """The two ends of the box around ``mid``; the last two lines of rounding.image if OUTWARD."""
    if OUTWARD:
        spread = spread + spread * (2 * gamma) + tl.abs(mid) * (4 * EPS) + TINY
        low, high = round_down(mid - spread, DTYPE), round_up(mid + spread, DTYPE)
    else:
        low, high = (mid - spread).to(DTYPE), (mid + spread).to(DTYPE)
    return low, high


@triton.jit
def round_down(x, DTYPE: tl.constexpr):
    """The largest number of DTYPE that is not above x, if the cast lands on a neighbour of x."""
    y = x.to(DTYPE)
    if DTYPE != x.dtype:  # a half type: the next number below is one step of the bits away
        bits = y.to(tl.int16, bitcast=True)
        below = tl.where(bits > 0, bits - 1, tl.where(bits == 0, -32767, bits + 1)).to(tl.int16)
        y = tl.where(y.to(x.dtype) > x, below, bits).to(DTYPE, bitcast=True)
    return y


@triton.jit
def round_up(x, DTYPE: tl.constexpr):
    """The smallest number of DTYPE that is not below x, if the cast lands on a neighbour of x."""
    y = x.to(DTYPE)
    if DTYPE != x.dtype:
        bits = y.to(tl.int16, bitcast=True)
        over = tl.where(bits >= 0, bits + 1, tl.where(bits == -32768, 1, bits - 1)).to(tl.int16)
        y = tl.where(y.to(x.dtype) < x, over, bits).to(DTYPE, bitcast=True)
    return y
