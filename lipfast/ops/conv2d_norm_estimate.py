"""Power iteration on a two-dimensional convolution: a lower estimate of its spectral norm.

With D_in and D_out the masks and A = D_out W D_in,

    u <- A v / ||A v||,   v <- A^T u / ||A^T u||,   and at the end   sigma = ||A v||  with  ||v|| = 1,

so sigma <= ||A|| in real arithmetic after any number of steps. A is never formed: W is one convolution for all samples, A^T
its transpose. Masks per sample are those of Huang et al. 2021, https://arxiv.org/abs/2111.01395, section 4.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast import rounding
from lipfast.ops._arguments import check_alike, check_leading, check_mask, check_shape
from lipfast.ops.interval_conv2d import _output_size, _pair, geometry
from lipfast.ops.spectral_norm_estimate import _random

_PART = 2**20  # numbers of an image that a thread of a CPU takes at once


def conv2d_norm_estimate(
    weight: Tensor,  # (*, O, C / groups, kernel height, kernel width)
    input_size: int | Sequence[int],  # H, W
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    input_mask: Tensor | None = None,  # (*, C, H, W)
    output_mask: Tensor | None = None,  # (*, O, H', W')
    start: Tensor | None = None,  # (*, C, H, W)
    iterations: int = 10,
) -> tuple[Tensor, Tensor]:  # (*), (*, C, H, W)
    """A lower estimate of the largest singular value of ``x -> conv2d(x, weight, ...)`` with zero padding.

    Args:
        weight, stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`, "same" and "valid" padding
            included. Leading dimensions of weight, masks and start are broadcast; a weight without any serves all samples.
        input_size: height and width of the image.
        input_mask, output_mask: bool; where False, the input or output counts as zero.
        start: where to begin, of any length: the ``right`` of an earlier call, or one image for all samples. A start that
            holds a NaN or Inf or that its mask leaves zero is replaced by a fixed random one (a hash of the index).
        iterations: 0 or more; each takes a convolution and a transposed one.

    Returns:
        ``(sigma, right)``: the estimate and the unit vector that attains it (zero where the mask leaves nothing), detached.

    Dtypes: float64, float32, and bfloat16/float16 computed in float32; CPU and CUDA.
    Raises: ValueError if a shape, dtype, device, the geometry does not fit or iterations is negative; the message names the
        argument.
    Soundness: none; see :func:`lipfast.conv2d_norm_bound`. Exactly 0 for a zero weight and where a mask leaves nothing. NaN
        or Inf in the weight gives NaN.
    Gradient: to the weight, with the vectors held constant; once they have converged, that of the norm.

    >>> conv2d_norm_estimate(torch.ones(1, 1, 1, 2), (1, 2))[0]
    tensor(1.4142)
    """
    name = "conv2d_norm_estimate"
    check_alike(name, weight=weight, start=start)
    size, where, output = convolution(name, weight, input_size, stride, padding, dilation, groups)
    image = [weight.shape[-3] * groups, *size]
    check_mask(name, "input_mask", input_mask, weight, ("*", *image))
    check_mask(name, "output_mask", output_mask, weight, ("*", *output))
    if start is not None:
        check_shape(name, "start", start, ("*", *image))
    maps = {"input_mask": input_mask, "output_mask": output_mask, "start": start}
    leading = [weight.shape[:-4], *(None if t is None else t.shape[:-3] for t in maps.values())]
    check_leading(name, **dict(zip(("weight", *maps), leading, strict=True)))
    if iterations < 0:
        raise ValueError(f"{name}: iterations must be 0 or more, got {iterations}")
    lead = torch.broadcast_shapes(*(sizes for sizes in leading if sizes is not None))
    kernel = weight.reshape(weight.shape[-4:]) if weight.shape[:-4].numel() == 1 else _flat(weight, lead, 4)
    flat = [None if t is None else _flat(t, lead, 3) for t in maps.values()]
    sigma, _, right = torch.ops.lipfast.conv2d_norm_estimate(kernel, *flat, size, *where, groups, iterations)
    return sigma.reshape(lead), right.detach().to(weight.dtype).reshape(*lead, *image)


def convolution(op, weight, input_size, stride, padding, dilation, groups):
    """The sizes (H, W) and (O, H', W'), and stride, padding and dilation as pairs, all checked."""
    check_shape(op, "weight", weight, ("*", "O", "C/groups", "kernel height", "kernel width"))
    if 0 in weight.shape[-4:]:
        raise ValueError(f"{op}: weight must have no empty channel or kernel dimension, got {tuple(weight.shape)}")
    size = _pair(op, "input_size", input_size, 1)
    entry = weight.new_empty(())  # only shapes count below
    kernel = entry.expand(weight.shape[-4:])
    image = entry.expand(1, weight.shape[-3] * groups if isinstance(groups, int) and groups > 0 else 1, *size)
    where = geometry(op, image, kernel, stride, padding, dilation, groups)
    return size, where, [weight.shape[-4], *_output_size(image, kernel, *where)]


# One leading dimension, of size 1 where the tensor serves all samples.
def _flat(t: Tensor, lead: torch.Size, rest: int) -> Tensor:
    inner = t.shape[-rest:]
    return t.reshape(1, *inner) if t.shape[:-rest].numel() == 1 else t.expand(*lead, *inner).reshape(lead.numel(), *inner)


def reference(
    weight: Tensor,  # (O, C / groups, kernel height, kernel width), or with B in front
    input_mask: Tensor | None,  # (B or 1, C, H, W)
    output_mask: Tensor | None,  # (B or 1, O, H', W')
    start: Tensor | None,  # (B or 1, C, H, W)
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (B,), (B, O, H', W'), (B, C, H, W), the last two constant
    where = (stride, padding, dilation, groups)
    _, left, right = fake(weight, input_mask, output_mask, start, input_size, *where, iterations)
    wide = weight.to(left.dtype)
    input_mask, output_mask = (None if m is None else m.to(wide.dtype) for m in (input_mask, output_mask))
    push = lambda v: _masked(_convolve(v, wide, *where), output_mask)
    with torch.no_grad():
        spare_left, spare_right = (_random(t.shape[1:].numel(), wide).view(t.shape[1:]) for t in (left, right))
        spare_left, spare_right = _masked(spare_left, output_mask), _masked(spare_right, input_mask).expand_as(right)
        right = spare_right if start is None else _direction(_masked(start.to(wide.dtype), input_mask), spare_right)
        for _ in range(iterations):
            left = _direction(push(right), spare_left)
            right = _direction(_masked(_gradients(True, left, right, wide, *where), input_mask), spare_right)
        right = _unit(right)
    image = push(right)
    left = _unit(image.detach())
    return (left * image).sum((1, 2, 3)).to(weight.dtype), left, right


def in_parts(
    weight: Tensor,
    input_mask: Tensor | None,
    output_mask: Tensor | None,
    start: Tensor | None,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference``, on a CPU of so many samples at a time that what lies between two convolutions stays in its cache."""
    rest = (input_size, stride, padding, dilation, groups, iterations)
    out = fake(weight, input_mask, output_mask, start, *rest)
    parts = _parts(*out[1:])
    if len(parts) == 1:
        return reference(weight, input_mask, output_mask, start, *rest)
    for part in parts:
        of_input, of_output, first = (_part(t, part) for t in (input_mask, output_mask, start))
        answer = reference(weight[part] if weight.ndim == 5 else weight, of_input, of_output, first, *rest)
        for whole, piece in zip(out, answer, strict=True):
            whole[part] = piece
    return out


def _parts(left: Tensor, right: Tensor) -> list[slice]:
    numbers, B = max(left[:1].numel(), right[:1].numel(), 1), len(right)
    step = max(1, _PART * torch.get_num_threads() // numbers) if right.device.type == "cpu" else max(B, 1)
    return [slice(first, first + step) for first in range(0, max(B, 1), step)]


def _part(t: Tensor | None, part: slice) -> Tensor | None:
    return t if t is None or len(t) == 1 else t[part]


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask  # a product, so that a NaN stays one


# The largest entry is 1: no norm of any step over- or underflows, and one pass over the data suffices.
def _direction(x: Tensor, spare: Tensor) -> Tensor:
    largest = x.abs().amax((1, 2, 3), keepdim=True)
    return torch.where(largest.isfinite() & (largest > 0), x / largest, spare)


def _unit(x: Tensor) -> Tensor:
    x = x / _or_one(x.abs().amax((1, 2, 3), keepdim=True))
    return x / _or_one(x.square().sum((1, 2, 3), keepdim=True).sqrt())


def _or_one(size: Tensor) -> Tensor:
    return torch.where(size == 0, 1.0, size)


# Each sample's own weight becomes a group of channels of one image.
def _convolve(x: Tensor, weight: Tensor, stride, padding, dilation, groups) -> Tensor:
    if weight.ndim == 4:
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)
    out = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), None, stride, padding, dilation, groups * len(x))
    return out.unflatten(1, (len(x), -1))[0]


def _gradients(to_image: bool, flow: Tensor, x: Tensor, weight: Tensor, stride, padding, dilation, groups) -> Tensor:
    """What reaches the image (the transposed convolution of ``flow``) or the weight."""
    shape = x.shape if to_image else weight.shape
    if weight.ndim == 5:
        flow, x = (t.reshape(1, -1, *t.shape[2:]) for t in (flow, x))
        weight, groups = weight.flatten(0, 1), groups * weight.shape[0]
    need = [to_image, not to_image, False]
    grads = torch.ops.aten.convolution_backward(flow, x, weight, None, stride, padding, dilation, False, [0, 0], groups, need)
    return grads[0 if to_image else 1].reshape(shape)


def fake(weight, input_mask, output_mask, start, input_size, stride, padding, dilation, groups, iterations):
    leads = [t.shape[:1] for t in (input_mask, output_mask, start) if t is not None]
    B = torch.broadcast_shapes((1,), weight.shape[:-4], *leads)[0]
    kernel = weight[0] if weight.ndim == 5 else weight
    dtype = rounding.accumulator(weight.dtype)
    right = weight.new_empty(B, kernel.shape[1] * groups, *input_size, dtype=dtype)
    left = weight.new_empty(B, kernel.shape[0], *_output_size(right, kernel, stride, padding, dilation), dtype=dtype)
    return weight.new_empty(B), left, right


def save(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[0], inputs[2], output[2])
    ctx.where, ctx.parts = inputs[5:9], _parts(*output[1:])
    ctx.set_materialize_grads(False)  # of the vectors, which are as large as the layer's output


def backward(ctx, grad, _left, _right):
    weight, output_mask, right = ctx.saved_tensors
    wide = weight.to(right.dtype)
    grads = []
    for part in ctx.parts:
        own = wide[part] if weight.ndim == 5 else wide
        with torch.no_grad():  # left again: to keep it would take as much memory as the layer's output
            left = _unit(_masked(_convolve(right[part], own, *ctx.where), _part(output_mask, part)))
        flow = grad[part].to(left.dtype).reshape(-1, 1, 1, 1) * left
        grads.append(_gradients(False, flow, right[part], own, *ctx.where))
    total = torch.cat(grads) if weight.ndim == 5 else torch.stack(grads).sum(0)
    return total.to(weight.dtype), *[None] * 9


_op = torch.library.custom_op("lipfast::conv2d_norm_estimate", in_parts, mutates_args=())
_op.register_fake(fake)
_op.register_autograd(backward, setup_context=save)
