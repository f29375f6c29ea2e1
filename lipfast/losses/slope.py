"""Penalties on units that are unstable within their boxes: those of Lipschitz-aware linearity grafting (Han and Kim 2025,
https://arxiv.org/abs/2510.25130) and two relatives.

The paper's own expression was not at hand when this was written. What is known of it: it pushes unstable units that are not
grafted towards stability, and has one hyper-parameter. The forms here are natural readings of its name, the slope being that of
CROWN's upper relaxation of a ReLU.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lipfast.losses.interval import batch_means
from lipfast.rounding import accumulator

FORMS = ("product", "distance", "power", "exponential", "rs", "volume")
REDUCTIONS = ("mean", "sum")
_LEAST = 1e-12


def slope(
    layers: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    form: str = "product",
    sharpness: float = 2.0,
    share: float = 1.0,
    reduction: str = "mean",
) -> Tensor:  # ()
    """Penalty on ReLUs that are neither grafted nor stable, for how far they are from either.

    With s = u/(u - l) the slope of the chord over the box (l, u), l < 0 < u, from 0 at the edge of being dead to 1 at the edge
    of being active, a unit costs

        product        4 s (1 - s)                 1 at s = 1/2, where its gradient vanishes
        distance       min(s, 1 - s)               its pull does not slacken near 1/2
        power          1 - |2s - 1|^sharpness      2: the product; 1: twice the distance; above: flat around 1/2
        exponential    exp(-sharpness |2s - 1|)    strongest at 1/2; exp(-sharpness) is left at the ends
        volume         -l u                        area, but for a half, of the triangle relaxation (Balunovic and Vechev 2020)
        rs             -tanh(1 + l u)              (Xiao et al. 2019, https://arxiv.org/abs/1809.03008)

    Units with s > 1/2 are pulled towards activity, the others towards being dead. The first four do not depend on the size of
    the box, so their gradients grow as 1/(u - l): where eps starts small, raise the weight with it.

    Args:
        layers: for each activation the box (lower, upper), (B, ...), before it, and the mask of its grafted units, which
            broadcasts to the box, or None where none is. As in ``Boxes.layers`` of :func:`lipfast.bounds.interval`.
        form: see above.
        sharpness: of the forms "power", at least 1, and "exponential".
        share: of each layer's units that count at most, the costliest of each sample.
        reduction: "mean" over the unstable units of all layers and samples; with "rs", as in its paper over the stable ones
            too, which it holds where they are. It is 0 where there is none. A unit that becomes stable leaves it, so the mean
            itself may rise. "sum" over the units and mean over the samples: for the same effect its weight is smaller, by about
            the number of unstable units of a sample.

    Half boxes are computed in float32.
    Raises: ValueError for an unknown form or reduction, or a number out of range.

    >>> lower, upper = torch.tensor([[-1.0, -3.0, 1.0]]), torch.tensor([[1.0, 1.0, 2.0]])
    >>> slope([(lower, upper, None)])  # of 1 and 3/4; the third is stable
    tensor(0.8750)
    """
    _check(form, sharpness, share, reduction)
    total, count, samples = torch.zeros(()), torch.zeros(()), 1
    for lower, upper, grafted in layers:
        samples = len(lower)
        stable = torch.zeros_like(lower, dtype=torch.bool) if form == "rs" else (lower >= 0) | (upper <= 0)  # NaN is not
        counted = (~stable if grafted is None else ~(stable | grafted)).flatten(1)
        lower, upper = (t.flatten(1).to(accumulator(t.dtype)) for t in (lower, upper))
        cost = _cost(form, lower.where(counted, -1), upper.where(counted, 1), sharpness)  # finite for the others too
        if share < 1:
            cost = cost.where(counted, -math.inf).topk(math.ceil(share * cost.shape[1]), 1).values
            counted = cost != -math.inf
        total = total.to(cost) + cost.where(counted, 0).sum()
        count = count.to(cost) + counted.sum()
    if reduction == "sum":
        return total / samples
    total, count = batch_means(total, count)
    return total / count.clamp_min(_LEAST)


def _cost(form: str, lower: Tensor, upper: Tensor, sharpness: float) -> Tensor:
    if form == "volume":
        return -lower * upper
    if form == "rs":
        return -torch.tanh(1 + lower * upper)
    width = (upper - lower).clamp_min(_LEAST)
    s, rest = upper / width, -lower / width  # 1 - s without its cancellation
    if form == "product":
        return 4 * s * rest
    if form == "distance":
        return torch.minimum(s, rest)
    uneven = (s - rest).abs()
    return 1 - uneven**sharpness if form == "power" else torch.exp(-sharpness * uneven)


def _check(form: str, sharpness: float, share: float, reduction: str) -> None:
    if form not in FORMS:
        raise ValueError(f"slope: form must be one of {', '.join(FORMS)}, got {form!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"slope: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    least = 1 if form == "power" else 0  # below 1 its gradient at s = 1/2 is not finite
    if not least <= sharpness < math.inf:
        raise ValueError(f"slope: sharpness must be at least {least} and finite, got {sharpness}")
    if not 0 < share <= 1:
        raise ValueError(f"slope: share must be above 0 and at most 1, got {share}")
