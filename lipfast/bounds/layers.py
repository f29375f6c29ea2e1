"""The maps that a network is made of, as data. What each means for an analysis is said in that analysis."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lipfast.ops.beta_abs import folded
from lipfast.ops.grafted_relu import grafted_relu


class Layer:
    """Base of all kinds, for the type checker and for rules that hold for every one."""

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        raise NotImplementedError(type(self).__name__)


@dataclass(frozen=True)
class Input(Layer):
    pass


@dataclass(frozen=True)
class Linear(Layer):
    weight: Tensor  # (O, I)
    bias: Tensor | None


@dataclass(frozen=True)
class Conv(Layer):
    """Zero-padded convolution over one or two dimensions, by the rank of the weight."""

    weight: Tensor  # (O, C / groups, *kernel)
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        geometry = zip(shape[1:], self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return self.weight.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry)


@dataclass(frozen=True)
class Scale(Layer):
    """(x - shift) * factor + offset, each a tensor that broadcasts against a batch, rounded at most to its own dtype."""

    shift: Tensor | None = None
    factor: Tensor | None = None
    offset: Tensor | None = None

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape


@dataclass(frozen=True)
class Sum(Layer):
    signs: tuple[float, float]


@dataclass(frozen=True)
class Rearrange(Layer):
    """The same numbers in other places: flatten, reshape, permute. ``function`` keeps the batch dimension first."""

    function: Callable[[Tensor], Tensor]

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.function(torch.empty(1, *shape, device="meta")).shape[1:])


@dataclass(frozen=True)
class Pad(Layer):
    """As :func:`torch.nn.functional.pad`; circular, reflect and replicate repeat entries, constant adds zeros."""

    amounts: tuple[int, ...]
    mode: str

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        sizes = list(shape)
        for i in range(len(self.amounts) // 2):
            sizes[-1 - i] += self.amounts[2 * i] + self.amounts[2 * i + 1]
        return tuple(sizes)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, self.amounts, self.mode)


@dataclass(frozen=True)
class AveragePool(Layer):
    """Weighted sums with weights >= 0 of at most ``terms`` entries each.

    Attributes:
        window: (kernel, stride, padding), each with one number per dimension, if every output is the mean of a whole window,
            zeros beyond the image included; None if not, or if that depends on the size of the image (adaptive pooling).
    """

    function: Callable[[Tensor], Tensor]
    terms: int
    window: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class MaxPool(Layer):
    function: Callable[[Tensor], Tensor]
    disjoint: bool  # windows do not overlap


@dataclass(frozen=True)
class L2Pool(Layer):
    """The l2 norm of each window; ``square_sum`` maps squared entries to the windows' sums of at most ``terms``.

    A window that the border cuts may be scaled by up to the root of ``terms``; then ``disjoint`` is False.
    """

    square_sum: Callable[[Tensor], Tensor]
    terms: int
    disjoint: bool


@dataclass(frozen=True)
class Elementwise(Layer):
    """One function of one variable, applied to every entry.

    Attributes:
        slopes: least and greatest slope, rounded outward.
        least: for a function that falls and then rises, its minimum rounded down and the ends of an interval in which
            it is reached; None if it never falls.
        error: the computed value is within ``error * eps * (1 + |x| + |f(x)|)`` of the exact one; 0 if it is exact.
        jump: what its implementation adds to that in absolute terms.
        kinks, pieces: of a piecewise linear function the places, ascending, where its slope changes (numbers or tensors
            that broadcast against a batch), and the slopes before, between and after them; both empty if it is curved.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    slopes: tuple[float, float]
    least: tuple[float, float, float] | None = None
    error: float = 0.0
    jump: float = 0.0
    kinks: tuple[float | Tensor, ...] = ()
    pieces: tuple[float, ...] = ()

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def constant_on(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        """Which entries do not change within their box; None if the function is constant nowhere. False where NaN."""
        constant = None
        edges = (-math.inf, *self.kinks, math.inf)
        for slope, left, right in zip(self.pieces, edges, edges[1:], strict=False):
            if slope == 0:
                sides = [lower >= left] * (left is not edges[0]) + [upper <= right] * (right is not edges[-1])
                inside = functools.reduce(torch.logical_and, sides)
                constant = inside if constant is None else constant | inside
        return constant

    def slopes_on(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest slope of each entry within its box; a box with NaN or Inf leaves every slope possible."""
        least, greatest = (torch.full_like(lower, slope) for slope in self.slopes)
        if not self.pieces:
            return least, greatest
        low, high = torch.full_like(lower, math.inf), torch.full_like(lower, -math.inf)
        edges = (-math.inf, *self.kinks, math.inf)
        for slope, left, right in zip(self.pieces, edges, edges[1:], strict=False):
            misses = (lower >= right) | (upper <= left)  # so NaN misses nothing
            low, high = torch.where(misses, low, low.clamp(max=slope)), torch.where(misses, high, high.clamp(min=slope))
        known = low <= high
        return torch.where(known, low, least), torch.where(known, high, greatest)


RELU = Elementwise("relu", torch.relu, (0.0, 1.0), kinks=(0.0,), pieces=(0.0, 1.0))
ABSOLUTE = Elementwise("abs", torch.abs, (-1.0, 1.0), (0.0, 0.0, 0.0), kinks=(0.0,), pieces=(-1.0, 1.0))


@dataclass(frozen=True)
class PartialAbs(Elementwise):
    """The absolute value in the first channels; the slopes of a box are known to be 1 in the others."""

    beta: float = 0.5

    def slopes_on(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        n = folded(self.beta, lower.shape[1])
        least, greatest = ABSOLUTE.slopes_on(lower[:, :n], upper[:, :n])
        same = torch.ones_like(lower[:, n:])
        return torch.cat([least, same], 1), torch.cat([greatest, same], 1)


class Grafted(Elementwise):
    """ReLU in some units, in the others a straight line, ``slope x + intercept``.

    ``mask``, ``slope`` and ``intercept`` have the shape (1, ...) of a batch of one sample. What holds for all units together is
    computed when it is asked for: that waits for the device.
    """

    mask: Tensor
    slope: Tensor
    intercept: Tensor

    def __init__(self, mask: Tensor, slope: Tensor, intercept: Tensor):
        values = {"name": "grafted_relu", "mask": mask, "slope": slope, "intercept": intercept}
        for key, value in values.items():
            object.__setattr__(self, key, value)

    def function(self, x: Tensor) -> Tensor:
        return grafted_relu(x, self.mask, self.slope.to(x.dtype), self.intercept.to(x.dtype))

    @property
    def unit_slopes(self) -> tuple[Tensor, Tensor]:  # (1, ...) twice
        """Least and greatest slope of each unit, anywhere."""
        return torch.where(self.mask, self.slope, 0.0), torch.where(self.mask, self.slope, 1.0)

    @property
    def slopes(self) -> tuple[float, float]:  # type: ignore[override]
        least, greatest = (t.detach() for t in self.unit_slopes)
        return (least.amin().item(), greatest.amax().item()) if least.numel() else (0.0, 0.0)

    @property
    def error(self) -> float:  # type: ignore[override]
        """A product and a sum: each rounds by half a spacing of |f(x)| + |intercept| at most."""
        offset = torch.where(self.mask, self.intercept, 0.0).detach().abs()
        return 2.0 * max(1.0, offset.amax().item()) if self.mask.any() else 0.0

    def constant_on(self, lower: Tensor, upper: Tensor) -> Tensor:
        return torch.where(self.mask, self.slope == 0, upper <= 0)

    def slopes_on(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        low, high = RELU.slopes_on(lower, upper)
        return tuple(torch.where(self.mask, self.slope.to(t.dtype), t) for t in (low, high))  # type: ignore[return-value]


@dataclass(frozen=True)
class MaxMin(Layer):
    """Channels c and c + C/2 become their maximum and minimum."""

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape


def widened(layer: Layer) -> Layer:
    """The same map with float64 weights; the others follow the dtype of what they are given."""
    if not isinstance(layer, (Linear, Conv)):
        return layer
    return replace(layer, weight=layer.weight.double(), bias=None if layer.bias is None else layer.bias.double())


class Unsupported(ValueError):
    """A layer that no rule knows. The message names it and what is known."""

    def __init__(self, name: str, what: str):
        super().__init__(
            f"layer {name!r}: {what} is not supported; supported are Linear, Conv1d, Conv2d, BatchNorm in eval mode, average, "
            "max and L2 pooling, flatten and reshape, sums, constants, normalisation, dropout in eval mode and the "
            "activations of torch.nn and lipfast.nn that have slope bounds"
        )
