"""Distances between all pairs of rows.

    distance_ij = || x_i - x_j ||_p.

With the rows of a last layer's weight it gives the Lipschitz constants of all differences of two outputs, in the norm dual
to the input's: the margin constants of Tsuzuki et al. 2018 (https://arxiv.org/abs/1802.04034, section 4).

The identity |x - y|^2 = |x|^2 + |y|^2 - 2 x.y is not used: where two rows nearly agree it cancels to nothing. Here the
subtraction comes first and each of its roundings is relative, so a tiny distance is as accurate as a large one. The gradient
does use a matrix product, for pairs that are far apart.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast.ops._arguments import check_alike, check_shape
from lipfast.rounding import accumulator

_TILE = 2**22  # numbers of a tile's differences
_SMALL = 2**17  # K K I up to which one tile is quicker than a loop over the batch
_CLOSE = 2.0**-7  # squared distance, by the larger squared length, below which a matrix product loses too much


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
    Memory: the result and a tile; the (K, K, I) differences are never stored. The gradient centers a copy of the rows.
    Gradient: 0 where a distance is 0. For p = inf to the coordinate that attains the maximum, the first if several do.

    >>> pairwise_distance(torch.tensor([[0., 0.], [3., 4.]]))
    tensor([[0., 5.],
            [5., 0.]])
    """
    check_alike("pairwise_distance", rows=rows)
    check_shape("pairwise_distance", "rows", rows, ("*", "K", "I"))
    if p not in (1, 2, math.inf):
        raise ValueError(f"pairwise_distance: p must be 1, 2 or inf, got {p}")
    return torch.ops.lipfast.pairwise_distance(rows, p)


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
    return torch.ops.lipfast.pairwise_distance_backward(grad, *ctx.saved_tensors, ctx.p), None


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


def _on_cpu(rows: Tensor, p: float = 2.0) -> Tensor:
    """Pair by pair in cache (:func:`torch.nn.functional.pdist`), and again, scaled, where squares left the dtype's range."""
    K, I = rows.shape[-2:]
    if K * K * I <= _SMALL:
        return reference(rows, p)
    (wide,) = _batch(rows)
    distance = wide.new_zeros(len(wide), K, K)
    i, j = torch.triu_indices(K, K, 1)
    least = (I * torch.finfo(wide.dtype).tiny / torch.finfo(wide.dtype).eps) ** 0.5
    for x, out in zip(wide, distance, strict=True):
        apart = F.pdist(x, p)
        if p == 2:
            lost = ~((apart > least) & (apart < math.inf)) & x.any()
            for n in lost.nonzero()[:, 0].split(max(1, _TILE // I)):
                apart[n] = _norm(x[i[n]] - x[j[n]], p)
        out[i, j] = apart
        out[j, i] = apart
        out.diagonal().copy_((x - x).sum(-1))  # NaN where a row has NaN or Inf
    return distance.reshape(*rows.shape[:-1], K).to(rows.dtype)


def _backward_on_cpu(grad: Tensor, rows: Tensor, distance: Tensor, p: float) -> Tensor:
    """p = 2: the sum over j of w_ij (x_i - x_j), w = (grad + grad^T) / distance, as a matrix product on centered rows, but
    for pairs so close that it would cancel; p = 1 pair by pair."""
    K, I = rows.shape[-2:]
    if p == math.inf or K * K * I <= _SMALL:
        return backward_reference(grad, rows, distance, p)
    wide, far, both = _batch(rows, distance, grad)
    both = both + both.mT
    i, j = torch.triu_indices(K, K, 1)
    out = torch.zeros_like(wide, memory_format=torch.contiguous_format)
    for x, d, g, total in zip(wide, far, both, out, strict=True):
        if p == 1:
            total += torch.ops.aten._pdist_backward(g[i, j], x, p, d[i, j])
            continue
        c = x - x.mean(0)
        size = c.square().sum(-1)
        close = ~(d.square() > _CLOSE * torch.maximum(size[:, None], size))  # also where squares left the dtype's range
        share = (g / d).masked_fill(close, 0.0)
        total += share.sum(1, keepdim=True) * c - share @ c
        for n in close[i, j].nonzero()[:, 0].split(max(1, _TILE // max(1, I))):
            step = g[i[n], j[n], None] * _slope(x[i[n]] - x[j[n]], d[i[n], j[n]], p)
            total.index_add_(0, i[n], step).index_add_(0, j[n], -step)
    return out.reshape(rows.shape).to(rows.dtype)


def _batch(rows: Tensor, *others: Tensor) -> list[Tensor]:
    """Each as a batch of matrices, in the dtype in which sums are formed."""
    count = math.prod(rows.shape[:-2])
    return [t.to(accumulator(rows.dtype)).reshape(count, *t.shape[-2:]) for t in (rows, *others)]


_op = torch.library.custom_op("lipfast::pairwise_distance", reference, mutates_args=())
_op.register_kernel("cpu", _on_cpu)
_op.register_fake(fake)
_op.register_autograd(backward, setup_context=save)
_backward = torch.library.custom_op("lipfast::pairwise_distance_backward", backward_reference, mutates_args=())
_backward.register_kernel("cpu", _backward_on_cpu)
_backward.register_fake(backward_fake)
_backward.register_autograd(backward_backward, setup_context=backward_save)
