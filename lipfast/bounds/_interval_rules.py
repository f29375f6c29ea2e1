"""What each kind of layer does to boxes: one rule each (Gowal et al. 2018, section 3).

``kind="bound"`` adds each rule's own rounding; see :mod:`lipfast.rounding` for the affine ones.
"""

import math
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from lipfast import rounding
from lipfast.bounds.layers import (
    ABSOLUTE,
    AveragePool,
    Conv,
    Elementwise,
    Grafted,
    L2Pool,
    Layer,
    Linear,
    MaxMin,
    MaxPool,
    Pad,
    PartialAbs,
    Rearrange,
    Scale,
    Sum,
)
from lipfast.ops.beta_abs import folded
from lipfast.ops.interval_conv2d import interval_conv2d
from lipfast.ops.interval_linear import interval_linear
from lipfast.ops.max_min import max_min

Box = tuple[Tensor, Tensor]


@singledispatch
def image(layer: Layer, box: Box, *, kind: str) -> Box:
    """A box around the layer's values over the box: the rule that each kind of layer brings."""
    raise NotImplementedError(f"no interval rule for {type(layer).__name__}")


@image.register
def _(layer: Linear, box: Box, *, kind: str) -> Box:
    return interval_linear(*box, layer.weight, layer.bias, outward=kind == "bound")


@image.register
def _(layer: Conv, box: Box, *, kind: str) -> Box:
    one = layer.weight.ndim == 3
    lower, upper = (t.unsqueeze(-2) for t in box) if one else box
    lower, upper = interval_conv2d(lower, upper, bias=layer.bias, outward=kind == "bound", **conv2d_arguments(layer))
    return (lower.squeeze(-2), upper.squeeze(-2)) if one else (lower, upper)


def conv2d_arguments(layer: Conv) -> dict[str, Any]:
    """Weight and geometry for a two-dimensional convolution; one over a line becomes one over a row of height 1."""
    line = layer.weight.ndim == 3
    row = lambda sizes, first: (first, *sizes) if line else tuple(sizes)
    return {
        "weight": layer.weight.unsqueeze(-2) if line else layer.weight,
        "stride": row(layer.stride, 1),
        "padding": row(layer.padding, 0),
        "dilation": row(layer.dilation, 1),
        "groups": layer.groups,
    }


@image.register
def _(layer: Scale, box: Box, *, kind: str) -> Box:
    lower, upper = box
    shift, factor, offset = (None if t is None else t.to(lower.device) for t in (layer.shift, layer.factor, layer.offset))
    low, high = (t if shift is None else t - shift.to(t.dtype) for t in (lower, upper))
    if factor is not None:
        factor = factor.to(low.dtype)
        low, high = torch.where(factor >= 0, low * factor, high * factor), torch.where(factor >= 0, high * factor, low * factor)
    if offset is not None:
        low, high = low + offset.to(low.dtype), high + offset.to(low.dtype)
    if kind == "bound":  # shift, factor and offset are themselves rounded, to the dtype or better: 8 eps covers all of it
        size = torch.maximum(lower.abs(), upper.abs())
        size = size if shift is None else size + shift.to(low.dtype).abs()
        size = size if factor is None else size * factor.abs()
        size = size if offset is None else size + offset.to(low.dtype).abs()
        slack = 8 * torch.finfo(low.dtype).eps * size + torch.finfo(low.dtype).tiny
        low, high = low - slack, high + slack
    return low, high


@image.register
def _(layer: Sum, left: Box, right: Box, *, kind: str) -> Box:
    first, second = layer.signs
    assert first == 1
    lower = left[0] + right[0] if second > 0 else left[0] - right[1]
    upper = left[1] + right[1] if second > 0 else left[1] - right[0]
    return lower - sum_slack(lower, kind), upper + sum_slack(upper, kind)


def sum_slack(value: Tensor, kind: str) -> Tensor | float:
    """More than the rounding of a sum of two numbers, and of taking this away from it."""
    return 2 * torch.finfo(value.dtype).eps * value.abs() if kind == "bound" else 0.0


@image.register
def _(layer: Rearrange, box: Box, *, kind: str) -> Box:
    return layer.function(box[0]), layer.function(box[1])


