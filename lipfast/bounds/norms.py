"""The l2 operator norms of a network's affine layers.

Each Linear and Conv becomes an :class:`Operator`; a normalisation or batch norm beside it, which scales channels, is
multiplied into its weight, since the norm of the product is less than the product of the norms.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lipfast.bounds._gains import UP
from lipfast.bounds._interval_rules import conv2d_arguments
from lipfast.bounds.layers import Conv, Layer, Linear, Scale
from lipfast.bounds.network import Network, read
from lipfast.ops.ball_conv2d import ball_conv2d
from lipfast.ops.ball_linear import ball_linear
from lipfast.ops.conv2d_norm_bound import conv2d_norm_bound
from lipfast.ops.conv2d_norm_confidence import conv2d_norm_confidence
from lipfast.ops.conv2d_norm_estimate import conv2d_norm_estimate
from lipfast.ops.spectral_norm_bound import spectral_norm_bound
from lipfast.ops.spectral_norm_estimate import spectral_norm_estimate


@dataclass(frozen=True)
class Norms:
    """Norms of all affine layers over all inputs.

    Attributes:
        kind: "bound": never below the true norms, float64, without gradient; "estimate": by power iteration, differentiable
            in the weights.
        sigma: of every Linear and Conv, by its name in the model, ().
        vectors: estimates only: for each the right singular vector that was reached, of the layer's input shape; without
            gradient. Handed to the next call they save iterations.
    """

    kind: str
    sigma: dict[str, Tensor]
    vectors: dict[str, Tensor]


@dataclass(frozen=True)
class Operator:
    """A Linear or Conv layer without its bias, with the scalings beside it.

    Attributes:
        layer: all scalings in its weight; ``plain`` has those before it only.
        first, last: positions of its first and last node: a scaling before it, itself, or a scaling after it.
        shape: of one input sample.
        error: each stored weight is within ``error`` times its size of the exact one.
    """

    name: str
    layer: Linear | Conv
    plain: Linear | Conv
    first: int
    last: int
    shape: tuple[int, ...]
    error: float

    def estimate(
        self, input_mask: Tensor | None, output_mask: Tensor | None, start: Tensor | None, iterations: int
    ) -> tuple[Tensor, Tensor]:
        """The norm for each sample's masks, (B,) or (), and the right vectors."""
        if isinstance(self.layer, Linear):
            sigma, right = spectral_norm_estimate(self.layer.weight, input_mask, output_mask, start, iterations)
            return _largest(sigma, input_mask, output_mask), right
        vectors = {"input_mask": input_mask, "output_mask": output_mask, "start": start}
        rows: dict[str, Any] = {name: _rows(self.layer, value) for name, value in vectors.items()}
        sigma, right = conv2d_norm_estimate(
            input_size=self._size(), iterations=iterations, **rows, **conv2d_arguments(self.layer)
        )
        return sigma, right.squeeze(-2) if self.layer.weight.ndim == 3 else right

    def bound(self, input_mask: Tensor | None = None, output_mask: Tensor | None = None) -> Tensor:
        """Never below the norm for each sample's masks, float64. Convolutions have a bound without masks only."""
        weight = self.layer.weight.double()
        if isinstance(self.layer, Linear):
            sigma = _largest(spectral_norm_bound(weight, input_mask, output_mask), input_mask, output_mask)
            entries = weight.norm()
        else:
            sigma = conv2d_norm_bound(input_size=self._size(), **conv2d_arguments(replace(self.layer, weight=weight)))
            entries = weight.norm() * weight[0, 0].numel() ** 0.5  # a matrix of norms |W| has at most this norm
        return (sigma + self.error * entries) * UP if self.error else sigma

    def confidence(
        self, input_mask: Tensor | None, output_mask: Tensor | None, failure_probability: float, bound: Tensor
    ) -> Tensor:  # (B,) float64
        """A convolution's norm for each sample's masks: above it but with ``failure_probability``, and at most ``bound``."""
        assert isinstance(self.layer, Conv)
        layer = replace(self.layer, weight=self.layer.weight.double())
        rest: dict[str, Any] = {"input_mask": _rows(layer, input_mask), "output_mask": _rows(layer, output_mask)}
        rest |= {"failure_probability": failure_probability, "bound": bound}
        sigma = conv2d_norm_confidence(input_size=self._size(), **rest, **conv2d_arguments(layer))
        entries = layer.weight.norm() * layer.weight[0, 0].numel() ** 0.5
        return torch.minimum((sigma + self.error * entries) * UP, bound) if self.error else sigma

    def row_norms(self, kind: str) -> Tensor:  # (1, O, ...)
        """The l2 norm of every row of ``plain``: how far each output moves over a unit ball of inputs. float64 for a bound."""
        layer, line = self.plain, self.plain.weight.ndim == 3
        if kind == "bound":
            layer = replace(layer, weight=layer.weight.double(), bias=None)
            zero = layer.weight.new_zeros(1, *self.shape)
            if isinstance(layer, Linear):
                reach = ball_linear(zero, 1.0, layer.weight, outward=True)[1]
            else:
                reach = ball_conv2d(zero.unsqueeze(-2) if line else zero, 1.0, outward=True, **conv2d_arguments(layer))[1]
            reach = reach * (1 + self.error) * UP
        elif isinstance(layer, Linear):
            return torch.linalg.vector_norm(layer.weight, dim=1)[None]
        else:
            arguments = conv2d_arguments(replace(layer, weight=layer.weight.square()))
            ones = layer.weight.new_ones(1, self.shape[0], *self._size())
            square = nn.functional.conv2d(ones, **arguments)
            reach = square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
        return reach.squeeze(-2) if line else reach

    def _size(self) -> tuple[int, ...]:
        return self.shape[-2:] if self.layer.weight.ndim == 4 else (1, self.shape[-1])


