"""Orthonormal rows by a Cholesky factor, contracted a little where the matrix is near to losing rank.

    W = L^-1 X,        L L^T = X X^T + e I,        e = eps mean(diag(X X^T))

(Hu et al. 2023, https://arxiv.org/abs/2310.02513, Cholesky-orthogonal dense layers, with the e of their code). W has the
singular values sqrt(s / (s + e)) < 1 for the eigenvalues s of X X^T: a linear layer of it is 1-Lipschitz, and orthogonal where
s is far above e.

Let F be the lower triangle of -G W^T for the gradient G by W, its diagonal halved. The factor's own derivative (Murray 2016,
https://arxiv.org/abs/1602.07527) and that of the solve leave

    Y = L^-T (G + (F + F^T) W)

of the gradient by X for a constant e. What e adds is a multiple of X; since W is the same for X and c X, the gradient is
orthogonal to X, which says how much: Y - X <Y, X>/<X, X>. That takes two products and one triangular solve.
"""

import math

import torch
from torch import Tensor

from lipfast.ops._arguments import check_alike, check_shape
from lipfast.rounding import accumulator


def cholesky_orthogonal(
    matrix: Tensor,  # (*, O, I)
    eps: float = 1e-3,
) -> Tensor:  # (*, O, I)
    """``L^-1 X`` for ``L L^T = X X^T + eps mean(diag(X X^T)) I``: rows that are nearly orthonormal; columns if X is tall.

    Args:
        matrix: any real matrix but zero; leading dimensions are a batch.
        eps: not negative. 0 makes a matrix of full rank orthonormal up to rounding.

    Returns:
        W with singular values ``sqrt(s / (s + e))`` for those ``sqrt(s)`` of X, ``e = eps |X|_F^2 / min(O, I)``: below 1,
        up to rounding. The same for all multiples ``c X``, ``c > 0``.

    Dtypes: float64, float32, and bfloat16/float16 (computed in float32, then rounded); CPU and CUDA. Products follow
        torch's own float32 precision. Nothing waits for the device.
    Raises: ValueError if the dtype or the number of dimensions does not fit or eps is negative or not finite.
    Accuracy: the errors of W are near ``|X|_2 / sqrt(s + e)`` roundings for the least s. A matrix whose Gram matrix rounding
        makes indefinite is all NaN: zero, and near losing rank if ``eps`` is much below 1e-3; so is one with NaN or Inf.

    >>> W = cholesky_orthogonal(torch.tensor([[3.0, 4.0]]), eps=0.5625)
    >>> torch.testing.assert_close(W, torch.tensor([[0.48, 0.64]]))
    """
    check_alike("cholesky_orthogonal", matrix=matrix)
    check_shape("cholesky_orthogonal", "matrix", matrix, ("*", "O", "I"))
    if not 0 <= eps < math.inf:
        raise ValueError(f"cholesky_orthogonal: eps must be a finite number of at least 0, got {eps}")
    return torch.ops.lipfast.cholesky_orthogonal(matrix, eps)


def reference(matrix: Tensor, eps: float = 1e-3) -> Tensor:
    return forward_reference(matrix, eps)[0]


def forward_reference(matrix: Tensor, eps: float = 1e-3) -> tuple[Tensor, Tensor]:  # W; L for X divided by its scale
    X = _wide(matrix)
    X = X / _scale(X)
    gram = X @ X.mT
    shift = eps * gram.diagonal(dim1=-2, dim2=-1).sum(-1) / max(1, gram.shape[-1])
    gram = gram + shift[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    L, failed = torch.linalg.cholesky_ex(gram)  # no check, which would wait for the device
    L = L.masked_fill((failed != 0)[..., None, None], math.nan)
    W = torch.linalg.solve_triangular(L, X, upper=False)
    return _as(matrix, W).to(matrix.dtype, copy=True).contiguous(), L.contiguous()


def forward_fake(matrix, eps=1e-3):
    K = min(matrix.shape[-2:])
    out = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    return out, matrix.new_empty(*matrix.shape[:-2], K, K, dtype=accumulator(matrix.dtype))


def save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], *output)
    ctx.set_materialize_grads(False)


def backward(ctx, grad, of_L):  # of_L: in a second derivative only
    matrix, out, L = ctx.saved_tensors
    X = _wide(matrix)
    scale = _scale(X)
    X = X / scale
    W = _wide(out) if out.dtype == L.dtype else torch.linalg.solve_triangular(L, X, upper=False)
    G = torch.zeros_like(W) if grad is None else _wide(grad)
    lower = -(G @ W.mT) if of_L is None else L.mT @ of_L - G @ W.mT
    Y = torch.linalg.solve_triangular(L.mT, G + (lower.tril() + lower.tril(-1).mT) @ W, upper=True)
    inner = lambda a, b: (a * b).sum((-2, -1), keepdim=True)
    along = -inner(Y, X) if of_L is None else inner(of_L, L) - inner(Y, X)  # L is proportional to X
    slope = (Y + along / inner(X, X) * X) / scale
    return _as(matrix, slope).to(matrix.dtype), None


def _wide(matrix: Tensor) -> Tensor:
    """(*, K, N), K <= N, in the dtype in which sums are formed."""
    wide = matrix.to(accumulator(matrix.dtype))
    return wide if wide.shape[-2] <= wide.shape[-1] else wide.mT


def _as(matrix: Tensor, wide: Tensor) -> Tensor:
    return wide if matrix.shape[-2] <= matrix.shape[-1] else wide.mT


def _scale(X: Tensor) -> Tensor:
    """The largest entry, constant to a derivative, so that squares stay in range."""
    return X.detach().abs().flatten(-2).amax(-1)[..., None, None] if X.numel() else X.new_ones(())


_forward = torch.library.custom_op("lipfast::cholesky_orthogonal_forward", forward_reference, mutates_args=())
_forward.register_fake(forward_fake)
_forward.register_autograd(backward, setup_context=save)
torch.library.define("lipfast::cholesky_orthogonal", torch.library.infer_schema(reference, mutates_args=()))
torch.library.impl(
    "lipfast::cholesky_orthogonal",
    "CompositeImplicitAutograd",
    lambda matrix, eps=1e-3: torch.ops.lipfast.cholesky_orthogonal_forward(matrix, eps)[0],
)
