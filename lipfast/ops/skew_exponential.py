"""The matrix exponential of a skew matrix: an orthogonal matrix.

    exp(A) = I + A + A^2/2 + A^3/6 + ...,        A = (S - S^T) / 2

for the matrix S that is passed: the exponential map of the orthogonal matrices (Hu et al. 2026,
https://arxiv.org/abs/2601.18513, equation 3). Scaling and squaring, exp(A) = exp(A/2^s)^(2^s).

On an eigenvalue i t of A the even terms make cos t and the odd ones i t sin(t)/t: both are functions of A^2, whose powers are
symmetric and commute. So of each of the products

    A^2,    A^4 = A^2 A^2,    A^6 = A^2 A^4,    T = A^4 (c4 A^4 + c5 A^6),    A (I + d1 A^2 + d2 A^4 + d3 A^6 + d4 T)

one half mirrors the other; I + c1 A^2 + c2 A^4 + c3 A^6 + T is the even part. The numbers make the largest errors over the
range of t, of cos t and of sin t, as small as they can be: below an eighth of the dtype's rounding.

The eigenvalues come in pairs +-i t, so t^(2k) <= |A^k|_F^2 / 2 for all of them. s is the least number for which this, at k = 1
or k = 6, puts every t / 2^s in range. Each squaring doubles a loss of orthogonality, so every few of them, and the last, are
followed by a Newton step (Bjorck & Bowie 1971, https://doi.org/10.1137/0708036).
"""

import math
from functools import partial

import torch
from torch import Tensor

from lipfast.ops._arguments import check_alike, check_shape
from lipfast.ops._definition import name_definition
from lipfast.ops._matrices import in_parts, joined, parts, skew_product, symmetric_part, symmetric_product, transposed
from lipfast.rounding import accumulator

_RANGE = {torch.float64: 0.25, torch.float32: 2.0}  # of t
_EVEN = {  # c1 to c5
    torch.float64: (0.5, 0.041666666666655548, 0.0013888888880698436, 2.4801560969424587e-5, 2.7518885868405878e-7),
    torch.float32: (0.49999995097278185, 0.041666492262851103, 0.0013886871599986064, 2.46994886207e-5, 2.51957043472e-7),
}
_ODD = {  # d1 to d4
    torch.float64: (0.16666666666667582, 0.0083333333345218965, 0.00019841274957552584, 0.11114743142254963),
    torch.float32: (0.16666681322774728, 0.0083336235535711559, 0.00019860071444424647, 0.11350704487929142),
}
_DOUBLINGS = 4  # of an error before a Newton step: at most, however large A is


def skew_exponential(
    skew: Tensor,  # (*, N, N)
    squarings: int | None = None,
) -> Tensor:  # (*, N, N)
    """``exp(A)`` of the skew part ``A = (skew - skew^T) / 2``: orthogonal, with determinant 1.

    Args:
        skew: square; leading dimensions are a batch. Only its skew part counts, so any square parameter will do: a matrix
            that is skew already is its own skew part.
        squarings: None to choose their number by the largest matrix of the batch, which on CUDA waits for the device to
            read it. A number spares that, as a CUDA graph needs; a matrix that it does not provably suffice for,
            ``(|A^6|_F^2 / 2)^(1/12) > 2^squarings * 2`` (float64: ``/ 4``), then comes out as NaN.

    Returns:
        Q with ``Q^T Q = I``.

    Dtypes: float64, float32, and bfloat16/float16 (computed in float32, then rounded); CPU and CUDA. Products follow
        torch's own float32 precision.
    Raises: ValueError if the dtype does not fit, the matrix is not square or squarings is negative.
    Accuracy: ``|Q^T Q - I|_2`` stays below 20 eps (2e-6 in float32) for finite A of any size, N up to 512 as tested; the
        error of Q below ``eps (40 + |A|_2)``, of which ``eps |A|_2`` is what rounding A would do. From ``|A|_2 = 1/eps``
        on Q is orthogonal and nothing more. NaN and Inf stay visible.
    Gradient: skew. Keeps three matrices beside skew.

    >>> skew_exponential(torch.tensor([[0., -torch.pi], [torch.pi, 0.]])).round(decimals=5).abs()
    tensor([[1., 0.],
            [0., 1.]])
    """
    check_alike("skew_exponential", skew=skew)
    check_shape("skew_exponential", "skew", skew, ("*", "N", "N"))
    check_shape("skew_exponential", "skew", skew, ("*", skew.shape[-1], skew.shape[-1]))
    if squarings is not None and squarings < 0:
        raise ValueError(f"skew_exponential: squarings must be 0 or more, got {squarings}")
    return torch.ops.lipfast.skew_exponential(skew, squarings)


