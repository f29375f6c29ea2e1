"""A network between linear functions of its input: the backward pass of CROWN, rounding included.

A linear function of a network's values is pulled back node by node, each activation replaced by a line below or above it, until
it is a linear function of the input, whose minimum over a box or a ball is known (Zhang et al. 2018, section 3.2).

1. At any time, for every input x of the ball, with v_n the exact value of node n,

       target  >=  sum_n <A_n, v_n> + c - slack,      the sum over the nodes that wait, A_n and c floating-point numbers.

2. The last node that waits is replaced. A linear one, v_n = sum_m W_m v_m + b, by rows A_n W_m on the nodes m that it reads,
   and <A_n, b> goes to c. An activation v_n = f(z) by its lines over the box [l, u] of z,

       slope z + offset  <=  f(z)  <=  (slope + turn) z + offset + lift,      the lower where A_n >= 0, else the upper.

3. f is convex, of two straight pieces with slopes off <= on, and f(0) = 0. If l < 0 < u the line of slope on, or off, through
   0 is below f; on if u > -l, the choice of the paper. The line above has the slope s of the chord, rounded in any way, and is
   raised until it is not below f at l and at u, lift = max((off - s) l, (on - s) u), rounded up: between them f is convex.
   If l >= 0 or u <= 0, and for a grafted unit, both lines are f itself.

4. In the end the input waits alone: min <A, x> = <A, center> - <|A|, radius> over a box, <A, center> - eps ||A||_q over a ball.

Rounding. A computed row errs in each entry by at most g |A_n| |W_m|, and <A_n, b> by at most g <|A_n|, |b|>, for a gamma g of
:mod:`lipfast.rounding` that has room for the few roundings beside the sum, for adding to the rows of other readers of the node
m, and for adding up c. So step 2 loses at most

       g <|A_n|, e_n>  <=  g ||A_n||_2 ||e_n||_2,     e_n = sum_m |W_m| max |v_m| + |b|,    of an activation
                                                      e_n = (|slope| + |turn|) max |z| + |offset| + |lift|,

which goes to slack; max |v_m| is that of the node's box. Slack grows by 2^-20 of itself, more than its own sums lose, and by
2^-300, more than underflow costs where all values stay below 2^100. A sample with larger ones, or with NaN, has no bound but
-Inf.

The units of an image see a window of it: their rows have an origin (:class:`lipfast.bounds._linf_rows.Rows`), and what lies
beyond the image, where a padded layer reads zeros, is cropped.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lipfast import rounding
from lipfast.bounds._crown_rows import Goals, added, cropped, dot, facing, is_local, length, pulled, transposed
from lipfast.bounds._interval_rules import Box, image
from lipfast.bounds._linf_rows import Rows
from lipfast.bounds.interval import _apply, _as_box, _Ball, _fresh
from lipfast.bounds.layers import AveragePool, Conv, Elementwise, Grafted, Input, Linear, Pad, Rearrange, Scale, Sum
from lipfast.bounds.network import Network, Node

_PART = 2**17  # numbers of the rows in work at a time: about what a core's cache holds
_TILE = 2**13  # numbers below which the steps of a pass cost more than what they work on
_LOST = 2.0**-300
_LARGEST = 2.0**100


@dataclass(frozen=True)
class Lines:
    """Of an activation, (B, ...) each: ``slope z + offset`` below it, ``(slope + turn) z + offset + lift`` above."""

    slope: Tensor
    turn: Tensor
    lift: Tensor
    offset: Tensor | None = None  # None: 0


def lines(node: Node, box: Box) -> Lines:
    """Step 3 of the module's docstring."""
    layer, (lower, upper) = node.layer, box
    off, on = (0.0, 1.0) if isinstance(layer, Grafted) else layer.pieces  # type: ignore[attr-defined]
    either = lambda condition: torch.where(condition, lower.new_tensor(on), lower.new_tensor(off))
    crosses = (lower < 0) & (upper > 0)
    side = either(lower >= 0)
    slope = torch.where(crosses, either(upper > -lower), side)
    above = torch.where(crosses, ((on * upper - off * lower) / (upper - lower)).clamp(off, on), side)
    lift = torch.maximum((off - above) * lower, (on - above) * upper)
    eps, tiny = torch.finfo(lower.dtype).eps, torch.finfo(lower.dtype).tiny
    lift = torch.where(crosses, lift * (1 + 4 * eps) + tiny, 0.0)
    if not isinstance(layer, Grafted):
        return Lines(slope, above - slope, lift)
    slope, above = (torch.where(layer.mask, layer.slope.to(lower), t) for t in (slope, above))
    offset = torch.where(layer.mask, layer.intercept.to(lower), 0.0).expand(lower.shape)
    return Lines(slope, above - slope, lift.masked_fill(layer.mask, 0.0), offset)


