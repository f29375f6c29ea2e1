"""The grafted ReLU as a layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lipfast.ops.grafted_relu import grafted_relu


class GraftedReLU(nn.Module):
    """``slope x + intercept`` in grafted units, ``max(x, 0)`` in the others: :func:`lipfast.grafted_relu`.

    ``mask`` is a buffer, ``slope`` and ``intercept`` are parameters, one number per unit, in the dtype of x where they meet it.

    Args:
        shape: that of one sample, (C, H, W) or (C,).
        mask: bool, of that shape: the grafted units. None grafts none, and the layer is a ReLU.
        slope, intercept: where they start, a number or a tensor that broadcasts to the shape.

    Raises: ValueError for a mask of another dtype or a tensor of another shape.
    """

    def __init__(
        self,
        shape: Sequence[int],
        mask: Tensor | None = None,
        slope: float | Tensor = 0.4,
        intercept: float | Tensor = 0.0,
    ):
        super().__init__()
        shape = tuple(shape)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
            raise ValueError(f"GraftedReLU: mask must be bool {shape}, got {mask.dtype} {tuple(mask.shape)}")
        self.mask: Tensor
        self.register_buffer("mask", torch.zeros(shape, dtype=torch.bool) if mask is None else mask.clone())
        self.slope = nn.Parameter(_filled("slope", slope, shape, self.mask))
        self.intercept = nn.Parameter(_filled("intercept", intercept, shape, self.mask))

    def forward(self, x: Tensor) -> Tensor:
        return grafted_relu(x, self.mask, self.slope.to(x.dtype), self.intercept.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{tuple(self.mask.shape)}, grafted={int(self.mask.sum())}"


def _filled(name: str, value: float | Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    start = torch.as_tensor(value, device=like.device).detach()
    start = start if start.is_floating_point() else start.to(torch.get_default_dtype())
    sizes = zip(start.shape[::-1], shape[::-1], strict=False)
    if start.ndim > len(shape) or any(own not in (1, size) for own, size in sizes):
        raise ValueError(f"GraftedReLU: {name} must broadcast to {shape}, got {tuple(start.shape)}")
    return start.expand(shape).clone()
