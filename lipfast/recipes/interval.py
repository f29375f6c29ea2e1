"""Interval bound propagation (Gowal et al. 2018, https://arxiv.org/abs/1810.12715) with the initialisation, regularisers and
short warm-up of Shi et al. 2021 (https://arxiv.org/abs/2103.17268).

While eps grows from 0 to its full size

    loss = kappa CE(image) + (1 - kappa) CE(worst case) + lambda (1 - eps/eps_full) (L_tightness + L_relu);

see :mod:`lipfast.losses`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lipfast import losses
from lipfast.bounds import interval, interval_margin
from lipfast.recipes.recipe import Memory, Recipe, normalises
from lipfast.schedules import linear_ramp, smooth_ramp

_PIXELS = (0.0, 1.0)
_LEAST_EPS = 1e-6  # below it the boxes' widths, which the regularisers compare, are lost in rounding


@dataclass(frozen=True, kw_only=True)
class Interval(Recipe):
    """Certified training in the l_infinity norm.

    Attributes:
        eps_factor: the full radius of training is ``eps_factor * eps``.
        ramp_start, ramp_length: the epochs during which eps grows, see :func:`lipfast.schedules.smooth_ramp`.
        kappa_start, kappa_end: weight of the image's own loss before and after the ramp, linear in between.
        regulariser: lambda above.
    """

    eps_factor: float = 1.0
    ramp_start: float = 0.0
    ramp_length: float
    kappa_start: float = 0.0
    kappa_end: float = 0.0
    regulariser: float = 0.5

    p: ClassVar[float] = math.inf
    certificate: ClassVar[str] = "interval"
    in_epochs: ClassVar[tuple[str, ...]] = (*Recipe.in_epochs, "ramp_start", "ramp_length")

    def __post_init__(self):
        super().__post_init__()
        for name in ("eps_factor", "ramp_start", "ramp_length", "regulariser"):
            self.require(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        for name in ("kappa_start", "kappa_end"):
            self.require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")

    @classmethod
    def preset(cls, data: str) -> "Interval":
        """Shi et al.'s setting for CIFAR-10 at 8/255; our own, short ones, for the others.

        >>> Interval.preset("cifar10").epochs
        160
        """
        if data not in _PRESETS:
            raise ValueError(f"interval: no preset for {data!r}; there are {', '.join(_PRESETS)}")
        return _PRESETS[data]

    def initialise(self, model: nn.Module) -> None:
        """Weights from N(0, 2 pi/fan_in^2) in all layers but the last, which keep the width of a box (Shi et al. 2021).

        For a Gaussian weight E|w| = sigma sqrt(2/pi); half of the units pass a ReLU, so a layer multiplies the mean width
        by fan_in sigma sqrt(2/pi)/2, which is 1.
        """
        weighted = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))]
        for module in weighted[:-1]:
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=math.sqrt(2 * math.pi) / fan_in)

    def schedule(self, epoch: float) -> dict[str, float]:
        """eps of training and kappa."""
        done = linear_ramp(epoch, self.ramp_start, self.ramp_length)
        return {
            "eps": self.eps * self.eps_factor * smooth_ramp(epoch, self.ramp_start, self.ramp_length),
            "kappa": self.kappa_start + (self.kappa_end - self.kappa_start) * done,
        }

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, epoch: float, memory: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`Recipe.loss`. Boxes are those of the network in eval mode: batch norm with its running statistics, which
        the image's own pass has just moved; they carry no gradient."""
        now = self.schedule(epoch)
        eps, kappa = max(now["eps"], _LEAST_EPS), now["kappa"]
        logits = model(x) if kappa > 0 or normalises(model) else None
        model.eval()
        weight = self._weight(now["eps"])
        boxes = interval(model, x, eps, kind="estimate", pixel_range=_PIXELS, keep_layers=weight > 0)
        model.train()
        margin = boxes.margin(y)
        total = losses.interval(margin, y, logits, kappa)
        parts = {"robust_loss": losses.interval(margin.detach(), y)}
        if logits is not None:
            parts["natural_loss"] = nn.functional.cross_entropy(logits.detach(), y)
        if weight > 0:
            layers = list(boxes.layers.values())
            start = ((x - eps).clamp(*_PIXELS), (x + eps).clamp(*_PIXELS))
            penalty = losses.tightness(layers, start) + losses.relu_balance(layers)
            total = total + weight * penalty
            parts["regulariser"] = penalty.detach()
        return total, parts

    def _weight(self, eps: float) -> float:
        full = self.eps * self.eps_factor
        return self.regulariser * (1 - eps / full) if full else 0.0

    def certified(self, model: nn.Module, x: Tensor, y: Tensor, epoch: float, memory: Memory) -> Tensor:
        margin = interval_margin(model, x, y, self.eps, kind="estimate", pixel_range=_PIXELS)
        others = torch.arange(margin.shape[1], device=y.device) != y[:, None]
        return ((margin > 0) | ~others).all(1)


_MNIST = Interval(
    data="mnist",
    model="cnn_small",
    epochs=30,
    batch_size=256,
    lr=6e-3,
    milestones=(20, 26),
    eps=0.1,
    eps_factor=1.5,
    ramp_length=10,
)
_PRESETS = {
    "digits": Interval(
        data="digits", model="cnn_small", epochs=40, batch_size=64, lr=1e-2, milestones=(30, 36), eps=0.1, ramp_length=20
    ),
    "mnist": _MNIST,
    "fashion-mnist": dataclasses.replace(_MNIST, data="fashion-mnist"),
    "cifar10": Interval(
        data="cifar10",
        model="cnn7",
        arguments={"batch_norm": True},
        epochs=160,
        batch_size=128,
        lr=5e-4,
        milestones=(120, 140),
        crop=2,
        flip=True,
        eps=8 / 255,
        ramp_start=1,
        ramp_length=80,
    ),
}
