"""The orthogonal polar factor: the nearest matrix with orthonormal columns.

    M = Q H,    Q^T Q = I,    H = (M^T M)^(1/2):        Q = U V^T for a singular value decomposition M = U S V^T

(Higham 1986, https://doi.org/10.1137/0907079, section 2). Near to Q, where E = M^T M - I has |E|_F <= 1/2, the binomial series
(Bjorck & Bowie 1971, https://doi.org/10.1137/0708036)

    Q = M (I + E)^(-1/2) = M (I - E/2 + 3/8 E^2 - 5/16 E^3 + 35/128 E^4 - ...)

is cut after E, E^2 or E^4, which takes |E| to at most 3/4 |E|^2 + 1/4 |E|^3, |E|^3 or 0.65 |E|^5, until that is the dtype's
rounding; |E| is at most |E|_F, and |E|^2 at most |E^2|_F. Elsewhere the decomposition itself is taken.

For a tall matrix or a square one

    dQ = Q K + (I - Q Q^T) dM H^-1,        H K + K H = Q^T dM - dM^T Q,

and the gradient solves the same equation for K, which is skew.
"""

import math

import torch
from torch import Tensor

from lipfast.ops._arguments import check_alike, check_shape
from lipfast.ops._definition import name_definition
from lipfast.ops._matrices import by_factors, in_parts, symmetric_product
from lipfast.rounding import accumulator

_NEAR = 0.5  # |E|_F up to which the series is taken: thrice at most, for float64's rounding


def polar(
    matrix: Tensor,  # (*, O, I)
) -> Tensor:  # (*, O, I)
    """The nearest matrix with orthonormal columns, or rows where ``matrix`` is wide, in every unitarily invariant norm.

    Args:
        matrix: any real matrix; leading dimensions are a batch.

    Returns:
        Q with ``Q^T Q = I`` (wide: ``Q Q^T = I``). A matrix without full rank has many nearest ones: one of them.

    Dtypes: float64, float32, and bfloat16/float16 (computed in float32, then rounded); CPU and CUDA. On CUDA it waits for
        the device, to read how far the batch is from orthonormal. Within ``|M^T M - I|_F <= 1/2`` it takes a few matrix
        products, elsewhere a singular value decomposition, matrix by matrix of a batch.
    Raises: ValueError if the dtype or the number of dimensions does not fit.
    Accuracy: ``|Q^T Q - I|_2`` below 20 eps as tested; an error of M moves Q by up to itself over the least singular value.
        NaN or Inf in a matrix makes all of it NaN.
    Gradient: of full rank; grows as 1 over the sum of the two least singular values (wide or tall: the least one) and is
        not finite without full rank.

    >>> polar(torch.tensor([[3., 0.], [0., -2.]]))
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    """
    check_alike("polar", matrix=matrix)
    check_shape("polar", "matrix", matrix, ("*", "O", "I"))
    return torch.ops.lipfast.polar(matrix)


def reference(matrix: Tensor) -> Tensor:
    O, I = matrix.shape[-2:]
    tall = (matrix if O >= I else matrix.mT).to(accumulator(matrix.dtype))
    Q = in_parts(_factor, tall.reshape(-1, *tall.shape[-2:])).reshape(tall.shape) if matrix.numel() else tall
    return (Q if O >= I else Q.mT).to(matrix.dtype, copy=True).contiguous()


def fake(matrix):
    return torch.empty_like(matrix, memory_format=torch.contiguous_format)


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


def backward(ctx, grad):
    matrix, Q = ctx.saved_tensors
    O, I = matrix.shape[-2:]
    if matrix.dtype != accumulator(matrix.dtype):
        Q = torch.ops.lipfast.polar(matrix.to(accumulator(matrix.dtype)))
    tall = lambda t: (t if O >= I else t.mT).to(Q.dtype)
    M, Q, G = tall(matrix), tall(Q), tall(grad)
    H, inner = Q.mT @ M, Q.mT @ G
    H = (H + H.mT) / 2
    slope = Q @ torch.ops.lipfast.polar_sylvester(H, inner - inner.mT)
    if O != I:
        flat = (t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:]) for t in (H, G - Q @ inner))
        outside = by_factors(lambda H, R: torch.linalg.solve_ex(H, R, left=False).result, *flat)
        slope = slope + outside.reshape(slope.shape)
    return (slope if O >= I else slope.mT).to(matrix.dtype)


def sylvester_reference(
    symmetric: Tensor,  # (*, N, N)
    skew: Tensor,  # (*, N, N)
) -> Tensor:  # (*, N, N)
    """The skew K with H K + K H = R."""
    values, vectors = torch.linalg.eigh(symmetric)
    inside = vectors.mT @ skew @ vectors
    return (vectors @ (inside / (values[..., None] + values[..., None, :])) @ vectors.mT).contiguous()


def sylvester_fake(symmetric, skew):
    return torch.empty_like(skew, memory_format=torch.contiguous_format)


def sylvester_save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def sylvester_backward(ctx, grad):
    symmetric, K = ctx.saved_tensors
    of_skew = torch.ops.lipfast.polar_sylvester(symmetric, (grad - grad.mT) / 2)
    product = of_skew @ K
    return product + product.mT, of_skew


def _factor(tall: Tensor) -> Tensor:  # (B, O, I), O >= I
    E = _defect(tall)
    size = torch.linalg.matrix_norm(E.detach())
    near = size <= _NEAR
    if near.all():
        return _steps(tall, E)
    out = torch.full_like(tall, torch.nan)
    far = (~near & tall.isfinite().all(-1).all(-1)).nonzero()[:, 0]
    if near.any():
        out = out.index_put((near.nonzero()[:, 0],), _steps(tall[near], E[near]))
    if len(far):
        U, _, Vh = torch.linalg.svd(tall[far], full_matrices=False)
        Q = U @ Vh
        out = out.index_put((far,), _steps(Q, _defect(Q)))  # a last step for what rounding took
    return out


def _defect(Q: Tensor) -> Tensor:
    E = symmetric_product(Q.mT, Q)
    E.diagonal(dim1=-2, dim2=-1).sub_(1)
    return E


def _steps(Q: Tensor, E: Tensor) -> Tensor:
    enough = 2 * torch.finfo(Q.dtype).eps
    while True:
        size = torch.linalg.matrix_norm(E.detach()).max().item()
        if 0.75 * size**2 + 0.25 * size**3 <= enough:
            return torch.baddbmm(Q, Q, E, alpha=-0.5)
        E2 = symmetric_product(E, E)
        size = torch.linalg.matrix_norm(E2.detach()).max().item() ** 0.5
        if size**3 <= enough:
            return torch.baddbmm(Q, Q, torch.add(E2 * (3 / 8), E, alpha=-0.5))
        rest = torch.add(E2 * (35 / 128), E, alpha=-5 / 16)
        rest.diagonal(dim1=-2, dim2=-1).add_(3 / 8)
        Q = torch.baddbmm(Q, Q, torch.add(symmetric_product(E2, rest), E, alpha=-0.5))
        if 0.65 * size**5 <= enough:
            return Q
        E = _defect(Q)


_op = torch.library.custom_op("lipfast::polar", reference, mutates_args=())
_op.register_fake(fake)
_op.register_autograd(backward, setup_context=save)
_sylvester = torch.library.custom_op("lipfast::polar_sylvester", sylvester_reference, mutates_args=())
_sylvester.register_fake(sylvester_fake)
_sylvester.register_autograd(sylvester_backward, setup_context=sylvester_save)
name_definition("lipfast::polar", reference)
