"""Power iteration on a two-dimensional convolution, Triton. Contract: lipfast/ops/conv2d_norm_estimate.py

The convolutions are torch's. What lies between two of them, from the mask to the division by the largest entry, is one launch
where a program holds a whole sample, and two where a sample is cut into chunks: the first measures every chunk, the second
joins the measures, in the same order in every program, and scales. Nothing is read back, so a CUDA graph can hold all of it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipfast.kernels.launch import FULL, index_type
from lipfast.ops.conv2d_norm_estimate import _convolve, _gradients, fake, reference

CHUNK = 4096  # numbers of a sample that one program takes
WHOLE = 32768  # the same where the samples alone fill the GPU; more would not stay in registers
PER_WARP = 512


def conv2d_norm_estimate(
    weight: Tensor,  # (O, C / groups, KH, KW), or with B in front
    input_mask: Tensor | None,  # (B or 1, C, H, W)
    output_mask: Tensor | None,  # (B or 1, O, H', W')
    start: Tensor | None,  # (B or 1, C, H, W)
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (B,), (B, O, H', W'), (B, C, H, W)
    where = (stride, padding, dilation, groups)
    if weight.dtype == torch.float64:
        return reference(weight, input_mask, output_mask, start, input_size, *where, iterations)
    sigma, left, right = fake(weight, input_mask, output_mask, start, input_size, *where, iterations)
    if sigma.numel():
        # Contiguous factors give contiguous products, in the order of the masks.
        wide = weight.to(right.dtype).contiguous()
        input_mask, output_mask = (None if m is None else m.contiguous() for m in (input_mask, output_mask))
        with torch.cuda.device_of(weight):
            _scale(torch.zeros_like(right[:1]) if start is None else start.contiguous(), input_mask, right)
            for _ in range(iterations):
                left = _convolve(right, wide, *where).contiguous()
                _scale(left, output_mask, left)
                right = _gradients(True, left, right, wide, *where).contiguous()
                _scale(right, input_mask, right)
            _scale(right, None, right, unit=True)
            left = _convolve(right, wide, *where).contiguous()
            _scale(left, output_mask, left, unit=True, sigma=sigma)
    return sigma, left, right


def _scale(
    x: Tensor,  # (B or 1, ...)
    mask: Tensor | None,  # (B or 1, ...)
    out: Tensor,  # (B, ...), may be x
    unit: bool = False,
    sigma: Tensor | None = None,  # (B,)
) -> None:
    """``out`` = mask x over its length if ``unit``, else over its largest entry (random where that is 0 or not finite)."""
    B, N = len(out), out[0].numel()
    block = triton.next_power_of_2(N)
    if block > (WHOLE if B >= FULL else CHUNK):
        block = CHUNK
    chunks = triton.cdiv(N, block)
    strides = [0 if t is None or len(t) == 1 else N for t in (x, mask)]
    warps = min(32, max(1, block // PER_WARP))
    options = {"UNIT": unit, "INDEX": index_type(out), "BLOCK": block, "num_warps": warps, "num_stages": 1}
    parts = None
    if chunks > 1:
        parts = out.new_empty(B, 2, chunks)
        conv2d_norm_parts_kernel[(B * chunks,)](x, mask, parts, N, *strides, chunks, **options)
    conv2d_norm_scale_kernel[(B * chunks,)](
        x, mask, parts, out, sigma, N, *strides, chunks, PARTS=triton.next_power_of_2(chunks), **options
    )


@triton.jit
def conv2d_norm_parts_kernel(
    x_ptr,  # (B or 1, N)
    mask_ptr,  # (B or 1, N) or None
    parts_ptr,  # (B, 2, chunks): the largest magnitude of a chunk, and the sum of its squares, each scaled for itself
    N, x_stride, mask_stride, chunks,
    UNIT: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, chunk = (tl.program_id(0) // chunks).to(INDEX), tl.program_id(0) % chunks
    k = chunk * BLOCK + tl.arange(0, BLOCK)
    x = masked(x_ptr, mask_ptr, b, k, N, x_stride, mask_stride)
    most = largest(x)
    tl.store(parts_ptr + 2 * b * chunks + chunk, most)
    if UNIT:
        x *= scale_of(most)
        tl.store(parts_ptr + (2 * b + 1) * chunks + chunk, tl.sum(x * x, 0))


@triton.jit
def conv2d_norm_scale_kernel(
    x_ptr,  # (B or 1, N)
    mask_ptr,  # (B or 1, N) or None
    parts_ptr,  # (B, 2, chunks), or None where a program holds a sample
    out_ptr,  # (B, N), may be x
    sigma_ptr,  # (B,) or None
    N, x_stride, mask_stride, chunks,
    UNIT: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    b, chunk = (tl.program_id(0) // chunks).to(INDEX), tl.program_id(0) % chunks
    k = chunk * BLOCK + tl.arange(0, BLOCK)
    x = masked(x_ptr, mask_ptr, b, k, N, x_stride, mask_stride)
    j = tl.arange(0, PARTS)
    if parts_ptr is None:
        most = largest(x)
    else:
        each = tl.load(parts_ptr + 2 * b * chunks + j, mask=j < chunks, other=0.0)
        most = largest(each)
    scale = scale_of(most)
    x *= scale
    to = out_ptr + b * N + k
    if UNIT:
        if parts_ptr is None:
            total = tl.sum(x * x, 0)
        else:
            ratio = tl.div_rn(scale, scale_of(each))
            total = tl.sum(ratio * ratio * tl.load(parts_ptr + (2 * b + 1) * chunks + j, mask=j < chunks, other=0.0), 0)
        length = tl.sqrt_rn(total)
        tl.store(to, x * tl.div_rn(1.0, tl.where(length == 0, 1.0, length)), mask=k < N)
        if sigma_ptr is not None:
            tl.store(sigma_ptr + b, tl.div_rn(length, scale).to(sigma_ptr.dtype.element_ty), mask=chunk == 0)
    elif (most > 0) & (most < float("inf")):
        tl.store(to, x * tl.div_rn(1.0, most * scale), mask=k < N)
    else:
        spare = random(k)
        if mask_ptr is not None:
            spare *= tl.load(mask_ptr + b * mask_stride + k, mask=k < N, other=0).to(tl.float32)
        tl.store(to, spare, mask=k < N)


@triton.jit
def masked(x_ptr, mask_ptr, b, k, N, x_stride, mask_stride):
    x = tl.load(x_ptr + b * x_stride + k, mask=k < N, other=0.0).to(tl.float32)
    if mask_ptr is not None:  # a product, so that a NaN stays one
        x *= tl.load(mask_ptr + b * mask_stride + k, mask=k < N, other=0).to(tl.float32)
    return x


@triton.jit
def largest(x):
    """The largest magnitude. Bits of magnitudes are ordered as the numbers are, with NaN on top."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(most):
    """The power of two that brings ``most`` near 1, so that no square over- or underflows; NaN for NaN and Inf."""
    exponent = most.to(tl.int32, bitcast=True) >> 23
    scale = ((254 - tl.minimum(tl.maximum(exponent, 1), 253)) << 23).to(tl.float32, bitcast=True)
    return tl.where(most < float("inf"), scale, float("nan"))


@triton.jit
def random(k):
    """Entry k of _random in lipfast/ops/spectral_norm_estimate.py."""
    bits = (k + 1).to(tl.uint32)
    bits = ((bits >> 16) ^ bits) * 0x7FEB352D
    bits = ((bits >> 15) ^ bits) * 0x31848BAB
    bits = ((bits >> 14) ^ bits) * 0x2C1B3C6D
    return ((bits >> 8) | 1).to(tl.float32) * (2.0**-23) - 1


if torch.version.cuda is not None:
    torch.library.register_kernel("lipfast::conv2d_norm_estimate", "cuda")(conv2d_norm_estimate)
