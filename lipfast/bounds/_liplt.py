"""Local LipLT: Lipschitz constants by loop transformation (Fazlyab et al. 2023, https://arxiv.org/abs/2310.00116), with the
slopes that each unit can have over the ball.

A unit with slopes in [a, b] is  phi(s) = c s + r psi(s),  c = (a + b)/2,  r = (b - a)/2,  psi 1-Lipschitz: constant units
have c = r = 0, units that stay on one linear piece r = 0. So the network is linear but for the psi, and with A_kj the linear
map from the output of nonlinearity j (0: the input) to the input of nonlinearity k, all the psi cut,

    m_k  =  || A_k0 || + sum_{0 < j < k} || A_kj R_j || m_j

bounds the slope of that input; at the logits, whose differences are rows of A, the norms are exact. Rows of units with r = 0
are left out of m_k, since psi_k reads no others. MaxMin sorts pairs: their mean is kept, their difference becomes its absolute
value; max and L2 pooling have c = 0. Each m_k is replaced by the product bound where that is smaller.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast import rounding
from lipfast.bounds._gains import UP, fixed_gain
from lipfast.bounds.layers import (
    AveragePool,
    Conv,
    Elementwise,
    Layer,
    Linear,
    MaxMin,
    Pad,
    Rearrange,
    Scale,
    Sum,
)
from lipfast.bounds.network import Network
from lipfast.ops.pairwise_distance import pairwise_distance
from lipfast.ops.spectral_norm_bound import gram_norm

_PART = 2**22  # numbers of the matrices of all samples in work at a time


@dataclass(frozen=True)
class Nonlinearity:
    """A nonlinear node of the graph.

    Attributes:
        position: in the graph.
        keep, turn: c and r of its units, (B, ...); None for MaxMin and pooling.
        reach: (B,), the product bound of its input, at the units that matter.
    """

    position: int
    keep: Tensor | None
    turn: Tensor | None
    reach: Tensor


def slopes(layer: Layer, box: tuple[Tensor, Tensor], kind: str) -> tuple[Tensor | None, Tensor | None]:
    """c and r of a layer's units over a box."""
    if not isinstance(layer, Elementwise):
        return None, None
    least, greatest = (t.double() if kind == "bound" else t for t in layer.slopes_on(*(t.detach() for t in box)))
    turn = (greatest - least) / 2
    if kind == "bound":
        turn = torch.where(turn > 0, turn + 2.0**-50 * (least.abs() + greatest.abs()), turn)
    return (least + greatest) / 2, turn


def pairwise_estimate(network: Network, x: Tensor, found: list[Nonlinearity], iterations: int) -> Tensor:  # (B, K, K)
    """By power iteration on every A_kj, for all nodes of the network; ends in logits (B, K)."""
    known = {n.position: n for n in found}
    sources = [0, *known]
    slope: dict[int, Tensor] = {0: x.new_ones(len(x))}
    end = len(network.nodes) - 1
    for k in known:
        total = sum(_norm(network, known, x, j, k, iterations) * slope[j] for j in sources if j < k)
        slope[k] = torch.minimum(torch.as_tensor(total, dtype=x.dtype), known[k].reach)
    return torch.stack([pairwise_distance(_rows(network, known, x, j, end)) * slope[j][:, None, None] for j in sources]).sum(0)


def _norm(
    network: Network, known: dict[int, Nonlinearity], x: Tensor, source: int, target: int, iterations: int
) -> Tensor:  # (B,)
    """|| D A R || for each sample, D the units of the target that matter."""
    image = _map(network, known, x, source, network.nodes[target].inputs[0])
    turn = known[target].turn
    cut = (lambda y: y) if turn is None else lambda y: y * (turn > 0)
    start = _start(network, known, x, source)
    with torch.enable_grad():
        at = torch.zeros_like(start).requires_grad_()
        traced = cut(image(at))
    if not traced.requires_grad:  # nothing leads from there to here
        return x.new_zeros(len(x))
    right = _unit(start)
    with torch.no_grad():
        for _ in range(iterations):
            left = _unit(cut(image(right)))
            (right,) = torch.autograd.grad(traced, at, left, retain_graph=True)
            right = _unit(right)
    return cut(image(right)).flatten(1).norm(dim=1)


