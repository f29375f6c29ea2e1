"""Which units are grafted: a share of each layer, those whose relaxation loosens the bounds behind them most.

Backward neuron selection of Han and Kim 2025 (https://arxiv.org/abs/2510.25130), section 4.2: from a pool of units that are
unstable on many images each layer grafts its best, layer by layer from the last to the first, so that the weights to units that
were found to matter can count alone.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipfast.bounds import Network
from lipfast.bounds._maps import transposed
from lipfast.bounds.layers import Conv, Elementwise, L2Pool, Layer, Linear, MaxMin, MaxPool, Scale, Sum
from lipfast.grafting.conversion import graft
from lipfast.grafting.scores import Scores, graftable

RULES = ("weighted", "width", "instability", "random")
POOLS = ("global", "layer")
ROWS = ("none", "grafted", "top")


def select(
    model: nn.Module,
    scores: Scores,
    ratio: float | Mapping[str, float] = 0.15,
    rule: str = "weighted",
    pool: str = "global",
    pool_fraction: float = 0.8,
    restrict_rows: str = "none",
    top: float = 0.5,
    recompute_bounds: Callable[[nn.Module], Scores] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Chooses the units to graft: for each activation, by its name, a bool mask of the shape of a sample.

    Args:
        model: the network that was scored. It is not changed.
        scores: of :func:`lipfast.grafting.score`.
        ratio: the share of a layer's units that is grafted, rounded up, if the pool has as many; one number, or one for each
            layer by name, where a layer that is not named is left alone.
        rule: what ranks the units of a layer: "weighted", ``interval`` times :func:`outgoing`; "width", ``interval``;
            "instability", ``count``; "random".
        pool: rank all unstable units of the network by ``count`` ("global"), or those of each layer ("layer"), and let the
            first ``pool_fraction`` of them be candidates. Units that are unstable on no image never are.
        restrict_rows: the weights that "weighted" counts: to all units of the next activations ("none"), to those that were
            grafted there ("grafted"), or to those of the first share ``top`` by score, grafted or not ("top"). An activation
            where that leaves no unit, or that cannot be grafted, counts whole, and so does the output.
        recompute_bounds: gives new scores of a grafted model, such as ``functools.partial(score, data=data, eps=eps)``. A graft
            changes boxes of later layers only, so the walk then goes from the first layer to the last, each scored on a copy
            of the model with the grafts before it, which start as :func:`lipfast.grafting.graft` starts them.
        seed: of the rule "random".

    Of equal units the earlier layer's is taken first, then the one of lower index: the same call gives the same masks.

    Raises: ValueError if an argument is out of range, ``scores`` are of another network, or ``restrict_rows`` is not "none"
        with ``recompute_bounds``, where later layers have no grafts yet, or with another rule than "weighted".

    >>> from lipfast.grafting import score
    >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> model[0].weight.data, model[2].weight.data = torch.tensor([[1.0], [-2.0]]), torch.tensor([[3.0, -1.0]])
    >>> scores = score(model, torch.tensor([[0.0]]), 0.25, pixel_range=None, progress=False)
    >>> select(model, scores, ratio=0.5, pool_fraction=1.0)
    {'1': tensor([ True, False])}
    """
    _check(rule, pool, pool_fraction, restrict_rows, top, recompute_bounds)
    network, at = graftable(model, scores.input_shape)
    _check_scores(scores, network, at)
    sizes = _sizes(ratio, network, at)
    random = _random(network, at, seed)
    masks: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    copied = copy.deepcopy(model) if recompute_bounds else model
    for name in at if recompute_bounds else reversed(at):
        if recompute_bounds and masks:
            fresh = recompute_bounds(copied)
            # The pool ranks the layers that are done as they were then: what is grafted is no longer unstable.
            scores = replace(fresh, count={**fresh.count, **{done: scores.count[done] for done in masks}})
        if rule == "weighted":
            rank = outgoing(network, name, rows).to(scores.interval[name].device) * scores.interval[name]
        else:
            rank = {"width": scores.interval, "instability": scores.count, "random": random}[rule][name]
        masks[name] = _best(rank, _pool(scores.count, pool, pool_fraction)[name], sizes[name])
        if recompute_bounds:
            graft(copied, {name: masks[name]}, input_shape=scores.input_shape)
        if restrict_rows != "none":
            matter = masks[name] if restrict_rows == "grafted" else _best(rank, rank > 0, _share(top, rank.numel()))
            rows |= {name: matter} if matter.any() else {}
    return {name: masks[name] for name in at}


def outgoing(
    network: Network,
    name: str,
    rows: Mapping[str, Tensor] | None = None,
) -> Tensor:  # (*shape,)
    """``sum_j |W_ji|`` for every unit i of an activation: by how much the boxes of all entries j that the next activations, or
    the network's output, read are wider together if that of unit i is by 1.

    Args:
        network: of :func:`lipfast.bounds.read`.
        name: of an activation of it.
        rows: by the name of a next activation which of its entries j count, bool; all where it is not named.

    Several readers add up, and so do the paths of a sum: a shortcut from i to an entry adds 1. Max pooling passes an entry's
    width on to every window that the entry is in, though one entry of a window is its maximum.

    Returns:
        float64, of the shape of a sample.

    Raises: ValueError for an unknown name.

    >>> from lipfast.bounds import read
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False), nn.ReLU())
    >>> model[2].weight.data = torch.tensor([[3.0, -1.0], [-2.0, 0.0]])
    >>> outgoing(read(model, (2,)), "1")
    tensor([5., 1.], dtype=torch.float64)
    """
    nodes, readers = network.nodes, network.readers()
    weights = (node.layer.weight for node in nodes if isinstance(node.layer, (Linear, Conv)))
    device = next((weight.device for weight in weights), None)
    start = next((p for p, node in enumerate(nodes) if node.name == name and isinstance(node.layer, _ACTIVATIONS)), None)
    if start is None:
        raise ValueError(f"outgoing: name must be that of an activation of the network, got {name!r}")

    @cache
    def sent(position: int) -> Tensor:  # (1, *shape)
        shape = nodes[position].shape
        total = torch.full((1, *shape), float(position == len(nodes) - 1), dtype=torch.float64, device=device)
        for reader in readers[position]:
            layer, by = nodes[reader].layer, nodes[reader].name
            if not isinstance(layer, _ACTIVATIONS):
                total = total + _absolute_transposed(layer, sent(reader), shape)
            else:
                total = total + (rows[by].to(total) if rows and by in rows else 1.0)
        return total

    with torch.no_grad():
        return sent(start)[0]


