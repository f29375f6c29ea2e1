"""beta-Abs: the absolute value of the first channels (LipNeXt, Hu et al. 2026, https://arxiv.org/abs/2601.18513).

1-Lipschitz and norm preserving in every l_p norm; so is its derivative, at 0 too. Between free orthogonal matrices beta-Abs
with beta = 1/2 contains MaxMin (its theorem 2): with

    R = 1/sqrt(2) [[I, -I], [I, I]],        max_min(x) = R^T beta_abs(R x).

The operator is a composition of torch's own (torch.compile fuses it with its neighbours), so this file needs no fake.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from lipfast.ops._arguments import check_alike


def beta_abs(x: Tensor, beta: float = 0.5) -> Tensor:  # (B, C, ...) -> (B, C, ...)
    """``|x|`` in the first ``floor(beta C)`` channels of dimension 1, ``x`` in the others.

    Args:
        x: (B, C) or (B, C, ...).
        beta: from 0, the identity, to 1, the absolute value.

    Dtypes: float64, float32, bfloat16, float16; CPU and CUDA. NaN stays NaN.
    Raises: ValueError if ``x`` has no dimension 1 or another dtype, or ``beta`` is not in [0, 1].
    Gradient: turned in sign where ``x < 0`` in those channels, so at 0 it is kept, where torch's ``abs`` has 0 (as
        ``max_min``, whose ties count as sorted). The second derivatives are 0.

    >>> beta_abs(torch.tensor([[-1.0, 2.0, -3.0, 4.0]]))
    tensor([[ 1.,  2., -3.,  4.]])
    """
    if has_torch_function_unary(x):  # so that a network's trace shows the call
        return handle_torch_function(beta_abs, (x,), x, beta)
    check_alike("beta_abs", x=x)
    if x.ndim < 2:
        raise ValueError(f"beta_abs: x must be (B, C, ...), got {tuple(x.shape)}")
    check_beta("beta_abs", beta)
    return _BetaAbs.apply(x, beta)


def check_beta(op: str, beta: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"{op}: beta must be from 0 to 1, got {beta}")


def folded(beta: float, C: int) -> int:
    """How many channels of C have their absolute value taken."""
    return int(beta * C + 1e-6)  # 0.29 of 100 is 29, though the float 0.29 lies below


def reference(x: Tensor, beta: float = 0.5) -> Tensor:
    n = folded(beta, x.shape[1])
    return torch.cat((x[:, :n].abs(), x[:, n:]), 1)


class _BetaAbs(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, beta: float) -> Tensor:
        return reference(x, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, beta = inputs
        ctx.n = folded(beta, x.shape[1])
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        sign = 1 - 2 * (x[:, : ctx.n] < 0).to(grad.dtype)
        return torch.cat((grad[:, : ctx.n] * sign, grad[:, ctx.n :]), 1), None


def _beta_abs(x: Tensor, beta: float = 0.5) -> Tensor:
    return _BetaAbs.apply(x, beta)


torch.library.define("lipfast::beta_abs", torch.library.infer_schema(reference, mutates_args=()))
torch.library.impl("lipfast::beta_abs", "CompositeImplicitAutograd", _beta_abs)
