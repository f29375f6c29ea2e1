"""How :func:`lipfast.certify` proves a radius: one function per method.

A method is prepared once per model, where it may compute what all images share, and returns a function of a batch. Every test
of a radius is a proof of its own, and a proof at one radius covers all smaller ones, so :func:`_search` may try radii in any
order: it can miss, never overstate.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lipfast import bounds
from lipfast.bounds import _auto_lirpa, crown_margin, interval_margin
from lipfast.bounds._margins import Margins
from lipfast.bounds._relaxation import check
from lipfast.ops.certified_radius import certified_radius

Radii = Callable[[Tensor, Tensor], Tensor]  # images (B, ...), their prediction (B,) -> (B,) float64
_ITERATIONS = 100  # of the power iterations of an estimate: what the papers take at evaluation
_EXPLICIT = 512  # side of the matrices that tighten LipLT, where the input has at most _SMALL numbers and they are cheap
_SMALL = 4096
_SLOPES = 20  # steps of alpha-CROWN: what auto_LiRPA takes unless told


@dataclass(frozen=True)
class Task:
    """What :func:`lipfast.certify` was asked for; ``levels`` ascend."""

    model: nn.Module
    input_shape: tuple[int, ...]  # of one sample
    levels: tuple[float, ...]
    p: float
    kind: str
    pixel_range: tuple[float, float] | None
    resolution: int
    failure_probability: float = 0.0  # of all tests of an image together


@dataclass(frozen=True)
class Method:
    """``norms``: every p that it knows, first the one it takes by default. ``clips``: it can use a pixel range. ``draws``: it
    can be given a failure probability. ``proves``: it has bounds, not only estimates."""

    prepare: Callable[[Task], Radii]
    norms: tuple[float, ...]
    clips: bool = False
    draws: bool = False
    proves: bool = True


def interval(task: Task) -> Radii:
    """The largest radius for which every interval margin of the prediction over the others is positive."""

    def radii(x: Tensor, prediction: Tensor) -> Tensor:
        def holds(at: Tensor, radius: Tensor) -> Tensor:
            y = prediction[at]
            return _positive(interval_margin(task.model, x[at], y, radius, task.p, task.kind, task.pixel_range), y)

        return _search(holds, torch.zeros(len(x), dtype=torch.float64, device=x.device), task)

    return radii


def product(task: Task) -> Radii:
    """Margins at the image over the Lipschitz constants of the whole network: as large as they are, up to the last level."""
    return _everywhere(task, "product")


def liplt(task: Task) -> Radii:
    """The same with the constants of LipLT, which are never larger."""
    return _everywhere(task, "liplt")


def local(task: Task) -> Radii:
    """What :func:`liplt` proves, then the largest radius with positive margins over the ball of that radius.

    Local LipLT is never looser than the product of local norms and several times the work, and narrowing a gap takes most of
    the tests: so it tries only the levels that the other does not reach.
    """
    norms = bounds.norms(task.model, task.input_shape, task.kind, _ITERATIONS)
    everywhere = _everywhere(task, "liplt", norms)
    listed = replace(task, resolution=0)
    share = task.failure_probability / (_tests(task) + _tests(listed))

    def radii(x: Tensor, prediction: Tensor) -> Tensor:
        def holds(method: str, at: Tensor, radius: Tensor) -> Tensor:
            y = prediction[at]
            how = method, task.kind, norms, _ITERATIONS
            found = bounds.local(task.model, x[at], radius, *how, failure_probability=share)
            return _positive(found.margin(y), y)

        reached = _search(partial(holds, "product"), everywhere(x, prediction), task)
        return _search(partial(holds, "liplt"), reached, listed)

    return radii


def crown(task: Task, iterations: int = 0) -> Radii:
    """What :func:`interval` proves; beyond it, the largest level with positive margins by CROWN.

    One test is a pass for every unit of every image, so gaps between levels are narrowed by boxes alone. Boxes before
    activations that come from intervals cost a small part of that and prove enough for some images.
    """
    boxes = interval(task)
    listed = replace(task, resolution=0)
    if task.kind == "estimate":  # asked before the long work, not after
        _auto_lirpa.library()
    else:
        check(bounds.read(task.model, task.input_shape))

    def radii(x: Tensor, prediction: Tensor) -> Tensor:
        def holds(how: dict[str, Any], at: Tensor, radius: Tensor) -> Tensor:
            y = prediction[at]
            return _positive(crown_margin(task.model, x[at], y, radius, task.p, task.kind, task.pixel_range, **how), y)

        quick = _search(partial(holds, {"intermediate": "interval"}), boxes(x, prediction), listed)
        return _search(partial(holds, {"iterations": iterations}), quick, listed)

    return radii


METHODS = {
    "interval": Method(interval, (math.inf, 1, 2), clips=True),
    "product": Method(product, (2, math.inf)),
    "liplt": Method(liplt, (2, math.inf)),
    "local": Method(local, (2,), draws=True),
    "crown": Method(crown, (math.inf, 1, 2), clips=True),
    "alpha-crown": Method(partial(crown, iterations=_SLOPES), (math.inf,), clips=True, proves=False),
}


def _everywhere(task: Task, method: str, norms: bounds.Norms | None = None) -> Radii:
    """Radii from the constants over all inputs, of a method of :func:`lipfast.bounds.lipschitz`."""
    bound = task.kind == "bound"
    if norms is None and bound and task.p == 2:  # for the constants and for the margins
        norms = bounds.norms(task.model, task.input_shape)
    asked = task.input_shape, task.p, method, task.kind, norms
    explicit = _EXPLICIT if method == "liplt" and math.prod(task.input_shape) <= _SMALL else 0
    constants = bounds.lipschitz(task.model, *asked, iterations=_ITERATIONS, explicit=explicit).double()  # (K, K)
    sound = constants.isfinite().all()
    proven = Margins(task.model, task.input_shape, norms) if bound else None

    def radii(x: Tensor, prediction: Tensor) -> Tensor:
        if proven is None:
            margin = interval_margin(task.model, x, prediction, 0.0, task.p, task.kind).double()
        else:
            margin = proven(x, prediction)
        # As logits: 0 for the prediction, below it for the others, and their differences are the margins, exactly.
        radius, first = certified_radius(-margin, constants)
        radius = radius.where((first == prediction) & sound, 0.0)
        return radius.clamp(max=task.levels[-1])

    return radii


def _positive(margin: Tensor, prediction: Tensor) -> Tensor:  # (N, K), (N,) -> (N,) bool
    others = margin.scatter(1, prediction[:, None], 1.0)
    return ((others > 0) & margin.isfinite()).all(1)


def _tests(task: Task) -> int:
    """As often as :func:`_search` tests an image at most: rungs of the ladder halved down to one, then the last gap."""
    return len(task.levels).bit_length() + task.resolution


def _search(holds: Callable[[Tensor, Tensor], Tensor], proven: Tensor, task: Task) -> Tensor:  # (B,) -> (B,)
    """The largest radii found to hold, each of ``task.levels`` tried where it matters, the last gap then halved.

    ``holds`` takes positions in the batch and a radius for each, float64 like all radii here: the ball that is tested must
    not be smaller than the one reported. ``proven`` (float64) holds already.
    """
    ladder = proven.new_tensor([0.0, *task.levels])
    rung = torch.searchsorted(ladder, proven, right=True) - 1  # highest that holds
    failed = torch.full_like(rung, len(ladder))  # lowest that does not, or one past the top
    while (at := (failed - rung > 1).nonzero()[:, 0]).numel():
        middle = (rung[at] + failed[at]) // 2
        ok = holds(at, ladder[middle])
        rung[at], failed[at] = torch.where(ok, middle, rung[at]), torch.where(ok, failed[at], middle)
    at = (failed < len(ladder)).nonzero()[:, 0]
    low, high = ladder[rung].maximum(proven), ladder[failed.clamp(max=len(task.levels))]
    for _ in range(task.resolution if at.numel() else 0):
        middle = (low[at] + high[at]) / 2
        ok = holds(at, middle)
        low[at], high[at] = torch.where(ok, middle, low[at]), torch.where(ok, high[at], middle)
    return low