@image.register
def _(layer: Pad, box: Box, *, kind: str) -> Box:
    return layer(box[0]), layer(box[1])


@image.register
def _(layer: AveragePool, box: Box, *, kind: str) -> Box:
    lower, upper = layer.function(box[0]), layer.function(box[1])
    if kind == "bound":
        size = layer.function(torch.maximum(box[0].abs(), box[1].abs()))
        slack = sum_error(layer.terms, size) * size + torch.finfo(size.dtype).tiny
        lower, upper = lower - slack, upper + slack
    return lower, upper


def sum_error(terms: int, like: Tensor) -> float:
    # Pooling sums halves in float32 and rounds once to them, which two spacings cover.
    return 2 * rounding.gamma(terms, like.dtype, like.device) + 2 * torch.finfo(like.dtype).eps


@image.register
def _(layer: MaxPool, box: Box, *, kind: str) -> Box:
    return layer.function(box[0]), layer.function(box[1])


@image.register
def _(layer: L2Pool, box: Box, *, kind: str) -> Box:
    lower, upper = box
    least = torch.where((lower <= 0) & (upper >= 0), 0.0, torch.minimum(lower.abs(), upper.abs()))
    greatest = torch.maximum(lower.abs(), upper.abs())
    low, high = layer.square_sum(least * least).sqrt(), layer.square_sum(greatest * greatest).sqrt()
    if kind == "bound":
        # Squares below the smallest normal number may vanish: at most sqrt(terms tiny) of the norm.
        error = sum_error(layer.terms + 4, high)
        lost = 2 * math.sqrt(layer.terms * torch.finfo(high.dtype).tiny)
        low, high = (low * (1 - error) - lost).clamp_min(0), high * (1 + error) + lost
    return low, high


@image.register
def _(layer: Elementwise, box: Box, *, kind: str) -> Box:
    lower, upper = box
    low, high = layer.function(lower), layer.function(upper)
    if layer.least is not None:
        value, left, right = layer.least
        low, high = torch.minimum(low, high), torch.maximum(low, high)
        low = torch.where((lower <= right) & (upper >= left), torch.full_like(low, value), low)
    if kind == "bound" and layer.error:
        unit = layer.error * torch.finfo(low.dtype).eps
        low = low - (unit * (1 + lower.abs() + low.abs()) + layer.jump)
        high = high + (unit * (1 + upper.abs() + high.abs()) + layer.jump)
    return low, high


@image.register
def _(layer: PartialAbs, box: Box, *, kind: str) -> Box:
    n = folded(layer.beta, box[0].shape[1])
    lower, upper = image(ABSOLUTE, (box[0][:, :n], box[1][:, :n]), kind=kind)
    return torch.cat([lower, box[0][:, n:]], 1), torch.cat([upper, box[1][:, n:]], 1)


@image.register
def _(layer: Grafted, box: Box, *, kind: str) -> Box:
    low, high = (layer.function(t) for t in box)
    low, high = torch.minimum(low, high), torch.maximum(low, high)  # a line may fall
    if kind == "bound":  # slope and intercept are rounded to the dtype, then a product, a sum and the slack: 4 eps covers all
        size = torch.maximum(box[0].abs(), box[1].abs()) * layer.slope.abs().to(low) + layer.intercept.abs().to(low)
        slack = 4 * torch.finfo(low.dtype).eps * size + torch.finfo(low.dtype).tiny
        low, high = torch.where(layer.mask, low - slack, low), torch.where(layer.mask, high + slack, high)
    return low, high


@image.register
def _(layer: MaxMin, box: Box, *, kind: str) -> Box:
    return max_min(box[0]), max_min(box[1])


class ReluInPlace(torch.autograd.Function):
    """ReLU of a box, written over it; its gradient is written over too. Both must have no other holder."""

    @staticmethod
    def forward(ctx, lower, upper):
        out = lower.relu_(), upper.relu_()
        ctx.mark_dirty(*out)
        ctx.save_for_backward(*out)
        return out

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():  # to be differentiated again
            return tuple(g * (out > 0) for g, out in zip(grads, ctx.saved_tensors, strict=True))
        pairs = zip(grads, ctx.saved_tensors, strict=True)
        return tuple(torch.ops.aten.threshold_backward.grad_input(g, out, 0, grad_input=g) for g, out in pairs)
