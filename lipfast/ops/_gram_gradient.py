"""Gradients of the bounds of :mod:`lipfast.ops._gram_norm`."""

import torch
from torch import Tensor

from lipfast.ops._gram_norm import MANY, frobenius, gram, parts_of, rescaled, scaled

_EIGENVECTORS = 32  # the side from which on they cost less than products


def gram_gradient(
    matrix: Tensor,  # (*, M, N)
    norm: Tensor,  # (*)
    iterations: int,
) -> Tensor:  # (*, M, N)
    """The derivative of :func:`gram_norm`, whose value is ``norm``.

    For q = 2^iterations the Schatten norm (trace (A A^H)^q)^(1/2q) has the derivative M / <A, M> times itself, where
    M = (A A^H)^(q-1) A is the product of all Gram matrices and A, because q - 1 = 1 + 2 + 4 + ...
    """
    if matrix.numel() == 0:
        return matrix
    wide = matrix.shape[-2] <= matrix.shape[-1]
    exponent, A = rescaled(matrix, parts_of(matrix.detach()).abs().flatten(matrix.ndim - 2).amax(-1))
    G = product = A
    for _ in range(iterations):
        square = G @ G.mH if wide else G.mH @ G
        _, G = rescaled(square, frobenius(square.detach()))
        product = G @ product if wide else product @ G
        _, product = rescaled(product, frobenius(product.detach()))
    inner = (A.conj() * product).real.sum((-2, -1))
    return (scaled(norm, -exponent) / inner.where(inner != 0, 1.0))[..., None, None] * product


def eigen_gradient(
    matrix: Tensor,  # (*, M, N)
    norm: Tensor,  # (*)
    iterations: int,
) -> Tensor:  # (*, M, N)
    """:func:`gram_gradient`, which see, for a CPU and not to be differentiated.

    M = V (E/e)^(q-1) V^H A for A A^H = V E V^H and the largest eigenvalue e: few eigenvectors count.
    """
    r = min(matrix.shape[-2:])
    if r < _EIGENVECTORS or iterations < MANY:
        return gram_gradient(matrix, norm, iterations)
    exponent, A = rescaled(matrix, parts_of(matrix).abs().flatten(matrix.ndim - 2).amax(-1))
    A = A if matrix.shape[-2] == r else A.mH
    finite = norm.isfinite()
    E, V = torch.linalg.eigh(gram(A).where(finite[..., None, None], 0.0))
    largest = E[..., -1:].clamp(min=2.0**-500)
    weight = (E.clamp(min=0) / largest) ** (2.0**iterations - 1)
    count = int((weight > 2.0**-80).sum(-1).amax()) if weight.numel() else 0
    E, V, weight = E[..., r - count :], V[..., r - count :], weight[..., r - count :]
    inner = (E * weight).sum(-1)
    factor = (scaled(norm, -exponent) / inner.where(inner != 0, 1.0)).where(finite, torch.nan)
    product = (V * (weight * factor[..., None])[..., None, :].to(V.dtype)) @ (V.mH @ A)
    return product if matrix.shape[-2] == r else product.mH.resolve_conj()
