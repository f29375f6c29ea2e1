"""Laying a convolutional network onto tori, so that products of its layers become small matrices, one for each frequency.

**Absorbed padding.** Extend the image of every value, in both directions, to a torus and each convolution to all of it. The
extended network computes what the network does at all real positions if every convolution finds zeros wherever it reads
beyond an image, that is if the activations before it are multiplied by the mask of real positions. A masked activation with
slopes in [a, b] has slopes in [min(a, 0), max(b, 0)], the same everywhere on the torus, so loop transformation (see
:mod:`lipfast.bounds._liplt_bound`) holds with the plain convolutions of the torus in every product: none is cut off in between.
A value that a convolution reads beyond its image without such a mask is *cut*: treated as the output of a nonlinearity.

**Size.** A convolution with padding p, stride s, dilation d from n to n' pixels reads from -p to L = s (n' - 1) + d (taps - 1)
- p. On a torus of N >= n + p and N > L pixels none of these meets an image pixel that it should not; its output lives on
N / s >= n' pixels. With circular padding N = n. The values of a *component*, joined by layers that are no cuts, all have
N = g M with one M. Where a single pixel remains, the stride counts for nothing and is taken as 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor

from lipfast.bounds.layers import AveragePool, Conv, Elementwise, Input, Linear, MaxMin, Pad, Rearrange, Scale, Sum
from lipfast.bounds.network import Network, Node

Pair = tuple[int, int]  # height, width


@dataclass(eq=False)
class Torus:
    """A component. ``M`` is known once all of it has been laid out."""

    ratios: list[tuple[Fraction, Fraction]] = field(default_factory=list)
    needs: list[tuple[tuple[Fraction, Fraction], Pair]] = field(default_factory=list)  # least N at a ratio
    exact: list[tuple[tuple[Fraction, Fraction], Pair, int]] = field(
        default_factory=list
    )  # the N of circular padding, its node
    unit: tuple[Fraction, Fraction] = (Fraction(1), Fraction(1))  # the ratio of M itself
    M: Pair = (1, 1)

    def need(self, ratio: tuple[Fraction, Fraction], sizes: Sequence[int]) -> None:
        self.ratios.append(ratio)
        self.needs.append((ratio, (sizes[0], sizes[1])))

    def solve(self) -> int | None:
        """Sets ``unit`` and ``M``; the position of a circular padding that does not fit, or None."""
        unit, M = [], []
        for side in (0, 1):
            ratios = [r[side] for r in self.ratios]
            down = math.lcm(*(r.denominator for r in ratios))
            unit.append(Fraction(math.gcd(*(int(r * down) for r in ratios)), down))
            M.append(max(math.ceil(Fraction(sizes[side]) * unit[side] / r[side]) for r, sizes in self.needs))
        for ratio, sizes, position in self.exact:
            if any(ratio[i] / unit[i] * M[i] > sizes[i] or sizes[i] * unit[i] % ratio[i] for i in (0, 1)):
                return position
            if any(ratio[i] / unit[i] * M[i] < sizes[i] for i in (0, 1)):
                M = [max(M[i], int(sizes[i] * unit[i] / ratio[i])) for i in (0, 1)]
        if any(any(r[i] / unit[i] * M[i] != s[i] for i in (0, 1)) for r, s, _ in self.exact):
            return self.exact[-1][2]
        self.unit, self.M = (unit[0], unit[1]), (M[0], M[1])
        return None

    def copies(self, ratio: tuple[Fraction, Fraction]) -> Pair:
        """g = N / M."""
        return int(ratio[0] / self.unit[0]), int(ratio[1] / self.unit[1])


@dataclass(frozen=True)
class Place:
    """Where a node's value lives.

    Attributes:
        torus: None for a plain vector.
        ratio: of its N to those of the other values on this torus.
        shape: C, H, W of the image there; (n, 1, 1) for a vector.
        clean: nothing but zeros beyond the image.
        wrapped: the value is its input's, padded around; only convolutions read it.
        order: of an image made a vector: which entry of the image each entry is.
        base: of a vector: the position of the Linear layer that made it of an image, if one did.
    """

    torus: Torus | None
    ratio: tuple[Fraction, Fraction]
    shape: tuple[int, int, int]
    clean: bool = True
    wrapped: bool = False
    order: Tensor | None = None
    base: int | None = None

    @property
    def copies(self) -> Pair:
        assert self.torus is not None
        return self.torus.copies(self.ratio)

    @property
    def N(self) -> Pair:
        assert self.torus is not None
        return self.copies[0] * self.torus.M[0], self.copies[1] * self.torus.M[1]

    @property
    def full(self) -> bool:
        """The image is the whole torus."""
        return self.torus is None or self.N == self.shape[1:]


@dataclass(frozen=True)
class Step:
    """A convolution or average pooling between two tori."""

    weight: Tensor  # (O, C, kernel height, kernel width) float64, groups filled with zeros
    stride: Pair
    padding: Pair
    dilation: Pair


@dataclass(frozen=True)
class Plan:
    """``places`` and, for cuts (the input among them), positions in ``cuts``; ``steps`` of convolutions by position."""

    places: list[Place]
    cuts: set[int]
    steps: dict[int, Step]


def plan(network: Network) -> Plan:
    """Lays out a network. What has no rule on a torus is cut."""
    forced: set[int] = set()
    while True:
        found = _plan(network, forced)
        misfit = [torus.solve() for torus in {id(p.torus): p.torus for p in found.places if p.torus is not None}.values()]
        wrong = [position for position in misfit if position is not None]
        if not wrong:
            return found
        forced |= set(wrong)


def _plan(network: Network, forced: set[int]) -> Plan:
    places: list[Place] = []
    found = Plan(places, set(), {})
    for position, node in enumerate(network.nodes):
        inputs = [places[i] for i in node.inputs]
        place = None
        if not isinstance(node.layer, Input) and position not in forced:
            before = network.nodes[node.inputs[0]].shape
            place = _place(position, node, before, inputs, found.steps)
        if place is None:
            found.cuts.add(position)
            place = _fresh(node.shape)
        places.append(place)
    return found


def _fresh(shape: tuple[int, ...]) -> Place:
    if len(shape) not in (2, 3):
        return _vector(math.prod(shape), None)
    image = (shape[0], 1, shape[1]) if len(shape) == 2 else (shape[0], shape[1], shape[2])
    torus = Torus()
    torus.need(_ONE, image[1:])
    return Place(torus, _ONE, image)


_ONE = Fraction(1), Fraction(1)


def _vector(entries: int, base: int | None) -> Place:
    return Place(None, _ONE, (entries, 1, 1), base=base)


def _place(position: int, node: Node, before: tuple[int, ...], inputs: list[Place], steps: dict[int, Step]) -> Place | None:
    layer, first = node.layer, inputs[0]
    if isinstance(layer, (Conv, AveragePool)):
        image = first.torus is not None and first.order is None and len(node.shape) in (2, 3)
        step = _step(layer, first, node.shape) if image else None
        if step is None:
            return None
        steps[position] = step
        return _convolved(step, first, node.shape)
    if any(place.wrapped for place in inputs):
        return None
    if isinstance(layer, Sum):
        return _summed(inputs)
    if isinstance(layer, Linear):
        vector = len(node.shape) == 1 and (first.torus is None or first.order is not None)
        return _vector(node.shape[0], first.base if first.torus is None else position) if vector else None
    if isinstance(layer, Scale):
        return first if factors(layer, first) is not None else None
    if isinstance(layer, Rearrange):
        return _rearranged(layer, before, node.shape, first)
    if isinstance(layer, Pad):
        return _padded(position, layer, first)
    if isinstance(layer, MaxMin):
        mixes = first.order is not None and not torch.equal(first.order, torch.arange(len(first.order)))
        return None if mixes or first.shape[0] % 2 else replace(first, clean=True)
    return replace(first, clean=True) if isinstance(layer, Elementwise) else None


def _step(layer: Conv | AveragePool, place: Place, shape: tuple[int, ...]) -> Step | None:
    """The layer as a convolution in two dimensions, with the stride that counts."""
    if isinstance(layer, Conv):
        weight, line = layer.weight.double(), layer.weight.ndim == 3
        weight = _ungrouped(weight.unsqueeze(-2) if line else weight, layer.groups)
        stride, padding, dilation = (_pair(v, fill) for v, fill in ((layer.stride, 1), (layer.padding, 0), (layer.dilation, 1)))
    elif layer.window is not None:
        kernel, stride, padding = (_pair(v, fill) for v, fill in zip(layer.window, (1, 1, 0), strict=True))
        weight, dilation = _each_channel(torch.full(kernel, 1 / math.prod(kernel), dtype=torch.float64), place), (1, 1)
    elif set(shape[1:]) == {1}:  # a mean over the whole image
        size = place.shape[1:] if len(shape) == 3 else place.shape[2:]
        with torch.enable_grad():
            ones = torch.ones(1, 1, *size, dtype=torch.float64, requires_grad=True)
            (mean,) = torch.autograd.grad(layer.function(ones).sum(), ones)
        weight, stride, padding, dilation = _each_channel(mean.reshape(place.shape[1:]), place), (1, 1), (0, 0), (1, 1)
    else:
        return None
    height, width = (1 if n == 1 else s for n, s in zip(_outputs(shape), stride, strict=True))
    return Step(weight, (height, width), padding, dilation)


def _pair(value: Sequence[int], fill: int) -> Pair:
    return (fill, value[0]) if len(value) == 1 else (value[0], value[1])


def _outputs(shape: tuple[int, ...]) -> Pair:
    return (shape[1], shape[2]) if len(shape) == 3 else (1, shape[1])


def _each_channel(window: Tensor, place: Place) -> Tensor:
    return torch.eye(place.shape[0], dtype=torch.float64)[..., None, None] * window


def _ungrouped(weight: Tensor, groups: int) -> Tensor:
    """The same convolution without groups: zeros between them."""
    if groups == 1:
        return weight
    parts = weight.unflatten(0, (groups, -1))
    own = torch.eye(groups, dtype=weight.dtype, device=weight.device)
    return torch.einsum("gh,gocij->gohcij", own, parts).flatten(2, 3).flatten(0, 1)


def _convolved(step: Step, place: Place, shape: tuple[int, ...]) -> Place | None:
    assert place.torus is not None
    outputs = _outputs(shape)
    reads = zip(outputs, step.weight.shape[2:], step.stride, step.padding, step.dilation, strict=True)
    last = [s * (n - 1) + d * (k - 1) - p for n, k, s, p, d in reads]
    ratio = place.ratio[0] / step.stride[0], place.ratio[1] / step.stride[1]
    if place.wrapped:
        if any(step.padding):
            return None
    else:
        beyond = any(step.padding) or any(L >= n for L, n in zip(last, place.shape[1:], strict=True))
        if beyond and not place.clean:
            return None
        place.torus.need(place.ratio, [max(n + p, L + 1) for n, p, L in zip(place.shape[1:], step.padding, last, strict=True)])
    place.torus.need(ratio, outputs)
    return Place(place.torus, ratio, (len(step.weight), *outputs), clean=False)


def _summed(inputs: list[Place]) -> Place | None:
    left, right = inputs
    if left.torus is not right.torus or left.ratio != right.ratio or left.shape != right.shape:
        return None
    if (left.order is None) != (right.order is None):
        return None
    if left.order is not None and right.order is not None and not torch.equal(left.order, right.order):
        return None
    bases = {left.base, right.base} - {None}
    if len(bases) > 1:  # two Gram matrices do not tell the norm of a sum
        return None
    return replace(left, clean=left.clean and right.clean, base=next(iter(bases), None))


def _rearranged(layer: Rearrange, before: tuple[int, ...], after: tuple[int, ...], place: Place) -> Place | None:
    if place.torus is None and (len(before) != 1 or len(after) != 1):
        return None
    entries = place.order if place.order is not None else torch.arange(math.prod(place.shape))
    order = layer.function(entries.reshape(1, *before)).reshape(-1)
    same = torch.equal(order, entries)
    if place.torus is not None and len(after) == 1:
        return replace(place, order=order)
    return place if same and before == after else None


def _padded(position: int, layer: Pad, place: Place) -> Place | None:
    if place.torus is None or place.order is not None or min(layer.amounts) < 0 or layer.mode not in ("constant", "circular"):
        return None
    if len(layer.amounts) > 4:  # channels
        return None
    left, right, *rest = layer.amounts
    top, bottom = rest or (0, 0)
    C, H, W = place.shape
    shape = (C, H + top + bottom, W + left + right)
    if layer.mode == "circular":
        place.torus.exact.append((place.ratio, (H, W), position))
        return replace(place, shape=shape, clean=False, wrapped=True)
    if not place.clean:
        return None
    place.torus.need(place.ratio, shape[1:])
    return replace(place, shape=shape)


def shift(layer: Pad) -> Pair:
    """By how many pixels padding moves an image: down, right."""
    return (layer.amounts[2] if len(layer.amounts) > 2 else 0), layer.amounts[0]


def factors(layer: Scale, place: Place) -> Tensor | None:
    """One factor for each channel of an image, for each entry of a vector; None if it is neither."""
    if layer.factor is None:
        return torch.ones(place.shape[0], dtype=torch.float64)
    factor = layer.factor.double()
    if factor.numel() == 1:
        return factor.reshape(1).expand(place.shape[0])
    if place.torus is None:
        return factor.reshape(-1) if factor.numel() == place.shape[0] else None
    per_channel = factor.numel() == place.shape[0] and factor.ndim >= 2 and factor.shape[-1] == 1
    return factor.reshape(-1) if per_channel and place.order is None else None
