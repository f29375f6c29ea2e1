"""LipLT over all inputs: an estimate for training. The mathematics is told in :mod:`lipfast.bounds._liplt`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lipfast.bounds._gains import fixed_gain
from lipfast.bounds._liplt import pairwise_estimate
from lipfast.bounds._maps import Nonlinearity, factor_of
from lipfast.bounds._product import gain, product
from lipfast.bounds.layers import Conv, Elementwise, Grafted, L2Pool, Linear, MaxMin, MaxPool
from lipfast.bounds.network import Network, read
from lipfast.bounds.norms import Norms, operators
from lipfast.bounds.norms import norms as norms_of


@dataclass(frozen=True)
class Liplt:
    """Estimates of a network's l2 Lipschitz constants.

    Attributes:
        pairwise: (K, K), of all differences of two logits: symmetric, with a zero diagonal.
        slopes: of the input of every activation and max or L2 pooling, by its name in the model, ().
        vectors: where the power iterations have arrived, without gradient: the next call begins with them.
    """

    pairwise: Tensor
    slopes: dict[str, Tensor]
    vectors: dict[str, Tensor]


def liplt(
    model: nn.Module, input_shape: tuple[int, ...], iterations: int = 10, vectors: Mapping[str, Tensor] | None = None
) -> Liplt:
    """Lipschitz constants by loop transformation (Fazlyab et al. 2023, https://arxiv.org/abs/2310.00116), estimated.

    An activation with slopes in [a, b] is ``(a + b)/2`` times its input and ``(b - a)/2`` times a function of slope at most 1,
    so the norms of products of layers take the place of the products of their norms. No difference of two logits needs a norm
    of its own: the rows of the last layer are pushed back once, and their distances are exact.

    Args:
        model: made of the layers that :mod:`lipfast.bounds.network` names; activations of any slopes, residual sums.
        input_shape: of one sample; constants are per unit of the l2 norm of such inputs.
        iterations: of the power method, all products of layers at once.
        vectors: ``Liplt.vectors`` of an earlier call. Pairs of layers without one, or with one of another shape, begin with a
            fixed random vector.

    Returns:
        :class:`Liplt`, in the parameters' dtype and on their device. Once the iterations have converged, at most the product of
        the layers' norms, which is computed beside it where loop transformation alone could exceed it (MaxMin).

    Soundness: none; power iteration approaches each norm from below. Bounds are :func:`lipfast.bounds.lipschitz`'s.
    Gradient: to all weights, with the vectors held constant; when these have converged, that of the exact constants.
    Raises: ValueError for negative iterations, fewer than two logits, a weight with NaN or Inf (not while a CUDA graph is being
        captured), overlapping pooling windows, batch norm or dropout in training mode, or a layer without a rule; the message
        names the layer.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    >>> model.load_state_dict({"0.weight": torch.eye(2), "2.weight": 3 * torch.eye(2)})
    <All keys matched successfully>
    >>> liplt(model, (2,)).pairwise.detach()  # (1/2) 3 sqrt(2) + (1/2) 3 sqrt(2)
    tensor([[0.0000, 4.2426],
            [4.2426, 0.0000]])
    """
    if iterations < 0:
        raise ValueError(f"iterations: 0 or more expected, got {iterations}")
    network = read(model, tuple(input_shape))
    shape = network.nodes[-1].shape
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"model: logits (B, K) of two classes or more expected, got (B, {str(shape)[1:]}")
    given = dict(vectors or {})
    found, norms = _nonlinearities(network), None
    if any(isinstance(network.nodes[n.position].layer, MaxMin) for n in found):
        norms = _norms(model, network, iterations, given)
        reach = lambda n: gain(network.until(network.nodes[n.position].inputs[0]), "estimate", norms)[None]
        found = [replace(n, reach=reach(n)) for n in found]
    names = _names(network)
    keys = {(j, n.position): f"{names[j]}>{names[n.position]}" for n in found for j in range(n.position)}
    starts = {pair: given[key] for pair, key in keys.items() if key in given}
    starts = {(j, k): v for (j, k), v in starts.items() if v.shape == (1, *network.nodes[j].shape)}
    estimate = pairwise_estimate(network, found, _like(network), iterations, starts)
    _check_finite(network, estimate.sizes)
    pairwise, kept = estimate.pairwise[0], {keys[pair]: v for pair, v in estimate.vectors.items()}
    if norms is not None:
        pairwise = torch.minimum(pairwise, product(network, "estimate", norms).to(pairwise.dtype))
        kept |= norms.vectors
    return Liplt(pairwise, {names[k]: m[0] for k, m in estimate.slopes.items()}, kept)


def _nonlinearities(network: Network) -> list[Nonlinearity]:
    found = []
    for position, node in enumerate(network.nodes):
        if isinstance(node.layer, Elementwise):
            least, greatest = node.layer.unit_slopes if isinstance(node.layer, Grafted) else node.layer.slopes
            found.append(Nonlinearity(position, (least + greatest) / 2, (greatest - least) / 2, None))
        elif isinstance(node.layer, (MaxMin, MaxPool, L2Pool)):
            fixed_gain(node.layer, node.name, network.nodes[node.inputs[0]].shape)  # 1, or an error
            found.append(Nonlinearity(position, None, None, None))
    return found


def _norms(model: nn.Module, network: Network, iterations: int, given: Mapping[str, Tensor]) -> Norms:
    """In float64, whose range holds their product through any number of layers."""
    start = {}
    for operator in operators(network, "estimate").values():
        shape = operator.shape[-1:] if isinstance(operator.layer, Linear) else operator.shape
        if operator.name in given and given[operator.name].shape == shape:
            start[operator.name] = given[operator.name]
    found = norms_of(model, network.nodes[0].shape, "estimate", iterations, start)
    return replace(found, sigma={name: sigma.double() for name, sigma in found.sigma.items()})


def _like(network: Network) -> Tensor:
    """One number of the weights' dtype and device."""
    weights = (node.layer.weight for node in network.nodes if isinstance(node.layer, (Linear, Conv)))
    return next((weight.new_zeros(1) for weight in weights), torch.zeros(1))


def _names(network: Network) -> list[str]:
    """Of the nodes, unique: a module that is used again, or that is several nodes, gets a number."""
    names = ["input"]
    for node in network.nodes[1:]:
        names.append(next(n for n in (node.name, *(f"{node.name}:{i}" for i in range(1, len(names) + 1))) if n not in names))
    return names


def _check_finite(network: Network, sizes: Mapping[int, Tensor]) -> None:
    if not sizes or (next(iter(sizes.values())).is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if torch.stack(list(sizes.values())).isfinite().all():
        return
    for position in sizes:
        node = network.nodes[position]
        factor = factor_of(node.layer)
        if factor is not None and not factor.isfinite().all():
            raise ValueError(f"layer {node.name!r}: finite weights expected, got NaN or Inf")
