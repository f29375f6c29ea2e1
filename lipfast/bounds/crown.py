"""CROWN: logits between linear functions of the input (Zhang et al. 2018, https://arxiv.org/abs/1811.00866).

A margin is pulled back through the network to the input, and each activation that may be on or off is replaced by a line above
or below it. The boxes that tell which may be, and how steep the lines are, come from the same pass for each unit, layer by
layer. What is proven, and why, is said in :mod:`lipfast.bounds._relaxation`.

Estimates are auto_LiRPA's (Xu et al. 2020, https://arxiv.org/abs/2002.12920): the same margins rounded to nearest, and those of
alpha-CROWN (Xu et al. 2021, https://arxiv.org/abs/2011.13824), which moves the lines below by gradient steps.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lipfast import rounding
from lipfast.bounds import _auto_lirpa
from lipfast.bounds._interval_rules import Box
from lipfast.bounds._relaxation import Goals, Relaxation, check
from lipfast.bounds.interval import Boxes, _Ball, _start, interval, interval_margin
from lipfast.bounds.layers import widened
from lipfast.bounds.network import Network, read

_KEPT = 2**21  # numbers of all values of the samples in work at a time
_INTERMEDIATE = ("crown", "interval")


@dataclass(frozen=True)
class Crown:
    """What CROWN proves of a network over balls around a batch of inputs, rounding included.

    Attributes:
        layers: for each activation, by its name in the model, the box before it: the interval box, intersected, where a unit
            may be on or off, with what CROWN proves of it. Grafted units keep their interval box.
    """

    layers: dict[str, Box]
    _parts: list[tuple[slice, Relaxation]]
    _interval: Boxes

    @torch.no_grad()
    def margin(self, label: Tensor) -> Tensor:  # (B,) -> (B, K)
        """As :func:`crown_margin`, from the boxes that are there already."""
        return _no_looser([_margin(relaxation, label[part]) for part, relaxation in self._parts], self._interval.margin(label))


@torch.no_grad()
def crown(
    model: nn.Module,
    x: Tensor,  # (B, ...)
    eps: float | Tensor,
    p: float = math.inf,
    pixel_range: tuple[float, float] | None = None,
    intermediate: str = "crown",
) -> Crown:
    """Boxes and margins of ``model`` over the balls of radius ``eps`` around ``x``; for both from one pass.

    Holds all lines and boxes of the batch, about four numbers of 8 bytes for each value of the network. Arguments and errors as
    in :func:`crown_margin`.
    """
    _check(intermediate)
    boxes = interval(model, x, eps, p, pixel_range=pixel_range, keep_layers=False)  # which looks at the arguments too
    parts = list(_relaxations(_network(model, x), x, eps, p, pixel_range, intermediate))
    layers = {name: _rounded([r.layers[name] for _, r in parts], x.dtype) for name in parts[0][1].layers}
    return Crown(layers, parts, boxes)


@torch.no_grad()
def crown_margin(
    model: nn.Module,
    x: Tensor,  # (B, ...)
    label: Tensor,  # (B,)
    eps: float | Tensor,
    p: float = math.inf,
    kind: str = "bound",
    pixel_range: tuple[float, float] | None = None,
    intermediate: str = "crown",
    iterations: int = 0,
) -> Tensor:  # (B, K)
    """Lower bounds of ``logit[label] - logit[j]`` over the balls of radius ``eps`` around ``x``; 0 where j is the label.

    Args:
        model: of the layers that :mod:`lipfast.bounds.network` names, without MaxMin, max and L2 pooling, and with
            activations of two straight, convex pieces that meet at 0: ReLU, LeakyReLU, the absolute value. Grafted units of a
            ReLU are straight and cost nothing.
        kind: "bound": proven, rounding included, in float64 whatever the model's dtype. "estimate": by auto_LiRPA, which rounds
            to nearest; p = inf. Neither carries a gradient.
        intermediate: where the boxes before activations come from, "crown" or "interval": much faster and looser.
        iterations: steps by which alpha-CROWN moves the slopes of an estimate.

    Returns: in the dtype of x. A bound is never below :func:`lipfast.bounds.interval_margin`; -Inf where numbers overflow.

    Other arguments and errors as there; also ValueError for a layer without lines, which it names, and for an estimate where
    auto_LiRPA is missing or does not read the network. It knows some layers more.

    >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    >>> crown_margin(model, torch.zeros(1, 2), torch.tensor([2]), 0.1).shape
    torch.Size([1, 3])
    """
    _check(intermediate)
    if iterations < 0 or (iterations and (kind == "bound" or intermediate != "crown")):
        raise ValueError(f"iterations: 0 expected, or more for an estimate with intermediate 'crown', got {iterations}")
    boxes = interval_margin(model, x, label, eps, p, kind, pixel_range)  # which looks at the arguments too
    if kind == "estimate":
        method = "CROWN-Optimized" if iterations else "CROWN" if intermediate == "crown" else "CROWN-IBP"
        return _auto_lirpa.margin(read(model, tuple(x.shape[1:])), x, label, eps, p, pixel_range, method, iterations)
    parts = _relaxations(_network(model, x), x, eps, p, pixel_range, intermediate)
    return _no_looser([_margin(relaxation, label[part]) for part, relaxation in parts], boxes)


def _check(intermediate: str) -> None:
    if intermediate not in _INTERMEDIATE:
        raise ValueError(f"intermediate: {' or '.join(map(repr, _INTERMEDIATE))} expected, got {intermediate!r}")


def _network(model: nn.Module, x: Tensor) -> Network:
    network = read(model, tuple(x.shape[1:]))
    check(network)
    return Network(tuple(replace(node, layer=widened(node.layer)) for node in network.nodes))


def _relaxations(
    network: Network,
    x: Tensor,
    eps: float | Tensor,
    p: float,
    pixel_range: tuple[float, float] | None,
    intermediate: str,
) -> Iterator[tuple[slice, Relaxation]]:
    """As many samples at a time as memory is meant to hold."""
    start = _start(x.double(), eps, p, "bound", pixel_range)
    step = max(1, _KEPT // sum(math.prod(node.shape) for node in network.nodes))
    for first in range(0, max(len(x), 1), step):
        part = slice(first, first + step)
        yield part, Relaxation(network, _cut(start, part), intermediate == "crown")


def _cut(start: Box | _Ball, part: slice) -> Box | _Ball:
    cut = lambda box: (box[0][part], box[1][part])
    if not isinstance(start, _Ball):
        return cut(start)
    return replace(
        start, center=cut(start.center), radius=start.radius[part], box=None if start.box is None else cut(start.box)
    )


def _margin(relaxation: Relaxation, label: Tensor) -> Tensor:  # (B,) -> (B, K), float64
    end = len(relaxation.network.nodes) - 1
    B, K = len(label), relaxation.network.nodes[end].shape[0]
    sample, other = (t.flatten() for t in torch.meshgrid(*(torch.arange(n).to(label) for n in (B, K)), indexing="ij"))
    sign = torch.tensor([1.0, -1.0]).to(relaxation.boxes[0][0]).expand(B * K, 2)
    found = relaxation.bounds(end, Goals(sample, torch.stack([label[sample], other], 1), sign))
    return found.reshape(B, K).scatter(1, label[:, None], 0.0)


def _no_looser(parts: list[Tensor], boxes: Tensor) -> Tensor:
    """All parts, or the margins of boxes, which may be NaN, where these are better."""
    boxes = boxes.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    return rounding.down(torch.cat(parts), boxes.dtype).maximum(boxes)


def _rounded(boxes: list[Box], dtype: torch.dtype) -> Box:
    lower, upper = (torch.cat(ends) for ends in zip(*boxes, strict=True))
    return rounding.down(lower, dtype), rounding.up(upper, dtype)
