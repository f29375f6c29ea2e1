"""What each kind of layer does to intervals of Jacobian rows, from its output back to its input: one rule each.

For any two points a, b of a layer's input box, g(a) - g(b) = D (a - b) with a matrix D between the layer's slopes over the
box: a secant's slope of one variable lies between the least and the greatest slope, and a maximum or a norm has, somewhere
between a and b, a subgradient that fits (Lebourg's mean value theorem; Clarke 1983, theorem 2.3.7). A rule contains
``row @ D`` for every row of the interval and every such D; ``kind="bound"`` adds the rounding.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import singledispatch

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast import rounding
from lipfast.bounds._interval_rules import Box, conv2d_arguments, image, sum_slack
from lipfast.bounds._linf_rows import _transposed
from lipfast.bounds.layers import (
    AveragePool,
    Conv,
    Elementwise,
    Grafted,
    L2Pool,
    Layer,
    Linear,
    MaxMin,
    MaxPool,
    Pad,
    Rearrange,
    Scale,
)
from lipfast.ops.interval_conv2d import interval_conv2d
from lipfast.ops.interval_linear import interval_linear

Rows = tuple[Tensor, Tensor]  # least and greatest entries, (N, R, *shape): R rows of N samples, or of one that stands for all


@singledispatch
def pulled(layer: Layer, rows: Rows, shape: tuple[int, ...], box: Box | None, *, kind: str) -> Rows:
    """Rows on a layer's output as rows on its input, which has ``shape`` and, before an activation or pooling, a ``box``."""
    raise NotImplementedError(f"no Jacobian rule for {type(layer).__name__}")


def added(left: Rows, right: Rows, kind: str) -> Rows:
    """What two readers send to one value."""
    lower, upper = left[0] + right[0], left[1] + right[1]
    return lower - sum_slack(lower, kind), upper + sum_slack(upper, kind)


@pulled.register
def _(layer: Linear, rows: Rows, shape: tuple[int, ...], box: Box | None, *, kind: str) -> Rows:
    return interval_linear(*rows, layer.weight.to(rows[0].dtype).mT, outward=kind == "bound")


@pulled.register
def _(layer: Conv, rows: Rows, shape: tuple[int, ...], box: Box | None, *, kind: str) -> Rows:
    where = conv2d_arguments(layer)
    where["weight"] = where["weight"].to(rows[0].dtype)
    image = (shape[0], 1, shape[1]) if len(shape) == 2 else shape
    lower, upper = (t.flatten(0, 1).unsqueeze(-2) if len(shape) == 2 else t.flatten(0, 1) for t in rows)
    transposed = _transposed_outward if kind == "bound" else _transposed_nearest
    lower, upper = transposed(lower, upper, image, **where)
    return lower.reshape(*rows[0].shape[:2], *shape), upper.reshape(*rows[0].shape[:2], *shape)


def _transposed_nearest(lower: Tensor, upper: Tensor, image: tuple[int, ...], weight: Tensor, **where) -> Rows:
    # The gradient of a box is a box of gradients: center and radius go back through W and |W|.
    like = lower.new_zeros(()).expand(len(lower), *image)
    geometry = (list(where[k]) for k in ("stride", "padding", "dilation"))
    return torch.ops.lipfast.interval_conv2d_backward(
        lower, upper, like, like, weight, *geometry, where["groups"], True, False
    )[:2]


