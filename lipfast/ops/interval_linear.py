"""Interval propagation through a linear layer.

An input box is a pair (lower, upper). With center m = (lower + upper)/2 and radius r = (upper - lower)/2 its image under
x -> W x + b lies in

    W m + b  -  |W| r      to      W m + b  +  |W| r,

the smallest box that does (Gowal et al. 2018, https://arxiv.org/abs/1810.12715, eq. 6).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast import rounding
from lipfast.ops._arguments import check_alike, check_shape
from lipfast.ops._definition import name_definition


def interval_linear(
    lower: Tensor,  # (*, I)
    upper: Tensor,  # (*, I)
    weight: Tensor,  # (O, I)
    bias: Tensor | None = None,  # (O,)
    outward: bool = False,
) -> tuple[Tensor, Tensor]:  # (*, O), (*, O)
    """Bounds on ``weight @ x + bias`` over every ``x`` with ``lower <= x <= upper``.

    Args:
        lower, upper: the input box, of one shape. ``lower <= upper`` is the caller's promise and is not checked (a check
            would read the data back).
        weight, bias: as in :func:`torch.nn.functional.linear`.
        outward: contain the exact image of every point, rounding included, whatever the order of summation. The radius is
            fed as ``r + gamma |m|`` with gamma = (I + 16) u in float32 and float64; see :mod:`lipfast.rounding`.

    Returns:
        ``(lower, upper)`` of the image box.

    Dtypes: float64, float32, and bfloat16/float16 accumulated in float32; CPU and CUDA.
    Raises: ValueError if a shape, dtype or device does not fit; the message names the argument.
    Soundness: without ``outward`` exact in real arithmetic only: rounding can make a bound tight by up to
        ``(I + 2) eps (|W| max(|lower|, |upper|) + |b|)``. A NaN or Inf in the input gives NaN or Inf.
    Gradient: to all four tensors, of the box in real arithmetic; at ``weight == 0`` the subgradient 0 of ``|weight|``.

    >>> interval_linear(torch.tensor([-1., 0.]), torch.tensor([1., 2.]), torch.tensor([[2., -1.]]))
    (tensor([-4.]), tensor([2.]))
    """
    check_alike("interval_linear", lower=lower, upper=upper, weight=weight, bias=bias)
    check_shape("interval_linear", "lower", lower, ("*", "I"))
    check_shape("interval_linear", "upper", upper, lower.shape)
    check_shape("interval_linear", "weight", weight, ("O", lower.shape[-1]))
    if bias is not None:
        check_shape("interval_linear", "bias", bias, weight.shape[:1])
    return torch.ops.lipfast.interval_linear(lower, upper, weight, bias, outward)


def reference(
    lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor | None = None, outward: bool = False
) -> tuple[Tensor, Tensor]:
    if outward:
        return rounding.image(lower, upper, weight, bias, weight.shape[1], F.linear)
    center = F.linear((lower + upper) / 2, weight, bias)
    radius = F.linear((upper - lower) / 2, weight.abs())
    return center - radius, center + radius


def fake(lower, upper, weight, bias=None, outward=False):
    out = lower.new_empty(*lower.shape[:-1], weight.shape[0])
    return out, torch.empty_like(out)


def save(ctx, inputs, output):
    lower, upper, weight, bias, _ = inputs
    ctx.save_for_backward(lower, upper, weight)
    ctx.has_bias = bias is not None


def backward(ctx, grad_lower, grad_upper):
    need = ctx.needs_input_grad
    grads = torch.ops.lipfast.interval_linear_backward(grad_lower, grad_upper, *ctx.saved_tensors, need[0] or need[1], need[2])
    low, high, weight = (g if used else None for g, used in zip(grads, (need[0], need[1], need[2]), strict=True))
    bias = _rows(grad_lower).sum(0) + _rows(grad_upper).sum(0) if ctx.has_bias and need[3] else None
    return low, high, weight, bias, None


def backward_reference(
    grad_lower: Tensor,  # (*, O)
    grad_upper: Tensor,  # (*, O)
    lower: Tensor,  # (*, I)
    upper: Tensor,  # (*, I)
    weight: Tensor,  # (O, I)
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the two inputs and the weight; an empty tensor for what is not needed."""
    grad_center, grad_radius = grad_upper + grad_lower, grad_upper - grad_lower
    low = high = grad_weight = lower.new_empty(0)
    if need_input:
        through_center, through_radius = grad_center @ weight / 2, grad_radius @ weight.abs() / 2
        low, high = through_center - through_radius, through_center + through_radius
    if need_weight:
        from_center = _rows(grad_center).mT @ _rows(lower + upper) / 2
        from_radius = _rows(grad_radius).mT @ _rows(upper - lower) / 2
        grad_weight = from_center + weight.sign() * from_radius
    return low, high if need_input else lower.new_empty(0), grad_weight if need_weight else lower.new_empty(0)


def backward_fake(grad_lower, grad_upper, lower, upper, weight, need_input, need_weight):
    empty = lambda like, needed: torch.empty_like(like) if needed else like.new_empty(0)
    return empty(lower, need_input), empty(upper, need_input), empty(weight, need_weight)


def backward_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.needs = inputs[5:]


def backward_backward(ctx, *grads):
    pull = torch.func.vjp(lambda *t: backward_reference(*t, *ctx.needs), *ctx.saved_tensors)[1]
    return (*pull(grads), None, None)


def _rows(t: Tensor) -> Tensor:
    return t.flatten(0, -2) if t.ndim > 1 else t[None]


_op = torch.library.custom_op("lipfast::interval_linear", reference, mutates_args=())
_op.register_fake(fake)
_op.register_autograd(backward, setup_context=save)
_backward = torch.library.custom_op("lipfast::interval_linear_backward", backward_reference, mutates_args=())
_backward.register_fake(backward_fake)
_backward.register_autograd(backward_backward, setup_context=backward_save)
name_definition("lipfast::interval_linear_backward", backward_reference)
