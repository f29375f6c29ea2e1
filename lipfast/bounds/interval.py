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
from lipfast.bounds._interval_rules import Box, ReluInPlace, conv2d_arguments, image, sum_slack
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
    _hidden: "Box | _Ball | None"  # before the final Linear layer, if that is what the network ends with
    _last: Linear | None
    _kind: str

    def margin(self, label: Tensor) -> Tensor:  # (B,) -> (B, K)
        """As :func:`interval_margin`, from the boxes that are there already."""
        with _grad_for(self._kind):
            _check_label(label, self.lower.shape, self._kind)
            if self._last is not None and self._hidden is not None:
                return _elided_margin(self._hidden, self._last, label, self._kind)
            margin = self.lower.gather(1, label[:, None]) - self.upper
            return (margin - sum_slack(margin, self._kind)).scatter(1, label[:, None], 0.0)


@dataclass(frozen=True)
class _Ball:
    """All center + factor * d with ||d||_p <= radius; center is itself a box, since its computation rounds."""

    center: Box
    radius: Tensor  # (B,)
    p: float
    factor: Tensor | None = None  # broadcasts against a batch
    box: Box | None = None  # values outside of it are no inputs either


def interval(
    model: nn.Module,
    x: Tensor,  # (B, ...)
    eps: float | Tensor,
    p: float = math.inf,
    kind: str = "bound",
    pixel_range: tuple[float, float] | None = None,
    keep_layers: bool = True,
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
        keep_layers: False leaves ``layers`` empty, and saves the memory and time of keeping every box.

    Raises: ValueError for NaN or Inf in x, a negative eps, an unknown p or kind, or a layer without a rule, which it names.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> boxes = interval(model, torch.zeros(1, 2), 0.1)
    >>> sorted(boxes.layers)
    ['1']
    """
    with _grad_for(kind):
        network = read(model, tuple(x.shape[1:]))
        layers: dict[str, Box] = {}
        keep = layers if keep_layers else None
        start = _start(x, eps, p, kind, pixel_range)
        last = _final_linear(network)
        if last is None:
            return Boxes(*_as_box(_last_value(network, start, kind, keep), kind), layers, None, None, kind)
        hidden = _last_value(network.until(network.nodes[-1].inputs[0]), start, kind, keep)
        return Boxes(*_as_box(_apply(last, [hidden], kind), kind), layers, hidden, last, kind)


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
        _check_label(label, torch.Size((len(x), *network.nodes[-1].shape)), kind)
        start = _start(x, eps, p, kind, pixel_range)
        last = _final_linear(network)
        if last is None:
            return Boxes(*_as_box(_last_value(network, start, kind), kind), {}, None, None, kind).margin(label)
        return _elided_margin(_last_value(network.until(network.nodes[-1].inputs[0]), start, kind), last, label, kind)


def _final_linear(network: Network) -> Linear | None:
    last = network.nodes[-1]
    flat = isinstance(last.layer, Linear) and len(network.nodes[last.inputs[0]].shape) == 1
    return last.layer if flat and isinstance(last.layer, Linear) else None


def _check_label(label: Tensor, output: torch.Size, kind: str) -> None:
    if len(output) != 2:
        raise ValueError(f"model: logits (B, K) expected, got {tuple(output)}")
    if label.shape != output[:1] or label.dtype != torch.int64:
        raise ValueError(f"label: {output[0]} int64 class indices expected, got {label.dtype} {tuple(label.shape)}")
    if kind == "bound" and not ((label >= 0) & (label < output[1])).all():
        raise ValueError(f"label: class indices from 0 to {output[1] - 1} expected")


def _elided_margin(hidden: Box | _Ball, last: Linear, label: Tensor, kind: str) -> Tensor:
    if isinstance(hidden, _Ball):
        return _ball_margin(hidden, last, label, kind)
    lower, upper = hidden
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
    return torch.cat(margins).scatter(1, label[:, None], 0.0)


def _ball_margin(ball: _Ball, last: Linear, label: Tensor, kind: str) -> Tensor:
    """For an affine network: the dual norm of a difference of two rows, one product per class that is a label."""
    dtype = ball.center[0].dtype
    wide = torch.float64 if kind == "bound" else dtype
    weight, bias = last.weight.to(wide), None if last.bias is None else last.bias.to(wide)
    widen = lambda box: (box[0].to(wide), box[1].to(wide))
    ball = replace(ball, center=widen(ball.center), box=None if ball.box is None else widen(ball.box))
    margin = weight.new_zeros(len(label), len(weight))
    for y in label.unique():
        differences = Linear(weight[y] - weight, None if bias is None else bias[y] - bias)
        lower, _ = _as_box(_ball_image(differences, ball, kind), kind)
        margin = torch.where(label[:, None] == y, lower, margin)
    return rounding.down(margin, dtype).scatter(1, label[:, None], 0.0) if kind == "bound" else margin


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
    if p == math.inf:
        return _box_around((x, x), radius, kind, pixel_range)
    box = None if pixel_range is None else _box_around((x, x), radius, kind, pixel_range)
    return _Ball((x, x), radius.expand(len(x), *[1] * (x.ndim - 1)).reshape(-1), p, box=box)


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


def _last_value(network: Network, start: Box | _Ball, kind: str, layers: dict[str, Box] | None = None) -> Box | _Ball:
    """Around the output; ``layers`` receives the boxes before activations."""
    values: list = []
    readers = network.readers()
    for position, node in enumerate(network.nodes):
        inputs = [values[i] for i in node.inputs]
        if layers is not None and isinstance(node.layer, _ACTIVATIONS):
            layers[_fresh(node.name, layers)] = _as_box(inputs[0], kind)
        if layers is None and _is_hidden_relu(network, readers, position):
            values.append(ReluInPlace.apply(*inputs[0]))
        else:
            values.append(_apply(node.layer, inputs, kind) if inputs else start)
        for i in node.inputs:
            if readers[i][-1] == position:
                values[i] = None
    return values[-1]


def _is_hidden_relu(network: Network, readers: list[list[int]], position: int) -> bool:
    """A ReLU between two affine layers, with no other reader: nobody else holds its box, nor the gradient of it."""

    def affine(at: int) -> bool:
        return isinstance(network.nodes[at].layer, (Linear, Conv))

    node = network.nodes[position]
    if not isinstance(node.layer, Elementwise) or node.layer.name != "relu":
        return False
    source, after = node.inputs[0], position
    while len(readers[after]) == 1 and not affine(after):
        after = readers[after][0]
        if not affine(after) and not isinstance(network.nodes[after].layer, Rearrange):
            return False
    layer = network.nodes[source].layer
    line = isinstance(layer, Conv) and layer.weight.ndim == 3  # its box is a view
    return affine(source) and not line and len(readers[source]) == 1 and affine(after)


def _fresh(name: str, taken: dict) -> str:
    """A layer that is used twice is listed twice: name, name:1, ..."""
    return next(n for n in (name, *(f"{name}:{i}" for i in range(1, len(taken) + 1))) if n not in taken)


def _apply(layer: Layer, inputs: list, kind: str) -> Box | _Ball:
    if len(inputs) == 1 and isinstance(inputs[0], _Ball) and isinstance(layer, (Linear, Conv, Scale, Rearrange)):
        lines = isinstance(layer, Linear) and inputs[0].center[0].ndim > 2
        if not lines or inputs[0].factor is None:  # a factor of its own for each line would make a weight for each
            return _ball_image(layer, inputs[0], kind)
    return image(layer, *(_as_box(v, kind) for v in inputs), kind=kind)


def _ball_image(layer: Layer, ball: _Ball, kind: str) -> Box | _Ball:
    box = None if ball.box is None else image(layer, ball.box, kind=kind)
    if isinstance(layer, Rearrange):
        factor = ball.factor
        if factor is not None:
            factor = layer.function(factor.expand(1, *ball.center[0].shape[1:]))
        return replace(ball, center=image(layer, ball.center, kind=kind), factor=factor, box=box)
    if isinstance(layer, Scale):
        factor = ball.factor
        if layer.factor is not None:
            # Its own rounding may have made the stored factor too small.
            own = layer.factor.double().abs() * (1 + 8 * torch.finfo(layer.factor.dtype).eps)
            own = own.expand(ball.center[0].shape[1:])[None]
            factor = own if factor is None else factor * own
        return replace(ball, center=image(layer, ball.center, kind=kind), factor=factor, box=box)
    assert isinstance(layer, (Linear, Conv))
    width = _width(layer, ball, kind)  # (B, O, ...)
    lower, upper = image(layer, ball.center, kind=kind)
    dtype = lower.dtype
    if kind == "estimate":
        lower, upper = lower - width.to(dtype), upper + width.to(dtype)
    else:  # the 2^-51 covers the rounding of the very sums in which it stands
        lower = rounding.down(lower.double() - (width + 2.0**-51 * lower.double().abs()), dtype)
        upper = rounding.up(upper.double() + (width + 2.0**-51 * upper.double().abs()), dtype)
    return (lower, upper) if box is None else (torch.maximum(lower, box[0]), torch.minimum(upper, box[1]))


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
    if value.box is not None:
        return value.box
    radius = value.radius.reshape(-1, *[1] * (value.center[0].ndim - 1))
    if value.factor is not None:
        radius = radius * value.factor.abs() * (1 + 2.0**-40)
    return _box_around(value.center, radius, kind)
