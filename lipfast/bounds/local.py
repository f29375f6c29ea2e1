"""Local Lipschitz bounds: how fast a network can change within an l2 ball around an input (Huang et al. 2021,
https://arxiv.org/abs/2111.01395).

Where an activation's box shows that a unit is constant over the ball, its increment is zero: its row of the layer before and
its column of the layer after drop out. With D_k the 0/1 diagonal of the units of layer k that vary,

    || increment after layer k ||  <=  || D_k W_k D_{k-1} || ... || D_1 W_1 ||  eps        (activations of slope at most 1)

and each factor is at most ||W_k||. Boxes are the intersection of interval propagation and of the l2 ball around each hidden
value (Lee et al. 2020, https://arxiv.org/abs/2006.09699), whose radius is eps times the local bound of the layers so far.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lipfast import rounding
from lipfast.bounds._gains import UP, between_outputs, fixed_gain, scale_gain
from lipfast.bounds._interval_rules import Box, image
from lipfast.bounds._liplt import pairwise_bound, pairwise_estimate, slopes, tail
from lipfast.bounds._maps import Nonlinearity
from lipfast.bounds._translation import largest_increment
from lipfast.bounds.interval import _ACTIVATIONS, _check_label, _elided_margin, _final_linear, _fresh
from lipfast.bounds.layers import (
    AveragePool,
    Conv,
    Elementwise,
    Input,
    L2Pool,
    Layer,
    Linear,
    MaxMin,
    MaxPool,
    Pad,
    Rearrange,
    Scale,
    Sum,
    widened,
)
from lipfast.bounds.network import Network, read
from lipfast.bounds.norms import Norms, Operator, check_kind, check_norms, operators
from lipfast.bounds.norms import norms as norms_of
from lipfast.ops.pairwise_distance import pairwise_distance


@dataclass(frozen=True)
class Local:
    """What is known of a network over l2 balls around a batch of inputs.

    Attributes:
        lipschitz: (B,), of the map from the ball to the last hidden value (to the output if that is not a Linear layer's).
        logits: (B, K), the model's own output at the centers, rounded to nearest.
        layers: for each activation or max/L2 pooling, by its name in the model, the box before it.
    """

    lipschitz: Tensor
    logits: Tensor
    layers: dict[str, Box]
    _hidden: "_Value"
    _box: Box  # of the hidden value
    _last: Linear | None
    _radius: Tensor  # (B,) of the input balls
    _kind: str
    _liplt: Tensor | None  # (B, K, K)

    def margin(self, label: Tensor) -> Tensor:  # (B,) -> (B, K)
        """Lower bounds of ``logit[label] - logit[j]`` over the balls; 0 where j is the label.

        The last hidden value moves within a ball and a box; the largest change of each difference of logits over their
        intersection is bounded by a scalar dual problem, see :func:`lipfast.bounds._translation.largest_increment`.
        """
        with torch.set_grad_enabled(self._kind == "estimate" and torch.is_grad_enabled()):
            center, bound = self._hidden.center, self._kind == "bound"
            if self._last is None:
                raise ValueError("model: local margins need a Linear layer as the last, whose rows they compare")
            _check_label(label, torch.Size((len(center[0]), len(self._last.weight))), self._kind)
            own = self.logits.gather(1, label[:, None]) - self.logits
            before = _elided_margin(center, self._last, label, self._kind) if bound else own
            low, high = self._box
            radius = self.lipschitz * self._radius.to(self.lipschitz.dtype)
            if self._liplt is not None:
                rows = self._liplt[torch.arange(len(label), device=label.device), label]
                apart = rows * self._radius[:, None].to(rows.dtype)
            if bound:
                infinity = center[0].new_tensor(math.inf)
                low = torch.nextafter(low.double() - center[1], -infinity)
                high = torch.nextafter(high.double() - center[0], infinity)
                change = largest_increment(self._last.weight.double(), label, low, high, radius * UP, outward=True)
                change = change if self._liplt is None else torch.minimum(change, apart * UP)
                return torch.nextafter(before - change, -infinity).scatter(1, label[:, None], 0.0)
            change = largest_increment(self._last.weight, label, low - center[0], high - center[0], radius)
            change = change if self._liplt is None else torch.minimum(change, apart)
            return (before - change).scatter(1, label[:, None], 0.0)

    def pairwise(self) -> Tensor:  # (B, K, K)
        """Local Lipschitz constants of all differences of two logits: symmetric, zero diagonal."""
        with torch.set_grad_enabled(self._kind == "estimate" and torch.is_grad_enabled()):
            found = self._product()
            return found if self._liplt is None else torch.minimum(found, self._liplt)

    def _product(self) -> Tensor:
        if self._last is None:
            return between_outputs(self.lipschitz, self.logits.shape[1])
        weight = self._last.weight.double() if self._kind == "bound" else self._last.weight
        varying = self._hidden.varying
        distance = pairwise_distance(weight if varying is None else weight * varying[:, None].to(weight.dtype))
        if self._kind == "bound":
            distance = distance * (1 + 4 * (weight.shape[1] + 16) * torch.finfo(weight.dtype).eps)
        return self.lipschitz[:, None, None] * distance


@dataclass(frozen=True)
class _Value:
    """A node's value over the ball: around ``center``, the clean value, moving by at most eps times ``gain``."""

    center: Box
    box: Box | None  # None: the ball is all that is known
    gain: Tensor  # (B,)
    varying: Tensor | None = None  # (B, ...) bool: entries that may change; None: all
    pending: tuple[Operator, Tensor | None] | None = None  # a layer, with its input's mask, that gain does not contain yet


def local(
    model: nn.Module,
    x: Tensor,  # (B, ...)
    eps: float | Tensor,
    method: str = "product",
    kind: str = "bound",
    norms: Norms | None = None,
    iterations: int = 2,
    keep_layers: bool = True,
    box_gradient: bool = True,
    failure_probability: float = 0.0,
) -> Local:
    """Local Lipschitz bounds of ``model`` over l2 balls of radius ``eps`` around ``x``.

    Args:
        model: made of the layers that :mod:`lipfast.bounds.network` names.
        x: a batch of inputs, in the model's dtype and on its device.
        eps: radius in the l2 norm of the model's own input, a number or (B,), above 0.
        method: "product" of the layers' local norms; "liplt": beside it, and never looser, loop transformation with each unit's
            slopes (:mod:`lipfast.bounds._liplt`), in :meth:`Local.pairwise` and :meth:`Local.margin`: over all layers for an
            estimate, over the Linear layers after the last other one for a bound; "global": product of the norms over all
            inputs, without masks, whose boxes and margins are those of Lee et al. 2020 (BCP).
        kind: "bound": proven, rounding included, without gradient; masks enter the norms of Linear layers, a convolution
            has its norm over all inputs unless there is a ``failure_probability``. "estimate": for training, differentiable in
            the parameters; every norm is a power iteration with the sample's masks, which is a lower estimate.
        norms: from :func:`lipfast.bounds.norms`, of the same kind and parameters, to save their computation; the vectors of
            an estimate are where each sample's iteration starts.
        iterations: of each sample's power iteration.
        keep_layers: False leaves ``layers`` empty, and saves the memory of keeping every box.
        box_gradient: False takes boxes for constants, which saves most of an estimate's memory and time: constants carry the
            same gradient as ever, margins miss what the last box would add.
        failure_probability: of a bound, from 0 to below 1. Above 0 masks enter the norms of convolutions too, by
            :func:`lipfast.conv2d_norm_confidence`: all bounds of one image hold together with probability
            1 - ``failure_probability`` over the random starts, which each call draws anew. Never looser than 0, and slow.

    Raises: ValueError for NaN or Inf in x, an eps that is not positive, an unknown kind, norms of the other kind or of another
        model, a failure_probability out of range or of an estimate, or a layer without a rule, which it names.
    """
    check_kind(kind)
    if not 0 <= failure_probability < 1:
        raise ValueError(f"failure_probability: from 0 to below 1 expected, got {failure_probability}")
    if failure_probability and kind != "bound":
        raise ValueError(f"failure_probability: 0 for an estimate expected, got {failure_probability}")
    if method not in ("liplt", "product", "global"):
        raise ValueError(f"method: 'liplt', 'product' or 'global' expected, got {method!r}")
    radius = _radius(x, eps, kind)
    with torch.set_grad_enabled(kind == "estimate" and torch.is_grad_enabled()):
        network = read(model, tuple(x.shape[1:]))
        if norms is None:
            norms = norms_of(model, tuple(x.shape[1:]), kind)
        last = _final_linear(network)
        until = network if last is None else network.until(network.nodes[-1].inputs[0])
        layers: dict[str, Box] = {}
        walk = _Walk(until, kind, norms, iterations, radius, method, box_gradient, x.dtype, failure_probability)
        hidden, gain = walk.last_value(x, layers if keep_layers else None, tail(network))
        logits = hidden.center[0].to(x.dtype)
        logits = logits if last is None else nn.functional.linear(logits, last.weight, last.bias)
        liplt = None
        if method == "liplt" and kind == "bound":
            liplt = pairwise_bound(network, walk.nonlinear, tail(network), *walk.before_tail)
        elif method == "liplt":
            liplt = pairwise_estimate(network, walk.nonlinear, x, iterations).pairwise
        return Local(gain, logits, layers, hidden, walk.box(hidden), last, radius, kind, liplt)


def local_lipschitz(
    model: nn.Module,
    x: Tensor,  # (B, ...)
    eps: float | Tensor,
    p: float = 2,
    method: str = "liplt",
    kind: str = "bound",
) -> Tensor:  # (B, K, K)
    """Lipschitz constants, over the l2 balls of radius ``eps`` around ``x``, of all differences of two logits.

    Args:
        p: 2.
    Symmetric, with a zero diagonal. Other arguments and errors as in :func:`local`.
    """
    if p != 2:
        raise ValueError(f"p: 2 expected, got {p}")
    return local(model, x, eps, method, kind).pairwise()


def _radius(x: Tensor, eps: float | Tensor, kind: str) -> Tensor:  # (B,) float64
    if not x.is_floating_point():
        raise ValueError(f"x: floating-point values expected, got {x.dtype}")
    if kind == "bound" and not x.isfinite().all():
        raise ValueError("x: finite values expected, got NaN or Inf")
    if not isinstance(eps, Tensor) and not 0 < eps < math.inf:
        raise ValueError(f"eps: positive and finite expected, got {eps}")
    radius = torch.as_tensor(eps, dtype=torch.float64, device=x.device)
    if radius.ndim > 1 or radius.numel() not in (1, len(x)):
        raise ValueError(f"eps: a number or one per sample expected, got {tuple(radius.shape)}")
    if kind == "bound" and not ((radius > 0) & (radius < math.inf)).all():
        raise ValueError("eps: positive and finite expected")
    return radius.expand(len(x))


class _Walk:
    """One pass through the graph; it holds what is the same for all nodes."""

    def __init__(
        self,
        network: Network,
        kind: str,
        norms: Norms,
        iterations: int,
        radius: Tensor,
        method: str,
        box_gradient: bool,
        dtype: torch.dtype,
        failure_probability: float,
    ):
        self.box_gradient, self.dtype = box_gradient, dtype
        self.network, self.kind, self.norms, self.iterations, self.radius = network, kind, norms, iterations, radius
        self.method = method
        self.nonlinear: list[Nonlinearity] = []  # of LipLT, with what it starts from
        self.before_tail: tuple[Tensor, Tensor | None] = (radius, None)
        self.operators = operators(network, kind)
        self.merged = {at: op for op in self.operators.values() for at in (op.first, op.last)}
        check_norms(norms, kind, self.operators.values())
        convolutions = sum(isinstance(operator.layer, Conv) for operator in self.operators.values())
        self.share = failure_probability / max(1, convolutions)  # of a convolution that has not drawn its start yet
        self.drawn: set[str] = set()

    def last_value(self, x: Tensor, layers: dict[str, Box] | None, tail: int) -> tuple[_Value, Tensor]:
        values: list = []
        readers = self.network.readers()
        for position, node in enumerate(self.network.nodes):
            inputs = [values[i] for i in node.inputs]
            if layers is not None and isinstance(node.layer, _ACTIVATIONS):
                layers[_fresh(node.name, layers)] = self.box(inputs[0])
            values.append(self.value(position, node.layer, node.name, inputs, x))
            if position == tail and self.method == "liplt":
                gain = self.gain(values[-1])
                if any(operator.first == position for operator in self.operators.values()) and isinstance(node.layer, Scale):
                    gain = (
                        gain * scale_gain(node.layer, self.kind) * UP
                    )  # left to the next layer's norm, which LipLT does not use
                self.before_tail = gain, values[-1].varying
            for i in node.inputs:
                if readers[i][-1] == position:
                    values[i] = None
        return values[-1], self.gain(values[-1])

    def gain(self, value: _Value, output_mask: Tensor | None = None) -> Tensor:
        """The Lipschitz bound of a value, of the entries in the mask if there is one."""
        if value.pending is None:
            return value.gain
        operator, input_mask = value.pending
        if self.kind == "bound":
            return value.gain * self.sigma(operator, input_mask, output_mask) * UP
        if input_mask is None and output_mask is None:
            return value.gain * self.norms.sigma[operator.name]
        start = self.norms.vectors[operator.name]
        return value.gain * operator.estimate(input_mask, output_mask, start, self.iterations)[0]

    def sigma(self, operator: Operator, input_mask: Tensor | None, output_mask: Tensor | None) -> Tensor:
        """The proven norm, with the masks where that is possible."""
        everywhere = self.norms.sigma[operator.name]
        if input_mask is None and output_mask is None:
            return everywhere
        if isinstance(operator.layer, Linear):
            return operator.bound(input_mask, output_mask)
        if not self.share or operator.name in self.drawn:  # each further start would be one more that can fail
            return everywhere
        self.drawn.add(operator.name)
        return operator.confidence(input_mask, output_mask, self.share, everywhere)

    def value(self, position: int, layer: Layer, name: str, inputs: Sequence[_Value], x: Tensor) -> _Value:
        if isinstance(layer, Input):
            wide = x.double() if self.kind == "bound" else x
            return _Value((wide, wide), None, wide.new_ones(len(x)))
        first = inputs[0]
        center = self.center(layer, [v.center for v in inputs])
        if isinstance(layer, (Linear, Conv)):
            return self.affine(self.operators[position], layer, first, center)
        if isinstance(layer, Sum):
            return self.sum(layer, inputs, center)
        box = None if first.box is None and isinstance(layer, (Scale, Rearrange)) else self.image(layer, first)
        if isinstance(layer, Scale):
            if position in self.merged:  # its operator's norm contains it
                return replace(first, center=center, box=box)
            return _Value(center, box, self.gain(first) * scale_gain(layer, self.kind), first.varying)
        if isinstance(layer, Elementwise):
            varying = moved = self.varying(layer, first)
        else:
            varying, moved = None, None if first.varying is None else _moved(layer, first.varying)
        reach = self.gain(first, varying)
        if self.method == "liplt" and isinstance(layer, _ACTIVATIONS):
            before = self.box(first)
            self.nonlinear.append(Nonlinearity(position, *slopes(layer, before, self.kind), reach))
        gain = reach * fixed_gain(layer, name, first.center[0].shape[1:])
        return _Value(center, box, gain * UP if self.kind == "bound" else gain, moved)

    def affine(self, operator: Operator, layer: Linear | Conv, value: _Value, center: Box) -> _Value:
        gain = self.gain(value)
        with self.boxes():
            radius = (gain * self.radius.to(gain.dtype)).reshape(-1, *[1] * (center[0].ndim - 1))
            reach = operator.row_norms(self.kind) * radius
            if value.box is None:
                box = _around(center, reach, self.kind, layer.weight.dtype)
            elif self.kind == "bound":
                (low, high), other = (
                    _around(center, reach, self.kind, layer.weight.dtype),
                    image(layer, value.box, kind=self.kind),
                )
                box = torch.maximum(low, other[0]), torch.minimum(high, other[1])
            else:
                box = _Intersection.apply(center[0], reach, *image(layer, value.box, kind=self.kind))
        return _Value(center, box, gain, pending=(operator, value.varying))

    def boxes(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(self.box_gradient and torch.is_grad_enabled())

    def sum(self, layer: Sum, inputs: Sequence[_Value], center: Box) -> _Value:
        with self.boxes():
            box = image(layer, *(self.box(v) for v in inputs), kind=self.kind)
        left, right = inputs
        varying = None if left.varying is None or right.varying is None else left.varying | right.varying
        return _Value(center, box, (self.gain(left) + self.gain(right)) * (UP if self.kind == "bound" else 1), varying)

    def varying(self, layer: Elementwise, value: _Value) -> Tensor | None:
        constant = layer.constant_on(*self.box(value)) if self.method != "global" else None
        if constant is None:
            return value.varying
        varying = ~constant
        return varying if value.varying is None else varying & value.varying

    def box(self, value: _Value) -> Box:
        if value.box is not None:
            return value.box
        reach = (value.gain * self.radius.to(value.gain.dtype)).reshape(-1, *[1] * (value.center[0].ndim - 1))
        return _around(value.center, reach, self.kind, self.dtype)

    def image(self, layer: Layer, value: _Value) -> Box:
        with self.boxes():
            return image(layer, self.box(value), kind=self.kind)

    def center(self, layer: Layer, centers: Sequence[Box]) -> Box:
        if self.kind == "bound":  # in float64: from layer to layer a box around the clean value grows as boxes do
            return image(widened(layer), *centers, kind="bound")
        value = _at_point(layer, *(c[0] for c in centers))
        return value, value


class _Intersection(torch.autograd.Function):
    """A box of ``center`` and ``reach`` (1, ...) or (B, ...) with another; it keeps one bit per end instead of four boxes."""

    @staticmethod
    def forward(ctx, center, reach, lower, upper):
        low, high = center - reach, center + reach
        ctx.save_for_backward(low > lower, high < upper)
        return torch.maximum(low, lower), torch.minimum(high, upper)

    @staticmethod
    def backward(ctx, grad_lower, grad_upper):
        low, high = (g * inner for g, inner in zip((grad_lower, grad_upper), ctx.saved_tensors, strict=True))
        return low + high, high - low, grad_lower - low, grad_upper - high


def _moved(layer: Layer, varying: Tensor) -> Tensor:
    """Where the outputs of a layer may change, if the inputs change only in ``varying``."""
    if isinstance(layer, Rearrange):
        return layer.function(varying)
    if isinstance(layer, MaxMin):
        either = torch.logical_or(*varying.chunk(2, 1))
        return torch.cat([either, either], 1)
    if isinstance(layer, L2Pool):
        return layer.square_sum(varying.float()) > 0
    assert isinstance(layer, (AveragePool, MaxPool, Pad)), layer
    return (layer(varying.float()) if isinstance(layer, Pad) else layer.function(varying.float())) > 0


def _around(center: Box, reach: Tensor, kind: str, dtype: torch.dtype) -> Box:
    """The box of all points within ``reach`` of the center in every coordinate."""
    lower, upper = center
    if kind == "estimate":
        return lower - reach, upper + reach
    reach = reach * UP  # the 2^-50 covers the rounding of the very sums in which it stands
    low, high = lower - (reach + 2.0**-50 * lower.abs()), upper + (reach + 2.0**-50 * upper.abs())
    return rounding.down(low, dtype), rounding.up(high, dtype)


def _at_point(layer: Layer, *x: Tensor) -> Tensor:
    """The layer's value, rounded to nearest."""
    if isinstance(layer, Linear):
        return nn.functional.linear(x[0], layer.weight, layer.bias)
    if isinstance(layer, Conv):
        conv = nn.functional.conv1d if layer.weight.ndim == 3 else nn.functional.conv2d
        return conv(x[0], layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    if isinstance(layer, (Elementwise, Rearrange, AveragePool, MaxPool)):
        return layer.function(x[0])
    return image(layer, *((v, v) for v in x), kind="estimate")[0]
