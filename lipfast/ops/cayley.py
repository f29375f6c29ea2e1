"""The Cayley transform: an orthogonal matrix from a skew one.

    Q = (I - A)(I + A)^-1 = 2 (I + A)^-1 - I,        A = (S - S^T) / 2

for the matrix S that is passed (Trockman & Kolter 2021, https://arxiv.org/abs/2104.07167, section 3). I + A has the singular
values sqrt(1 + t^2) for the eigenvalues i t of A: it is never singular. Since (I + A)^-1 = (I + Q)/2,

    dQ = -2 (I + A)^-1 dA (I + A)^-1 = -(I + Q) dA (I + Q) / 2,

so the gradient takes two products and no second solve.

float32 is computed in float64, by halves and without pivots: matrix products do nearly all of the work, which is several
times as quick as a pivoted factorisation. The symmetric part of I + A, and so of every Schur complement, is at least I; but
a complement may be as large as |A|^2, which float64 bears up to |A| of some thousands. Beyond, on a CPU, and for float64 input,
the matrix is factorised with pivots, and one Newton step (Bjorck & Bowie 1971) takes the loss of orthogonality, about eps |A|,
away. (On CUDA, to look at |A| would be to wait for it.)
"""

import math

import torch
from torch import Tensor

from lipfast.ops._arguments import check_alike, check_shape
from lipfast.ops._definition import name_definition
from lipfast.ops._matrices import in_parts, inverse, symmetric_product, transposed
from lipfast.rounding import accumulator

_SIDE = 32  # of a matrix that is inverted whole
_SAFE = 2e3  # the largest |A|_F for which no pivots are needed


def cayley(
    skew: Tensor,  # (*, N, N)
) -> Tensor:  # (*, N, N)
    """``(I - A)(I + A)^-1`` of the skew part ``A = (skew - skew^T) / 2``: orthogonal, with determinant 1.

    Args:
        skew: square; leading dimensions are a batch. Only its skew part counts, so any square parameter will do: a matrix
            that is skew already is its own skew part.

    Returns:
        Q with ``Q^T Q = I`` and no eigenvalue -1; ``A = (I - Q)(I + Q)^-1`` in turn.

    Dtypes: float64, float32 (computed in float64), and bfloat16/float16 (in float32, then rounded); CPU and CUDA.
    Raises: ValueError if the dtype does not fit or the matrix is not square. Nothing waits for the device.
    Accuracy: ``|Q^T Q - I|_2`` stays below 4 eps in float32 and 4 sqrt(N) eps in float64, for ``|A|_2`` up to 1e6 (in float32
        on CUDA 1e3) and N up to 1024 as tested; an error of A, its rounding to begin with, moves Q by up to twice its size.
        Half types add their own rounding, and are orthogonal only to that. NaN or Inf in a matrix makes all of it NaN.
    Gradient: skew, two products.

    >>> cayley(torch.tensor([[0., -1.], [1., 0.]]))
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """
    check_alike("cayley", skew=skew)
    check_shape("cayley", "skew", skew, ("*", "N", "N"))
    check_shape("cayley", "skew", skew, ("*", skew.shape[-1], skew.shape[-1]))
    return torch.ops.lipfast.cayley(skew)


def reference(skew: Tensor) -> Tensor:
    wide = skew.to(accumulator(skew.dtype)).reshape(math.prod(skew.shape[:-2]), *skew.shape[-2:])
    Q = in_parts(_by_halves if skew.dtype == torch.float32 else _with_pivots, wide)
    return Q.reshape(skew.shape).to(skew.dtype).contiguous()


def fake(skew):
    return torch.empty_like(skew, memory_format=torch.contiguous_format)


def save(ctx, inputs, output):
    ctx.save_for_backward(output)


def backward(ctx, grad):
    (output,) = ctx.saved_tensors
    flat = lambda t: t.to(accumulator(output.dtype)).reshape(math.prod(output.shape[:-2]), *output.shape[-2:])
    return in_parts(gradient, flat(grad), flat(output)).reshape(output.shape).to(output.dtype)


def gradient(G: Tensor, Q: Tensor) -> Tensor:  # (B, N, N), as all below
    return slope(torch.baddbmm(G, Q.mT, G), Q)


def slope(left: Tensor, Q: Tensor) -> Tensor:
    """The gradient, for ``left = (I + Q)^T G``."""
    both = torch.baddbmm(left, left, Q.mT, beta=0.25, alpha=0.25)
    return transposed(both) - both


def _by_halves(matrix: Tensor) -> Tensor:
    return precise(matrix - transposed(matrix)).to(matrix.dtype)


def precise(double: Tensor) -> Tensor:
    """Of ``double = 2 A`` in float32, to more than its precision; float64."""
    if double.device.type == "cpu" and not (torch.linalg.matrix_norm(double) <= 2 * _SAFE).all():  # NaN is not
        return _with_pivots(double.double() / 2)
    return by_halves(double, torch.float64)


def by_halves(double: Tensor, dtype: torch.dtype) -> Tensor:
    """Of ``double = 2 A``, computed in ``dtype``, which is that of the result."""
    Q = _inverse(_plus_identity(double.to(dtype) / 4, 0.5))
    return Q - torch.eye(Q.shape[-1], dtype=dtype, device=Q.device)  # not in place: a derivative may need the inverse


def _with_pivots(matrix: Tensor) -> Tensor:
    A = (matrix - transposed(matrix)) / 4
    Q = inverse(_plus_identity(A, 0.5))
    Q = Q - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.baddbmm(Q, Q, symmetric_product(Q.mT, Q), beta=1.5, alpha=-0.5)


def _plus_identity(A: Tensor, share: float) -> Tensor:
    """NaN where NaN or Inf is in A: a factorisation may divide by the Inf."""
    taint = 0 * A.sum((-2, -1))[:, None]
    A.diagonal(dim1=-2, dim2=-1).add_(share + taint)
    return A


def _inverse(matrix: Tensor) -> Tensor:
    """By halves, for a matrix whose symmetric part is positive definite."""
    N = matrix.shape[-1]
    if N <= _SIDE:
        return inverse(matrix)
    half = slice(None, N // 2), slice(N // 2, None)
    a, b, c, d = (matrix[:, i, j] for i in half for j in half)
    first = _inverse(a)
    right, down = first @ b, c @ first
    last = _inverse(torch.baddbmm(d, c, right, alpha=-1))
    minus = -last
    corner = right @ minus
    out = torch.empty_like(matrix)
    out[:, half[1], half[1]] = last
    out[:, half[1], half[0]].baddbmm_(minus, down, beta=0)
    out[:, half[0], half[1]] = corner
    out[:, half[0], half[0]] = torch.baddbmm(first, corner, down, alpha=-1)
    return out


_op = torch.library.custom_op("lipfast::cayley", reference, mutates_args=())
_op.register_fake(fake)
_op.register_autograd(backward, setup_context=save)
name_definition("lipfast::cayley", reference)
