"""LipLT: Lipschitz constants by loop transformation (Fazlyab et al. 2023, https://arxiv.org/abs/2310.00116), with the slopes
that each unit can have, over all inputs or over a ball.

A unit with slopes in [a, b] is  phi(s) = c s + r psi(s),  c = (a + b)/2,  r = (b - a)/2,  psi 1-Lipschitz: constant units
have c = r = 0, units that stay on one linear piece r = 0. So the network is linear but for the psi, and with A_kj the linear
map from the output of nonlinearity j (0: the input) to the input of nonlinearity k, all the psi cut,

    m_k  =  || A_k0 || + sum_{0 < j < k} || A_kj R_j || m_j

bounds the slope of that input; at the logits, whose differences are rows of A, the norms are exact. Rows of units with r = 0
are left out of m_k, since psi_k reads no others. MaxMin sorts pairs: their mean is kept, their difference, all that psi reads,
becomes its absolute value; max and L2 pooling have c = 0. Where a product bound is given and smaller, it replaces m_k.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lipfast import rounding
from lipfast.bounds._gains import UP
from lipfast.bounds._maps import Maps, Nonlinearity, lengths
from lipfast.bounds.layers import Elementwise, Layer, Linear
from lipfast.bounds.network import Network
from lipfast.ops._gram_norm import gram_norm
from lipfast.ops.pairwise_distance import pairwise_distance

_PART = 2**22  # numbers of the matrices of all samples in work at a time


@dataclass(frozen=True)
class Estimate:
    """What :func:`pairwise_estimate` finds.

    Attributes:
        pairwise: (B, K, K).
        slopes: m_k, (B,), by the position of nonlinearity k.
        vectors: unit right singular vectors of A_kj R_j, (B, ...), by the positions of j and k; without gradient.
        sizes: see :class:`Maps`.
    """

    pairwise: Tensor
    slopes: dict[int, Tensor]
    vectors: dict[tuple[int, int], Tensor]
    sizes: dict[int, Tensor]


def slopes(layer: Layer, box: tuple[Tensor, Tensor], kind: str) -> tuple[Tensor | None, Tensor | None]:
    """c and r of a layer's units over a box."""
    if not isinstance(layer, Elementwise):
        return None, None
    least, greatest = (t.double() if kind == "bound" else t for t in layer.slopes_on(*(t.detach() for t in box)))
    turn = (greatest - least) / 2
    if kind == "bound":
        turn = torch.where(turn > 0, turn + 2.0**-50 * (least.abs() + greatest.abs()), turn)
    return (least + greatest) / 2, turn


def pairwise_estimate(
    network: Network,
    found: Sequence[Nonlinearity],
    x: Tensor,
    iterations: int,
    vectors: Mapping[tuple[int, int], Tensor] | None = None,
) -> Estimate:
    """By power iteration on every A_kj R_j; differentiable in the weights, the vectors held constant.

    Args:
        network: ends in logits (B, K).
        found: its nonlinearities, ascending.
        x: (B, ...): its batch, dtype and device count.
        iterations: each takes a pass through the network and a transposed one.
        vectors: of an earlier call; those that are missing or zero are replaced by fixed random ones.
    """
    maps = Maps(network, found, x)
    rights = maps.iterate(maps.starts(vectors or {}), iterations)
    weights = {0: x.new_ones(len(x), dtype=torch.float64)}  # r_j m_j in units of 2^exponent
    slope: dict[int, Tensor] = {}
    for k, image in maps.images(rights).items():
        before = network.nodes[k].inputs[0]
        unit, reach = torch.exp2(maps.exponents[before]), maps.known[k].reach
        reached = (lengths(image).double() * torch.stack([weights[j] for j in maps.sources[before]])).sum(0)
        reached = reached if reach is None else torch.minimum(reached, reach.double() / unit)
        turn = maps.known[k].turn
        weights[k] = reached * (turn / maps.base(k)) if isinstance(turn, float) else reached
        slope[k] = (reached * unit).to(x.dtype)
    named = {(j, k): v.movedim(-1, 1) for j, stack in rights.items() for k, v in zip(maps.targets[j], stack, strict=True)}
    return Estimate(_pairwise(maps, weights), slope, named, maps.sizes)


def _pairwise(maps: Maps, weights: dict[int, Tensor]) -> Tensor:  # (B, K, K)
    """The distances of the rows of the maps to the logits, one source at a time: no more than K rows are ever pushed."""
    largest = torch.stack(list(weights.values())).detach().amax(0)
    scale = largest.where(largest > 0, 1.0)
    total: Tensor | float = 0.0
    for j, rows in maps.rows():
        total = total + _distance(rows) * (weights[j] / scale).to(rows.dtype)[:, None, None]
    assert isinstance(total, Tensor)
    return (total.double() * (scale * torch.exp2(maps.exponents[-1]))[:, None, None]).to(total.dtype)


def _distance(rows: Tensor) -> Tensor:  # (B, K, n) -> (B, K, K)
    """As :func:`lipfast.pairwise_distance`, by matrix products where float64 is wider than the rows."""
    return pairwise_distance(rows) if rows.dtype == torch.float64 else _Distance.apply(rows)


