"""l_inf Lipschitz constants: products of norms, and LipLT (Fazlyab et al. 2023, https://arxiv.org/abs/2310.00116).

The norm of a matrix from l_inf to l_inf is its largest row's l1 norm, so nothing is iterated. With each nonlinearity j written
as c id + r psi_j, psi_j 1-Lipschitz, the network is linear but for the psi_j, and row u of its input k moves by at most

    m_k[u]  =  sum_j sum_i |A_kj R_j|[u, i] m_j[i],       A_kj: from nonlinearity j to k; j = 0 is the input, R_0 = 1, m_0 = 1,

per unit of l_inf change of the network's input: one number for each unit where the paper has one for each layer. Differences of
two logits are differences of two rows.

Rows on vectors are pushed back through the network as it is. On images one m_j for each channel is kept, valid at every
position of the endless grid Z^d: there a row of one position of a channel speaks for all of them. The grid's network is the
true one within the image: convolutions are not cropped, and activations are multiplied by a mask, 1 within the image and 0
beyond, whose slopes are those of the activation and 0, where something padded reads them: so it reads zeros, as from the input,
and from sums, paddings and scalings of zeros. Any other value that a padded layer reads, and the result of a layer that the
grid does not know, becomes a psi of its own: c = 0, r = 1, with its own m.

Rounding (kind "bound", float64). Pushing a row back through a layer errs by at most gamma times the same sum of absolute
values, so along all layers by expm1(sum of gammas) |W|...|W|. Those absolute products times the m_j are what one forward pass
of positive numbers gives, T = |W| T_before, T = |c| T_before + r m after a nonlinearity. m_k adds expm1(.) T_k, and gamma
times itself for its own sum. Underflow costs less than 2^-500 everywhere below 2^500 and is added as that.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast import rounding
from lipfast.bounds._gains import scale_gain
from lipfast.bounds._linf_rows import Plan, Rows, joined, plan, through
from lipfast.bounds.interval import _final_linear
from lipfast.bounds.layers import (
    AveragePool,
    Conv,
    Elementwise,
    Grafted,
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
from lipfast.bounds.network import Network
from lipfast.bounds.norms import operators
from lipfast.ops.pairwise_distance import pairwise_distance

_PART = 2**23  # numbers of the rows in work at a time
_WORK = 2**38  # products for the m of one node, after which its rows stop where they are
_UNDERFLOW = 2.0**-500


def lipschitz_inf(network: Network, method: str, kind: str) -> Tensor:  # (K, K)
    """Of all differences of two logits: ``|(z_a - z_b)(x) - (z_a - z_b)(y)| <= L_ab max |x - y|``.

    Args:
        network: ends in logits (K,).
        method: "product" of the layers' norms; "liplt", never above it.
        kind: "bound", float64, rounding included; "estimate", the same sums in the model's dtype, differentiable in the
            parameters.

    Returns:
        Symmetric, with a zero diagonal; where a NaN or Inf of the weights matters, NaN or Inf.

    Raises: ValueError for weights whose sums are too long for a bound.
    """
    bound = kind == "bound"
    if bound:
        network = Network(tuple(replace(node, layer=widened(node.layer)) for node in network.nodes))
    found = _product(network, kind)
    if method == "liplt":
        found = torch.minimum(found, _Loop(network, bound).pairwise())
    return found.masked_fill(torch.eye(len(found), dtype=torch.bool, device=found.device), 0.0)


def _product(network: Network, kind: str) -> Tensor:  # (K, K)
    last = _final_linear(network)
    if last is None:
        K = network.nodes[-1].shape[0]
        return (2 * _gain(network, kind)).expand(K, K)
    before = _gain(network.until(network.nodes[-1].inputs[0]), kind)
    return before * _distance(last.weight, kind == "bound")


def _distance(rows: Tensor, bound: bool) -> Tensor:
    distance = pairwise_distance(rows, 1.0)
    return distance * (1 + 4 * (rows.shape[-1] + 16) * torch.finfo(rows.dtype).eps) + _UNDERFLOW if bound else distance


def _gain(network: Network, kind: str) -> Tensor:  # ()
    """The product of the norms of all layers, the scalings beside a Linear or Conv multiplied into its weight."""
    merged = operators(network, kind)
    done = {at for operator in merged.values() for at in (operator.first, operator.last)} - merged.keys()
    like = _like(network)
    gains: list[Tensor] = []
    for position, node in enumerate(network.nodes):
        layer, inputs = node.layer, [gains[i] for i in node.inputs]
        if isinstance(layer, Input):
            gain = torch.ones_like(like)
        elif isinstance(layer, (Linear, Conv)):
            gain = inputs[0] * merged[position].layer.weight.abs().flatten(1).sum(1).amax() * (1 + 2 * merged[position].error)
        elif isinstance(layer, Sum):
            gain = inputs[0] + inputs[1]
        elif isinstance(layer, Scale):
            gain = inputs[0] if position in done else inputs[0] * scale_gain(layer, kind)
        elif isinstance(layer, Elementwise):
            gain = inputs[0] * max(map(abs, layer.slopes))
        elif isinstance(layer, L2Pool):
            gain = inputs[0] * math.sqrt(layer.terms)
        else:  # averages, maxima and copies
            gain = inputs[0]
        gains.append(gain * (1 + 2 * _error(layer, gain.device)) + _UNDERFLOW if kind == "bound" else gain)
    return gains[-1]


def _like(network: Network) -> Tensor:  # ()
    """One, in the dtype and on the device of the weights."""
    weights = [node.layer.weight for node in network.nodes if isinstance(node.layer, (Linear, Conv))]
    return weights[0].new_ones(()) if weights else torch.ones((), dtype=torch.float64)


def _error(layer: Layer, device: torch.device) -> float:
    """Relative to the sum of absolute values: what a pass through the layer, backward or forward, rounds at most."""
    terms, error = 2, 0.0
    if isinstance(layer, (Linear, Conv)):
        terms = max(layer.weight.shape[:2]) * layer.weight[0, 0].numel()
    elif isinstance(layer, (AveragePool, L2Pool)):
        terms = layer.terms
    elif isinstance(layer, Scale) and layer.factor is not None:
        error = 8 * torch.finfo(layer.factor.dtype).eps
    return error + rounding.gamma(terms, torch.float64, device)


class _Loop:
    """The recursion over a network's nodes.

    Attributes:
        reach: for each node how far each entry of its value moves, per unit of the input: (C, 1, ...) on the grid, where it
            holds at every position that is read, else the node's shape.
        total: T of the module's docstring, in the same shapes; bounds only.
        error: the sum of the gammas of a path from the node back to the input.
    """

    def __init__(self, network: Network, bound: bool):
        self.network, self.bound, self.like = network, bound, _like(network)
        self.plan: Plan = plan(network)
        self.reach: list[Tensor] = []
        self.total: list[Tensor] = []
        self.error: list[float] = []
        self.tightened: set[int] = set()
        readers = network.readers()
        for position, node in enumerate(network.nodes):
            if isinstance(node.layer, (Elementwise, MaxMin, MaxPool, L2Pool)) or position in self.plan.unknown:
                self.tighten(node.inputs[0])
            reach = self.spread(position, [self.reach[i] for i in node.inputs])
            if bound:
                own = _error(node.layer, self.like.device)
                reach = reach * (1 + 2 * own) + _UNDERFLOW
                merging = rounding.gamma(len(readers[position]), torch.float64, self.like.device)
                self.error.append(max((self.error[i] for i in node.inputs), default=0.0) + own + merging)
                self.total.append(self.absolute(position, reach))
            self.reach.append(reach)
            if position in self.plan.cut:
                self.tighten(position)

    def spread(self, position: int, inputs: list[Tensor]) -> Tensor:
        """How far a node's entries move at most when those of its inputs move that far."""
        node, grid = self.network.nodes[position], self.plan.grid[position]
        layer = node.layer
        if isinstance(layer, Input):
            return self.like.new_ones((node.shape[0],) + (1,) * (len(node.shape) - 1) if grid else node.shape)
        if isinstance(layer, Sum):
            return inputs[0] + inputs[1]
        (far,) = inputs
        if isinstance(layer, Conv):
            weight = layer.weight.abs().flatten(2).sum(2).unflatten(0, (layer.groups, -1))  # (groups, O / groups, C / groups)
            moved = weight @ _channels(far).reshape(layer.groups, -1, 1)
            return moved.reshape(-1, *[1] * (len(node.shape) - 1))
        if isinstance(layer, Elementwise):
            return far * _steepest(layer, grid)
        if isinstance(layer, MaxMin):
            return torch.maximum(*far.chunk(2)).repeat(2, *[1] * (far.ndim - 1))
        if grid and position not in self.plan.unknown and isinstance(layer, (AveragePool, Pad, Rearrange)):
            return far
        far = far.expand(self.network.nodes[node.inputs[0]].shape)
        if isinstance(layer, Linear):
            return F.linear(far, layer.weight.abs())
        if isinstance(layer, Scale):
            moved = far if layer.factor is None else (far * layer.factor.abs().to(far)).reshape(node.shape)
        elif isinstance(layer, L2Pool):
            moved = layer.square_sum(far[None].square())[0].sqrt()
        else:
            assert isinstance(layer, (AveragePool, MaxPool, Pad, Rearrange)), layer
            moved = layer(far[None])[0] if isinstance(layer, Pad) else layer.function(far[None])[0]
        return _channels(moved) if grid else moved

    def absolute(self, position: int, reach: Tensor) -> Tensor:
        """T of a node whose own entries move by ``reach`` at most."""
        node = self.network.nodes[position]
        layer = node.layer
        if isinstance(layer, Input):
            return reach
        before, moved = [self.total[i] for i in node.inputs], self.reach[node.inputs[0]]
        if isinstance(layer, Grafted):  # |c| and r are at most the greatest slope, those of a unit and those of the grid
            passed = (before[0] + moved) * _steepest(layer, self.plan.grid[position]) * (1 + 2.0**-48)
        elif isinstance(layer, Elementwise):
            (keep, turn), (masked_keep, masked_turn) = _slopes(layer, False), _slopes(layer, True)
            passed = before[0] * max(abs(keep), abs(masked_keep)) + max(turn, masked_turn) * moved
        elif isinstance(layer, MaxMin):
            passed = _mean_of_pairs(before[0], 0) + 1.5 * _mean_of_pairs(moved, 0)
        elif isinstance(layer, (MaxPool, L2Pool)):
            passed = reach
        else:
            passed = self.spread(position, before)
        return torch.maximum(passed, reach)  # where rows stop

    def tighten(self, position: int) -> None:
        """Replaces a node's reach by m where that is smaller."""
        node = self.network.nodes[position]
        if position in self.tightened | self.plan.unknown or isinstance(node.layer, (Input, MaxPool, L2Pool)):
            return
        self.tightened.add(position)
        grid, reach = self.plan.grid[position], self.reach[position]
        count, step, start, found = reach.numel(), 1, 0, []
        while start < count:  # the first row tells how large the others are
            step = min(step, count - start)
            rows = reach.new_zeros(step, count)
            rows[:, start : start + step].fill_diagonal_(1.0)
            origin = (0,) * (len(node.shape) - 1) if grid else None
            sums, terms = reach.new_zeros(step), 0
            for values, moved in self.parts(position, Rows(rows.reshape(step, *reach.shape), origin), _WORK / count):
                sums = sums + (values.abs() * moved).flatten(1).sum(1)
                terms += values[0].numel()
            found.append(sums)
            start, step = start + step, max(1, _PART // self.largest)
        m = torch.cat(found).reshape(reach.shape)
        if self.bound:
            m = m * (1 + 2 * rounding.gamma(terms, torch.float64, m.device)) + self.slip(position) + _UNDERFLOW
        self.reach[position] = torch.minimum(m, reach)

    def slip(self, position: int) -> Tensor:
        """What the rows of a node may err by, times the m_j: expm1 for the rows, exp for the rounding of T."""
        error = self.error[position]
        return self.total[position] * (math.expm1(error) * math.exp(2 * error))

    def parts(self, start: int, rows: Rows, work: float = math.inf) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows on a node's value as rows A R on every psi, the input included, each with the m of that psi.

        After ``work`` products for each row, what is left is rows on the nodes that were reached, each with its reach.
        """
        self.largest = 1
        waiting = {start: rows}
        while waiting:
            position = max(waiting)
            rows, node = waiting.pop(position), self.network.nodes[position]
            layer = node.layer
            self.largest = max(self.largest, rows.values[0].numel())
            on_grid = rows.origin is not None
            closed = on_grid and position in self.plan.closed and position != start
            if closed or isinstance(layer, (Input, MaxPool, L2Pool)) or work < 0:
                reach = self.reach[position]
                yield rows.values, _channels(reach) if on_grid else reach
                continue
            moved = self.reach[node.inputs[0]] if node.inputs else self.like
            masked = on_grid and position in self.plan.masked
            if isinstance(layer, Elementwise):
                if isinstance(layer, Grafted) and not on_grid:
                    unit_keep, unit_turn = _unit_slopes(layer, rows.values)
                    yield rows.values * unit_turn, moved
                    before = [rows.times(unit_keep)]
                else:
                    keep, turn = _slopes(layer, masked)
                    if turn:
                        yield rows.values * turn, moved
                    before = [rows.times(keep)] if keep else []
            elif isinstance(layer, MaxMin):
                mean, moved = _mean_of_pairs(rows.values, 1), _mean_of_pairs(moved, 0)
                yield rows.values - mean, moved
                if masked:  # the pair's mean has slope 1 within the image, 0 beyond
                    mean = mean / 2
                    yield mean, moved
                before = [Rows(mean, rows.origin)]
            else:
                if isinstance(layer, (Linear, Conv)):
                    work -= rows.values[0].numel() * layer.weight[0].numel()
                before = through(layer, rows, self.network.nodes[node.inputs[0]].shape)
            for i, part in zip(node.inputs, before, strict=False):
                waiting[i] = joined(waiting[i], part) if i in waiting else part

    def pairwise(self) -> Tensor:  # (K, K)
        end = len(self.network.nodes) - 1
        K = self.network.nodes[end].shape[0]
        found, count = self.like.new_zeros(K, K), 0
        for values, moved in self.parts(end, Rows(torch.eye(K).to(self.like), None)):
            found, count = found + _distance((values * moved).flatten(1), self.bound), count + 1
        if self.bound:
            slip = self.slip(end) + _UNDERFLOW
            found = (found + (slip[:, None] + slip)) * (1 + 2 * rounding.gamma(count, torch.float64, found.device))
        last = _final_linear(self.network)
        if last is None:
            return found
        before = self.reach[self.network.nodes[end].inputs[0]]
        near = _distance(last.weight * before, self.bound)  # every unit of the last hidden value on its own
        if self.bound:
            slip = 2.0**-50 * F.linear(before, last.weight.abs())
            near = near + (slip[:, None] + slip)
        return torch.minimum(found, near)


def _steepest(layer: Elementwise, grid: bool) -> float | Tensor:
    """The greatest absolute slope; of each unit, (...), where they differ and are not those of a whole grid."""
    if isinstance(layer, Grafted) and not grid:
        return torch.maximum(*(t[0].abs() for t in layer.unit_slopes))
    return max(map(abs, layer.slopes))


def _unit_slopes(layer: Grafted, like: Tensor) -> tuple[Tensor, Tensor]:  # (1, ...) twice
    """c and r of each unit, in the dtype of the rows: float64 for a bound."""
    least, greatest = (t.to(like.dtype) for t in layer.unit_slopes)
    turn = (greatest - least) / 2
    return (least + greatest) / 2, torch.where(turn > 0, turn + 2.0**-50 * (least.abs() + greatest.abs()), 0.0)


def _slopes(layer: Elementwise, masked: bool) -> tuple[float, float]:
    """c and r of an activation; of the one that is multiplied by a mask."""
    low, high = layer.slopes
    if masked:
        low, high = min(low, 0.0), max(high, 0.0)
    turn = (high - low) / 2
    return (low + high) / 2, turn + 2.0**-50 * (abs(low) + abs(high)) if turn else 0.0


def _channels(reach: Tensor) -> Tensor:  # (C, ...) -> (C, 1, ...)
    return reach.flatten(1).amax(1).reshape(-1, *[1] * (reach.ndim - 1))


def _mean_of_pairs(t: Tensor, dim: int) -> Tensor:
    a, b = t.chunk(2, dim)
    return torch.cat([a + b, a + b], dim) / 2
