"""The exponential of a small skew matrix by a short series (LipNeXt, Hu et al. 2026, https://arxiv.org/abs/2601.18513).

The order follows the Frobenius norm of each matrix:

    |A|_F < 0.05     I + A + A^2/2
    |A|_F < 0.25     ... + A^3/6
    |A|_F < 1        ... + A^4/24
    otherwise        the exponential itself

For an eigenvalue i t of A the singular values of the three sums are sqrt(1 + t^4/4), sqrt(1 - t^4/12 + t^6/36) and
sqrt(1 - t^6/72 + t^8/576), and t <= |A|_F / sqrt(2): at the end of its range each is within 2e-7, 4.1e-5 and 8.2e-4 of 1.
A single pair of eigenvalues attains that; matrices of many are closer by far. The second order makes norms larger than 1,
so a certificate has to measure them.
"""

import torch
from torch import Tensor

from lipfast.ops._arguments import check_alike, check_shape
from lipfast.ops._matrices import skew_product, symmetric_product
from lipfast.ops.skew_exponential import skew_exponential

BANDS = 0.05, 0.25, 1.0


def fast_exponential(skew: Tensor) -> Tensor:  # (*, N, N) -> (*, N, N)
    """The series above for the skew part of ``skew``: nearly orthogonal, for steps of an optimiser.

    :func:`lipfast.skew_exponential` is orthogonal to working precision, and differentiable at its speed.

    Dtypes: float64, float32. On CUDA it waits for the device, to read the largest norm.
    Raises: ValueError if the matrix is not square or of another dtype.

    >>> fast_exponential(torch.tensor([[0.0, -0.03], [0.03, 0.0]]))
    tensor([[ 0.9995, -0.0300],
            [ 0.0300,  0.9995]])
    """
    check_alike("fast_exponential", skew=skew)
    check_shape("fast_exponential", "skew", skew, ("*", "N", "N"))
    check_shape("fast_exponential", "skew", skew, ("*", skew.shape[-1], skew.shape[-1]))
    if skew.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"fast_exponential: skew must be float32 or float64, got {skew.dtype}")
    A = ((skew - skew.mT) / 2).reshape(-1, *skew.shape[-2:])
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return (less_identity(A) + eye).reshape(skew.shape)


def less_identity(A: Tensor) -> Tensor:  # (B, N, N) -> (B, N, N)
    """``FastExp(A) - I`` of skew matrices: small as they are, so that a product with it rounds little."""
    if A.numel() == 0:
        return A.clone()
    size = torch.linalg.matrix_norm(A)
    largest = size.max().item()
    square = symmetric_product(A, A)
    if largest < BANDS[0]:
        return A.add(square, alpha=0.5)
    third, fourth = (((size >= low).to(A.dtype) / n)[:, None, None] for low, n in zip(BANDS, (6, 24), strict=False))
    if largest < BANDS[1]:
        return skew_product(square, A).mul_(third).add_(A).add_(square, alpha=0.5)
    factor = (A * third).addcmul_(square, fourth)  # 1/2 + A/6 + A^2/24
    factor.diagonal(dim1=-2, dim2=-1).add_(0.5)
    out = (square @ factor).add_(A)
    if largest >= BANDS[2]:
        far = (size >= BANDS[2]).nonzero()[:, 0]
        exact = skew_exponential(A[far])
        exact.diagonal(dim1=-2, dim2=-1).sub_(1)
        out[far] = exact
    return out
