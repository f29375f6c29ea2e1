"""Rows of a network's linear part, pushed back layer by layer, on a sample's entries or on the endless grid of an image.

What is meant by the grid is said in :mod:`lipfast.bounds._linf`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast.bounds.layers import (
    AveragePool,
    Conv,
    Layer,
    Linear,
    Pad,
    Rearrange,
    Scale,
    Sum,
)
from lipfast.bounds.network import Network


@dataclass(frozen=True)
class Rows:
    """Coefficients of R linear functions of a node's value.

    Attributes:
        values: (R, *shape), or on the grid (R, C, *window), zero outside the window.
        origin: the image's position of the window's first entry; None off the grid.
    """

    values: Tensor
    origin: tuple[int, ...] | None

    def times(self, factor: float | Tensor) -> "Rows":
        return Rows(self.values * factor, self.origin)


def joined(a: Rows, b: Rows) -> Rows:
    """The sum of two rows on the same node."""
    if a.origin is None or b.origin is None:
        return Rows(a.values + b.values, None)
    ends = [[o + n for o, n in zip(r.origin or (), r.values.shape[2:], strict=True)] for r in (a, b)]
    first, last = tuple(map(min, a.origin, b.origin)), list(map(max, *ends))
    widened = []
    for rows, end in zip((a, b), ends, strict=True):
        amounts = [(o - f, e - n) for o, f, e, n in zip(rows.origin or (), first, last, end, strict=True)]
        widened.append(F.pad(rows.values, [amount for pair in reversed(amounts) for amount in pair]))
    return Rows(widened[0] + widened[1], first)


def through(layer: Layer, rows: Rows, shape: tuple[int, ...]) -> list[Rows]:
    """Rows on a linear layer's output as rows on its inputs, of ``shape``."""
    if isinstance(layer, Sum):
        return [rows.times(sign) for sign in layer.signs]
    if isinstance(layer, Scale):
        return [rows if layer.factor is None else rows.times(layer.factor.to(rows.values))]
    if isinstance(layer, Linear):
        return [Rows(rows.values @ layer.weight, None)]
    if rows.origin is None:
        return [Rows(_transposed(layer, rows.values, shape), None)]
    if isinstance(layer, Conv):
        values = _conv_transpose(layer, rows.values, (0,) * len(layer.stride))
        origin = tuple(s * o - p for s, o, p in zip(layer.stride, rows.origin, layer.padding, strict=True))
        return [Rows(values, origin)]
    if isinstance(layer, AveragePool) and layer.window is not None:
        kernel, stride, padding = layer.window
        C = rows.values.shape[1]
        mean = Conv(rows.values.new_full((C, 1, *kernel), 1 / layer.terms), None, stride, padding, (1,) * len(kernel), C)
        return through(mean, rows, shape)
    if isinstance(layer, Pad):
        before = layer.amounts[::2]  # the last dimension's first
        before += (0,) * (len(rows.origin) - len(before))
        return [Rows(rows.values, tuple(o - n for o, n in zip(rows.origin, reversed(before), strict=True)))]
    assert isinstance(layer, Rearrange), layer
    return [rows]


def _transposed(layer: Layer, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Of the layer on samples of ``shape`` as it is, paddings and all."""
    if not isinstance(layer, Conv):
        assert isinstance(layer, (AveragePool, Pad, Rearrange)), layer
        function = layer if isinstance(layer, Pad) else layer.function
        return torch.func.vjp(function, values.new_zeros(len(values), *shape))[1](values)[0]
    geometry = zip(
        layer.stride, layer.padding, layer.dilation, layer.weight.shape[2:], values.shape[2:], shape[1:], strict=True
    )
    rest = tuple(n - ((o - 1) * s - 2 * p + d * (k - 1) + 1) for s, p, d, k, o, n in geometry)
    return _conv_transpose(layer, values, layer.padding, rest)


def _conv_transpose(layer: Conv, values: Tensor, padding: tuple[int, ...], rest: tuple[int, ...] | int = 0) -> Tensor:
    transpose = F.conv_transpose1d if layer.weight.ndim == 3 else F.conv_transpose2d
    return transpose(values, layer.weight, None, layer.stride, padding, rest, layer.groups, layer.dilation)


@dataclass(frozen=True)
class Plan:
    """Where the nodes of a network live.

    Attributes:
        grid: nodes whose values the grid knows at every position.
        masked: those that must be zero beyond the image, since something padded reads them.
        unknown: nodes whose layer the grid does not know.
        cut: other nodes that are not zero beyond the image and padded, or come to the grid from vectors.
    """

    grid: list[bool]
    masked: set[int]
    unknown: set[int]
    cut: set[int]

    @property
    def closed(self) -> set[int]:
        return self.unknown | self.cut


def plan(network: Network) -> Plan:
    grid: list[bool] = []
    zero: list[bool] = []  # beyond the image
    unknown: set[int] = set()
    cut: set[int] = set()
    for position, node in enumerate(network.nodes):
        layer, inputs = node.layer, node.inputs
        shape = network.nodes[inputs[0]].shape if inputs else node.shape
        grid.append(isinstance(layer, Conv) or (all(grid[i] for i in inputs) and _keeps_grid(layer, shape)))
        zero.append(False)
        if not grid[position]:
            continue
        if not _known(layer, len(node.shape)):
            unknown.add(position)
        elif isinstance(layer, Conv) and not grid[inputs[0]]:
            cut.add(inputs[0])
        elif _padded(layer) and not zero[inputs[0]]:
            cut.add(inputs[0])
            zero[inputs[0]] = True
        if isinstance(layer, _ZERO_AT_ZERO) and position not in unknown:
            zero[position] = all(zero[i] for i in inputs) and (not isinstance(layer, Pad) or min(layer.amounts) >= 0)
        else:
            zero[position] = position in unknown or not isinstance(layer, (Conv, AveragePool))
    readers, masked = network.readers(), set()
    for position in reversed(range(len(grid))):
        for reader in readers[position]:
            layer = network.nodes[reader].layer
            if grid[reader] and reader not in unknown and position not in cut:
                if _padded(layer) or (reader in masked and reader not in cut and isinstance(layer, _ZERO_AT_ZERO)):
                    masked.add(position)
    return Plan(grid, masked, unknown, cut)


_ZERO_AT_ZERO = (Scale, Sum, Rearrange, Pad)


def _keeps_grid(layer: Layer, shape: tuple[int, ...]) -> bool:
    """Whether the output for samples of ``shape``, which are on the grid, has a place there."""
    if isinstance(layer, Rearrange):
        places = torch.arange(torch.Size(shape).numel()).reshape(1, *shape)
        return torch.equal(layer.function(places), places)
    return len(shape) in (2, 3) and not isinstance(layer, Linear)


def _known(layer: Layer, rank: int) -> bool:
    """Whether the grid has a rule for a layer whose inputs live there."""
    if isinstance(layer, Scale):
        sizes = () if layer.factor is None else layer.factor.shape
        return all(size == 1 for size in sizes[max(0, len(sizes) - rank + 1) :])
    if isinstance(layer, AveragePool):
        return layer.window is not None and len(layer.window[0]) == rank - 1  # else it pools over channels
    if isinstance(layer, Pad):
        return layer.mode == "constant" and len(layer.amounts) // 2 < rank
    return True


def _padded(layer: Layer) -> bool:
    """Whether the layer reads beyond the image."""
    if isinstance(layer, Conv):
        return any(layer.padding)
    if isinstance(layer, AveragePool):
        return layer.window is not None and any(layer.window[2])
    return isinstance(layer, Pad) and max(layer.amounts) > 0
