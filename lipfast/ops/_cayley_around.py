"""A base times a Cayley transform: the square weights of :func:`lipfast.nn.orthogonal`.

    W = base Q,        Q = (I - A)(I + A)^-1,        A = (S - S^T) / 2

with the dQ = -(I + Q) dA (I + Q) / 2 of :mod:`lipfast.ops.cayley`. As base (I + Q) = base + W, the gradient of A is the skew
part of -(base + W)^T G (I + Q)^T / 2: the base takes a product forwards and none backwards.

float32 on a CPU: the product by the base rounds W by several eps, whatever Q is. So Q is inverted in float32 as well, unless
A is large: the halves' complements are of |A|^2.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast.ops._matrices import in_parts, transposed
from lipfast.ops.cayley import by_halves, gradient, precise, slope

_LARGE = 2  # |A|, beyond which float32 is not enough
_ITERATIONS = 3


def cayley_around(
    base: Tensor,  # (*, N, N)
    skew: Tensor,  # (*, N, N)
) -> Tensor:  # (*, N, N)
    """``base @ cayley(skew)``, of float64 or float32; ``base`` is constant to a derivative."""
    return torch.ops.lipfast.cayley_around(base, skew)[0]


def reference(base: Tensor, skew: Tensor) -> tuple[Tensor, Tensor]:  # W, Q
    if skew.dtype == torch.float32 and skew.device.type == "cpu":
        Q = in_parts(_transform, _flat(skew)).reshape(skew.shape)
    else:
        Q = torch.ops.lipfast.cayley(skew)
    return base @ Q, Q


def fake(base, skew):
    empty = lambda: torch.empty_like(skew, memory_format=torch.contiguous_format)
    return empty(), empty()


def save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], *output)
    ctx.set_materialize_grads(False)


def backward(ctx, grad, of_Q):  # of_Q: in a second derivative only
    base, W, Q = ctx.saved_tensors
    if grad is None and of_Q is None:
        return None, None
    if of_Q is None:
        out = in_parts(_gradient, *map(_flat, (grad, base, W, Q)))
    else:
        G = of_Q if grad is None else torch.baddbmm(_flat(of_Q), _flat(base).mT, _flat(grad))
        out = in_parts(gradient, _flat(G), _flat(Q))
    return None, out.reshape(Q.shape)


def _flat(matrices: Tensor) -> Tensor:  # (B, N, N), as all below
    return matrices.reshape(math.prod(matrices.shape[:-2]), *matrices.shape[-2:])


def _gradient(G: Tensor, base: Tensor, W: Tensor, Q: Tensor) -> Tensor:
    return slope((base + W).mT @ G, Q)


def _transform(matrix: Tensor) -> Tensor:
    double = matrix - transposed(matrix)
    if _norm_estimate(double) <= 2 * _LARGE:  # NaN is not
        return by_halves(double, torch.float32)
    return precise(double).to(matrix.dtype)


def _norm_estimate(A: Tensor) -> float:
    """The largest ``|A|_2`` of the batch, or less: of many like it a little less, of one that stands out hardly any."""
    B, N = A.shape[:2]
    v = torch.arange(N, dtype=A.dtype).square().cos().expand(B, 1, N)
    for _ in range(_ITERATIONS):
        v = F.normalize(v, dim=-1) @ A
    return v.norm(dim=-1).max().item() if v.numel() else 0.0


_op = torch.library.custom_op("lipfast::cayley_around", reference, mutates_args=())
_op.register_fake(fake)
_op.register_autograd(backward, setup_context=save)
