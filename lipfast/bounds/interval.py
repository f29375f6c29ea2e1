"""Boxes through a network: interval bound propagation.

Each layer kind has one rule, from boxes around its inputs to a box around its output (Gowal et al. 2018, section 3). The
input is a ball in the l1, l2 or l-infinity norm; until the first affine layer a ball stays a ball, so that layer sees the
dual norm of its rows rather than the box around the ball.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lipfast import rounding
from lipfast.bounds._interval_rules import Box, conv2d_arguments, image, sum_slack
from lipfast.bounds.layers import Conv, Elementwise, L2Pool, Layer, Linear, MaxMin, MaxPool, Rearrange, Scale
from lipfast.bounds.network import Network, read
from lipfast.ops.ball_conv2d import ball_conv2d
from lipfast.ops.ball_linear import ball_linear

_ACTIVATIONS = (Elementwise, MaxMin, MaxPool, L2Pool)


@dataclass(frozen=True)
class Boxes:
    """Bounds of a network's values over the input balls.

    Attributes:
        lower, upper: of the output, (B, ...).
        layers: for each activation or max/L2 pooling, by its name in the model, the box before it.
    """

    lower: Tensor
    upper: Tensor
    layers: dict[str, Box]


@dataclass(frozen=True)
class _Ball:
    """All center + factor * d with ||d||_p <= radius; center is itself a box, since its computation rounds."""

    center: Box
    radius: Tensor  # (B,)
    p: float
    factor: Tensor | None = None  # broadcasts against a batch


def interval(
    model: nn.Module,
    x: Tensor,  # (B, ...)
    eps: float | Tensor,
    p: float = math.inf,
    kind: str = "bound",
    pixel_range: tuple[float, float] | None = None,
) -> Boxes:
    """Boxes around every value of ``model`` over the balls of radius ``eps`` around ``x``.

    Args:
        model: made of the layers that :mod:`lipfast.bounds.network` names.
        x: a batch of inputs, in the model's dtype and on its device.
        eps: radius in the l_p norm of the model's own input (a normalisation layer belongs to the model, so pixels in
            [0, 1] mean pixel units): a number, (B,), or, for p = inf, anything that broadcasts against x.
        p: 1, 2 or inf.
        kind: "bound" contains the exact values, rounding included, and carries no gradient; "estimate" is rounded to
            nearest and differentiable in the parameters and x.
        pixel_range: values outside of it are no inputs; the first box is clipped to it. None clips nothing.

    Raises: ValueError for NaN or Inf in x, a negative eps, an unknown p or kind, or a layer without a rule, which it names.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> boxes = interval(model, torch.zeros(1, 2), 0.1)
    >>> sorted(boxes.layers)
    ['1']
    """
    with _grad_for(kind):
        network = read(model, tuple(x.shape[1:]))
        layers: dict[str, Box] = {}
        lower, upper = _values(network, _start(x, eps, p, kind, pixel_range), kind, layers)[-1]
        return Boxes(lower, upper, layers)


def interval_margin(
    model: nn.Module,
    x: Tensor,  # (B, ...)
    label: Tensor,  # (B,)
    eps: float | Tensor,
    p: float = math.inf,
    kind: str = "bound",
    pixel_range: tuple[float, float] | None = None,
) -> Tensor:  # (B, K)
    """Lower bounds of ``logit[label] - logit[j]`` over the balls of radius ``eps`` around ``x``; 0 where j is the label.

    A final Linear layer is merged with the difference e_label - e_j (last-layer elision, Gowal et al. 2018, section 3):
    the two logits share the last hidden box, so this is never looser than the difference of their bounds.
    Arguments and errors as in :func:`interval`; ``label`` holds class indices.
    """
    with _grad_for(kind):
        network = read(model, tuple(x.shape[1:]))
        if len(network.nodes[-1].shape) != 1:
            raise ValueError(f"model: logits (B, K) expected, got samples of shape {network.nodes[-1].shape}")
        K = network.nodes[-1].shape[0]
        if label.shape != x.shape[:1] or label.dtype != torch.int64:
            raise ValueError(f"label: {len(x)} int64 class indices expected, got {label.dtype} {tuple(label.shape)}")
        if kind == "bound" and not ((label >= 0) & (label < K)).all():
            raise ValueError(f"label: class indices from 0 to {K - 1} expected")
        start = _start(x, eps, p, kind, pixel_range)
        last = network.nodes[-1]
        if not isinstance(last.layer, Linear) or len(network.nodes[last.inputs[0]].shape) != 1:
            *_, (lower, upper) = _values(network, start, kind)
            margin = lower.gather(1, label[:, None]) - upper
            margin = margin - sum_slack(margin, kind)
        else:
            hidden = _values(replace(network, nodes=network.nodes[: last.inputs[0] + 1]), start, kind)[-1]
            margin = _elided_margin(_as_box(hidden, kind), last.layer, label, kind)
        return margin.scatter(1, label[:, None], 0.0)


def _elided_margin(box: Box, last: Linear, label: Tensor, kind: str) -> Tensor:
    lower, upper = box
    dtype = lower.dtype
    weight, bias = last.weight, last.bias
    if kind == "bound":  # the difference of two rows is then exact, or within the terms that rounding.gamma adds
        lower, upper, weight = lower.double(), upper.double(), weight.double()
        bias = None if bias is None else bias.double()
    K, I = weight.shape
    margins = []
    step = max(1, 2**25 // (K * I))  # the row differences (B, K, I) stay below a quarter of a gigabyte
    for low, high, y in zip(lower.split(step), upper.split(step), label.split(step), strict=True):
        rows = weight[y][:, None] - weight  # (B, K, I)
        shift = None if bias is None else bias[y][:, None] - bias
        if kind == "bound":
            product = lambda x, w: torch.einsum("bi,bki->bk", x, w)
            margins.append(rounding.down(rounding.image(low, high, rows, shift, I, product)[0], dtype))
        else:
            center, radius = (low + high) / 2, (high - low) / 2
            margin = torch.einsum("bi,bki->bk", center, rows) - torch.einsum("bi,bki->bk", radius, rows.abs())
            margins.append(margin if shift is None else margin + shift)
    return torch.cat(margins)


def _grad_for(kind: str):
    if kind not in ("bound", "estimate"):
        raise ValueError(f"kind: 'bound' or 'estimate' expected, got {kind!r}")
    return torch.set_grad_enabled(kind == "estimate" and torch.is_grad_enabled())


def _start(x: Tensor, eps: float | Tensor, p: float, kind: str, pixel_range: tuple[float, float] | None) -> Box | _Ball:
    if not x.is_floating_point():
        raise ValueError(f"x: floating-point values expected, got {x.dtype}")
    if kind == "bound" and not x.isfinite().all():  # an estimate does not wait for the device to tell
        raise ValueError("x: finite values expected, got NaN or Inf")
    if not isinstance(eps, Tensor) and not 0 <= eps < math.inf:
        raise ValueError(f"eps: finite and not negative expected, got {eps}")
    radius = torch.as_tensor(eps, dtype=torch.float64, device=x.device)
    if kind == "bound" and not ((radius >= 0) & (radius < math.inf)).all():
        raise ValueError("eps: finite and not negative expected")
    if p not in (1, 2, math.inf):
        raise ValueError(f"p: 1, 2 or inf expected, got {p}")
    if radius.ndim == 1 and len(radius) == len(x):
        radius = radius.reshape(-1, *[1] * (x.ndim - 1))
    elif radius.ndim and p != math.inf:
        raise ValueError(f"eps: a number or one per sample expected for p = {p}, got {tuple(radius.shape)}")
    if p != math.inf and pixel_range is None:
        return _Ball((x, x), radius.expand(len(x), *[1] * (x.ndim - 1)).reshape(-1), p)
    return _box_around((x, x), radius, kind, pixel_range)


def _box_around(center: Box, radius: Tensor, kind: str, pixel_range: tuple[float, float] | None = None) -> Box:
    dtype = center[0].dtype
    if kind == "estimate":
        lower, upper = center[0] - radius.to(dtype), center[1] + radius.to(dtype)
    else:
        lower, upper = center[0].double() - radius, center[1].double() + radius
        infinity = lower.new_tensor(math.inf)
        lower = rounding.down(torch.nextafter(lower, -infinity), dtype)
        upper = rounding.up(torch.nextafter(upper, infinity), dtype)
    return (lower, upper) if pixel_range is None else (lower.clamp(*pixel_range), upper.clamp(*pixel_range))


def _values(network: Network, start: Box | _Ball, kind: str, layers: dict[str, Box] | None = None) -> list:
    """The box of every node; None for those no longer needed."""
    values: list = []
    last_use = network.last_use()
    for position, node in enumerate(network.nodes):
        inputs = [values[i] for i in node.inputs]
        if layers is not None and isinstance(node.layer, _ACTIVATIONS):
            layers[_fresh(node.name, layers)] = _as_box(inputs[0], kind)
        layer = node.layer
        if layers is None and isinstance(layer, Elementwise) and layer.in_place is not None:
            source = node.inputs[0]
            if last_use[source] == position and isinstance(network.nodes[source].layer, (Linear, Conv)):
                layer = replace(layer, function=layer.in_place)  # nobody else holds these numbers
        values.append(_apply(layer, inputs, kind) if inputs else start)
        for i in node.inputs:
            if last_use[i] == position:
                values[i] = None
    values[-1] = _as_box(values[-1], kind)
    return values


def _fresh(name: str, taken: dict) -> str:
    """A layer that is used twice is listed twice: name, name:1, ..."""
    return next(n for n in (name, *(f"{name}:{i}" for i in range(1, len(taken) + 1))) if n not in taken)


def _apply(layer: Layer, inputs: list, kind: str) -> Box | _Ball:
    if len(inputs) == 1 and isinstance(inputs[0], _Ball) and isinstance(layer, (Linear, Conv, Scale, Rearrange)):
        return _ball_image(layer, inputs[0], kind)
    return image(layer, *(_as_box(v, kind) for v in inputs), kind=kind)


def _ball_image(layer: Layer, ball: _Ball, kind: str) -> Box | _Ball:
    if isinstance(layer, Rearrange):
        factor = ball.factor
        if factor is not None:
            factor = layer.function(factor.expand(1, *ball.center[0].shape[1:]))
        return replace(ball, center=image(layer, ball.center, kind=kind), factor=factor)
    if isinstance(layer, Scale):
        factor = ball.factor
        if layer.factor is not None:
            # Its own rounding may have made the stored factor too small.
            own = layer.factor.double().abs() * (1 + 8 * torch.finfo(layer.factor.dtype).eps)
            own = own.expand(ball.center[0].shape[1:])[None]
            factor = own if factor is None else factor * own
        return replace(ball, center=image(layer, ball.center, kind=kind), factor=factor)
    assert isinstance(layer, (Linear, Conv))
    width = _width(layer, ball, kind)  # (B, O, ...)
    lower, upper = image(layer, ball.center, kind=kind)
    dtype = lower.dtype
    if kind == "estimate":
        return lower - width.to(dtype), upper + width.to(dtype)
    lower, upper = lower.double(), upper.double()
    low = lower - (width + 2.0**-51 * lower.abs())  # the last term covers this subtraction's own rounding
    return rounding.down(low, dtype), rounding.up(upper + (width + 2.0**-51 * upper.abs()), dtype)


def _width(layer: Linear | Conv, ball: _Ball, kind: str) -> Tensor:
    """How far the layer's outputs move over the ball, in float64: radius times the dual norm of its scaled rows."""
    shape = ball.center[0].shape[1:]
    outward = kind == "bound"
    weight = layer.weight.double()
    zero = weight.new_zeros(1, *shape)
    if isinstance(layer, Linear):
        scaled = weight if ball.factor is None else weight * ball.factor.reshape(-1)
        unit = ball_linear(zero, 1.0, scaled, p=ball.p, outward=outward)[1]
    else:
        if ball.factor is not None:
            per_channel = ball.factor.abs().flatten(2).amax(-1).reshape(-1)  # exact when the factor is one per channel
            scale = per_channel.reshape(layer.groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
            weight = (weight.unflatten(0, (layer.groups, -1)) * scale).flatten(0, 1)
        line = weight.ndim == 3
        arguments = conv2d_arguments(replace(layer, weight=weight))
        unit = ball_conv2d(zero.unsqueeze(-2) if line else zero, 1.0, p=ball.p, outward=outward, **arguments)[1]
        unit = unit.squeeze(-2) if line else unit
    width = unit * ball.radius.reshape(-1, *[1] * (unit.ndim - 1))
    return width * (1 + 2.0**-50) if outward else width


def _as_box(value: Box | _Ball, kind: str) -> Box:
    if not isinstance(value, _Ball):
        return value
    radius = value.radius.reshape(-1, *[1] * (value.center[0].ndim - 1))
    if value.factor is not None:
        radius = radius * value.factor.abs() * (1 + 2.0**-40)
    return _box_around(value.center, radius, kind)
