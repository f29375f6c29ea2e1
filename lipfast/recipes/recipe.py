"""What every recipe is: hyper-parameters, an initialisation, a loss. The loop that uses them is :mod:`lipfast.train`."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lipfast.data import Images
from lipfast.nn import ClippedReLU, LiResConv2d
from lipfast.schedules import decay

Memory = dict[str, Any]
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "momentum": lambda parameters, **settings: torch.optim.SGD(parameters, momentum=0.9, **settings),
    "sgd": lambda parameters, **settings: torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **settings),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyper-parameters that all recipes share. Epochs may be fractions; radii are in units of pixels in [0, 1].

    Attributes:
        data: name of the data set it is made for.
        model, arguments: ``models.build(model, **arguments)``; the loop adds the data's shape and number of classes.
        milestones: epochs at which the learning rate is multiplied by ``lr_decay``.
        decay_start, lr_end: from that epoch on the learning rate falls exponentially, to ``lr_end`` when the last one ends;
            with ``lr_end`` 0 it does not.
        clip: largest l2 norm of the gradient.
        crop, flip, rotate, shift, randaugment: random shift by up to ``crop`` pixels, mirror image, rotation in degrees, shift
            as a fraction of the image and probability of RandAugment, see :func:`lipfast.data.batches`.
        eps: the radius at which the network is to be certified.
    """

    data: str
    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    epochs: int
    batch_size: int = 128
    optimizer: str = "adam"
    lr: float = 5e-4
    weight_decay: float = 0.0
    milestones: tuple[float, ...] = ()
    lr_decay: float = 0.2
    decay_start: float = 0.0
    lr_end: float = 0.0
    clip: float = 10.0
    crop: int = 0
    flip: bool = False
    rotate: float = 0.0
    shift: float = 0.0
    randaugment: float = 0.0
    seed: int = 0
    eps: float

    p: ClassVar[float]  # norm of the perturbation that the recipe trains for
    certificate: ClassVar[str]  # method of lipfast.certify that it trains for
    measured: ClassVar[tuple[str, ...]] = ()  # names of what :meth:`measures` finds
    in_epochs: ClassVar[tuple[str, ...]] = ("milestones", "decay_start")  # fields that with_epochs stretches

    def __post_init__(self):
        self.require("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        for name in ("epochs", "batch_size"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "clip"):
            self.require(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        for name in ("weight_decay", "lr_decay", "decay_start", "lr_end", "crop", "rotate", "shift", "seed", "eps"):
            self.require(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        self.require("randaugment", 0 <= self.randaugment <= 1, "a probability from 0 to 1")

    def require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"recipe: {name} must be {expected}, got {getattr(self, name)!r}")

    @classmethod
    def preset(cls, data: str) -> "Recipe":
        """The published (or our own, where it says so) setting for a data set."""
        raise NotImplementedError

    def initialise(self, model: nn.Module) -> None:
        """Sets the weights at the start."""

    def before_epoch(self, model: nn.Module, optimizer: Optimizer, data: Images, epoch: int) -> None:
        """What happens between epochs, ``epoch`` of them done. A resumed run begins with it again."""

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        """The last change of the weights before they are evaluated and kept, ``epoch`` epochs done."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, epoch: float, memory: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective on a batch, () with gradient, and its parts for the record, detached.

        Args:
            model: in training mode, and left there.
            x, y: (B, C, H, W) pixels in [0, 1], (B,) labels.
            epoch: epochs done so far, a real number.
            memory: what this recipe keeps from one step to the next. The loop hands over an empty one when an epoch begins,
                so that a resumed run needs none of it.
        """
        raise NotImplementedError

    def project(self, model: nn.Module) -> None:
        """Brings parameters back to where they are allowed; called after each step. Here: thresholds of clipped ReLU >= 0."""
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, ClippedReLU):
                    module.threshold.clamp_(min=0)

    def schedule(self, epoch: float) -> dict[str, float]:
        """The scheduled quantities at a time, for the record."""
        return {}

    def certified(self, model: nn.Module, x: Tensor, y: Tensor, epoch: float, memory: Memory) -> Tensor:  # (B,) bool
        """Where the label is certified at ``eps``, as estimated without regard to rounding. ``model`` is in eval mode.

        ``epoch``: epochs done so far. ``memory``: as for the loss, empty at the first batch of an evaluation.
        """
        raise NotImplementedError

    def measures(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:  # (B,) each
        """Further numbers of an evaluation, whose means over the test split go into the record. ``model`` is in eval mode."""
        return {}

    def conclude(self, model: nn.Module, test: Images, folder: Path) -> None:
        """What the first process does with the trained network, once; files go into the run folder."""

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """A parameter group may have an ``lr_factor``: the loop sets its learning rate to so many times :meth:`lr_at`."""
        return OPTIMIZERS[self.optimizer](model.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def lr_at(self, epoch: float) -> float:
        """The learning rate of a step, ``epoch`` epochs done so far. Here it changes from epoch to epoch only."""
        epoch = math.floor(epoch)
        lr = self.lr * self.lr_decay ** sum(m <= epoch for m in self.milestones)
        return lr * decay(epoch, self.decay_start, self.epochs, self.lr_end / self.lr) if self.lr_end else lr

    def with_epochs(self, epochs: int) -> "Recipe":
        """The same recipe stretched or squeezed to ``epochs``, its schedules in proportion."""
        scale = epochs / self.epochs
        values: dict[str, Any] = {"epochs": epochs}
        for name in self.in_epochs:
            value = getattr(self, name)
            values[name] = tuple(scale * v for v in value) if isinstance(value, tuple) else scale * value
        return dataclasses.replace(self, **values)

    def with_settings(self, settings: Mapping[str, Any]) -> "Recipe":
        """The same recipe with other fields. Values may be text as typed by a user: ``8/255``, ``50,60``, ``true``.

        Raises: ValueError for an unknown field or a value that does not fit.

        >>> from lipfast.recipes import Interval
        >>> Interval.preset("digits").with_settings({"eps": "8/255", "milestones": "5,7"}).milestones
        (5.0, 7.0)
        """
        types = {f.name: f.type for f in dataclasses.fields(self)}
        for name in settings:
            if name not in types:
                raise ValueError(f"recipe: no field {name!r}; fields are {', '.join(types)}")
        values = {name: _parsed(name, types[name], value) for name, value in settings.items()}
        return dataclasses.replace(self, **values)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _parsed(name: str, kind: Any, value: Any) -> Any:
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if kind in (float, int):
            number = Fraction(value) if isinstance(value, str) else value
            if kind is int and number != int(number):
                raise ValueError
            return kind(number)
        if kind in (bool, str):
            return kind(value)
        if kind == tuple[float, ...]:
            parts = value.split(",") if isinstance(value, str) else value
            return tuple(float(Fraction(p)) if isinstance(p, str) else float(p) for p in parts if p != "")
        return dict(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        what = getattr(kind, "__name__", "value") if isinstance(kind, type) else str(kind)
        raise ValueError(f"recipe: {name} must be {what}, got {value!r}") from error


def normalises(model: nn.Module) -> bool:
    """Whether bounds, which are of the network in eval mode, are of another function than the one in training mode."""
    return any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, LiResConv2d)) for m in model.modules())