_ACTIVATIONS = (Elementwise, MaxMin, L2Pool)


def _absolute_transposed(layer: Layer, v: Tensor, shape: tuple[int, ...]) -> Tensor:
    """|W|^T v of a layer on samples of ``shape``."""
    if isinstance(layer, Sum):
        return v
    if isinstance(layer, MaxPool):
        return _windows_transposed(layer, v, shape)
    if isinstance(layer, (Linear, Conv)):
        layer = replace(layer, weight=layer.weight.double().abs(), bias=None)
    elif isinstance(layer, Scale) and layer.factor is not None:
        layer = replace(layer, factor=layer.factor.abs())
    return transposed(layer, v, shape)


def _windows_transposed(layer: MaxPool, v: Tensor, shape: tuple[int, ...]) -> Tensor:
    """To each entry the sum of v over the windows that it is in."""
    pool: Any = getattr(layer.function, "__self__")  # noqa: B009  the module whose forward it is
    sizes = lambda value: value if isinstance(value, tuple) else (value,) * (len(shape) - 1)
    ones = v.new_ones(shape[0], 1, *sizes(pool.kernel_size))
    conv = F.conv_transpose1d if len(shape) == 2 else F.conv_transpose2d
    spread = conv(v, ones, stride=sizes(pool.stride), groups=shape[0], dilation=sizes(pool.dilation))
    # What lies beyond the image goes; where no window reaches, in the end of the image, zeros come.
    amounts = [(-p, n + p - m) for p, n, m in zip(sizes(pool.padding), shape[1:], spread.shape[2:], strict=True)]
    return F.pad(spread, [amount for pair in reversed(amounts) for amount in pair])


def _pool(counts: Mapping[str, Tensor], pool: str, fraction: float) -> dict[str, Tensor]:
    """The candidates: the most often unstable units."""
    if pool == "layer":
        return {name: _best(t, t > 0, _share(fraction, int((t > 0).sum()))) for name, t in counts.items()}
    every = torch.cat([t.flatten() for t in counts.values()])
    chosen = _best(every, every > 0, _share(fraction, int((every > 0).sum())))
    parts = chosen.split([t.numel() for t in counts.values()])
    return {name: part.reshape(t.shape) for (name, t), part in zip(counts.items(), parts, strict=True)}


def _best(rank: Tensor, candidates: Tensor, size: int) -> Tensor:
    """The mask of the ``size`` candidates of highest rank, or of all if there are fewer; of equal ones the first."""
    rank = torch.where(candidates, rank.to(candidates.device, torch.float64), -math.inf)
    order = rank.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros_like(candidates.flatten())
    mask[order[: min(size, int(candidates.sum()))]] = True
    return mask.reshape(candidates.shape)


def _share(fraction: float, units: int) -> int:
    return math.ceil(fraction * units - 1e-9)  # 0.07 * 100 is above 7


def _random(network: Network, at: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(network.nodes[p].shape, generator=generator, dtype=torch.float64) for name, p in at.items()}


def _sizes(ratio: float | Mapping[str, float], network: Network, at: Mapping[str, int]) -> dict[str, int]:
    """How many units of each layer are grafted at most."""
    given = ratio if isinstance(ratio, Mapping) else dict.fromkeys(at, ratio)
    for name, share in given.items():
        if name not in at:
            raise ValueError(f"select: ratio must name layers of the model, {', '.join(at)}, got {name!r}")
        if not 0 <= share <= 1:
            raise ValueError(f"select: ratio must be from 0 to 1, got {share}")
    return {name: _share(given.get(name, 0.0), math.prod(network.nodes[p].shape)) for name, p in at.items()}


def _check(rule, pool, pool_fraction, restrict_rows, top, recompute_bounds) -> None:
    for name, value, known in (("rule", rule, RULES), ("pool", pool, POOLS), ("restrict_rows", restrict_rows, ROWS)):
        if value not in known:
            raise ValueError(f"select: {name} must be one of {', '.join(known)}, got {value!r}")
    for name, share in (("pool_fraction", pool_fraction), ("top", top)):
        if not 0 <= share <= 1:
            raise ValueError(f"select: {name} must be from 0 to 1, got {share}")
    if restrict_rows != "none" and (recompute_bounds is not None or rule != "weighted"):
        why = f"with rule {rule!r}" if recompute_bounds is None else "with recompute_bounds, which walks forwards"
        raise ValueError(f"select: restrict_rows must be 'none' {why}, got {restrict_rows!r}")


def _check_scores(scores: Scores, network: Network, at: Mapping[str, int]) -> None:
    want = {name: network.nodes[p].shape for name, p in at.items()}
    got = {name: tuple(t.shape) for name, t in scores.count.items()}
    if want != got:
        name = next(n for n in (*want, *got) if want.get(n) != got.get(n))
        raise ValueError(f"select: scores must be of this model: layer {name!r} has {want.get(name)}, got {got.get(name)}")
