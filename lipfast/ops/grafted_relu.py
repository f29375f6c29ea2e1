"""ReLU with some units made straight lines: slope x + intercept where the mask says so (linearity grafting, Chen et al. 2022,
https://arxiv.org/abs/2206.07839; which units: Han and Kim 2025, https://arxiv.org/abs/2510.25130).

A line needs no relaxation: a certificate is exact on a grafted unit, where a ReLU that may be on or off costs it an error.

The operator is a composition of torch's own (torch.compile fuses it with its neighbours), so this file needs no fake, and
``reference`` is the definition. Both kinds of unit are ``gain max(x, floor) + offset``: floor 0, gain 1 and offset 0 for a
ReLU, and for a line no floor, its slope and its intercept. That is two passes over x, without a branch; the derivative keeps x
alone.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from lipfast.ops._arguments import check_alike, check_broadcasts
from lipfast.ops._matrices import joined, parts


def grafted_relu(
    x: Tensor,  # (*,)
    mask: Tensor,  # bool; broadcasts to x: the shape of a sample, one entry per unit
    slope: Tensor,  # broadcasts to x
    intercept: Tensor,  # broadcasts to x
) -> Tensor:  # (*,)
    """``slope x + intercept`` where ``mask``, elsewhere ``max(x, 0)``, elementwise.

    Args:
        x: of any shape.
        mask: the grafted units, True where they are straight lines.
        slope, intercept: of any value; those of units that are not grafted are ignored.

    Dtypes: float64, float32, bfloat16, float16, one for x, slope and intercept; CPU and CUDA. NaN stays NaN.
    Raises: ValueError if a shape, dtype or device does not fit; the message names the argument.
    Gradient: to ``x`` the slope where ``mask``, elsewhere 1 where ``x > 0`` and 0 where not; to ``slope`` and ``intercept``
        where ``mask``. Differentiable any number of times.

    >>> mask = torch.tensor([False, False, True])
    >>> grafted_relu(torch.tensor([-1.0, 2.0, -1.0]), mask, torch.tensor(0.5), torch.tensor(0.25))
    tensor([ 0.0000,  2.0000, -0.2500])
    """
    if has_torch_function((x, mask, slope, intercept)):  # so that a network's trace shows the call
        return handle_torch_function(grafted_relu, (x, mask, slope, intercept), x, mask, slope, intercept)
    check_alike("grafted_relu", x=x, slope=slope, intercept=intercept)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.device != x.device:
        kind = f"{mask.dtype} on {mask.device}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"grafted_relu: mask must be a bool tensor on {x.device} as x is, got {kind}")
    check_broadcasts("grafted_relu", x, mask=mask, slope=slope, intercept=intercept)
    return _grafted(x, mask, slope, intercept)


def reference(x: Tensor, mask: Tensor, slope: Tensor, intercept: Tensor) -> Tensor:
    return torch.where(mask, slope * x + intercept, x.relu())


def _grafted(x: Tensor, mask: Tensor, slope: Tensor, intercept: Tensor) -> Tensor:
    floor = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(mask, -math.inf)
    gain, offset = torch.where(mask, slope, 1.0), torch.where(mask, intercept, 0.0)
    return _Grafted.apply(x, floor, gain, offset)


class _Grafted(torch.autograd.Function):
    """Differentiable any number of times: its backward is made of what torch can differentiate."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, floor: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
        return joined([torch.addcmul(offset, part.clamp(floor), gain) for part in _parts(x, floor, gain, offset)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, floor, gain, offset = ctx.saved_tensors
        to_x, _, to_gain, to_offset = ctx.needs_input_grad
        pairs = list(zip(*(_parts(t, floor, gain, offset) for t in (grad, x)), strict=True))
        # made of vector instructions on a CPU, where torch's masks go one element at a time
        masked = lambda grad, x: torch.ops.aten.threshold_backward(grad * gain, x - floor, 0)
        return (
            joined([masked(*pair) for pair in pairs]) if to_x else None,
            None,
            # of a line, which has no floor; where() drops the others
            sum((grad * x).sum_to_size(gain.shape) for grad, x in pairs) if to_gain else None,
            grad.sum_to_size(offset.shape) if to_offset else None,
        )


def _parts(x: Tensor, *units: Tensor) -> tuple[Tensor, ...]:
    """A few samples at a time, which stay in a CPU's cache from pass to pass; the compiler fuses the passes.

    All at once where the units differ from sample to sample.
    """
    alike = x.ndim > 0 and all(t.ndim < x.ndim or t.shape[0] == 1 for t in units)
    return parts(x) if alike and not torch.compiler.is_compiling() else (x,)


torch.library.define("lipfast::grafted_relu", torch.library.infer_schema(reference, mutates_args=()))
torch.library.impl("lipfast::grafted_relu", "CompositeImplicitAutograd", _grafted)
