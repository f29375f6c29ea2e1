"""Weights with rows of unit length: last-layer normalisation.

    w_k = raw_k / |raw_k|_2

Every output of a linear layer is then 1-Lipschitz in the l2 norm, and two of them differ by at most |w_i - w_j|_2 <= 2 times
what the input does. Without it the last layer's rows, which no orthogonality binds, could grow instead of the margin (Singla
et al. 2022, https://arxiv.org/abs/2108.04062; Hu et al. 2023, https://arxiv.org/abs/2301.12549).
"""

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipfast.nn._weights import weight_of
from lipfast.rounding import accumulator

L = TypeVar("L", bound=nn.Module)


def unit_rows(layer: L, name: str = "weight") -> L:
    """Scales every row of a layer's weight to unit l2 norm, whatever the optimiser does to it.

    Args:
        layer: a Linear or convolution, changed in place; what is trained is ``layer.parametrizations.weight.original``.
        name: of a weight (O, I) or (O, C, ...), one row for each output.

    Returns:
        The layer, still an ``nn.Linear`` or convolution for :mod:`lipfast.bounds`. ``layer.weight = rows`` takes rows of any
        length but zero; ``torch.nn.utils.parametrize.remove_parametrizations(layer, name)`` leaves a plain weight.

    Dtypes: float64, float32, and bfloat16/float16 (lengths in float32). Rows have unit length up to rounding.
    Raises: ValueError if the layer has no such weight, or a row is zero. A row that training makes zero becomes NaN.

    >>> head = unit_rows(nn.Linear(2, 1))
    >>> head.weight = torch.tensor([[3.0, 4.0]])
    >>> head.weight.tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    weight_of("unit_rows", layer, name)
    parametrize.register_parametrization(layer, name, UnitRows())
    return layer


class UnitRows(nn.Module):
    """The parametrization of :func:`unit_rows`: (O, ...) -> (O, ...)."""

    def forward(self, raw: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(raw.flatten(1), dim=1, dtype=accumulator(raw.dtype))
        return (raw / length.reshape(-1, *[1] * (raw.ndim - 1))).to(raw.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        if not weight.is_meta and not weight.flatten(1).any(1).all():
            raise ValueError("unit_rows: weight must have no zero row, got one")
        return weight