def reference(skew: Tensor, squarings: int | None = None) -> Tensor:
    return forward_reference(skew, squarings)[0]


def forward_reference(
    skew: Tensor, squarings: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # Q; A^2, A^4, exp(A) of the scaled A; squarings, on the CPU
    A = in_parts(_skew_part, _flat(skew))
    count = _enough(A) if squarings is None else squarings
    powers = [_powers(_scaled(part, -count)) for part in parts(A)]
    sizes = torch.cat([_largest(part[3]) for part in powers])
    if squarings is None and count > 0:  # so there are matrices
        fewer = min(count, max(0, -_exponent(sizes / _RANGE[A.dtype])))
        powers = [[_scaled(power, k * fewer) for k, power in zip((1, 2, 4, 6), part, strict=True)] for part in powers]
        count -= fewer
    root = joined([_polynomial(*part) for part in powers])
    if squarings is not None:
        root = root.where((sizes <= _RANGE[A.dtype])[:, None, None], math.nan)
    Q = in_parts(partial(_power, count), root)
    A2, A4 = (joined([part[k] for part in powers]).reshape(skew.shape) for k in (1, 2))
    return Q.reshape(skew.shape).to(skew.dtype, copy=True), A2, A4, root.reshape(skew.shape), torch.tensor(count)


def forward_fake(skew, squarings=None):
    wide = torch.empty_like(skew, dtype=accumulator(skew.dtype), memory_format=torch.contiguous_format)
    out = torch.empty_like(skew, memory_format=torch.contiguous_format)
    return out, wide, torch.empty_like(wide), torch.empty_like(wide), torch.empty((), dtype=torch.int64, device="cpu")


def save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], *output[1:])
    ctx.set_materialize_grads(False)  # of three matrices for each that came in
    ctx.mark_non_differentiable(*output[1:])


def backward(ctx, grad, *_):
    if grad is None:
        return None, None
    return torch.ops.lipfast.skew_exponential_backward(grad, *ctx.saved_tensors), None


def backward_reference(
    grad: Tensor,  # (*, N, N)
    skew: Tensor,  # (*, N, N)
    A2: Tensor,  # (*, N, N), and so on: the results of forward_reference
    A4: Tensor,
    root: Tensor,
    squarings: Tensor,
) -> Tensor:  # (*, N, N)
    count = int(squarings)
    slope = in_parts(partial(_gradient, count), *map(_flat, (grad, skew, A2, A4, root)))
    return slope.reshape(skew.shape).to(skew.dtype)


def backward_fake(grad, skew, A2, A4, root, squarings):
    return torch.empty_like(skew, memory_format=torch.contiguous_format)


def backward_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], inputs[5])


def backward_backward(ctx, grad):
    first, skew, squarings = ctx.saved_tensors

    def of_tensors(first, skew):
        powers = _powers(_scaled(_skew_part(_flat(skew)), -int(squarings)))
        return backward_reference(first, skew, powers[1], powers[2], _polynomial(*powers), squarings)

    return (*torch.func.vjp(of_tensors, first, skew)[1](grad), None, None, None, None)


def _flat(t: Tensor) -> Tensor:  # (*, N, N) -> (B, N, N), as all below
    return t.to(accumulator(t.dtype)).reshape(math.prod(t.shape[:-2]), *t.shape[-2:])


def _skew_part(matrix: Tensor) -> Tensor:
    half = matrix / 2
    return half - transposed(half)


def _enough(A: Tensor) -> int:
    """Squarings that are enough as t^2 <= |A|_F^2 / 2 <= N^2 max |a|^2 / 2, and mostly too many."""
    if A.numel() == 0:
        return 0
    entry = torch.linalg.vector_norm(A.detach(), math.inf, (-2, -1))
    return max(0, _exponent(entry) + math.frexp(A.shape[-1] * 0.5**0.5 / _RANGE[A.dtype])[1])


def _largest(A6: Tensor) -> Tensor:  # (B, N, N) -> (B)
    """At least the largest t."""
    return (torch.linalg.matrix_norm(A6.detach()) * 0.5**0.5) ** (1 / 6)


def _exponent(sizes: Tensor) -> int:
    """Of the least power of 2 above the finite ones. Waits for the device."""
    return int(torch.frexp(sizes.nan_to_num(0, 0).amax()).exponent)


def _scaled(t: Tensor, exponent: int) -> Tensor:
    return t * 2.0**exponent if exponent else t


