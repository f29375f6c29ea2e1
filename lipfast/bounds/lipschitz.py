"""Lipschitz constants of a network over all inputs."""

import torch
from torch import Tensor, nn

from lipfast.bounds._gains import UP, between_outputs, fixed_gain, scale_gain
from lipfast.bounds.interval import _final_linear
from lipfast.bounds.layers import Conv, Input, Linear, Scale, Sum
from lipfast.bounds.network import Network, read
from lipfast.bounds.norms import Norms, check_kind, check_norms, operators
from lipfast.bounds.norms import norms as norms_of
from lipfast.ops.pairwise_distance import pairwise_distance


def lipschitz(
    model: nn.Module,
    input_shape: tuple[int, ...],
    p: float = 2,
    method: str = "product",
    kind: str = "bound",
    norms: Norms | None = None,
) -> Tensor:  # (K, K)
    """l2 Lipschitz constants of all differences of two logits: ``|(z_i - z_j)(x) - (z_i - z_j)(y)| <= L_ij ||x - y||``.

    Args:
        model: made of the layers that :mod:`lipfast.bounds.network` names; a residual connection adds its branches' constants.
        input_shape: of one sample; distances are measured between such inputs, in their units.
        p: 2.
        method: "product" of the layers' norms (Szegedy et al. 2013), the last one's row by row: with its rows w_i,
            ``||w_i - w_j||`` times the constant of the layers before (Tsuzuki et al. 2018, https://arxiv.org/abs/1802.04034).
        kind: "bound", proven, rounding included, float64, without gradient; "estimate", from power iterations, which approach
            each norm from below: differentiable in the parameters.
        norms: from :func:`lipfast.bounds.norms`, of the same kind and parameters, to save their computation.

    Returns:
        (K, K), symmetric, with a zero diagonal.

    Raises: ValueError for an unknown p, method or kind, norms of another kind or model, fewer than two logits, or a layer
        without a rule, which it names.

    >>> lipschitz(nn.Linear(2, 2, bias=False).requires_grad_(False), (2,)).shape
    torch.Size([2, 2])
    """
    if p != 2:
        raise ValueError(f"p: 2 expected, got {p}")
    if method != "product":
        raise ValueError(f"method: 'product' expected, got {method!r}")
    check_kind(kind)
    with torch.set_grad_enabled(kind == "estimate" and torch.is_grad_enabled()):
        network = read(model, tuple(input_shape))
        shape = network.nodes[-1].shape
        if len(shape) != 1 or shape[0] < 2:
            raise ValueError(f"model: logits (B, K) of two classes or more expected, got (B, {str(shape)[1:]}")
        norms = norms_of(model, tuple(input_shape), kind) if norms is None else norms
        last = _final_linear(network)
        if last is None:
            return between_outputs(_gain(network, kind, norms), shape[0])
        before = _gain(network.until(network.nodes[-1].inputs[0]), kind, norms)
        if kind == "estimate":
            return before * pairwise_distance(last.weight)
        weight = last.weight.double()
        slack = 1 + 4 * (weight.shape[1] + 16) * torch.finfo(torch.float64).eps
        return before * pairwise_distance(weight) * slack


def _gain(network: Network, kind: str, norms: Norms) -> Tensor:  # ()
    """The product bound of the network's last value."""
    merged = operators(network, kind)
    check_norms(norms, kind, merged.values())
    done = {at for operator in merged.values() for at in (operator.first, operator.last)} - merged.keys()
    like = next(iter(norms.sigma.values()), torch.ones((), dtype=torch.float64 if kind == "bound" else torch.float32))
    up = UP if kind == "bound" else 1
    gains: list[Tensor] = []
    for position, node in enumerate(network.nodes):
        inputs = [gains[i] for i in node.inputs]
        if isinstance(node.layer, Input):
            gains.append(torch.ones_like(like))
        elif isinstance(node.layer, (Linear, Conv)):
            gains.append(inputs[0] * norms.sigma[merged[position].name] * up)
        elif isinstance(node.layer, Sum):
            gains.append((inputs[0] + inputs[1]) * up)
        elif isinstance(node.layer, Scale):
            gains.append(inputs[0] if position in done else inputs[0] * scale_gain(node.layer, kind) * up)
        else:
            gains.append(inputs[0] * fixed_gain(node.layer, node.name, network.nodes[node.inputs[0]].shape) * up)
    return gains[-1]
