"""Distances between all pairs of rows.

    distance_ij = || x_i - x_j ||_p.

With the rows of a last layer's weight it gives the Lipschitz constants of all differences of two outputs, in the norm dual
to the input's: the margin constants of Tsuzuki et al. 2018 (https://arxiv.org/abs/1802.04034, section 4).

The identity |x - y|^2 = |x|^2 + |y|^2 - 2 x.y is not used: where two rows nearly agree it cancels to nothing. Here the
subtraction comes first and each of its roundings is relative, so a tiny distance is as accurate as a large one. So it is in
the gradient, for p = 2 the sum over j of w_ij (x_i - x_j) with w = (grad + grad^T) / distance, which is no matrix product.
"""

import math

import torch
from torch import Tensor

from lipfast.ops._arguments import check_alike
from lipfast.rounding import accumulator

_TILE = 2**22  # numbers of a tile's differences


def pairwise_distance(
    rows: Tensor,  # (*, K, I)
    p: float = 2.0,
) -> Tensor:  # (*, K, K)
    """The l_p distance of every pair of rows.

    Args:
        rows: K vectors of I numbers; leading dimensions are a batch.
        p: the norm of the differences, 1, 2 or inf.

    Returns:
        A symmetric matrix with zeros on its diagonal.

    Dtypes: float64, float32, and bfloat16/float16 computed in float32; CPU and CUDA.
    Raises: ValueError if a shape or dtype does not fit or p is another number.
    Accuracy: every entry has a relative error of at most ``(I + 8) eps`` (p = inf: eps), also between rows that nearly agree;
        squares neither overflow nor underflow, so an entry is infinite only where the distance exceeds the dtype's range.
        Rounded to nearest: an estimate, not a bound. A NaN in a row makes its entries NaN, the diagonal's too; an Inf makes
        them Inf, or NaN where it meets another of its sign.
    Memory: the result and a tile; the (K, K, I) differences are never stored. The gradient's kernel keeps a (K, K) of weights.
    Gradient: 0 where a distance is 0. For p = inf to the coordinate that attains the maximum, the first if several do.

    >>> pairwise_distance(torch.tensor([[0., 0.], [3., 4.]]))
    tensor([[0., 5.],
            [5., 0.]])
    """
    check_alike("pairwise_distance", rows=rows)
    if rows.ndim < 2:
        raise ValueError(f"pairwise_distance: rows must be (*, K, I), got {tuple(rows.shape)}")
    if p not in (1, 2, math.inf):
        raise ValueError(f"pairwise_distance: p must be 1, 2 or inf, got {p}")
    return torch.ops.lipfast.pairwise_distance.default(rows, p)  # to look for the overload takes as long as a few rows


def reference(rows: Tensor, p: float = 2.0) -> Tensor:
    wide = rows.to(accumulator(rows.dtype))
    distance = wide.new_zeros(*rows.shape[:-1], rows.shape[-2])
    for i, j in _tiles(rows):
        tile = _norm(wide[..., i, None, :] - wide[..., None, j, :], p)
        distance[..., i, j] = tile
        distance[..., j, i] = tile.mT
    return distance.to(rows.dtype)


def fake(rows, p=2.0):
    return rows.new_empty(*rows.shape[:-1], rows.shape[-2])


def save(ctx, inputs, output):
    rows, ctx.p = inputs
    ctx.save_for_backward(rows, output)


def backward(ctx, grad):
    return torch.ops.lipfast.pairwise_distance_backward.default(grad, *ctx.saved_tensors, ctx.p), None


def backward_reference(
    grad: Tensor,  # (*, K, K)
    rows: Tensor,  # (*, K, I)
    distance: Tensor,  # (*, K, K)
    p: float,
) -> Tensor:  # (*, K, I)
    """The sum over j of (grad_ij + grad_ji) times the derivative of distance_ij by row i."""
    wide, far = (t.to(accumulator(rows.dtype)) for t in (rows, distance))
    both = (grad + grad.mT).to(wide.dtype)
    out = torch.zeros_like(wide)
    for i, j in _tiles(rows):
        slope = _slope(wide[..., i, None, :] - wide[..., None, j, :], far[..., i, j], p)
        share = both[..., i, j]
        out[..., i, :] += (share[..., None, :] @ slope).squeeze(-2)
        if i != j:
            out[..., j, :] -= (share.mT[..., None, :] @ slope.transpose(-3, -2)).squeeze(-2)
    return out.to(rows.dtype)


def backward_fake(grad, rows, distance, p):
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def backward_save(ctx, inputs, output):
    *tensors, ctx.p = inputs
    ctx.save_for_backward(*tensors)


def backward_backward(ctx, grad):
    of_tensors = lambda grad, rows, distance: backward_reference(grad, rows, distance, ctx.p)
    return (*torch.func.vjp(of_tensors, *ctx.saved_tensors)[1](grad), None)


def _tiles(rows: Tensor) -> list[tuple[slice, slice]]:
    """Ranges of i and j that cover i <= j."""
    K, I = rows.shape[-2:]
    if I == 0:
        return []
    side = max(1, math.isqrt(_TILE * K // max(1, rows.numel())))
    parts = [slice(start, min(start + side, K)) for start in range(0, K, side)]
    return [(i, j) for n, i in enumerate(parts) for j in parts[n:]]


def _norm(difference: Tensor, p: float) -> Tensor:  # (*, I) -> (*)
    size = difference.abs()
    if p == 1:
        return size.sum(-1)
    if p == math.inf:
        return size.max(-1).values
    largest = size.detach().amax(-1)
    scale = largest.where((largest > 0) & (largest < math.inf), 1.0)  # so that the squares stay in range
    return scale * torch.linalg.vector_norm(difference / scale[..., None], dim=-1)


def _slope(difference: Tensor, distance: Tensor, p: float) -> Tensor:  # (*, I), (*) -> (*, I)
    if p == 1:
        return difference.sign()
    if p == math.inf:
        first = difference.abs().argmax(-1, keepdim=True)
        return torch.zeros_like(difference).scatter(-1, first, difference.gather(-1, first).sign())
    return difference / distance.where(distance != 0, math.inf)[..., None]


_op = torch.library.custom_op("lipfast::pairwise_distance", reference, mutates_args=())
_op.register_fake(fake)
_op.register_autograd(backward, setup_context=save)
_backward = torch.library.custom_op("lipfast::pairwise_distance_backward", backward_reference, mutates_args=())
_backward.register_fake(backward_fake)
_backward.register_autograd(backward_backward, setup_context=backward_save)
