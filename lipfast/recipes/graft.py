"""Lipschitz-aware linearity grafting (Han and Kim 2025, https://arxiv.org/abs/2510.25130): a network is trained against
attacks, the units that dominate its l_inf local Lipschitz constant are made straight lines, and training goes on.

Both phases take fast adversarial training with gradient alignment (FAT, GradAlign), the second two terms more:

    loss  =  CE(attacked image) + alignment L_GradAlign                          before grafting
    loss  =  the same + slope_weight L_slope + l1_weight ||W||_1                  after it

The network has :class:`lipfast.nn.GraftedReLU` throughout, whose masks are empty, so that it is a ReLU network, until the epoch
``pretrain``. Then every unit is scored on calibration images, masks are selected and written. They are part of the checkpoint,
so a run goes on after any epoch. The paper's text was not at hand: what it leaves open is a field here, what is not known of it
is taken from its predecessor (Chen et al. 2022, https://arxiv.org/abs/2206.07839, and its code).
"""

import dataclasses
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lipfast import checkpoint, evaluation, losses
from lipfast.attacks import fgsm
from lipfast.bounds import interval, interval_margin
from lipfast.data import Dataset, Images
from lipfast.grafting import graft, score, select
from lipfast.grafting.prune import prune
from lipfast.grafting.scores import BOUNDS, MEASURES
from lipfast.grafting.selection import POOLS, ROWS, RULES
from lipfast.losses.slope import FORMS
from lipfast.nn import GraftedReLU
from lipfast.recipes.recipe import OPTIMIZERS, Memory, Recipe
from lipfast.schedules import cosine