def check(network: Network) -> None:
    """Raises ValueError, naming the layer, for one that has no lines."""
    for node in network.nodes:
        layer, known = node.layer, (Input, Linear, Conv, Scale, Sum, AveragePool, Pad, Rearrange, Grafted)
        convex = False
        if type(layer) is Elementwise and len(layer.kinks) == 1 and isinstance(layer.kinks[0], float):
            zero = torch.zeros(1, dtype=torch.float64)
            convex = layer.kinks[0] == 0 and layer.pieces[0] <= layer.pieces[1] and not layer.function(zero).any()
        if not convex and not isinstance(layer, known):
            what = layer.name if isinstance(layer, Elementwise) else type(layer).__name__
            raise ValueError(f"layer {node.name!r}: {what} has no linear relaxation here; the method 'interval' knows it")


class Relaxation:
    """A network over a batch of balls, with the boxes of its values and the lines of its activations.

    Args:
        network: with float64 weights, checked by :func:`check`.
        start: the input's box or ball, in float64.
        tighten: intersects the box before an activation with what a backward pass says of each unit that may be on or off.

    Attributes:
        boxes: for each node, around its value (B, ...).
        layers: for each activation, by its name in the model, the box before it.
    """

    def __init__(self, network: Network, start: Box | _Ball, tighten: bool):
        self.network, self.start = network, start
        self.boxes: list[Box] = []
        self.layers: dict[str, Box] = {}
        self._lines: dict[int, Lines] = {}
        self._offset: list[Tensor | None] = []  # (1 or B, ...): what a row's constant grows by
        self._error: list[Tensor] = []  # g ||e_n||_2, (B,)
        self._size: list[Tensor] = []  # || max |v_n| ||_2, (B,)
        self._local = [is_local(network, node) for node in network.nodes]
        self._responses: dict[int, Rows] = {}
        values: list[Box | _Ball] = []
        for at, node in enumerate(network.nodes):
            if isinstance(node.layer, Elementwise):
                (source,) = node.inputs
                lower, upper = self.boxes[source]
                if tighten and not self._is_exact(source):
                    crosses = (lower < 0) & (upper > 0)
                    units = crosses & ~node.layer.mask if isinstance(node.layer, Grafted) else crosses
                    values[source] = self.boxes[source] = self.tightened(source, units)
                self.layers[_fresh(node.name, self.layers)] = self.boxes[source]
                self._lines[at] = lines(node, self.boxes[source])
            values.append(_apply(node.layer, [values[i] for i in node.inputs], "bound") if node.inputs else start)
            self.boxes.append(_as_box(values[-1], "bound"))
            self._learn(at, node)

    def _learn(self, at: int, node: Node) -> None:
        """Offset, error and size of a node."""
        layer, sizes = node.layer, [_size(self.boxes[i]) for i in node.inputs]
        terms, offset = math.prod(node.shape), None
        if isinstance(layer, Elementwise):
            around, offset = self._lines[at], self._lines[at].offset
            error = (around.slope.abs() + around.turn.abs()) * sizes[0] + around.lift
            error = error if offset is None else error + offset.abs()
        elif isinstance(layer, (Linear, Conv)):
            terms = max(terms, max(layer.weight.shape[:2]) * layer.weight[0, 0].numel())
            if layer.bias is not None:
                offset = layer.bias.reshape(-1, *[1] * (layer.weight.ndim - 2)).expand(1, *node.shape)
            positive = replace(layer, bias=None if layer.bias is None else layer.bias.abs())
            error = image(positive, (-sizes[0], sizes[0]), kind="bound")[1]
        elif isinstance(layer, Scale):
            offset, error = _of_scale(layer, sizes[0])
            offset = None if offset is None else offset.expand(1, *node.shape)
            terms += 0  # shift, factor and offset are rounded themselves
        elif isinstance(layer, (Input, Sum)):
            error = sizes[0] + sizes[1] if sizes else _size(self.boxes[at])
        else:
            error = image(layer, (-sizes[0], sizes[0]), kind="bound")[1]
        g = rounding.gamma(terms + 4 * len(self.network.nodes), torch.float64, error.device)
        self._offset.append(offset)
        self._error.append(2 * g * error.flatten(1).norm(dim=1))  # twice, as the error is rounded itself
        self._size.append(_size(self.boxes[at]).flatten(1).norm(dim=1))

    def _is_exact(self, at: int) -> bool:
        """Whether a pass would only repeat the box: at most one sum of products lies between the input and the node."""
        ball, products = isinstance(self.start, _Ball), 0
        while not isinstance((node := self.network.nodes[at]).layer, Input):
            layer = node.layer
            products += isinstance(layer, (Linear, Conv, AveragePool))
            known = isinstance(layer, (Linear, Conv, Scale, Rearrange))
            boxed = isinstance(layer, AveragePool) or (isinstance(layer, Pad) and layer.mode == "constant")
            if not known and (ball or not boxed):
                return False
            (at,) = node.inputs
        return products <= 1

    def tightened(self, at: int, units: Tensor) -> Box:  # (B, ...) bool
        """The box of a node, intersected with the bounds of a backward pass from each of ``units``."""
        lower, upper = (t.clone() for t in self.boxes[at])
        places = units.nonzero()  # (N, 2 + dimensions)
        sign = lower.new_ones(len(places), 1)
        position = places[:, 2:].repeat(2, 1) if places.shape[1] > 2 else None
        goals = Goals(places[:, 0].repeat(2), places[:, 1:2].repeat(2, 1), torch.cat([sign, -sign]), position)
        low, high = self.bounds(at, goals).chunk(2)
        index = tuple(places.T)
        lower[index], upper[index] = lower[index].maximum(low), upper[index].minimum(-high)
        return lower, upper

    def bounds(self, at: int, goals: Goals) -> Tensor:  # (R,)
        """Lower bounds of linear functions of a node's value; -Inf where there is none."""
        found = self.boxes[at][0].new_full(goals.sample.shape, -math.inf)
        step, tile = 16, 1  # the first rows tell how large the others are
        if goals.position is not None and len(goals.position):
            each = self._response(at).values[0].numel() * len(goals.position) / math.prod(self.network.nodes[at].shape[1:])
            tile = max(1, round(math.sqrt(_TILE / each)))
        for group in goals.groups(tile):
            while len(group):
                part, group = group[:step], group[step:]
                found[part], widest = self._lower(at, goals.take(part))
                step = max(1, _PART // widest)
        sound = torch.stack(self._size).amax(0) < _LARGEST  # NaN is not
        return torch.where(found.isfinite() & sound[goals.sample], found, -math.inf)

    def _lower(self, at: int, goals: Goals) -> tuple[Tensor, int]:  # (R,)
        """Of one group; and how many numbers the largest of a row's rows had."""
        first, last = (int(t) for t in goals.sample.aminmax())
        owner: slice | Tensor = slice(first, first + 1) if first == last else goals.sample
        waiting, terms = self._first(at, goals)
        slack, widest = 2 * self._error[at][owner], 1
        while True:
            at = max(waiting)
            rows, node = waiting.pop(at), self.network.nodes[at]
            widest = max(widest, rows.values[0].numel())
            slack = slack + self._error[at][owner] * length(rows)
            if isinstance(node.layer, Input):
                return self._least(rows, owner, terms, slack), widest
            if (offset := self._offset[at]) is not None:
                terms.append(dot(rows.values, facing(offset, rows, owner)))
            if isinstance(node.layer, Elementwise):
                around = self._lines[at]
                below = rows.values.clamp(max=0)
                slope, turn, lift = (facing(t, rows, owner) for t in (around.slope, around.turn, around.lift))
                terms.append(dot(below, lift))
                before = [Rows((rows.values * slope).addcmul_(below, turn), rows.origin)]
            else:
                before = pulled(self.network, at, rows, self._local[at])
            for i, part in zip(node.inputs, before, strict=True):
                if i in waiting:
                    part = added(waiting[i], part, self.network.nodes[i].shape)
                waiting[i] = part

    def _first(self, at: int, goals: Goals) -> tuple[dict[int, Rows], list[Tensor]]:
        """The goals as rows, and their constants. Of a Linear or Conv at once on what it reads: weights, not their products."""
        node = self.network.nodes[at]
        layer, rank = node.layer, len(node.shape) - 1
        if rank == 0 and not isinstance(layer, Linear):
            hot = self.boxes[at][0].new_zeros(len(goals.unit), *node.shape)
            for unit, sign in zip(goals.unit.T, goals.sign.T, strict=True):
                hot[torch.arange(len(hot)).to(unit), unit] += sign
            return {at: Rows(hot, None)}, []
        response = self._response(at)
        if rank == 0:
            rows = Rows(goals.of(response.values), None)
        else:
            rows = goals.placed(response, layer.stride if isinstance(layer, Conv) else (1,) * rank)
        if not isinstance(layer, Conv if rank else Linear):
            return {at: rows}, []
        (source,) = node.inputs
        bias = layer.bias  # type: ignore[attr-defined]
        return {source: cropped(rows, self.network.nodes[source].shape)}, [] if bias is None else [goals.of(bias)]

    def _response(self, at: int) -> Rows:
        """One row for each unit, of an image at position 0: on what a Linear or Conv reads, else on the node's value."""
        if at not in self._responses:
            node = self.network.nodes[at]
            rank, units = len(node.shape) - 1, node.shape[0]
            if isinstance(node.layer, Linear) and not rank:
                self._responses[at] = Rows(node.layer.weight, None)
            else:
                one = Rows(torch.eye(units).to(self.boxes[at][0]).reshape(units, units, *[1] * rank), (0,) * rank)
                self._responses[at] = transposed(node.layer, one, ()) if isinstance(node.layer, Conv) else one
        return self._responses[at]

    def _least(self, rows: Rows, owner: slice | Tensor, terms: list[Tensor], slack: Tensor) -> Tensor:
        """Step 4, with the terms of c."""
        lower, upper = self.boxes[0]
        center = lower / 2 + upper / 2
        radius = torch.maximum(upper - center, center - lower) * (1 + 2.0**-50)
        middle, spread = (dot(v, facing(t, rows, owner)) for v, t in ((rows.values, center), (rows.values.abs(), radius)))
        least = middle - spread
        if isinstance(self.start, _Ball):
            of_ball = dot(rows.values, facing(self.start.center[0], rows, owner))
            dual = length(rows) if self.start.p == 2 else rows.values.abs().flatten(1).amax(1)
            far = self.start.radius[owner] * dual * (1 + 2 * rounding.gamma(rows.values[0].numel(), dual.dtype, dual.device))
            least = torch.maximum(least, of_ball - far)
        return sum(terms) + least - (slack * (1 + 2.0**-20) + _LOST)


def _size(box: Box) -> Tensor:
    return torch.maximum(box[0].abs(), box[1].abs())


def _of_scale(layer: Scale, size: Tensor) -> tuple[Tensor | None, Tensor]:
    """The constant of (x - shift) factor + offset, and its e."""
    shift, factor, offset = (None if t is None else t.to(size) for t in (layer.shift, layer.factor, layer.offset))
    factor = size.new_ones(()) if factor is None else factor
    error = (size if shift is None else size + shift.abs()) * factor.abs()
    if shift is None:
        return offset, error if offset is None else error + offset.abs()
    return (-shift * factor, error) if offset is None else (offset - shift * factor, error + offset.abs())
