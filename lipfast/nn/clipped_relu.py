"""The clipped ReLU as a layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lipfast.ops.clipped_relu import clipped_relu


class ClippedReLU(nn.Module):
    """``min(max(x, 0), threshold)``: :func:`lipfast.clipped_relu`.

    Args:
        threshold: a number or tensor, not negative; where it starts if it is learnable.
        shape: that of one sample, (C, H, W) or (C,), for one threshold per unit; None keeps the shape given.
        learnable: a parameter instead of a buffer. Keeping it from falling below 0 is up to the training loop.

    Raises: ValueError for a negative or NaN threshold.
    """

    def __init__(self, threshold: float | Tensor = 1.0, shape: Sequence[int] | None = None, learnable: bool = False):
        super().__init__()
        start = torch.as_tensor(threshold, dtype=torch.get_default_dtype()).detach()
        if not (start >= 0).all():
            raise ValueError(f"ClippedReLU: threshold must not be negative, got {threshold}")
        start = start.expand(start.shape if shape is None else tuple(shape)).clone()
        self.threshold: Tensor
        if learnable:
            self.threshold = nn.Parameter(start)
        else:
            self.register_buffer("threshold", start)

    def forward(self, x: Tensor) -> Tensor:
        return clipped_relu(x, self.threshold)

    def extra_repr(self) -> str:
        return f"{tuple(self.threshold.shape)}, learnable={isinstance(self.threshold, nn.Parameter)}"
