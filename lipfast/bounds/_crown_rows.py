"""Rows of linear functions for the backward pass of :mod:`lipfast.bounds._relaxation`: where they start, how they move.

The units of an image see a window of it. So their rows have an origin (:class:`lipfast.bounds._linf_rows.Rows`), are cropped
where the window leaves the image, and become rows on all of it before a layer that knows no windows.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast.bounds._linf_rows import Rows, _keeps_grid, _known, joined, through
from lipfast.bounds.layers import Conv
from lipfast.bounds.network import Network, Node


@dataclass(frozen=True)
class Goals:
    """R linear functions of a node's value, each a signed sum of T units of one sample.

    Attributes:
        sample: (R,).
        unit, sign: (R, T); units are the numbers of a vector, the channels of an image.
        position: (R, dimensions), where in the image; None for vectors.
    """

    sample: Tensor
    unit: Tensor
    sign: Tensor
    position: Tensor | None = None

    def of(self, t: Tensor) -> Tensor:  # (units, ...) -> (R, ...)
        """What is known of each unit at position 0, for the signed sums."""
        chosen = t.index_select(0, self.unit.flatten()).unflatten(0, self.unit.shape)
        chosen = chosen * self.sign.reshape(*self.sign.shape, *[1] * (t.ndim - 1))
        return chosen.squeeze(1) if self.unit.shape[1] == 1 else chosen.sum(1)

    def take(self, index: Tensor) -> "Goals":
        position = None if self.position is None else self.position[index]
        return Goals(self.sample[index], self.unit[index], self.sign[index], position)

    def groups(self, tile: int) -> list[Tensor]:
        """Rows that share a pass: those of a square of ``tile`` positions a side, in vectors those of a sample."""
        key = self.sample
        if self.position is not None:
            radix = 2 ** (20 * torch.arange(self.position.shape[1])).to(key)
            key = (self.position // tile * radix).sum(1).unique(return_inverse=True)[1]
        order = key.argsort(stable=True)
        return list(order.split(key.bincount().tolist()))

    def placed(self, response: Rows, stride: tuple[int, ...]) -> Rows:
        """Rows (units, C, *window) of the units at position 0, each moved to its own position, on one window for all."""
        assert self.position is not None
        assert response.origin is not None
        first = self.position.amin(0)
        shift = (self.position - first) * torch.tensor(stride).to(first)  # (R, dimensions)
        origin = tuple(s * o + r for s, o, r in zip(stride, first.tolist(), response.origin, strict=True))
        values, window = self.of(response.values), response.values.shape[2:]
        if not shift.any():
            return Rows(values, origin)
        sizes = [n + s for n, s in zip(window, shift.amax(0).tolist(), strict=True)]
        places = torch.arange(math.prod(sizes)).to(first).reshape(sizes)
        start = places[tuple(shift.T)]  # (R,)
        places = start[:, None] + places[tuple(map(slice, window))].flatten()  # (R, numbers in a window)
        spread = values.new_zeros(*values.shape[:2], math.prod(sizes))
        spread.scatter_(2, places[:, None].expand(-1, values.shape[1], -1), values.flatten(2))
        return Rows(spread.unflatten(2, sizes), origin)


def pulled(network: Network, at: int, rows: Rows, local: bool) -> list[Rows]:
    """Rows on a linear node as rows on the nodes that it reads; ``local``: as :func:`is_local` says."""
    node = network.nodes[at]
    shape = network.nodes[node.inputs[0]].shape
    if rows.origin is not None and not local:
        rows = whole(rows, node.shape)
    before = [transposed(node.layer, rows, shape)] if isinstance(node.layer, Conv) else through(node.layer, rows, shape)
    return [cropped(part, network.nodes[i].shape) for i, part in zip(node.inputs, before, strict=True)]


def transposed(layer: Conv, rows: Rows, shape: tuple[int, ...]) -> Rows:
    """Of a convolution that reads ``shape``, not cropped: plain sums of products, no transform that rounds otherwise."""
    values, grid, line = rows.values, rows.origin is not None, layer.weight.ndim == 3
    both = lambda sizes, first: (first, *sizes) if line else tuple(sizes)
    kernel, stride, dilation = both(layer.weight.shape[2:], 1), both(layer.stride, 1), both(layer.dilation, 1)
    size, padding = both(shape[1:], 1), both(layer.padding, 0)
    if grid:
        spans = zip(both(values.shape[2:], 1), kernel, stride, dilation, strict=True)
        size, padding = tuple((n - 1) * s + d * (k - 1) + 1 for n, k, s, d in spans), (0, 0)
    weight = layer.weight.reshape(layer.groups, len(layer.weight) // layer.groups, -1)  # (groups, O, C and kernel)
    grouped = values.reshape(len(values), *weight.shape[:2], -1)
    columns = torch.einsum("goc,rgol->rgcl", weight, grouped).flatten(1, 2)
    out = F.fold(columns, size, kernel, dilation, padding, stride)
    origin = None
    if rows.origin is not None:
        origin = tuple(s * o - p for s, o, p in zip(layer.stride, rows.origin, layer.padding, strict=True))
    return Rows(out.squeeze(-2) if line else out, origin)


def is_local(network: Network, node: Node) -> bool:
    """Whether rows on a window of a linear node are rows on a window of what it reads."""
    shape = network.nodes[node.inputs[0]].shape if node.inputs else node.shape
    return len(shape) in (2, 3) and _keeps_grid(node.layer, shape) and _known(node.layer, len(node.shape))


def cropped(rows: Rows, shape: tuple[int, ...]) -> Rows:
    """Without what lies beyond the image."""
    if rows.origin is None:
        return rows
    values, origin = rows.values, []
    for axis, (o, n) in enumerate(zip(rows.origin, shape[1:], strict=True), start=2):
        first, last = max(o, 0), min(o + values.shape[axis], n)
        if first >= last:  # all of it does: a zero at the first pixel stands for nothing
            return Rows(values.new_zeros(*values.shape[:2], *[1] * len(rows.origin)), (0,) * len(rows.origin))
        values = values.narrow(axis, first - o, last - first)
        origin.append(first)
    return Rows(values, tuple(origin))


def whole(rows: Rows, shape: tuple[int, ...]) -> Rows:
    """On all of the image."""
    if rows.origin is None:
        return rows
    spans = zip(rows.origin, rows.values.shape[2:], shape[1:], strict=True)
    amounts = [(o, n - o - size) for o, size, n in spans]
    return Rows(F.pad(rows.values, [amount for pair in reversed(amounts) for amount in pair]), None)


def added(a: Rows, b: Rows, shape: tuple[int, ...]) -> Rows:
    """Of two readers of one node."""
    alike = (a.origin is None) == (b.origin is None)
    return joined(a, b) if alike else joined(whole(a, shape), whole(b, shape))


def facing(vector: Tensor, rows: Rows, owner: slice | Tensor) -> Tensor:  # (1 or B, ...) -> (1 or R, ...)
    """What of a vector for each sample, or one for all, meets each row: its own sample's, in the rows' window."""
    if rows.origin is not None:
        spans = zip(rows.origin, rows.values.shape[2:], strict=True)
        vector = vector[(slice(None), slice(None), *(slice(o, o + size) for o, size in spans))]
    if len(vector) == 1:
        return vector
    return vector[owner] if isinstance(owner, slice) else vector.contiguous().index_select(0, owner)


def dot(values: Tensor, vector: Tensor) -> Tensor:  # (R, ...), (1 or R, ...) -> (R,)
    if len(vector) == 1:
        return values.flatten(1) @ vector.flatten()
    return (values.flatten(1)[:, None] @ vector.flatten(1)[:, :, None]).flatten()


def length(rows: Rows) -> Tensor:  # (R,)
    return torch.linalg.vector_norm(rows.values.flatten(1), dim=1)
