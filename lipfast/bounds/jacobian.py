"""The local Lipschitz constant of a network by intervals of its Jacobian.

For two points of a ball, f(a) - f(b) = W_n D_{n-1} W_{n-1} ... D_1 W_1 (a - b), with each D_k between the slopes that the layer
can have over its box. Rows of the product are pushed back from the output to the input as intervals, entry by entry, so

    max_k |f_k(a) - f_k(b)|  <=  max_k sum_i |J_ki| |a_i - b_i|  <=  max_k ||J_k||_q ||a - b||_p,     1/p + 1/q = 1.

With p = inf this bounds the constant of Han and Kim 2025 (https://arxiv.org/abs/2510.25130, section 3); Shi et al. 2022
(https://arxiv.org/abs/2210.07394) propagate linear relaxations instead, which are tighter and cost far more. A grafted unit has
one slope, so it adds no width.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lipfast import rounding
from lipfast.bounds._interval_rules import Box
from lipfast.bounds._jacobian_rules import Rows, added, pulled
from lipfast.bounds.interval import _ACTIVATIONS, _as_box, _final_linear, _grad_for, _last_value, _start
from lipfast.bounds.layers import Sum
from lipfast.bounds.network import Network, read

_PART = 2**22  # numbers of the widest node's rows in work at a time, of each end


def jacobian(
    model: nn.Module,
    x: Tensor,  # (B, ...)
    eps: float | Tensor,
    p: float = math.inf,
    kind: str = "bound",
    pixel_range: tuple[float, float] | None = None,
    layers: Mapping[str, Box] | None = None,
) -> Tensor:  # (B,)
    """Local Lipschitz constants ``max_k |f_k(a) - f_k(b)| / ||a - b||_p`` over all a, b within ``eps`` of each sample.

    Args:
        model: made of the layers that :mod:`lipfast.bounds.network` names; every entry of its output is an f_k.
        x: a batch of inputs, in the model's dtype and on its device.
        eps: radius of the balls in the l_p norm, as in :func:`lipfast.bounds.interval`.
        p: 1, 2 or inf, of the balls and of the distance.
        kind: "bound" is never below the constant, rounding included, float64, and carries no gradient; infinite where a value
            of the network is not finite. "estimate" is rounded to nearest, in the model's dtype, and differentiable in the
            parameters; boxes are constants.
        pixel_range: values outside of it are no inputs. None: all are.
        layers: boxes before activations that the caller knows to hold for these balls, such as those of
            :func:`lipfast.bounds.crown`, which make deep networks' constants much smaller; their intersection with
            those of interval propagation is used.

    Memory: that of :func:`lipfast.bounds.interval` with its layers; rows go through the network in parts.
    Raises: ValueError as :func:`lipfast.bounds.interval` does, and for boxes of an unknown name or another shape.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False)).requires_grad_(False)
    >>> _ = model[0].weight.copy_(torch.tensor([[1., 1.], [1., -1.]])), model[0].bias.copy_(torch.tensor([1., -1.]))
    >>> _ = model[2].weight.copy_(torch.tensor([[1., 2.]]))
    >>> jacobian(model, torch.zeros(1, 2), 0.1, kind="estimate")
    tensor([2.])
    """
    with _grad_for(kind):
        network = read(model, tuple(x.shape[1:]))
        found: dict[str, Box] = {}
        with torch.no_grad():
            output = _as_box(_last_value(network, _start(x, eps, p, kind, pixel_range), kind, found), kind)
        for name, box in (layers or {}).items():
            found[name] = _intersection(name, box, found.get(name))
        activations = [i for i, node in enumerate(network.nodes) if isinstance(node.layer, _ACTIVATIONS)]
        boxes = dict(zip(activations, found.values(), strict=True))  # in this order; a layer that is used twice has two
        constants = _constants(network, boxes, x, p, kind)
        if kind == "estimate":
            return constants
        finite = [t.isfinite().flatten(1).all(1) for box in (*found.values(), output) for t in box]
        return torch.where(torch.stack(finite).all(0) & ~constants.isnan(), constants, math.inf)


def _intersection(name: str, box: Box, own: Box | None) -> Box:
    if own is None or any(t.shape != own[0].shape for t in box):
        expected = "the name of an activation" if own is None else tuple(own[0].shape)
        raise ValueError(f"layers: {expected} expected, got {name!r} with {[tuple(t.shape) for t in box]}")
    dtype = own[0].dtype
    return torch.maximum(own[0], rounding.down(box[0], dtype)), torch.minimum(own[1], rounding.up(box[1], dtype))


def _constants(network: Network, boxes: dict[int, Box], x: Tensor, p: float, kind: str) -> Tensor:  # (B,)
    R, widest = math.prod(network.nodes[-1].shape), max(math.prod(node.shape) for node in network.nodes)
    rows = max(1, _PART // max(1, widest))
    samples = max(1, rows // R)
    like = x.new_empty(0, dtype=rounding.accumulator(x.dtype)) if kind == "bound" else x
    split = {at: list(zip(low.split(samples), high.split(samples), strict=True)) for at, (low, high) in boxes.items()}
    found = []
    for n, part in enumerate(x.split(samples)):
        own, largest = {at: pieces[n] for at, pieces in split.items()}, []
        for begin in range(0, R, rows):
            first = _first_rows(network, begin, min(begin + rows, R), like)
            largest.append(_norms(_at_input(network, own, *first, kind), p, kind).amax(1))
        found.append(torch.stack(largest).amax(0).expand(len(part)))  # without activations all samples have the same rows
    return torch.cat(found)


def _first_rows(network: Network, begin: int, end: int, like: Tensor) -> tuple[int, Rows]:
    """A node, and the rows from ``begin`` to ``end`` of the output's exact Jacobian there: (1, R, *shape) twice."""
    last, final = len(network.nodes) - 1, _final_linear(network)
    if final is not None:
        rows = final.weight[None, begin:end].to(like)
        return network.nodes[last].inputs[0], (rows, rows)
    shape = network.nodes[last].shape
    rows = like.new_zeros(end - begin, math.prod(shape))
    rows.diagonal(begin).fill_(1)
    rows = rows.reshape(1, -1, *shape)
    return last, (rows, rows)


