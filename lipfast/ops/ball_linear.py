"""An l_p ball through a linear layer.

Over the ball {x : ||x - c||_p <= r} the output o of x -> W x + b ranges, by Hölder's inequality, exactly over

    W_o c + b_o  -  r ||W_o||_q      to      W_o c + b_o  +  r ||W_o||_q,          1/p + 1/q = 1,

so the smallest box around the image needs one product and the dual norms of the rows, which no sample enters (used for
p = 2 by Lee et al. 2020, https://arxiv.org/abs/2006.09699). The norms are summed in float64 whatever the dtype.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast import rounding
from lipfast.ops._arguments import check_alike, check_shape
from lipfast.ops._matrices import joined, parts
from lipfast.ops.interval_linear import _rows


def ball_linear(
    center: Tensor,  # (*, I)
    radius: float | Tensor,  # () or (*,), one number per sample
    weight: Tensor,  # (O, I)
    bias: Tensor | None = None,  # (O,)
    p: float = 2.0,
    outward: bool = False,
) -> tuple[Tensor, Tensor]:  # (*, O), (*, O)
    """Bounds on ``weight @ x + bias`` over every ``x`` with ``||x - center||_p <= radius``.

    Args:
        center: the middle of the ball.
        radius: in the l_p norm of ``center``'s last dimension. A Python number is rounded up to the dtype of ``center``;
            ``radius >= 0`` of a tensor is the caller's promise and is not checked (a check would read the data back).
        weight, bias: as in :func:`torch.nn.functional.linear`.
        p: 1, 2 or inf.
        outward: contain the exact image of every point of the ball, rounding included, whatever the order of summation.
            This costs a second product per sample, ``|weight| @ |center|``, which the error of the first one needs; see
            :mod:`lipfast.rounding`.

    Returns:
        ``(lower, upper)`` of the image box.

    Dtypes: float64, float32, and bfloat16/float16 accumulated in float32; CPU and CUDA.
    Raises: ValueError if a shape, dtype, device, ``p`` or a negative number for ``radius`` does not fit; the message names
        the argument.
    Soundness: without ``outward`` exact in real arithmetic only. A NaN or Inf in the input gives NaN or Inf.
    Gradient: to all four tensors, of the box in real arithmetic; twice. Where a norm has a kink it is the subgradient 0 of
        a zero row (p = 2) or weight (p = inf), and for p = 1 that of the first weight of largest magnitude.

    >>> ball_linear(torch.tensor([1.0, 0.0]), 0.5, torch.tensor([[3.0, 4.0]]))
    (tensor([0.5000]), tensor([5.5000]))
    """
    check_alike("ball_linear", center=center, weight=weight, bias=bias)
    check_shape("ball_linear", "center", center, ("*", "I"))
    check_shape("ball_linear", "weight", weight, ("O", center.shape[-1]))
    if bias is not None:
        check_shape("ball_linear", "bias", bias, weight.shape[:1])
    radius = checked_ball("ball_linear", center, radius, center.shape[:-1], p)
    return torch.ops.lipfast.ball_linear(center, radius, weight, bias, float(p), outward)


def checked_ball(op: str, center: Tensor, radius: float | Tensor, samples: torch.Size, p: float) -> Tensor:
    """The radius as a tensor, () or of shape ``samples``."""
    if p not in (1, 2, math.inf):
        raise ValueError(f"{op}: p must be 1, 2 or inf, got {p!r}")
    if not isinstance(radius, Tensor):
        if not radius >= 0:
            raise ValueError(f"{op}: radius must not be negative, got {radius!r}")
        return rounding.up(center.new_full((), radius, dtype=torch.float64), center.dtype)
    check_alike(op, center=center, radius=radius)
    if radius.ndim:
        check_shape(op, "radius", radius, samples)
    return radius


def row_norms(weight: Tensor, p: float) -> Tensor:  # (O, I) -> (O,)
    """The dual norm of every row, in float64."""
    if p == 1:  # the maximum by its index: amax would share the gradient among ties
        return weight.gather(1, weight.abs().argmax(1, keepdim=True)).squeeze(1).double().abs()
    return joined([torch.linalg.vector_norm(part.double(), 2 if p == 2 else 1, 1) for part in parts(weight)])


def norm_slopes(
    weight: Tensor,  # (O, I)
    norms: Tensor,  # (O,)
    share: Tensor,  # (O,)
    p: float,
) -> Tensor:  # (O, I)
    """``share`` times the derivatives of :func:`row_norms`, which are ``norms``."""
    if p == 1:
        first = weight.abs().argmax(1, keepdim=True)
        slope = weight.gather(1, first).sign() * share[:, None]
        return torch.zeros_like(weight).scatter(1, first, slope.to(weight.dtype))
    if p == math.inf:
        return weight.sign() * share[:, None].to(weight.dtype)
    rows = parts(weight)
    factors = (share / norms.where(norms != 0, math.inf))[:, None].split([len(part) for part in rows])
    return joined([(part * factor).to(weight.dtype) for part, factor in zip(rows, factors, strict=True)])


def reference(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, p: float, outward: bool = False
) -> tuple[Tensor, Tensor]:
    norms = row_norms(weight, p)
    if outward:
        return outward_box(center, radius[..., None], norms, weight, bias, weight.shape[1], F.linear)
    mid = F.linear(center, weight, bias)
    reach = radius[..., None] * norms.to(center.dtype)
    return mid - reach, mid + reach


def outward_box(
    center: Tensor,
    radius: Tensor,  # broadcasts against norms
    norms: Tensor,  # computed row norms, float64; broadcasts against the product's result
    weight: Tensor,
    bias: Tensor | None,
    terms: int,
    product: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """A box that contains W x + b for every x of the ball, rounding included; arguments as in :func:`rounding.image`.

    That function encloses W c + b. The norms, sums of ``terms`` terms, err by less than (terms + 16) 2^-52 relative to
    themselves, and by terms 2^-500 where squares of float64 weights underflow. 4 eps covers each of the two last sums.
    """
    wide = rounding.accumulator(center.dtype)
    eps, tiny = torch.finfo(wide).eps, torch.finfo(wide).tiny
    low, high = rounding.image(center.to(wide), center.to(wide), weight, bias, terms, product)
    norms = rounding.up(norms * (1 + (terms + 16) * 2.0**-52) + terms * 2.0**-500, wide)
    reach = radius.to(wide) * norms * (1 + 4 * eps) + tiny
    lower = low - (reach + 4 * eps * low.abs())
    upper = high + (reach + 4 * eps * high.abs())
    return rounding.down(lower, center.dtype), rounding.up(upper, center.dtype)


def fake(center, radius, weight, bias, p, outward=False):
    out = center.new_empty(*center.shape[:-1], weight.shape[0])
    return out, torch.empty_like(out)


def save(ctx, inputs, output):
    center, radius, weight, _, ctx.p, _ = inputs
    ctx.save_for_backward(center, radius, weight)


def backward(ctx, grad_lower, grad_upper):
    center, radius, weight = ctx.saved_tensors
    need_center, need_radius, need_weight, need_bias, *_ = ctx.needs_input_grad
    grad_mid, grad_reach = grad_upper + grad_lower, grad_upper - grad_lower  # (*, O)
    grad_center = grad_mid @ weight if need_center else None
    grad_radius = grad_weight = None
    norms = row_norms(weight, ctx.p)
    if need_radius:
        grad_radius = (grad_reach @ norms.to(weight.dtype)).sum_to_size(radius.shape)
    if need_weight:
        from_norms = (grad_reach * radius[..., None]).sum_to_size(norms.shape)
        grad_weight = _rows(grad_mid).mT @ _rows(center) + norm_slopes(weight, norms, from_norms.double(), ctx.p)
    grad_bias = grad_mid.sum_to_size(weight.shape[:1]) if need_bias else None
    return grad_center, grad_radius, grad_weight, grad_bias, None, None


_op = torch.library.custom_op("lipfast::ball_linear", reference, mutates_args=())
_op.register_fake(fake)
_op.register_autograd(backward, setup_context=save)
