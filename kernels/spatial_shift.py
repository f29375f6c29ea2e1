"""Spatial shift, Triton. Contract: lipfast/ops/spatial_shift.py

A program's tile lies in one group of channels, so all of it moves by one step: that of a number, not of its tile's entries. A
tile of an image whose channels lie last is rows of neighbours before and after the step, hence loads and stores full vectors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipfast.kernels.launch import index_type

NUMBERS = 4096  # of a tile
CHANNELS = 64  # of a tile where they lie last, a full line of memory in half precision
PIXELS = 512  # of a tile, at most
PLANES = 8  # the same where the pixels of a channel lie together


def spatial_shift(x: Tensor, ratio: float = 0.125, back: bool = False) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
    out = torch.empty_like(x)
    B, C, H, W = x.shape
    if out.numel():
        n = round(ratio * C)
        aligned = min(16, n & -n) or 16  # the compiler sees what divides n in a product alone
        J = min(CHANNELS if out.stride(1) == 1 else PLANES, triton.next_power_of_2(max(n, C - 4 * n)))
        T = min(NUMBERS // J, PIXELS)
        tiles = 4 * triton.cdiv(n, J) + triton.cdiv(C - 4 * n, J)
        with torch.cuda.device_of(x):
            spatial_shift_kernel[(tiles * triton.cdiv(B * H * W, T),)](
                x, out, B, C, H, W, n // aligned, -1 if back else 1, *x.stride(), *out.stride(),
                INDEX=index_type(x, out), ALIGNED=aligned, T=T, J=J, num_warps=4, num_stages=1,
            )  # fmt: skip
    return out


@triton.jit
def spatial_shift_kernel(
    x_ptr,  # (B, C, H, W)
    out_ptr,  # (B, C, H, W)
    B, C, H, W, units, step,
    x_b, x_c, x_h, x_w,
    out_b, out_c, out_h, out_w,
    INDEX: tl.constexpr, ALIGNED: tl.constexpr, T: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    n = units * ALIGNED
    moved = tl.cdiv(n, J)
    tiles = 4 * moved + tl.cdiv(C - 4 * n, J)
    tile = tl.program_id(0) % tiles
    group = tl.where(tile < 4 * moved, tile // tl.maximum(moved, 1), 4)  # up, down, left, right, stay
    j = (tile - group * moved) * J + tl.arange(0, J)
    t = (tl.program_id(0) // tiles).to(INDEX) * T + tl.arange(0, T)
    b, h, w = t // (H * W), t // W % H, t % W
    inside = (t < B.to(INDEX) * H * W)[:, None] & (j < tl.where(group < 4, n, C - 4 * n))[None, :]

    down = step * ((group == 0).to(tl.int32) - (group == 1).to(tl.int32))  # to where a pixel reads from
    right = step * ((group == 2).to(tl.int32) - (group == 3).to(tl.int32))
    row, column = (h + down + H) % H, (w + right + W) % W
    c = (group * n + j).to(INDEX)
    value = tl.load(x_ptr + (b * x_b + row * x_h + column * x_w)[:, None] + (c * x_c)[None, :], mask=inside)
    tl.store(out_ptr + (b * out_b + h * out_h + w * out_w)[:, None] + (c * out_c)[None, :], value, mask=inside)


if torch.version.cuda is not None:
    torch.library.register_kernel("lipfast::spatial_shift_pass", "cuda")(spatial_shift)
