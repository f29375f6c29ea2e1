"""MaxMin: sorts pairs of channels (Anil et al. 2019, https://arxiv.org/abs/1811.05381, where it is GroupSort of size 2).

Channel c is paired with channel c + C/2, as in Huang et al. 2021 (https://arxiv.org/abs/2111.01395): the first half of
the output holds the larger numbers of the pairs, the second half the smaller. (Others pair neighbours, 2c with 2c + 1; a
permutation of the channels, which the weights before and after can absorb, leads from one to the other.)

A permutation of its input, hence 1-Lipschitz in every l_p norm and norm preserving. So is its derivative, at ties too. The
operator is a composition of torch's own (torch.compile fuses it with its neighbours), so this file needs no fake.
"""

from typing import Any

import torch
from torch import Tensor

from lipfast.ops._arguments import check_alike


def max_min(x: Tensor) -> Tensor:  # (B, C, ...) -> (B, C, ...)
    """``cat(max(a, b), min(a, b))`` with ``a`` and ``b`` the two halves of dimension 1.

    Args:
        x: (B, C) or (B, C, ...) with C even.

    Dtypes: float64, float32, bfloat16, float16; CPU and CUDA. NaN in one of a pair gives NaN in both.
    Raises: ValueError if ``x`` has no dimension 1, an odd size there, or another dtype.
    Gradient: the permutation turned back; a tie counts as sorted already, where autograd through ``reference`` gives both
        of the pair the mean of their gradients. The second derivatives are 0.

    >>> max_min(torch.tensor([[1.0, 4.0, 3.0, 2.0]]))
    tensor([[3., 4., 1., 2.]])
    """
    check_alike("max_min", x=x)
    if x.ndim < 2 or x.shape[1] % 2:
        raise ValueError(f"max_min: x must be (B, C, ...) with C even, got {tuple(x.shape)}")
    return _MaxMin.apply(x)


def reference(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat((torch.maximum(a, b), torch.minimum(a, b)), 1)


class _MaxMin(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return reference(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        a, b = ctx.saved_tensors[0].chunk(2, 1)
        larger, smaller = grad.chunk(2, 1)
        swapped = (a < b).to(grad.dtype)  # 0 or 1, where lerp is exact; on a CPU many times faster than torch.where
        return torch.cat((torch.lerp(larger, smaller, swapped), torch.lerp(smaller, larger, swapped)), 1)


torch.library.define("lipfast::max_min", torch.library.infer_schema(reference, mutates_args=()))
torch.library.impl("lipfast::max_min", "CompositeImplicitAutograd", _MaxMin.apply)
