"""l_2 pooling: the l_2 norm of each channel over all pixels (LipNeXt, Hu et al. 2026, https://arxiv.org/abs/2601.18513).

1-Lipschitz in the l_2 norm, which it keeps, and so is its derivative's transposed wherever a channel is not zero. The image is
divided by its largest entry before it is squared, so no square overflows, nor does any that counts underflow.

The operator is a composition of torch's own (torch.compile fuses it with its neighbours), so this file needs no fake;
``reference`` is the definition.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from lipfast.ops._arguments import check_alike, check_shape
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


class _L2Pool(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        largest = x.abs().amax((2, 3), keepdim=True)
        scale = torch.where((largest > 0) & largest.isfinite(), largest, 1)
        return (x / scale).square().sum((2, 3)).sqrt() * scale[..., 0, 0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, norm = ctx.saved_tensors
        norm = torch.where(norm == 0, torch.inf, norm)  # 0 / inf is 0, however often it is differentiated
        return x / norm[..., None, None] * grad[..., None, None]


def _pooled(x: Tensor) -> Tensor:
    return _L2Pool.apply(x.to(accumulator(x.dtype))).to(x.dtype)


torch.library.define("lipfast::l2_pool", torch.library.infer_schema(reference, mutates_args=()))
torch.library.impl("lipfast::l2_pool", "CompositeImplicitAutograd", _pooled)