def norms(
    model: nn.Module,
    input_shape: tuple[int, ...],
    kind: str = "bound",
    iterations: int = 10,
    vectors: Mapping[str, Tensor] | None = None,
) -> Norms:
    """The l2 operator norm of every Linear and Conv of ``model``, the scalings beside it included.

    Args:
        model: made of the layers that :mod:`lipfast.bounds.network` names.
        input_shape: of one sample.
        kind: "bound" or "estimate", see :class:`Norms`.
        iterations: of the power iteration of an estimate.
        vectors: ``Norms.vectors`` of an earlier call, to start from; layers without one start from a fixed random vector.

    Raises: ValueError for an unknown kind, negative iterations or a layer without a rule, which it names.

    >>> norms(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), (2,), kind="estimate").sigma.keys()
    dict_keys(['0'])
    """
    check_kind(kind)
    found = Norms(kind, {}, {})
    with torch.set_grad_enabled(kind == "estimate" and torch.is_grad_enabled()):
        for operator in operators(read(model, tuple(input_shape)), kind).values():
            if kind == "bound":
                found.sigma[operator.name] = operator.bound()
            else:
                start = (vectors or {}).get(operator.name)
                found.sigma[operator.name], found.vectors[operator.name] = operator.estimate(None, None, start, iterations)
    return found


def check_kind(kind: str) -> None:
    if not isinstance(kind, str) or kind not in ("bound", "estimate"):
        got = repr(kind) if isinstance(kind, str) else type(kind).__name__
        raise ValueError(f"kind: 'bound' or 'estimate' expected, got {got}")


def check_norms(norms: Norms, kind: str, needed: Iterable[Operator]) -> None:
    if norms.kind != kind:
        raise ValueError(f"norms: of kind {kind!r} expected, got {norms.kind!r}")
    for operator in needed:
        if operator.name not in norms.sigma:
            raise ValueError(f"norms: of this model expected, without layer {operator.name!r}")


def operators(network: Network, kind: str) -> dict[int, Operator]:
    """Every Linear and Conv by its position, merged with the scalings of channels that no other layer reads."""
    readers = network.readers()
    found: dict[int, Operator] = {}
    taken: set[str] = set()
    merged: set[int] = set()  # a scaling between two layers belongs to the first of them only
    for position, node in enumerate(network.nodes):
        layer = node.layer
        if not isinstance(layer, (Linear, Conv)):
            continue
        first = last = position
        weight, error = layer.weight, 0.0
        before = network.nodes[node.inputs[0]]
        if len(readers[node.inputs[0]]) == 1 and node.inputs[0] not in merged:
            factor = _per_channel(before.layer, before.shape, layer)
            if factor is not None:
                groups = layer.groups if isinstance(layer, Conv) else 1
                weight = _wide(weight, kind)
                columns = factor.reshape(groups, 1, -1, *[1] * (weight.ndim - 2)).to(weight)
                weight = (weight.unflatten(0, (groups, -1)) * columns).flatten(0, 1)
                first, error = node.inputs[0], error + 8 * torch.finfo(factor.dtype).eps
        plain = weight
        if len(readers[position]) == 1:
            after = network.nodes[readers[position][0]]
            factor = _per_channel(after.layer, after.shape, layer)
            if factor is not None:
                weight = _wide(weight, kind)
                weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1)).to(weight)
                last, error = readers[position][0], error + 8 * torch.finfo(factor.dtype).eps
        name = next(n for n in (node.name, *(f"{node.name}:{i}" for i in range(1, position))) if n not in taken)
        taken.add(name)
        merged |= {first, last}
        shape = network.nodes[node.inputs[0]].shape
        layers = replace(layer, weight=weight), replace(layer, weight=plain)
        found[position] = Operator(name, *layers, first, last, shape, error if kind == "bound" else 0.0)
    return found


def _wide(weight: Tensor, kind: str) -> Tensor:
    return weight.double() if kind == "bound" else weight


def _per_channel(scale: Layer, shape: tuple[int, ...], layer: Linear | Conv) -> Tensor | None:
    """The scaling as one factor for each channel of ``shape``, or None if it is none."""
    rank = max(layer.weight.ndim - 2, 0)  # dimensions of pixels
    factor = scale.factor if isinstance(scale, Scale) else None
    if factor is None or len(shape) != rank + 1 or any(size != 1 for size in factor.shape[factor.ndim - rank :]):
        return None
    return factor.reshape(-1).expand(shape[0])


def _rows(layer: Conv, value: Tensor | None) -> Tensor | None:
    return value.unsqueeze(-2) if value is not None and layer.weight.ndim == 3 else value


def _largest(sigma: Tensor, *masks: Tensor | None) -> Tensor:
    """A Linear layer over several positions of a sample is block diagonal: the norm is the largest block's."""
    rank = max((m.ndim for m in masks if m is not None), default=1)
    return sigma.flatten(1).amax(1) if rank > 2 else sigma
