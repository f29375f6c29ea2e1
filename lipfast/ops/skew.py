"""The skew-symmetric part of a square matrix: the nearest skew matrix in the Frobenius norm.

    skew(M) = (M - M^T) / 2

Skew matrices are the tangent space of the orthogonal matrices at I, so this projects a gradient in the Lie algebra: the
Riemannian gradient of f at an orthogonal X is X skew(X^T df/dX) (Hu et al. 2026, https://arxiv.org/abs/2601.18513, section 3).

The operator is a composition of torch's own, so this file needs neither fake nor derivative.
"""

import torch
from torch import Tensor

from lipfast.ops._arguments import check_alike, check_shape


def skew(
    matrix: Tensor,  # (*, N, N)
) -> Tensor:  # (*, N, N)
    """``(matrix - matrix^T) / 2``.

    Args:
        matrix: square; leading dimensions are a batch.

    Returns:
        A matrix that is skew to the last bit: ``out == -out.mT``, zeros on the diagonal.

    Dtypes: float64, float32, bfloat16, float16; CPU and CUDA.
    Raises: ValueError if the dtype does not fit or the matrix is not square.
    Accuracy: one rounding an entry. A difference beyond the dtype's range is Inf; NaN and Inf stay visible.

    >>> skew(torch.tensor([[1., 4.], [2., 3.]]))
    tensor([[ 0.,  1.],
            [-1.,  0.]])
    """
    check_alike("skew", matrix=matrix)
    check_shape("skew", "matrix", matrix, ("*", "N", "N"))
    N = matrix.shape[-1]
    check_shape("skew", "matrix", matrix, ("*", N, N))
    return torch.ops.lipfast.skew(matrix)


def reference(matrix: Tensor) -> Tensor:
    return (matrix - matrix.mT) / 2


torch.library.define("lipfast::skew", torch.library.infer_schema(reference, mutates_args=()))
torch.library.impl("lipfast::skew", "CompositeImplicitAutograd", reference)