_PIXELS = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Graft(Recipe):
    """Adversarial training with grafting in between.

    Attributes:
        pretrain: the epoch before which units are grafted: 0, at once; ``epochs``, never.
        start: a checkpoint or run folder whose weights the run begins with, "" for none; with ``pretrain`` 0 in place of
            training a network first.
        finetune_lr: of the weights after grafting, falling along a cosine. ``lr`` and ``milestones`` are those before it.
        line_lr: of slopes and intercepts, falling alike; without weight decay.
        step: of the attack, in units of ``eps``.
        alignment: weight of :func:`lipfast.losses.gradient_alignment`.
        slope_weight, slope_form: of :func:`lipfast.losses.slope` after grafting, summed over units.
        l1_weight: of :func:`lipfast.losses.l1` after grafting.
        prune: weights below it are set to 0 when the last epoch ends.
        calibration: how many training images the scores are taken on.
        bounds, measure: of the scores, see :func:`lipfast.grafting.score`.
        rule, ratio, pool, pool_fraction, restrict_rows: of the choice, see :func:`lipfast.grafting.select`.
        evaluation: how many test images the trained network is evaluated on (:func:`lipfast.evaluation.evaluate`), 0 for none.
        line: "fixed", all lines start with ``line_slope`` and ``line_intercept``; "chord", each on its unit's chord.
    """

    optimizer: str = "momentum"
    pretrain: float
    start: str = ""
    finetune_lr: float = 1e-3
    line_lr: float = 1e-2
    step: float = 1.25
    alignment: float = 0.2
    slope_weight: float = 1e-4
    slope_form: str = "product"
    l1_weight: float = 1e-6
    prune: float = 0.0
    calibration: int = 1000
    bounds: str = "interval"
    measure: str = "width"
    rule: str = "weighted"
    ratio: float = 0.15
    pool: str = "global"
    pool_fraction: float = 0.8
    restrict_rows: str = "none"
    evaluation: int = 1000
    line: str = "fixed"
    line_slope: float = 0.4
    line_intercept: float = 0.0

    p: ClassVar[float] = math.inf
    certificate: ClassVar[str] = "crown"
    measured: ClassVar[tuple[str, ...]] = ("fgsm_accuracy", "unstable_ratio", "grafted_ratio")
    in_epochs: ClassVar[tuple[str, ...]] = (*Recipe.in_epochs, "pretrain")

    def __post_init__(self):
        super().__post_init__()
        self.require("pretrain", 0 <= self.pretrain <= self.epochs, f"from 0 to epochs, {self.epochs}")
        self.require("eps", 0 < self.eps < math.inf, "positive and finite")
        for name in ("finetune_lr", "line_lr"):
            self.require(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        for name in ("step", "alignment", "slope_weight", "l1_weight", "prune"):
            self.require(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        choices: dict[str, Iterable[str]] = {"slope_form": FORMS, "bounds": BOUNDS, "measure": MEASURES, "rule": RULES}
        choices |= {"pool": POOLS, "restrict_rows": ROWS, "line": ("fixed", "chord")}
        for name, known in choices.items():  # told now, not between the phases
            self.require(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        self.require("calibration", self.calibration >= 1, "at least 1")
        self.require("evaluation", self.evaluation >= 0, "at least 0")
        for name in ("ratio", "pool_fraction"):
            self.require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")

    @classmethod
    def preset(cls, data: str) -> "Graft":
        """The predecessor's schedule for CIFAR-10; short ones of our own for the others.

        >>> Graft.preset("cifar10").pretrain
        200
        """
        if data not in _PRESETS:
            raise ValueError(f"graft: no preset for {data!r}; there are {', '.join(_PRESETS)}")
        return _PRESETS[data]

    @property
    def grafted_at(self) -> int:
        return round(self.pretrain)

    def initialise(self, model: nn.Module) -> None:
        if not any(isinstance(module, GraftedReLU) for module in model.modules()):
            raise ValueError(
                f"graft: model {self.model} must have GraftedReLU activations: arguments={{'activation': 'grafted_relu'}}"
            )
        if self.start:
            _load(model, self.start)

    def before_epoch(self, model: nn.Module, optimizer: Optimizer, data: Images, epoch: int) -> None:
        """Scores, selects and grafts, once."""
        if epoch != self.grafted_at:
            return
        images = _calibration(data, self.calibration, self.seed)
        scores = score(model, images, self.eps, self.bounds, self.measure, self.calibration, progress=False)
        choice = self.ratio, self.rule, self.pool, self.pool_fraction, self.restrict_rows
        masks = select(model, scores, *choice, seed=self.seed)
        fixed = self.line_slope, self.line_intercept
        graft(model, masks, *(fixed if self.line == "fixed" else (scores.chord_slope, scores.chord_intercept)))
        optimizer.state.clear()  # momentum of another network

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, epoch: float, memory: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        model.eval()
        attacked = fgsm(model, x, y, self.eps, math.inf, self.step * self.eps, _PIXELS)
        model.train()
        total = F.cross_entropy(model(attacked), y)
        parts = {"adversarial_loss": total.detach()}

        def add(name: str, weight: float, penalty: Tensor) -> Tensor:
            parts[name] = penalty.detach()
            return total + weight * penalty

        if self.alignment:
            total = add("misalignment", self.alignment, losses.gradient_alignment(model, x, y, self.eps))
        if epoch >= self.grafted_at and self.slope_weight:
            total = add("slope_loss", self.slope_weight, self.slope_loss(model, x))
        if epoch >= self.grafted_at and self.l1_weight:
            total = add("l1", self.l1_weight, losses.l1(model))
        return total, parts

    def slope_loss(self, model: nn.Module, x: Tensor) -> Tensor:
        model.eval()
        boxes = interval(model, x, self.eps, kind="estimate", pixel_range=_PIXELS).layers
        model.train()
        masks = {name: module.mask for name, module in model.named_modules() if isinstance(module, GraftedReLU)}
        layers = [(*box, masks[name]) for name, box in boxes.items() if name in masks]
        return losses.slope(layers, self.slope_form, reduction="sum")

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        if epoch == self.epochs and self.prune:
            prune(model, self.prune)

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        lines = [p for m in model.modules() if isinstance(m, GraftedReLU) for p in (m.slope, m.intercept)]
        ids = {id(p) for p in lines}
        weights = {"params": [p for p in model.parameters() if id(p) not in ids], "weight_decay": self.weight_decay}
        straight = {"params": lines, "weight_decay": 0.0, "lr_factor": self.line_lr / self.finetune_lr}
        return OPTIMIZERS[self.optimizer]([weights, straight], lr=self.lr)

    def lr_at(self, epoch: float) -> float:
        if epoch < self.grafted_at:
            return super().lr_at(epoch)
        return self.finetune_lr * cosine(epoch, self.grafted_at, self.epochs - self.grafted_at)

    def certified(self, model: nn.Module, x: Tensor, y: Tensor, epoch: float, memory: Memory) -> Tensor:
        """By boxes, which are quick; what the network is made for is the method "crown"."""
        margin = interval_margin(model, x, y, self.eps, kind="estimate", pixel_range=_PIXELS)
        others = torch.arange(margin.shape[1], device=y.device) != y[:, None]
        return ((margin > 0) | ~others).all(1)

    def measures(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Accuracy under one step of attack, the share of units that are unstable by boxes, grafted ones being stable, and of
        grafted units."""
        with torch.enable_grad():
            attacked = fgsm(model, x, y, self.eps, math.inf, self.eps, _PIXELS, start="zero")
        boxes = interval(model, x, self.eps, kind="estimate", pixel_range=_PIXELS).layers
        unstable, grafted = (torch.zeros(len(x), device=x.device) for _ in range(2))
        units = 0
        for name, module in model.named_modules():
            if isinstance(module, GraftedReLU):
                lower, upper = boxes[name]
                unstable += ((lower < 0) & (upper > 0) & ~module.mask).flatten(1).sum(1)
                grafted += module.mask.sum()
                units += module.mask.numel()
        right = (model(attacked).argmax(1) == y).float()
        return {"fgsm_accuracy": right, "unstable_ratio": unstable / units, "grafted_ratio": grafted / units}

    def conclude(self, model: nn.Module, test: Images, folder: Path) -> None:
        path = folder / evaluation.NAME
        if self.evaluation and not path.exists():
            evaluation.evaluate(model, test, self.eps, limit=self.evaluation, progress=sys.stderr.isatty()).save(path)


def _load(model: nn.Module, start: str) -> None:
    """Weights of a checkpoint; one of a plain ReLU network has no lines yet."""
    tensors = checkpoint.load(start).state_dict()
    lines = {f"{name}.{t}" for name, m in model.named_modules() if isinstance(m, GraftedReLU) for t in m.state_dict()}
    own = model.state_dict()
    checkpoint.fill(model, {key: own[key] for key in lines} | tensors, f"start: {start}")


def _calibration(data: Images, count: int, seed: int) -> Any:
    """Training images without augmentation: a random part where all are in memory, else the first."""
    if not isinstance(data, Dataset):
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count].to(data.labels.device)
    return data.pixels(order), data.labels[order]


_MNIST = Graft(
    data="mnist",
    model="cnn_b",
    arguments={"activation": "grafted_relu"},
    epochs=16,
    pretrain=8,
    batch_size=128,
    optimizer="adam",
    lr=1e-3,
    milestones=(5, 7),
    finetune_lr=5e-4,
    line_lr=5e-3,
    eps=0.1,
)
_CIFAR = Graft(
    data="cifar10",
    model="cnn_b",
    arguments={"activation": "grafted_relu"},
    epochs=300,
    pretrain=200,
    batch_size=128,
    lr=0.1,
    lr_decay=0.1,
    milestones=(100, 150),
    weight_decay=5e-4,
    crop=4,
    flip=True,
    eps=2 / 255,
)
_PRESETS = {
    "digits": dataclasses.replace(
        _MNIST, data="digits", model="cnn_small", epochs=30, pretrain=15, batch_size=64, lr=2e-3, milestones=(10, 13), eps=0.05
    ),
    "mnist": _MNIST,
    "fashion-mnist": dataclasses.replace(_MNIST, data="fashion-mnist"),
    "cifar10": _CIFAR,
}