def _rows(network: Network, known: dict[int, Nonlinearity], x: Tensor, source: int, target: int) -> Tensor:  # (B, K, n)
    """The rows of A R from a source to the logits."""
    image = _map(network, known, x, source, target)
    with torch.enable_grad():
        at = torch.zeros_like(_start(network, known, x, source)).requires_grad_()
        logits = image(at)
        sums = [z.sum() for z in logits.unbind(1)]
    if not logits.requires_grad:
        return x.new_zeros(len(x), *logits.shape[1:], at[0].numel())
    rows = [torch.autograd.grad(z, at, retain_graph=True, create_graph=torch.is_grad_enabled())[0] for z in sums]
    return torch.stack(rows, 1).flatten(2)


def _start(network: Network, known: dict[int, Nonlinearity], x: Tensor, source: int) -> Tensor:
    """A fixed vector of the source's shape, no entry of it zero."""
    size = int(torch.Size(network.nodes[source].shape).numel())
    wave = torch.sin(torch.arange(1, size + 1, device=x.device, dtype=torch.float64) ** 2) + 1.5
    return wave.to(x.dtype).reshape(1, *network.nodes[source].shape).expand(len(x), *network.nodes[source].shape).contiguous()


def _unit(v: Tensor) -> Tensor:
    length = v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1))
    return v / length.where(length > 0, 1.0)


def _map(network: Network, known: dict[int, Nonlinearity], x: Tensor, source: int, target: int) -> Callable[[Tensor], Tensor]:
    """The linear map A R from the output of a source to a node's value."""

    def image(v: Tensor) -> Tensor:
        values: dict[int, Tensor] = {source: _turned(network, known, source, v)}
        for position in range(source + 1, target + 1):
            node = network.nodes[position]
            inputs = [values.get(i) for i in node.inputs]
            if any(t is not None for t in inputs):
                kept = known[position].keep if position in known else None
                result = _linear(node.layer, inputs, kept)
                if result is not None:
                    values[position] = result
        return values.get(target, v.new_zeros(len(v), *network.nodes[target].shape))

    return image


def _turned(network: Network, known: dict[int, Nonlinearity], source: int, v: Tensor) -> Tensor:
    if source == 0:
        return v
    layer, turn = network.nodes[source].layer, known[source].turn
    if isinstance(layer, MaxMin):
        return v - _mean_of_pairs(v)
    if turn is None:
        node = network.nodes[source]
        return v * fixed_gain(layer, node.name, network.nodes[node.inputs[0]].shape)
    return v * turn


def _mean_of_pairs(v: Tensor) -> Tensor:
    a, b = v.chunk(2, 1)
    return torch.cat([a + b, a + b], 1) / 2


def _linear(layer: Layer, inputs: list[Tensor | None], keep: Tensor | None) -> Tensor | None:
    """The layer's linear part; an input that is None is zero, and so is a result."""
    if isinstance(layer, Sum):
        parts = [v if sign > 0 else -v for v, sign in zip(inputs, layer.signs, strict=True) if v is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]
    (v,) = inputs
    assert v is not None
    if isinstance(layer, Linear):
        return F.linear(v, layer.weight)
    if isinstance(layer, Conv):
        conv = F.conv1d if layer.weight.ndim == 3 else F.conv2d
        return conv(v, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    if isinstance(layer, Scale):
        return v if layer.factor is None else v * layer.factor.to(v)
    if isinstance(layer, (Rearrange, AveragePool)):
        return layer.function(v)
    if isinstance(layer, Pad):
        return layer(v)
    if isinstance(layer, MaxMin):
        return _mean_of_pairs(v)
    return None if keep is None else v * keep


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
        own = {n.position: Nonlinearity(n.position, _of(n.keep, here), _of(n.turn, here), n.reach[here]) for n in known}
        parts.append(_pairwise_bound(network, own, first, gain[here], _of(varying, here)))
    return torch.cat(parts)


def _of(t: Tensor | None, samples: slice) -> Tensor | None:
    return None if t is None else t[samples]


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
        assert node.keep is not None
        assert node.turn is not None
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
