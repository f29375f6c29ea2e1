"""Weights that training made small, set to zero (Xiao et al. 2019, https://arxiv.org/abs/1809.03008)."""

import math

import torch
from torch import nn

from lipfast.losses.l1 import weighted


@torch.no_grad()
def prune(model: nn.Module, threshold: float = 1e-3) -> int:
    """Sets to zero, in place, the weights of linear and convolution layers with ``|w| < threshold``.

    Those that :func:`lipfast.losses.l1` counts. Bounds hold for the network that is left, so prune before you certify; training
    afterwards moves them again.

    Returns: how many were not zero before.
    Raises: ValueError for a weight that is computed from other parameters, since one of its entries cannot be set alone, or a
        ``threshold`` that is negative or not finite; the model is then unchanged.

    >>> layer = nn.Linear(3, 1)
    >>> layer.weight.data = torch.tensor([[0.5, -1e-4, 0.0]])
    >>> prune(layer), layer.weight.tolist()
    (1, [[0.5, 0.0, 0.0]])
    """
    if not 0 <= threshold < math.inf:
        raise ValueError(f"prune: threshold must be at least 0 and finite, got {threshold}")
    layers = list(weighted(model))
    for name, layer in layers:
        if "weight" not in dict(layer.named_parameters(recurse=False)):
            raise ValueError(f"prune: the weight of layer {name!r} must be a plain parameter, got one that is computed")
    pruned = 0
    for _, layer in layers:
        small = layer.weight.abs() < threshold
        pruned += int((small & (layer.weight != 0)).sum())
        layer.weight.masked_fill_(small, 0.0)
    return pruned
