"""l_2 pooling: the l_2 norm of each channel over all pixels (LipNeXt, Hu et al. 2026, https://arxiv.org/abs/2601.18513).

1-Lipschitz in the l_2 norm, which it keeps, and so is its derivative's transposed wherever a channel is not zero. The image is
divided by its largest entry before it is squared, so no square overflows, nor does any that counts underflow.

The operator is a composition of torch's own (torch.compile fuses it with its neighbours), so this file needs no fake;
``reference`` is the definition.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from lipfast.ops._arguments import check_alike, check_shape
from lipfast.ops._matrices import in_parts
from lipfast.rounding import accumulator


def l2_pool(x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C)
    """``sqrt(sum over pixels of x^2)``, channel by channel.

    Args:
        x: (B, C, H, W) with at least one pixel.

    Dtypes: float64, float32, bfloat16, float16, the last two summed in float32; CPU and CUDA. Inf in a channel gives Inf,
        NaN gives NaN, and so does a norm beyond the dtype's largest number give Inf.
    Raises: ValueError for another shape or dtype.
    Gradient: ``x`` divided by its norm; 0 for a channel that is all zero, and so are the second derivatives there.

    >>> l2_pool(torch.tensor([[[[3.0, -4.0]]]]))
    tensor([[5.]])
    """
    if has_torch_function_unary(x):  # so that a network's trace shows the call, and over how many pixels it sums
        return handle_torch_function(l2_pool_over, (x,), x, x.shape[2] * x.shape[3])
    check_alike("l2_pool", x=x)
    check_shape("l2_pool", "x", x, ("B", "C", "H", "W"))
    if 0 in x.shape[2:]:
        raise ValueError(f"l2_pool: x must be (B, C, H, W) with at least one pixel, got {tuple(x.shape)}")
    return _pooled(x)


def l2_pool_over(x: Tensor, pixels: int) -> Tensor:
    """What a trace holds for :func:`l2_pool`."""
    return l2_pool(x)


def reference(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(2, 3), dtype=accumulator(x.dtype)).to(x.dtype)


_SURE = 1e-12, 1e18  # between these no square of float32 or float64 that matters overflows or vanishes


class _L2Pool(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        if (
            type(x) is not Tensor or x.device.type != "cpu" or torch.compiler.is_compiling()
        ):  # no numbers to look at, or far off
            return _scaled_norm(x)
        norm = reference(x)
        unsure = ~((norm > _SURE[0]) & (norm < _SURE[1]))  # NaN is
        if unsure.any():
            norm[unsure] = _scaled_norm(x[unsure][:, None, None])[:, 0]
        return norm

    @staticmethod
    def vmap(_info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        x = x.movedim(in_dims[0], 0)
        return _L2Pool.apply(x.flatten(0, 1)).unflatten(0, x.shape[:2]), 0

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, norm = ctx.saved_tensors
        norm = torch.where(norm == 0, torch.inf, norm)  # 0 / inf is 0, however often it is differentiated
        return _in_parts(lambda x, norm, grad: x / norm * grad, x, *(t[..., None, None].expand_as(x) for t in (norm, grad)))


def _scaled_norm(x: Tensor) -> Tensor:
    """Whose squares neither overflow nor vanish."""
    flat = x.flatten(2)
    largest = torch.maximum(flat.amax(-1), -flat.amin(-1))  # each much faster on a CPU than the largest of |x|
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    return torch.linalg.vector_norm(flat / scale[..., None], dim=-1) * scale


def _in_parts(function: Callable[..., Tensor], *images: Tensor) -> Tensor:
    """A few images at a time, whose quotients stay in a CPU's cache; the compiler fuses the whole batch."""
    return function(*images) if torch.compiler.is_compiling() else in_parts(function, *images)


def _pooled(x: Tensor) -> Tensor:
    return _L2Pool.apply(x.to(accumulator(x.dtype))).to(x.dtype)


torch.library.define("lipfast::l2_pool", torch.library.infer_schema(reference, mutates_args=()))
torch.library.impl("lipfast::l2_pool", "CompositeImplicitAutograd", _pooled)
