"""MaxMin as a layer."""

from torch import Tensor, nn

from lipfast.ops.max_min import max_min


class MaxMin(nn.Module):
    """Sorts channels c and c + C/2 of (B, C, ...): :func:`lipfast.max_min`."""

    def forward(self, x: Tensor) -> Tensor:
        return max_min(x)
