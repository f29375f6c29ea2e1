"""The orthogonal polar factor: the nearest matrix with orthonormal columns.

    M = Q H,    Q^T Q = I,    H = (M^T M)^(1/2):        Q = U V^T for a singular value decomposition M = U S V^T

(Higham 1986, https://doi.org/10.1137/0907079, section 2). Near to Q, where E = M^T M - I has |E|_F <= 1/2, the binomial series
(Bjorck & Bowie 1971, https://doi.org/10.1137/0708036)

    Q = M (I + E)^(-1/2) = M (I - E/2 + 3/8 E^2 - 5/16 E^3 + 35/128 E^4 - ...)

is cut after E, E^2 or E^4, which takes |E| to at most 3/4 |E|^2 + 1/4 |E|^3, |E|^3 or 0.65 |E|^5, until that is the dtype's
rounding; |E| is at most |E|_F, and |E|^2 at most |E^2|_F. Elsewhere the decomposition itself is taken.

For a tall matrix or a square one

    dQ = Q K + (I - Q Q^T) dM H^-1,        H K + K H = Q^T dM - dM^T Q,

and the gradient solves the same equation for K, which is skew. Near to Q, where H = I + D, K is the sum of

    T_0 = R / 2,        T_(n+1) = -(D T_n + T_n D) / 2

for the right side R. A term has at most |D|_F of the norm of the one before, so |D|_F |T_n|_F / |T_0|_F bounds, but for a
factor of (1 + |D|_F) / (1 - |D|_F), what is left out of K after T_n; |D|_F^(n+1) bounds that. It is cut where this is the
dtype's rounding. Elsewhere the eigenvalues of H are taken.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipfast.ops._arguments import check_alike, check_shape
from lipfast.ops._definition import name_definition
from lipfast.ops._matrices import by_factors, in_parts, symmetric_product, transposed
from lipfast.rounding import accumulator

_NEAR = 0.5  # |E|_F up to which the series is taken: thrice at most, for float64's rounding
_TERMS = 12  # of the sum, at most: as long as a decomposition takes
_SURE = 1e-6, 1e18  # norms between which no square of float32 that matters overflows or vanishes


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
        not finite without full rank. Waits and chooses as the factor itself does.

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
    Q = in_parts(_factor, _flat(tall)).reshape(tall.shape) if matrix.numel() else tall
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
    tall = lambda t: _flat(t if O >= I else t.mT).to(Q.dtype)
    M, Q, G = tall(matrix), tall(Q), tall(grad)
    H, inner = symmetric_product(Q.mT, M), Q.mT @ G
    slope = Q @ torch.ops.lipfast.polar_sylvester(H, inner - transposed(inner))
    if O != I:
        slope = slope + by_factors(lambda H, R: torch.linalg.solve_ex(H, R, left=False).result, H, G - Q @ inner)
    return (slope if O >= I else slope.mT).reshape(matrix.shape).to(matrix.dtype)


def sylvester_reference(
    symmetric: Tensor,  # (*, N, N)
    skew: Tensor,  # (*, N, N)
) -> Tensor:  # (*, N, N)
    """The skew K with H K + K H = R."""
    return in_parts(_skew_solution, _flat(symmetric), _flat(skew)).reshape(skew.shape).contiguous()


def sylvester_fake(symmetric, skew):
    return torch.empty_like(skew, memory_format=torch.contiguous_format)


def sylvester_save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def sylvester_backward(ctx, grad):
    symmetric, K = ctx.saved_tensors
    of_skew = torch.ops.lipfast.polar_sylvester(symmetric, (grad - grad.mT) / 2)
    product = of_skew @ K
    return product + product.mT, of_skew


def _flat(t: Tensor) -> Tensor:  # (*, O, I) -> (B, O, I)
    return t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:])


def _factor(tall: Tensor) -> Tensor:  # (B, O, I), O >= I
    E = _defect(tall)
    return _by_distance(torch.linalg.matrix_norm(E.detach()) <= _NEAR, _steps, _decomposed, tall, E)


def _by_distance(near: Tensor, series: Callable[..., Tensor], decomposed: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """``series`` of the near matrices, ``decomposed`` of the others; NaN where the first of ``batches`` is not finite."""
    if near.all():
        return series(*batches)
    out = torch.full_like(batches[0], torch.nan)
    far = ~near & batches[0].isfinite().all(-1).all(-1)
    for chosen, function in ((near, series), (far, decomposed)):
        if chosen.any():
            out = out.index_put((chosen.nonzero()[:, 0],), function(*(batch[chosen] for batch in batches)))
    return out


def _decomposed(tall: Tensor, _: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(tall, full_matrices=False)
    Q = U @ Vh
    return _steps(Q, _defect(Q))  # a last step for what rounding took


def _defect(Q: Tensor) -> Tensor:
    return _less_identity(symmetric_product(Q.mT, Q))


def _less_identity(symmetric: Tensor) -> Tensor:
    symmetric.diagonal(dim1=-2, dim2=-1).sub_(1)
    return symmetric


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


def _skew_solution(H: Tensor, R: Tensor) -> Tensor:  # (B, N, N)
    D = _less_identity(H.clone())
    near = torch.linalg.matrix_norm(D) ** (_TERMS + 1) <= torch.finfo(D.dtype).eps
    return _by_distance(near, _sum, _from_eigenvalues, H, R, D)


def _sum(_: Tensor, R: Tensor, D: Tensor) -> Tensor:
    term = R / 2
    K, first, size = term.clone(), torch.linalg.matrix_norm(term), torch.linalg.matrix_norm(D)
    sure = (first > _SURE[0]) & (first < _SURE[1])
    left = size  # of K, at most
    while (left > torch.finfo(D.dtype).eps).any():
        product = torch.baddbmm(term, D, term, beta=0, alpha=-0.5)
        term = product - transposed(product)
        K += term
        left = size * torch.where(sure, torch.linalg.matrix_norm(term) / first, left)
    return K


def _from_eigenvalues(H: Tensor, R: Tensor, _: Tensor) -> Tensor:
    values, V = torch.linalg.eigh(H)
    return V @ (V.mT @ R @ V / (values[..., None] + values[..., None, :])) @ V.mT


_op = torch.library.custom_op("lipfast::polar", reference, mutates_args=())
_op.register_fake(fake)
_op.register_autograd(backward, setup_context=save)
_sylvester = torch.library.custom_op("lipfast::polar_sylvester", sylvester_reference, mutates_args=())
_sylvester.register_fake(sylvester_fake)
_sylvester.register_autograd(sylvester_backward, setup_context=sylvester_save)
name_definition("lipfast::polar", reference)