def _powers(A: Tensor) -> list[Tensor]:  # A, A^2, A^4, A^6
    A2 = symmetric_product(A, A)
    A4 = symmetric_product(A2, A2)
    return [A, A2, A4, symmetric_product(A2, A4)]


def _polynomial(A: Tensor, A2: Tensor, A4: Tensor, A6: Tensor) -> Tensor:
    c1, c2, c3, c4, c5 = _EVEN[A.dtype]
    d1, d2, d3, d4 = _ODD[A.dtype]
    top = symmetric_product(A4, _sum((c4, A4), (c5, A6)))
    even, odd = _sum((1, top), (c1, A2), (c2, A4), (c3, A6)), _sum((d4, top), (d1, A2), (d2, A4), (d3, A6))
    for part in (even, odd):
        part.diagonal(dim1=-2, dim2=-1).add_(1)
    return even + skew_product(A, odd)


def _gradient(count: int, G: Tensor, skew: Tensor, A2: Tensor, A4: Tensor, root: Tensor) -> Tensor:
    """Of a symmetric matrix only the symmetric part of a gradient counts, of a skew one only the skew part. With a symmetric
    gradient G that of A^2 A^2 is X + X^T for X = A^2 G, and that of A^6 for X = A^2 (Y + Y^T / 2), Y = A^2 G.
    """
    roots = [root]
    for n in range(count - 1):
        roots.append(_square(roots[-1], n))
    for Q in reversed(roots[:count]):
        G = torch.baddbmm(Q.mT @ G, G, Q.mT)
    A = _scaled(_skew_part(skew), -count)
    A6 = symmetric_product(A2, A4)
    c1, c2, c3, c4, c5 = _EVEN[A.dtype]
    d1, d2, d3, d4 = _ODD[A.dtype]
    odd = _sum((d4, symmetric_part(root)), (d1 - d4 * c1, A2), (d2 - d4 * c2, A4), (d3 - d4 * c3, A6))
    odd.diagonal(dim1=-2, dim2=-1).add_(1 - d4)
    of_even = symmetric_part(G)
    of_product = G - of_even
    of_odd = -symmetric_part(A @ of_product)
    of_top = _sum((1, of_even), (d4, of_odd))
    right = of_top @ A4
    of_A6 = symmetric_part(_sum((c5, right), (c3, of_even), (d3, of_odd)))
    of_A4 = torch.baddbmm(_sum((c4, right), (c2, of_even), (d2, of_odd)), of_top, _sum((c4, A4), (c5, A6)))
    Y = A2 @ of_A6
    X = A2 @ (Y / 2 + symmetric_part(Y + of_A4))
    of_A2 = _sum((2, symmetric_part(X)), (c1, of_even), (d1, of_odd))
    of_A = torch.baddbmm(of_product @ odd, A, of_A2, alpha=-2)
    return _skew_part(_scaled(of_A, -count))


def _sum(first: tuple[float, Tensor], *others: tuple[float, Tensor]) -> Tensor:
    out = first[0] * first[1]
    for factor, matrix in others:
        out.add_(matrix, alpha=factor)
    return out


def _power(count: int, Q: Tensor) -> Tensor:
    """Q^(2^count)."""
    for n in range(count):
        Q = _square(Q, n, last=n == count - 1)
    return Q


def _square(Q: Tensor, n: int, last: bool = False) -> Tensor:
    Q = Q @ Q
    if last or n % _DOUBLINGS == _DOUBLINGS - 1:  # a Newton step has no derivative along the orthogonal matrices
        Q = Q + (Q - Q @ symmetric_product(Q.mT, Q)).detach() / 2
    return Q


_forward = torch.library.custom_op("lipfast::skew_exponential_forward", forward_reference, mutates_args=())
_forward.register_fake(forward_fake)
_forward.register_autograd(backward, setup_context=save)
_backward = torch.library.custom_op("lipfast::skew_exponential_backward", backward_reference, mutates_args=())
_backward.register_fake(backward_fake)
_backward.register_autograd(backward_backward, setup_context=backward_save)
torch.library.define("lipfast::skew_exponential", torch.library.infer_schema(reference, mutates_args=()))
torch.library.impl(
    "lipfast::skew_exponential",
    "CompositeImplicitAutograd",
    lambda skew, squarings=None: torch.ops.lipfast.skew_exponential_forward(skew, squarings)[0],
)
name_definition("lipfast::skew_exponential_forward", forward_reference)
name_definition("lipfast::skew_exponential_backward", backward_reference)
