"""The matrix exponential of a skew matrix: an orthogonal matrix.

    exp(A) = I + A + A^2/2 + ...,        A = (S - S^T) / 2

for the matrix S that is passed: the exponential map of the orthogonal matrices (Hu et al. 2026,
https://arxiv.org/abs/2601.18513, equation 3). Scaling and squaring, exp(A) = exp(A/2^s)^(2^s), of the Taylor polynomial of
degree 8, which takes three products (Bader, Blanes & Casas 2019, https://doi.org/10.3390/math7121174, section 3).

The eigenvalues of A come in pairs +-i t, so t^(2k) <= |A^k|_F^2 / 2 for all of them. s is the least number for which this,
at k = 1 or k = 4, puts every t / 2^s in the polynomial's range, where what it leaves out is below the dtype's rounding. Each
squaring doubles a loss of orthogonality, so every few of them, and the last, are followed by a Newton step (Bjorck & Bowie
1971, https://doi.org/10.1137/0708036).
"""

import math

import torch
from torch import Tensor

from lipfast.ops._arguments import check_alike, check_shape
from lipfast.rounding import accumulator

_RANGE = {torch.float64: 2.0**-4, torch.float32: 0.5}  # of t: the first term left out, t^9/9!, is below eps/8
_DOUBLINGS = 4  # of an error before a Newton step: at most, however large A is
_ROOT = math.sqrt(177)
_A4 = (1 + _ROOT) / 132, (1 + _ROOT) / 528  # of A, A^2
_LEFT = 2 / 3  # of A^2
_RIGHT = (29 * _ROOT - 271) / 210, 11 * (_ROOT - 1) / 840, 11 * (_ROOT - 9) / 3360, (89 - _ROOT) / 2240  # of I, A, A^2, A4
_SUM = (857 - 58 * _ROOT) / 630  # of A^2


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
            ``(|A^2|_F^2 / 2)^(1/4) > 2^squarings / 2`` (float64: ``/ 16``), then comes out as NaN.

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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # Q; A^2, A4, exp(A) of the scaled A; squarings, on the CPU
    A = _skew_part(skew)
    count = _squarings(A) if squarings is None else squarings
    A = A * 2.0**-count
    A2, A4, Q = _polynomial(A)
    if squarings is not None:
        Q = Q.where((_largest(A2) ** 0.5 <= _RANGE[A.dtype])[..., None, None], math.nan)
    root = Q.clone()
    for n in range(count):
        Q = _square(Q, n, last=n == count - 1)
    return Q.to(skew.dtype, copy=True), A2, A4, root, torch.tensor(count)


def forward_fake(skew, squarings=None):
    wide = torch.empty_like(skew, dtype=accumulator(skew.dtype), memory_format=torch.contiguous_format)
    out = torch.empty_like(skew, memory_format=torch.contiguous_format)
    return out, wide, torch.empty_like(wide), torch.empty_like(wide), torch.empty((), dtype=torch.int64, device="cpu")


def save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def backward(ctx, grad, *_):
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
    A = _skew_part(skew) * 2.0**-count
    roots = [root]
    for n in range(count - 1):
        roots.append(_square(roots[-1], n))
    G = grad.to(A.dtype)
    for Q in reversed(roots[:count]):
        G = Q.mT @ G + G @ Q.mT
    left, right = _factors(A, A2, A4)
    of_left, of_right = G @ right.mT, left.mT @ G
    of_A4 = of_left + _RIGHT[3] * of_right
    of_cube = A2 @ of_A4
    of_A2 = _SUM * G + _LEFT * of_left + _RIGHT[2] * of_right + _A4[1] * of_cube + of_A4 @ (_A4[0] * A + _A4[1] * A2).mT
    of_A = G + _RIGHT[1] * of_right + _A4[0] * of_cube - A @ (of_A2 + of_A2.mT)  # A is skew: one product for both of A A's
    return ((of_A - of_A.mT) * 2.0 ** -(count + 1)).to(skew.dtype)


def backward_fake(grad, skew, A2, A4, root, squarings):
    return torch.empty_like(skew, memory_format=torch.contiguous_format)


def backward_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], inputs[5])


def backward_backward(ctx, grad):
    first, skew, squarings = ctx.saved_tensors

    def of_tensors(first, skew):
        A = _skew_part(skew) * 2.0 ** -int(squarings)
        return backward_reference(first, skew, *_polynomial(A), squarings)

    return (*torch.func.vjp(of_tensors, first, skew)[1](grad), None, None, None, None)


def _skew_part(skew: Tensor) -> Tensor:
    half = skew.to(accumulator(skew.dtype)) / 2
    return half - half.mT


def _largest(A: Tensor) -> Tensor:  # (*, N, N) -> (*)
    """At least the largest t."""
    return torch.linalg.matrix_norm(A) * 0.5**0.5


def _squarings(A: Tensor) -> int:
    """As the largest finite matrix of the batch needs. Waits for the device, once or twice."""
    A = A.detach()
    if A.numel() == 0:
        return 0
    shift = torch.frexp(A.abs().nan_to_num(0, 0).amax()).exponent.clamp(min=0)
    A = A * torch.ldexp(A.new_ones(()), -shift)  # so that powers stay in range
    count = lambda size: shift + torch.frexp(size.nan_to_num(0, 0).amax() / _RANGE[A.dtype]).exponent
    needed = int(count(_largest(A)))
    if needed > 0:
        A2 = A @ A
        needed = int(count(_largest(A2 @ A2) ** 0.25))
    return max(needed, 0)


def _polynomial(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A^2, a polynomial of degree 4 and that of degree 8."""
    A2 = A @ A
    A4 = A2 @ (_A4[0] * A + _A4[1] * A2)
    left, right = _factors(A, A2, A4)
    Q = left @ right + A + _SUM * A2
    return A2, A4, Q + torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)


def _factors(A: Tensor, A2: Tensor, A4: Tensor) -> tuple[Tensor, Tensor]:
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return _LEFT * A2 + A4, _RIGHT[0] * eye + _RIGHT[1] * A + _RIGHT[2] * A2 + _RIGHT[3] * A4


def _square(Q: Tensor, n: int, last: bool = False) -> Tensor:
    Q = Q @ Q
    if last or n % _DOUBLINGS == _DOUBLINGS - 1:  # a Newton step has no derivative along the orthogonal matrices
        Q = Q + (Q - Q @ (Q.mT @ Q)).detach() / 2
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
