"""What an l_inf robust network is worth at one radius: its accuracy, under attack, proven; and what proofs have to fight with.

The table of Han and Kim 2025 (https://arxiv.org/abs/2510.25130): clean (SA), attacked (RA) and verified accuracy (VA), the
share of unstable units (UNR), the mean lower bound of the margin, the local Lipschitz constant, and times.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipfast._version import __version__
from lipfast.attacks import pgd
from lipfast.bounds._interval_rules import Box
from lipfast.bounds.crown import crown
from lipfast.bounds.interval import interval
from lipfast.bounds.jacobian import jacobian
from lipfast.checkpoint import replace_file
from lipfast.data import Images
from lipfast.nn import GraftedReLU

NAME = "evaluation.json"  # in a run folder
METHODS: dict[str, Callable[..., Any]] = {"interval": interval, "crown": crown}  # each gives boxes and margins


@dataclass(frozen=True)
class Evaluation:
    """Means over the first ``images`` test images, at l_inf radius ``eps``, pixels clipped to [0, 1].

    Attributes:
        eps: in units of the pixels.
        clean_accuracy, attacked_accuracy: of the images themselves, and of the worst that PGD found.
        verified_accuracy: by method, the share of images that are right within the whole ball, proven, rounding included.
        lower_bound: by method, the mean over images of the least lower bound of ``logit[label] - logit[j]``.
        unstable_ratio: by method, the mean over images of the share of units whose input's box contains 0 inside. Of all units
            of activations; grafted ones are never unstable.
        grafted_ratio: the share of grafted units.
        lipschitz: the mean l_inf constant of the balls, proven (:func:`lipfast.bounds.jacobian`, with the boxes of the last
            method).
        attack: steps and starts of PGD.
        seconds: per image, by what they were spent on.
    """

    data: str
    images: int
    eps: float
    clean_accuracy: float
    attacked_accuracy: float
    verified_accuracy: dict[str, float]
    lower_bound: dict[str, float]
    unstable_ratio: dict[str, float]
    grafted_ratio: float
    lipschitz: float
    attack: tuple[int, int]
    seconds: dict[str, float]
    versions: dict[str, str] = field(default_factory=lambda: {"lipfast": __version__, "torch": torch.__version__})

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON, whole or not at all."""
        replace_file(path, (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Evaluation":
        """Reads what :meth:`save` wrote. Raises: ValueError if the file is damaged or something else."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{**values, "attack": tuple(values["attack"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"Evaluation.load: {path} is damaged or no evaluation ({error})") from error

    def lines(self) -> list[tuple[str, str]]:
        """Name and value of each number, for people."""
        percent = lambda fraction: f"{100 * fraction:.2f} %"
        rows = [("clean accuracy", percent(self.clean_accuracy))]
        rows += [(f"under attack (PGD, {self.attack[0]} steps, {self.attack[1]} starts)", percent(self.attacked_accuracy))]
        for method, accuracy in self.verified_accuracy.items():
            rows += [
                (f"verified, {method} (bound)", percent(accuracy)),
                (f"mean lower bound of the margin, {method}", f"{self.lower_bound[method]:.4g}"),
                (f"unstable units, {method}", percent(self.unstable_ratio[method])),
            ]
        rows += [("grafted units", percent(self.grafted_ratio))]
        rows += [("local l_inf Lipschitz constant (bound)", f"{self.lipschitz:.4g}")]
        return rows + [(f"seconds per image, {what}", f"{seconds:.3g}") for what, seconds in self.seconds.items()]


def evaluate(
    model: nn.Module,
    data: Images,
    eps: float,
    methods: tuple[str, ...] = ("interval", "crown"),
    limit: int | None = 1000,
    steps: int = 100,
    restarts: int = 1,
    batch_size: int = 64,
    progress: bool = True,
) -> Evaluation:
    """Evaluates ``model`` on test images in the l_inf ball.

    Args:
        model: made of the layers that :mod:`lipfast.bounds` knows, of those that CROWN knows for "crown". It is put into eval
            mode, and back. On the device of ``data``.
        eps: radius, in units of pixels in [0, 1].
        methods: of verification: "interval", "crown" or both.
        limit: take only the first so many images; None takes all.
        steps, restarts: of PGD, the first from the image itself, the others from a random point; its step is 2.5 eps / steps.

    Raises: ValueError if an argument is out of range, there is no image, or a layer is not supported.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise ValueError(f"evaluate: methods must be of {', '.join(METHODS)}, got {', '.join(map(repr, unknown)) or 'none'}")
    if not 0 < eps < math.inf:
        raise ValueError(f"evaluate: eps must be positive and finite, got {eps}")
    for name, value in (("limit", limit), ("steps", steps), ("restarts", restarts), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"evaluate: {name} must be at least 1, got {value}")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _evaluate(model, data, eps, methods, limit, (steps, restarts), batch_size, progress)
    finally:
        for module, mode in modes:
            module.training = mode


def _evaluate(model, data, eps, methods, limit, attack, batch_size, progress) -> Evaluation:
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    masks = {name: module.mask for name, module in model.named_modules() if isinstance(module, GraftedReLU)}
    clock, sums = _Clock(), _Sums()
    units = 0
    for x, y in _bar(_first(data, limit, batch_size), progress):
        x, generator = x.to(dtype), torch.Generator(x.device).manual_seed(0)
        with torch.no_grad():
            sums.add("clean", model(x).argmax(1) == y)
        with clock("attack"):
            steps, restarts = attack
            found = pgd(model, x, y, eps, math.inf, steps, restarts, 2.5 * eps / steps, generator=generator)
        with torch.no_grad():
            sums.add("attacked", model(found).argmax(1) == y)
        layers = None  # the tightest boxes before activations that there are
        for method in methods:
            with clock(method):
                boxes = METHODS[method](model, x, eps, pixel_range=(0.0, 1.0))
                margin = boxes.margin(y)
            least = margin.double().scatter(1, y[:, None], math.inf).amin(1)
            sums.add(f"verified {method}", (least > 0) & margin.isfinite().all(1))
            sums.add(f"bound {method}", least)
            layers = boxes.layers
            unstable, units = _unstable(boxes.layers, masks, x)
            sums.add(f"unstable {method}", unstable / max(1, units))
        with clock("lipschitz"):
            sums.add("lipschitz", jacobian(model, x, eps, pixel_range=(0.0, 1.0), layers=layers))
    if not sums.count:
        raise ValueError("evaluate: data must have at least one image, got none")
    mean = sums.mean
    return Evaluation(
        data=data.name,
        images=sums.count,
        eps=float(eps),
        clean_accuracy=mean("clean"),
        attacked_accuracy=mean("attacked"),
        verified_accuracy={method: mean(f"verified {method}") for method in methods},
        lower_bound={method: mean(f"bound {method}") for method in methods},
        unstable_ratio={method: mean(f"unstable {method}") for method in methods},
        grafted_ratio=sum(int(mask.sum()) for mask in masks.values()) / max(1, units),
        lipschitz=mean("lipschitz"),
        attack=attack,
        seconds={what: seconds / sums.count for what, seconds in clock.seconds.items()},
    )


def _unstable(layers: dict[str, Box], masks: dict[str, Tensor], like: Tensor) -> tuple[Tensor, int]:
    """How many units of each image are unstable, (B,), and how many units there are."""
    count, units = torch.zeros(len(like), device=like.device), 0
    for name, (lower, upper) in layers.items():
        unstable = (lower < 0) & (upper > 0)
        count += (unstable & ~masks[name] if name in masks else unstable).flatten(1).sum(1)
        units += lower[0].numel()
    return count, units


def _first(data: Images, limit: int | None, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    left = len(data) if limit is None else min(limit, len(data))
    for x, y in data.in_order(batch_size):
        if left <= 0:
            return
        yield x[:left], y[:left]
        left -= len(x)


class _Sums:
    """Means of numbers that come batch by batch."""

    def __init__(self):
        self.totals: dict[str, float] = {}
        self.count = 0

    def add(self, name: str, values: Tensor) -> None:
        if name == "clean":
            self.count += len(values)
        self.totals[name] = self.totals.get(name, 0.0) + values.double().sum().item()

    def mean(self, name: str) -> float:
        return self.totals[name] / self.count


class _Clock:
    """Seconds, by what they were spent on; every block ends by reading its result."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, what: str) -> "_Clock":
        self.what = what
        return self

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[self.what] = self.seconds.get(self.what, 0.0) + time.perf_counter() - self.start


def _bar(batches: Iterator, progress: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:  # the bar is a comfort, not a need
        return batches
    return tqdm(batches, "evaluate", unit="batch", leave=False, disable=not progress)
