"""The clipped MaxMin as a layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lipfast.ops._clip import clip
from lipfast.ops.max_min import max_min


class ClippedMaxMin(nn.Module):
    """Sorts channels c and c + C/2, then clips the larger from above and the smaller from below (Huang et al. 2021,
    https://arxiv.org/abs/2111.01395):

        (min(max(a, b), upper), max(min(a, b), lower)),    a and b the two halves of dimension 1.

    1-Lipschitz in every l_p norm whatever the thresholds are, so they need no projection. Where every image of a set reaches
    its threshold, the unit is constant there and drops out of the local bound.

    Args:
        upper, lower: numbers or tensors, where the thresholds start if they are learnable; ``lower`` is by default ``-upper``.
        shape: that of one sample, (C, H, W) or (C,) with C even, for thresholds (C/2, H, W) or (C/2,), one per unit; None keeps
            the shapes given.
        learnable: parameters instead of buffers.

    Raises: ValueError for a NaN threshold or an odd C.

    >>> ClippedMaxMin(2.0)(torch.tensor([[1.0, 4.0, 3.0, -9.0]]))
    tensor([[ 2.,  2.,  1., -2.]])
    """

    upper: Tensor
    lower: Tensor

    def __init__(
        self,
        upper: float | Tensor = 1.0,
        lower: float | Tensor | None = None,
        shape: Sequence[int] | None = None,
        learnable: bool = False,
    ):
        super().__init__()
        if shape is not None and shape[0] % 2:
            raise ValueError(f"ClippedMaxMin: shape must be (C, ...) with C even, got {tuple(shape)}")
        for name, given in (("upper", upper), ("lower", -upper if lower is None else lower)):
            start = torch.as_tensor(given, dtype=torch.get_default_dtype()).detach()
            if start.isnan().any():
                raise ValueError(f"ClippedMaxMin: {name} must be a number, got {given}")
            start = start.expand(start.shape if shape is None else (shape[0] // 2, *shape[1:])).clone()
            if learnable:
                setattr(self, name, nn.Parameter(start))
            else:
                self.register_buffer(name, start)

    def forward(self, x: Tensor) -> Tensor:
        larger, smaller = max_min(x).chunk(2, 1)
        return torch.cat((clip(larger, None, self.upper), clip(smaller, self.lower, None)), 1)

    def extra_repr(self) -> str:
        return f"{tuple(self.upper.shape)}, learnable={isinstance(self.upper, nn.Parameter)}"
