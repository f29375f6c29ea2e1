"""How much each ReLU unit loosens the boxes behind it, over calibration images: by this units are chosen for grafting.

Scores of Han and Kim 2025 (https://arxiv.org/abs/2510.25130), section 4.1. With boxes [l, u] of a unit's input over the balls
around the images, and W the affine layers from it to the next activations:

    interval  =  max over images of u - l where l < 0 < u, else 0          (a max: one bad image counts)
    count     =  number of images where l < 0 < u                          (instability)
    outgoing  =  sum_j |W_ji| over the entries j that the next activations, or the output, read

Boxes grow by |W|, so interval * outgoing is the unit's share in the widths of the next boxes, up to the factor u / (u - l) by
which a ReLU narrows its own; measure "upper" counts that too. A unit that is grafted already is never unstable.

:func:`lipfast.grafting.outgoing` has the weights, this file the boxes.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lipfast.bounds import Network, interval, read
from lipfast.bounds.crown import crown
from lipfast.bounds.network import _trace
from lipfast.data import Dataset, Folder, unit
from lipfast.nn import GraftedReLU

MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "width": lambda lower, upper: upper - lower,
    "error": lambda lower, upper: -lower * (upper / (upper - lower)),
    "upper": lambda lower, upper: upper,
}
BOUNDS = ("interval", "crown")


@dataclass(frozen=True, eq=False)
class Scores:
    """What :func:`score` found: for each activation, by its name in the model, a tensor of the shape of a sample.

    Attributes:
        interval: the largest ``measure`` over the images where the unit is unstable, 0 if it never is; in the model's dtype.
        count: int64, on how many images it is unstable.
        chord_slope, chord_intercept: float64, means over those images of the line through the ends of ReLU on the box: slope
            u / (u - l), intercept -u l / (u - l). Of a unit that is never unstable the mean over all images, on each of which
            ReLU is a line, of slope 1 or 0.
        grafted: bool, the units that are grafted already.
        images: how many there were.
        input_shape: of one of them.
    """

    interval: dict[str, Tensor]
    count: dict[str, Tensor]
    chord_slope: dict[str, Tensor]
    chord_intercept: dict[str, Tensor]
    grafted: dict[str, Tensor]
    images: int
    input_shape: tuple[int, ...]

    def unstable_ratio(self, of: str = "all") -> float:
        """Share of unstable units, mean over the images: of "all" units, or of those that are not grafted, "plain".

        Raises: ValueError for another ``of``.
        """
        if of not in ("all", "plain"):
            raise ValueError(f"unstable_ratio: of must be 'all' or 'plain', got {of!r}")
        units = sum(t.numel() if of == "all" else int((~t).sum()) for t in self.grafted.values())
        return sum(int(t.sum()) for t in self.count.values()) / (self.images * max(1, units))


def score(
    model: nn.Module,
    data: Any,
    eps: float,
    bounds: str = "interval",
    measure: str = "width",
    limit: int | None = 1000,
    batch_size: int = 256,
    pixel_range: tuple[float, float] | None = (0.0, 1.0),
    progress: bool = True,
) -> Scores:
    """Scores every ReLU unit of ``model`` on calibration images.

    One pass over the images. Memory is that of one batch and a few numbers per unit, however many images there are.

    Args:
        model: a network that :mod:`lipfast.bounds` reads, whose ReLUs are ``nn.ReLU`` or :class:`lipfast.nn.GraftedReLU`
            modules, each used once. It is put into eval mode, and back.
        data: a :class:`lipfast.data.Dataset` or :class:`lipfast.data.Folder`, images (B, ...), a pair (images (B, ...), labels
            (B,)), or an iterable of batches of images or of such pairs. uint8 images become floats in [0, 1].
        eps: l_inf radius of the balls around the images, in units of the pixels handed over.
        bounds: "interval", boxes through the network, rounded to nearest, for they prove nothing here; "crown",
            :func:`lipfast.bounds.crown`, tighter and much slower, which knows fewer kinds of layers.
        measure: of the box [l, u] of an unstable unit: "width", u - l; "error", the gap of ReLU's triangle relaxation,
            -u l / (u - l); "upper", u, the width of ReLU's image.
        limit: take only the first so many images; None takes all.
        batch_size: images at a time. Scores do not depend on it, but for rounding.
        pixel_range: the balls are clipped to it; None clips nothing.
        progress: show a progress bar.

    Raises: ValueError if an argument is out of range, there is no image, no ReLU or one that cannot be grafted, or a box is
        not finite; the message names the argument or the layer.

    >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    >>> model[0].weight.data = torch.tensor([[1.0], [-2.0]])
    >>> scores = score(model, torch.tensor([[0.0], [0.5]]), 0.25, pixel_range=None, progress=False)
    >>> scores.interval["1"], scores.count["1"]
    (tensor([0.5000, 1.0000]), tensor([1, 1]))
    """
    _check(model, eps, bounds, measure, limit, batch_size, pixel_range)
    found: dict[str, _Running] = {}
    images = 0
    input_shape: tuple[int, ...] = ()
    with _evaluating(model) as like, torch.no_grad():
        for x in _bar(data, limit, batch_size, progress):
            _check_pixels(x, pixel_range)
            if not images:
                input_shape = tuple(x.shape[1:])
                _, at = graftable(model, input_shape)
            for name, (lower, upper) in _boxes(model, x if like is None else x.to(like), eps, bounds, pixel_range).items():
                if name in at and not images:
                    found[name] = _Running(model.get_submodule(name), lower[0])
                if name in at:
                    found[name].add(name, lower, upper, MEASURES[measure])
            images += len(x)
    if not images:
        raise ValueError("score: data must have at least one image, got none")
    chords = {name: running.chord(images) for name, running in found.items()}
    return Scores(
        interval={name: running.interval for name, running in found.items()},
        count={name: running.count for name, running in found.items()},
        chord_slope={name: slope for name, (slope, _) in chords.items()},
        chord_intercept={name: intercept for name, (_, intercept) in chords.items()},
        grafted={name: running.grafted for name, running in found.items()},
        images=images,
        input_shape=input_shape,
    )


def graftable(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[Network, dict[str, int]]:
    """The network, and where in it each activation is that can be grafted, by name, in the order of computation.

    Raises: ValueError if there is none, or a ReLU is a function in forward or a module that is used at several places: what is
        grafted needs a mask of its own.
    """
    if isinstance(model, (nn.ReLU, GraftedReLU)):
        raise ValueError("model: there is no layer to graft in a bare ReLU; make it a module of a network")
    network = read(model, tuple(input_shape))
    graph, _ = _trace(model, tuple(input_shape))
    uses = Counter(str(fx.target) for fx in graph.nodes if fx.op == "call_module")
    at: dict[str, int] = {}
    for position, node in enumerate(network.nodes):
        if getattr(node.layer, "name", None) in ("relu", "grafted_relu"):
            if uses[node.name] > 1:
                raise ValueError(
                    f"layer {node.name!r}: a ReLU that is used at several places cannot be grafted; make one nn.ReLU "
                    "for each place"
                )
            if uses[node.name] < 1 or node.name in at:
                raise ValueError(
                    f"layer {node.name!r}: a ReLU function in forward cannot be grafted; make it an nn.ReLU module"
                )
            at[node.name] = position
    if not at:
        raise ValueError("model: there is no layer to graft; supported are nn.ReLU and lipfast.nn.GraftedReLU modules")
    return network, at


class _Running:
    """The statistics of one layer over the images so far."""

    def __init__(self, module: nn.Module, like: Tensor):
        self.grafted = torch.zeros_like(like, dtype=torch.bool)
        if isinstance(module, GraftedReLU):
            self.grafted |= module.mask
        self.interval, self.count = torch.zeros_like(like), torch.zeros_like(like, dtype=torch.int64)
        self.slope, self.intercept, self.active = (torch.zeros_like(like, dtype=torch.float64) for _ in range(3))

    def add(self, name: str, lower: Tensor, upper: Tensor, measure: Callable[[Tensor, Tensor], Tensor]) -> None:
        if not (upper - lower).isfinite().all():
            raise ValueError(f"score: boxes must be finite, got NaN or Inf before layer {name!r}")
        unstable = (lower < 0) & (upper > 0) & ~self.grafted
        slope = torch.where(unstable, upper / (upper - lower), 0.0)
        self.interval = torch.maximum(self.interval, torch.where(unstable, measure(lower, upper), 0.0).amax(0))
        self.count += unstable.sum(0)
        self.slope += slope.sum(0, dtype=torch.float64)
        self.intercept -= (slope * lower).sum(0, dtype=torch.float64)
        self.active += (lower >= 0).sum(0)

    def chord(self, images: int) -> tuple[Tensor, Tensor]:
        times = self.count.clamp(min=1)
        return torch.where(self.count > 0, self.slope / times, self.active / images), self.intercept / times


def _boxes(model: nn.Module, x: Tensor, eps: float, bounds: str, pixel_range) -> dict[str, tuple[Tensor, Tensor]]:
    """Before each activation, by its name."""
    if bounds == "crown":
        return crown(model, x, eps, pixel_range=pixel_range).layers
    return interval(model, x, eps, kind="estimate", pixel_range=pixel_range).layers


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[Tensor | None]:
    """The model in eval mode, and afterwards as it was. Yields a parameter, for its dtype and device."""
    modes = [(module, module.training) for module in model.modules()]
    like = next((t for t in model.parameters() if t.is_floating_point()), None)
    try:
        model.eval()
        with torch.autocast("cpu" if like is None else like.device.type, enabled=False):
            yield like
    finally:
        for module, mode in modes:
            module.training = mode


def _batches(data: Any, limit: int | None, batch_size: int) -> Iterator[Tensor]:
    """At most ``batch_size`` images at a time, as floats; ``limit`` in all."""
    left = math.inf if limit is None else limit
    for images in _given(data, batch_size):
        if not isinstance(images, Tensor) or images.ndim < 2:
            what = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"score: data must give images (B, ...) or pairs (images, labels), got {what}")
        if not images.is_floating_point() and images.dtype != torch.uint8:
            raise ValueError(f"score: images must be floating, with pixels in [0, 1], or uint8, got {images.dtype}")
        taken = images[: int(min(left, len(images)))]
        yield from (unit(x) for x in taken.split(batch_size) if len(x))
        left -= len(taken)
        if left <= 0:  # asks for no batch in vain: the next may be slow to read
            return


def _given(data: Any, batch_size: int) -> Iterator[Any]:
    if isinstance(data, (Dataset, Folder)):
        data = data.in_order(batch_size)
    elif isinstance(data, Tensor) or _is_pair(data):
        data = [data]
    elif not isinstance(data, Iterable):
        raise ValueError(f"score: data must be a Dataset, images, (images, labels) or batches, got {type(data).__name__}")
    for batch in data:
        yield batch[0] if _is_pair(batch) else batch


def _is_pair(batch: Any) -> bool:
    """Images and labels, where two batches of images are not."""
    two = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)
    return two and batch[1].ndim == 1


def _bar(data: Any, limit: int | None, batch_size: int, progress: bool) -> Iterable[Tensor]:
    batches = _batches(data, limit, batch_size)
    try:
        from tqdm.auto import tqdm
    except ImportError:  # the bar is a comfort, not a need
        return batches
    size = len(data[0]) if _is_pair(data) else len(data) if isinstance(data, (Dataset, Folder, Tensor)) else math.inf
    size = min(size, math.inf if limit is None else limit)
    total = None if size == math.inf else math.ceil(size / batch_size)
    return tqdm(batches, "score", total, unit="batch", leave=False, disable=not progress)


def _check_pixels(x: Tensor, pixel_range: tuple[float, float] | None) -> None:
    if pixel_range is not None and not ((x >= pixel_range[0]) & (x <= pixel_range[1])).all():
        raise ValueError(f"score: pixels must be within pixel_range {pixel_range}, got {x.min():g} to {x.max():g}")


def _check(model, eps, bounds, measure, limit, batch_size, pixel_range) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"score: model must be an nn.Module, got {type(model).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"score: eps must be positive and finite, got {eps}")
    for name, value, known in (("bounds", bounds, BOUNDS), ("measure", measure, tuple(MEASURES))):
        if value not in known:
            raise ValueError(f"score: {name} must be one of {', '.join(known)}, got {value!r}")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"score: {name} must be at least 1, got {value}")
    if pixel_range is not None and not pixel_range[0] < pixel_range[1]:
        raise ValueError(f"score: pixel_range must be (low, high) with low < high, got {pixel_range}")
