"""The maps that a network is made of, as data. What each means for an analysis is said in that analysis."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Scale(Layer):
    """(x - shift) * factor + offset, each a tensor that broadcasts against a batch."""

    shift: Tensor | None = None
    factor: Tensor | None = None
    offset: Tensor | None = None


@dataclass(frozen=True)
class Sum(Layer):
    signs: tuple[float, float]


@dataclass(frozen=True)
class Rearrange(Layer):
    """The same numbers in other places: flatten, reshape, permute. ``function`` keeps the batch dimension first."""

    function: Callable[[Tensor], Tensor]


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
    """Weighted sums with weights >= 0 of at most ``terms`` entries each."""

    function: Callable[[Tensor], Tensor]
    terms: int


@dataclass(frozen=True)
class MaxPool(Layer):
    function: Callable[[Tensor], Tensor]
    disjoint: bool  # windows do not overlap


@dataclass(frozen=True)
class L2Pool(Layer):
    """The l2 norm of each window; ``square_sum`` maps squared entries to the windows' sums of at most ``terms``."""

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
    """

    name: str
    function: Callable[[Tensor], Tensor]
    slopes: tuple[float, float]
    least: tuple[float, float, float] | None = None
    error: float = 0.0
    jump: float = 0.0


@dataclass(frozen=True)
class MaxMin(Layer):
    """Channels c and c + C/2 become their maximum and minimum."""


class Unsupported(ValueError):
    """A layer that no rule knows. The message names it and what is known."""

    def __init__(self, name: str, what: str):
        super().__init__(
            f"layer {name!r}: {what} is not supported; supported are Linear, Conv1d, Conv2d, BatchNorm in eval mode, average, "
            "max and L2 pooling, flatten and reshape, sums, constants, normalisation, dropout in eval mode and the "
            "activations of torch.nn and lipfast.nn that have slope bounds"
        )