class _Distance(torch.autograd.Function):
    """|x - y|^2 = |x|^2 + |y|^2 - 2 x.y in float64 loses less to cancellation than the rows lost by their own rounding."""

    @staticmethod
    def forward(ctx, rows):
        wide = rows.double()
        products = wide @ wide.mT
        squares = products.diagonal(dim1=1, dim2=2)
        both = squares[:, :, None] + squares[:, None, :]
        apart = both - products - products.mT
        distance = apart.where(apart > 2.0**-46 * both, 0.0).sqrt().to(rows.dtype)
        ctx.save_for_backward(rows, distance)
        return distance

    @staticmethod
    def backward(ctx, grad):
        rows, distance = ctx.saved_tensors
        rows = rows - rows.mean(1, keepdim=True)
        slope = (grad + grad.mT) / distance.where(distance > 0, torch.inf)
        return slope.sum(-1, keepdim=True) * rows - slope @ rows


def tail(network: Network) -> int:
    """The position from which on the network is a chain of Linear layers, elementwise functions and reshapes to vectors."""
    readers = network.readers()
    position = len(network.nodes) - 1
    while position > 0:
        node = network.nodes[position]
        before = network.nodes[node.inputs[0]]
        vector = len(node.shape) == 1 and len(before.shape) == 1 and isinstance(node.layer, (Linear, Elementwise))
        if not vector or len(readers[node.inputs[0]]) != 1:
            break
        position = node.inputs[0]
    return position


def pairwise_bound(
    network: Network, found: list[Nonlinearity], first: int, gain: Tensor, varying: Tensor | None
) -> Tensor:  # (B, K, K) float64
    """For the chain from node ``first`` on, the :func:`tail`: every A_kj as a matrix, its rounding included.

    ``gain`` (B,) is the product bound of that node's value, ``varying`` (B, n) the entries of it that may change. A product
    of float64 matrices errs by gamma |P| |Q|, in Frobenius norm by gamma ||P||_F ||Q||_F, and carries ||P||_F times the error
    of Q on. Samples go in parts, since each has matrices of its own.
    """
    known = [n for n in found if n.position > first]
    widths = [node.shape[0] for node in network.nodes[first:]]
    step = max(1, _PART // (max(widths) * max(widths[1:], default=1)))
    parts = []
    for start in range(0, len(gain), step):
        here = slice(start, start + step)
        own = {n.position: replace(n, keep=_of(n.keep, here), turn=_of(n.turn, here), reach=_of(n.reach, here)) for n in known}
        parts.append(_pairwise_bound(network, own, first, gain[here], _of(varying, here)))
    return torch.cat(parts)


def _of(t: Tensor | float | None, samples: slice) -> Tensor | None:
    return t[samples] if isinstance(t, Tensor) else None


def _pairwise_bound(
    network: Network, known: dict[int, Nonlinearity], first: int, gain: Tensor, varying: Tensor | None
) -> Tensor:  # (B, K, K)
    width = network.nodes[first].shape[0]
    begin = gain.new_ones(len(gain), width) if varying is None else varying.double()
    # From every source: the matrix so far, (B, m, n), or the diagonal of one, (B, n); a bound on its error; its input's slope.
    maps = [(begin, gain.new_zeros(len(gain)), gain)]
    for position in range(first + 1, len(network.nodes)):
        layer = network.nodes[position].layer
        if isinstance(layer, Linear):
            weight = layer.weight.double()
            g = rounding.gamma(weight.shape[1], torch.float64, weight.device)
            size = weight.norm() * UP
            maps = [(_after(weight, A), (size * error + g * size * _frobenius(A)) * UP, slope) for A, error, slope in maps]
            continue
        node = known[position]
        assert isinstance(node.keep, Tensor)
        assert isinstance(node.turn, Tensor)
        assert node.reach is not None
        total = sum(_norm_bound(A, node.turn > 0, error) * slope * UP for A, error, slope in maps)
        reached = torch.minimum(torch.as_tensor(total) * UP, node.reach)
        keep = node.keep
        most = keep.abs().amax(-1)
        maps = [(A * _along(keep, A), (error * most + 2.0**-50 * _frobenius(A) * most) * UP, slope) for A, error, slope in maps]
        maps.append((node.turn, torch.zeros_like(gain), reached))
    far = []
    for A, error, slope in maps:
        distance = pairwise_distance(A if A.ndim == 3 else torch.diag_embed(A))
        slack = 1 + 4 * (A.shape[-1] + 16) * torch.finfo(torch.float64).eps
        apart = (distance * slack + 2 * error[:, None, None]) * slope[:, None, None] * UP
        far.append(apart)
    K = far[0].shape[-1]
    return torch.stack(far).sum(0) * UP * (1 - torch.eye(K, dtype=torch.float64, device=gain.device))


def _after(weight: Tensor, A: Tensor) -> Tensor:
    return weight * A[:, None] if A.ndim == 2 else weight @ A


def _along(rows: Tensor, A: Tensor) -> Tensor:
    """One number for each row of A."""
    return rows if A.ndim == 2 else rows[..., None]


def _norm_bound(A: Tensor, rows: Tensor, error: Tensor) -> Tensor:  # (B,)
    if A.ndim == 2:
        return ((A * rows).abs().amax(-1) + error) * UP
    return gram_norm(A * rows[..., None], 12, error)


def _frobenius(A: Tensor) -> Tensor:
    return A.flatten(1).norm(dim=1) * (1 + rounding.gamma(A[0].numel(), torch.float64, A.device))
