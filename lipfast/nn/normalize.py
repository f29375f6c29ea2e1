"""Normalisation of pixels as a layer of the network, so that a certified radius stays in pixel units."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """``(x - mean) / std`` for every channel of (B, C, H, W); both are buffers, (C, 1, 1).

    Raises: ValueError if ``mean`` and ``std`` are not of one length (C,), or a ``std`` is not above 0.

    >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 1, 2))
    tensor([[[[2., 2.]]]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor):
        super().__init__()
        mean, std = (torch.as_tensor(t, dtype=torch.get_default_dtype()).detach().clone() for t in (mean, std))
        if mean.ndim != 1 or mean.shape != std.shape:
            raise ValueError(f"Normalize: mean and std must be (C,), got {tuple(mean.shape)} and {tuple(std.shape)}")
        if not std.is_meta and not (std > 0).all():
            raise ValueError(f"Normalize: std must be above 0, got {std.tolist()}")
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"