def _at_input(network: Network, boxes: dict[int, Box], position: int, rows: Rows, kind: str) -> Rows:
    """Rows on the node at ``position`` as rows on the network's input."""
    waiting = {position: rows}
    for at in range(position, 0, -1):
        if at not in waiting:  # nothing that the output depends on
            continue
        node, rows = network.nodes[at], waiting.pop(at)
        if isinstance(node.layer, Sum):
            lower, upper = rows
            parts = [rows, rows if node.layer.signs[1] > 0 else (-upper, -lower)]
        else:
            parts = [pulled(node.layer, rows, network.nodes[node.inputs[0]].shape, boxes.get(at), kind=kind)]
        for i, part in zip(node.inputs, parts, strict=True):
            waiting[i] = added(waiting[i], part, kind) if i in waiting else part
    return waiting[0]


def _norms(rows: Rows, p: float, kind: str) -> Tensor:  # (N, R)
    """Of each row's largest absolute entries, the dual norm."""
    lower, upper = rows
    size = torch.maximum(-lower, upper).flatten(2)
    dual = {math.inf: 1.0, 2: 2.0, 1: math.inf}[p]
    if kind == "estimate":
        return torch.linalg.vector_norm(size, dual, dim=2)
    norm = torch.linalg.vector_norm(size, dual, dim=2, dtype=torch.float64)
    I, tiny = size.shape[2], torch.finfo(torch.float64).tiny  # squares below tiny may vanish
    return norm * (1 + 2 * rounding.gamma(I, norm.dtype, norm.device)) + (math.sqrt(I * tiny) if p == 2 else 0.0)
