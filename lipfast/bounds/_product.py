"""Products of layers' norms: l2 Lipschitz constants that need nothing but :func:`lipfast.bounds.norms`."""

import torch
from torch import Tensor

from lipfast.bounds._gains import UP, between_outputs, fixed_gain, scale_gain
from lipfast.bounds.interval import _final_linear
from lipfast.bounds.layers import Conv, Input, Linear, Scale, Sum
from lipfast.bounds.network import Network
from lipfast.bounds.norms import Norms, check_norms, operators
from lipfast.ops.pairwise_distance import pairwise_distance


def product(network: Network, kind: str, norms: Norms) -> Tensor:  # (K, K)
    """Of all differences of two logits: the norms of all layers but the last, times the distances of the last one's rows."""
    last = _final_linear(network)
    if last is None:
        return between_outputs(gain(network, kind, norms), network.nodes[-1].shape[0])
    before = gain(network.until(network.nodes[-1].inputs[0]), kind, norms)
    if kind == "estimate":
        return before * pairwise_distance(last.weight)
    weight = last.weight.double()
    slack = 1 + 4 * (weight.shape[1] + 16) * torch.finfo(torch.float64).eps
    return before * pairwise_distance(weight) * slack


def gain(network: Network, kind: str, norms: Norms) -> Tensor:  # ()
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
