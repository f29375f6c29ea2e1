"""An l_p ball through a two-dimensional convolution: :mod:`lipfast.ops.ball_linear` with the same algebra.

The row of an output pixel holds the kernel's taps that fall inside the image, so rows at the border are shorter and their
norms smaller. Whether tap (i, j) of output pixel (y, x) falls inside depends on (i, y) and (j, x) separately; with these
two tables of zeros and ones the norms of all pixels are, for q = 1 and 2, two small products with the kernel's powers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast.ops._arguments import check_alike, check_shape
from lipfast.ops.ball_linear import checked_ball, outward_box
from lipfast.ops.interval_conv2d import _output_size, geometry, plain_conv2d


def ball_conv2d(
    center: Tensor,  # (*, C, H, W)
    radius: float | Tensor,  # () or (*,), one number per sample
    weight: Tensor,  # (O, C / groups, kernel height, kernel width)
    bias: Tensor | None = None,  # (O,)
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    p: float = 2.0,
    outward: bool = False,
) -> tuple[Tensor, Tensor]:  # (*, O, H', W') twice
    """Bounds on ``conv2d(x, weight, bias, ...)`` over every ``x`` with ``||x - center||_p <= radius``.

    Args:
        center: the middle of the ball.
        radius: in the l_p norm of a whole sample, all of (C, H, W); otherwise as in :func:`lipfast.ball_linear`.
        weight, bias, stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`, "same" and "valid"
            padding included. Padding is with exact zeros, which the ball does not move.
        p: 1, 2 or inf.
        outward: as in :func:`lipfast.ball_linear`, with I = (C / groups) x kernel height x kernel width terms; costs a
            second convolution per sample.

    Returns:
        ``(lower, upper)`` of the image box, the smallest in real arithmetic, at the border too.

    Dtypes, soundness and gradient: as :func:`lipfast.ball_linear`; for p = 1 the first tap is that of the lowest kernel
        row, then column, then channel.
    Raises: ValueError if a shape, dtype, device, ``p``, the geometry or a negative number for ``radius`` does not fit; the
        message names the argument.

    >>> low, high = ball_conv2d(torch.zeros(1, 3, 3), 1.0, torch.ones(1, 1, 3, 3), padding=1, p=float("inf"))
    >>> high
    tensor([[[4., 6., 4.],
             [6., 9., 6.],
             [4., 6., 4.]]])
    """
    name = "ball_conv2d"
    check_alike(name, center=center, weight=weight, bias=bias)
    check_shape(name, "center", center, ("*", "C", "H", "W"))
    stride, padding, dilation = geometry(name, center, weight, stride, padding, dilation, groups)
    if bias is not None:
        check_shape(name, "bias", bias, weight.shape[:1])
    radius = checked_ball(name, center, radius, center.shape[:-3], p).reshape(-1)  # (1,) or (B,)
    images = center.reshape(-1, *center.shape[-3:])
    out = torch.ops.lipfast.ball_conv2d(images, radius, weight, bias, stride, padding, dilation, groups, float(p), outward)
    return tuple(t.reshape(*center.shape[:-3], *t.shape[1:]) for t in out)


def pixel_norms(weight: Tensor, p: float, image: Tensor, stride, padding, dilation) -> Tensor:  # (O, H', W')
    """The dual norm of the row of every output pixel, in float64; of ``image`` only the size counts."""
    size = _output_size(image, weight, stride, padding, dilation)
    sides = zip(weight.shape[2:], size, image.shape[2:], stride, padding, dilation, strict=True)
    down, across = (_inside(weight.device, *side) for side in sides)  # (kernel height, H') and (kernel width, W')
    taps = weight.double().abs()
    if p == 1:
        # Maxima one dimension at a time, each by index: amax would share the gradient among ties. -1 stands for outside.
        taps = _first_maximum(taps, 1)  # (O, kernel height, kernel width)
        taps = _first_maximum(torch.where(across, taps[..., None], -1.0), 2)  # (O, kernel height, W')
        taps = _first_maximum(torch.where(down[:, :, None], taps[:, :, None], -1.0), 1)  # (O, H', W')
        return taps.clamp(min=0)
    sums = (taps.square() if p == 2 else taps).sum(1)
    sums = down.double().mT @ sums @ across.double()
    if p == 2:  # the subgradient of an empty or zero row is 0
        return torch.where(sums > 0, torch.where(sums > 0, sums, 1.0).sqrt(), sums)
    return sums


# Which taps of which outputs fall on pixels, along one side: (taps, outputs).
def _inside(device, taps: int, outputs: int, pixels: int, stride: int, padding: int, dilation: int) -> Tensor:
    position = torch.arange(outputs, device=device) * stride - padding + torch.arange(taps, device=device)[:, None] * dilation
    return (position >= 0) & (position < pixels)


def _first_maximum(t: Tensor, dim: int) -> Tensor:
    return t.gather(dim, t.argmax(dim, keepdim=True)).squeeze(dim)


def reference(
    center: Tensor,  # (B, C, H, W)
    radius: Tensor,  # (1,) or (B,)
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    p: float,
    outward: bool = False,
) -> tuple[Tensor, Tensor]:
    where = (stride, padding, dilation)
    norms = pixel_norms(weight, p, center, *where)
    radius = radius.reshape(-1, 1, 1, 1)
    if outward:
        column = None if bias is None else bias[:, None, None]
        product = lambda x, w: plain_conv2d(x, w, *where, groups)
        return outward_box(center, radius, norms, weight, column, weight[0].numel(), product)
    mid = F.conv2d(center, weight, bias, *where, groups)
    reach = radius * norms.to(center.dtype)
    return mid - reach, mid + reach


def fake(center, radius, weight, bias, stride, padding, dilation, groups, p, outward=False):
    size = _output_size(center, weight, stride, padding, dilation)
    out = center.new_empty(center.shape[0], weight.shape[0], *size)
    return out, torch.empty_like(out)


def save(ctx, inputs, output):
    center, radius, weight, _, *ctx.where, ctx.groups, ctx.p, _ = inputs
    ctx.save_for_backward(center, radius, weight)


def backward(ctx, grad_lower, grad_upper):
    center, radius, weight = ctx.saved_tensors
    need_center, need_radius, need_weight, need_bias, *_ = ctx.needs_input_grad
    grad_mid, grad_reach = grad_upper + grad_lower, grad_upper - grad_lower  # (B, O, H', W')
    grad_radius = None
    norms, pull = torch.func.vjp(lambda w: pixel_norms(w, ctx.p, center, *ctx.where), weight)[:2]
    if need_radius:
        grad_radius = (grad_reach * norms.to(weight.dtype)).sum((1, 2, 3)).sum_to_size(radius.shape)
    grad_center, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_mid, center, weight, None, *ctx.where, False, [0, 0], ctx.groups, [need_center, need_weight, False]
    )
    if need_weight:
        from_norms = (grad_reach * radius.reshape(-1, 1, 1, 1)).sum(0)
        grad_weight = grad_weight + pull(from_norms.double())[0]
    grad_bias = grad_mid.sum((0, 2, 3)) if need_bias else None
    return grad_center, grad_radius, grad_weight, grad_bias, *[None] * 6


_op = torch.library.custom_op("lipfast::ball_conv2d", reference, mutates_args=())
_op.register_fake(fake)
_op.register_autograd(backward, setup_context=save)
