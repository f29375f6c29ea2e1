"""min(max(x, low), high) with ends per unit, and its gradient in few passes over memory: activations with thresholds use it."""

from typing import Any

import torch
from torch import Tensor


def clip(x: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    """As ``x.clamp(low, high)``: the ends broadcast to ``x``, ``low <= high``, and one of them may be None.

    Gradient: to ``x`` where ``low < x < high``, to ``high`` where ``x >= high``, else to ``low``. Differentiable any number
    of times.
    """
    return _Clip.apply(x, low, high)


class _Clip(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, high = ctx.saved_tensors
        to_low, to_high = None, None
        if high is not None:
            grad, to_high = _split(grad, high - x, high.shape if ctx.needs_input_grad[2] else None)
        if low is not None:
            grad, to_low = _split(grad, x - low, low.shape if ctx.needs_input_grad[1] else None)
        return grad, to_low, to_high


def _split(grad: Tensor, inside: Tensor, shape: torch.Size | None) -> tuple[Tensor, Tensor | None]:
    """The gradient where ``inside > 0``, and the sum of the rest over the batch.

    ``threshold_backward`` is made of vector instructions, where torch's masks go one element at a time on a CPU.
    """
    passed = torch.ops.aten.threshold_backward(grad, inside, 0)
    return passed, None if shape is None else (grad - passed).sum_to_size(shape)
