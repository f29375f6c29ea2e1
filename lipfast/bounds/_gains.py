"""The l2 gains, ||f(x) - f(y)|| <= gain ||x - y||, of layers that have no matrix."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.bounds.layers import AveragePool, Elementwise, L2Pool, Layer, MaxMin, MaxPool, Pad, Rearrange, Scale

UP = 1 + 2.0**-50  # more than the rounding of a few products or sums in float64


def fixed_gain(layer: Layer, name: str, shape: Sequence[int]) -> float:
    """Of a layer without parameters, for samples of ``shape``. Raises ValueError if there is none."""
    if isinstance(layer, Elementwise):
        return max(map(abs, layer.slopes))
    if isinstance(layer, (MaxMin, Rearrange)) or (isinstance(layer, Pad) and layer.mode == "constant"):
        return 1.0
    if isinstance(layer, (MaxPool, L2Pool)):
        if not layer.disjoint:
            remedy = "make stride equal kernel_size, and L2 pooling without ceil_mode"
            raise ValueError(f"layer {name!r}: pooling over overlapping or cut windows has no l2 rule; {remedy}")
        return 1.0
    assert isinstance(layer, (AveragePool, Pad)), layer
    return _schur(layer.function if isinstance(layer, AveragePool) else layer, shape) * (1 + 2.0**-40)


def _schur(function, shape: Sequence[int]) -> float:
    """sqrt(||A||_1 ||A||_inf) >= ||A||: of a linear map with entries >= 0, from the sums of its rows and columns."""
    with torch.enable_grad():
        ones = torch.ones(1, *shape, dtype=torch.float64, requires_grad=True)
        rows = function(ones)
        (columns,) = torch.autograd.grad(rows.sum(), ones)
    return math.sqrt(rows.max().item() * columns.max().item())


def scale_gain(layer: Scale, kind: str) -> Tensor | float:
    """The largest factor, in float64 for a bound."""
    if layer.factor is None:
        return 1.0
    largest = layer.factor.abs().amax()
    return largest.double() * (1 + 8 * torch.finfo(layer.factor.dtype).eps) if kind == "bound" else largest


def between_outputs(lipschitz: Tensor, classes: int) -> Tensor:  # (*) -> (*, K, K)
    """Of the difference of any two entries of a map: sqrt(2) times the map's."""
    apart = 1 - torch.eye(classes, dtype=lipschitz.dtype, device=lipschitz.device)
    return lipschitz[..., None, None] * (math.sqrt(2) * UP) * apart