def _transposed_outward(
    lower: Tensor,  # (M, O, H', W')
    upper: Tensor,
    image: tuple[int, ...],  # C, H, W
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Rows:
    """A transposed convolution as a plain one, whose rounding is known.

    Input pixel y meets output o by the tap k where o stride + k dilation - padding = y. Pixels of one phase of the stride meet
    the same taps, so each phase is one output channel of a convolution with stride 1, and the phases are shuffled together.
    """
    (C, *size), G = image, groups
    taps = [_phases(*sides) for sides in zip(weight.shape[2:], stride, dilation, strict=True)]
    kernel = weight.unflatten(0, (G, -1)).transpose(1, 2)  # (G, C/G, O/G, KH, KW)
    for side, chosen in zip((3, 5), taps, strict=True):  # each becomes (phase, tap)
        picked = F.pad(kernel, [0, 0] * (kernel.ndim - 1 - side) + [0, 1]).index_select(
            side, chosen.flatten().to(kernel.device)
        )
        kernel = picked.unflatten(side, chosen.shape)
    kernel = kernel.permute(0, 1, 3, 5, 2, 4, 6).flatten(0, 3)  # (C stride stride, O/G, tap, tap)
    first = [p // s for p, s in zip(padding, stride, strict=True)]
    count = [(n - 1 + p) // s + 1 - f for n, p, s, f in zip(size, padding, stride, first, strict=True)]
    before = [t.shape[1] - 1 - f for t, f in zip(taps, first, strict=True)]
    after = [f + c - o for f, c, o in zip(first, count, lower.shape[2:], strict=True)]
    around = [before[1], after[1], before[0], after[0]]
    ends = interval_conv2d(F.pad(lower, around), F.pad(upper, around), kernel, groups=G, outward=True)
    skip = [p - f * s for p, f, s in zip(padding, first, stride, strict=True)]
    low, high = (_shuffled(t, C, stride)[..., skip[0] :, skip[1] :][..., : size[0], : size[1]] for t in ends)
    return low, high


def _phases(kernel: int, stride: int, dilation: int) -> Tensor:  # (phase, tap), ``kernel`` where there is none
    """Of a pixel in phase ``(y + padding) % stride`` the tap that meets each output, the furthest behind first."""
    extent = (kernel - 1) * dilation // stride + 1
    taps = torch.full((stride, extent), kernel)
    for k in range(kernel):
        taps[k * dilation % stride, extent - 1 - k * dilation // stride] = k
    return taps


def _shuffled(x: Tensor, C: int, stride: Sequence[int]) -> Tensor:
    """As :func:`torch.nn.functional.pixel_shuffle`, for any two strides."""
    return x.unflatten(1, (C, *stride)).permute(0, 1, 4, 2, 5, 3).flatten(2, 3).flatten(3, 4)


@pulled.register
def _(layer: Scale, rows: Rows, shape: tuple[int, ...], box: Box | None, *, kind: str) -> Rows:
    if layer.factor is None:
        return rows
    factor = layer.factor.to(rows[0])
    ends = rows[0] * factor, rows[1] * factor
    lower, upper = torch.minimum(*ends), torch.maximum(*ends)
    if kind == "estimate":
        return lower, upper
    info = torch.finfo(factor.dtype)  # the factor is itself rounded, to its dtype or better
    own = torch.finfo(layer.factor.dtype).eps if layer.factor.is_floating_point() else 0.0
    unit = 8 * max(info.eps, own)
    return lower - (unit * lower.abs() + info.tiny), upper + (unit * upper.abs() + info.tiny)


@pulled.register
def _(layer: Rearrange, rows: Rows, shape: tuple[int, ...], box: Box | None, *, kind: str) -> Rows:
    order = torch.arange(math.prod(shape), device=rows[0].device)
    places = layer.function(order.reshape(1, *shape)).flatten()
    lower, upper = (t.flatten(2) for t in rows)
    if not torch.equal(places, order):
        back = places.argsort()
        lower, upper = lower[..., back], upper[..., back]
    return lower.reshape(*lower.shape[:2], *shape), upper.reshape(*upper.shape[:2], *shape)


@pulled.register(AveragePool)
@pulled.register(Pad)
def _(layer: AveragePool | Pad, rows: Rows, shape: tuple[int, ...], box: Box | None, *, kind: str) -> Rows:
    if isinstance(layer, Pad) and layer.mode == "constant":
        return F.pad(rows[0], [-n for n in layer.amounts]), F.pad(rows[1], [-n for n in layer.amounts])
    back = lambda t: _transposed(layer, t.flatten(0, 1), shape).reshape(*t.shape[:2], *shape)
    if kind == "estimate":
        return back(rows[0]), back(rows[1])
    lower, upper = (t.double() for t in rows)  # an entry is in at most as many sums as there are
    terms = math.prod(rows[0].shape[2:])
    size = back(torch.maximum(lower.abs(), upper.abs()))
    slack = 2 * rounding.gamma(terms, size.dtype, size.device) * size + torch.finfo(size.dtype).tiny
    return rounding.down(back(lower) - slack, rows[0].dtype), rounding.up(back(upper) + slack, rows[1].dtype)


@pulled.register
def _(layer: Elementwise, rows: Rows, shape: tuple[int, ...], box: Box, *, kind: str) -> Rows:
    slopes = layer.slopes
    whole = not isinstance(layer, Grafted) and {*slopes, *layer.pieces} <= {-1.0, 0.0, 1.0}
    return _times(rows, layer.slopes_on(*box), slopes[0] >= 0, whole or kind == "estimate")


def _times(rows: Rows, slopes: Box, rising: bool, exact: bool) -> Rows:
    """Each entry times every number between its ``slopes``, (N, ...), which are all at least 0 if ``rising``."""
    lower, upper = rows
    least, greatest = slopes
    if not exact:  # of the slopes; nextafter below covers the product's
        unit = 8 * torch.finfo(least.dtype).eps
        least, greatest = least - unit * least.abs(), greatest + unit * greatest.abs()
    least, greatest = (t.to(lower.dtype).unsqueeze(1) for t in (least, greatest))
    if rising:
        lower, upper = torch.minimum(lower * least, lower * greatest), torch.maximum(upper * least, upper * greatest)
    else:
        ends = lower * least, lower * greatest, upper * least, upper * greatest
        lower = torch.minimum(torch.minimum(*ends[:2]), torch.minimum(*ends[2:]))
        upper = torch.maximum(torch.maximum(*ends[:2]), torch.maximum(*ends[2:]))
    if exact:
        return lower, upper
    infinity = lower.new_tensor(math.inf)
    return torch.nextafter(lower, -infinity), torch.nextafter(upper, infinity)


@pulled.register
def _(layer: MaxMin, rows: Rows, shape: tuple[int, ...], box: Box, *, kind: str) -> Rows:
    # With one p in [0, 1], greater' = p a' + (1 - p) b' and less' = (1 - p) a' + p b'; p is 1 or 0 where the boxes are apart.
    (low_a, low_b), (high_a, high_b) = (t.unsqueeze(1).chunk(2, 2) for t in box)
    first, second = low_a >= high_b, high_a <= low_b

    def back(t: Tensor, hull: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        greater, less = t.chunk(2, 2)
        either = hull(greater, less)
        to_a = torch.where(first, greater, torch.where(second, less, either))
        return torch.cat([to_a, torch.where(first, less, torch.where(second, greater, either))], 2)

    return back(rows[0], torch.minimum), back(rows[1], torch.maximum)


@pulled.register
def _(layer: MaxPool, rows: Rows, shape: tuple[int, ...], box: Box, *, kind: str) -> Rows:
    # The maximum is one of those entries whose upper ends reach the largest lower end; a subgradient averages over them.
    readers, members = _windows(layer.function, box[0])
    upper, largest = box[1].flatten(2), layer.function(box[0]).flatten(2)
    candidates = torch.stack([valid & ~(upper[..., at] < largest) for at, valid in members]).sum(0)

    def slopes(at: Tensor) -> Box:
        candidate = ~(upper < largest[..., at])
        return candidate & (candidates[..., at] == 1), candidate

    return _through_windows(readers, rows, shape, slopes, True, kind)


@pulled.register
def _(layer: L2Pool, rows: Rows, shape: tuple[int, ...], box: Box, *, kind: str) -> Rows:
    # The gradient is w x / sqrt(w sum of x^2); w is not 1 where torch scales a window that the border cuts. Where a window is
    # all zero, an entry that cannot change sign is zero at both points too, so that slope 0 fits.
    readers, members = _windows(layer.square_sum, box[0])
    (lower, upper), tiny = (t.flatten(2) for t in box), torch.finfo(box[0].dtype).tiny
    weight = layer.square_sum(torch.ones_like(box[0][:1])).flatten(2) / torch.stack([valid for _, valid in members]).sum(0)
    least, greatest = (t.flatten(2) for t in image(layer, box, kind=kind))

    def slopes(at: Tensor) -> Box:
        w, near, far = weight[..., at], least[..., at], greatest[..., at].clamp_min(tiny)
        low, high = lower * w / torch.where(lower < 0, near, far), upper * w / torch.where(upper > 0, near, far)
        return torch.maximum(low, -w.sqrt()), torch.minimum(high, w.sqrt())

    return _through_windows(readers, rows, shape, slopes, False, kind)


Lists = list[tuple[Tensor, Tensor]]  # in each pair: for every entry one that goes with it, and whether there is one


def _windows(function: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Lists, Lists]:
    """For every entry of an image the windows that read it, and for every window its entries; places as in ``flatten``."""
    sizes, read = like.shape[2:], []
    for side, n in enumerate(sizes):  # a window is a product of one range per side: which of them reads a whole line?
        lines = torch.eye(n, dtype=like.dtype, device=like.device).reshape(
            n, 1, *(n if i == side else 1 for i in range(len(sizes)))
        )
        windows = function(lines.expand(n, 1, *sizes))[:, 0] > 0
        read.append(windows.movedim(side + 1, 1).flatten(2)[..., 0] if len(sizes) > 1 else windows)
    return _lists(read), _lists([matrix.mT for matrix in read])


def _lists(read: list[Tensor]) -> Lists:
    """From which goes with which, one (n, m) bool matrix per side."""
    sides = []
    for matrix in read:
        valid, at = matrix.to(torch.int8).sort(dim=1, descending=True, stable=True)
        sides.append([(at[:, i], valid[:, i] > 0) for i in range(int(matrix.sum(1).amax()))])
    pairs = []
    for chosen in itertools.product(*sides):
        place, exists = chosen[0]
        for (at, valid), matrix in zip(chosen[1:], read[1:], strict=True):
            place, exists = place[..., None] * matrix.shape[1] + at, exists[..., None] & valid
        pairs.append((place.flatten(), exists.flatten()))
    return pairs


def _through_windows(
    readers: Lists, rows: Rows, shape: tuple[int, ...], slopes: Callable[[Tensor], Box], whole: bool, kind: str
) -> Rows:
    """Sums, over the windows that read an entry, of their rows times ``slopes``; those are 0 and 1 if ``whole``."""
    total: Rows | None = None
    for at, valid in readers:
        least, greatest = slopes(at)
        taken = rows[0].flatten(3)[..., at], rows[1].flatten(3)[..., at]
        part = _times(taken, (least * valid, greatest * valid), whole, whole or kind == "estimate")
        total = part if total is None else added(total, part, kind)
    assert total is not None
    return total[0].reshape(*total[0].shape[:2], *shape), total[1].reshape(*total[1].shape[:2], *shape)
