"""CRM: certified radius maximisation (Fazlyab et al. 2023, https://arxiv.org/abs/2310.00116).

The loss is :func:`lipfast.losses.crm` with the pairwise constants of LipLT, :func:`lipfast.bounds.liplt`. It knows no radius to
train for: every image that is classified rightly and whose radius is below ``radius_cap`` is pulled outwards.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lipfast import losses
from lipfast.losses.crm import FORMS
from lipfast.ops.certified_radius import certified_radius
from lipfast.recipes.lipschitz import Lipschitz
from lipfast.recipes.recipe import Memory, Recipe


@dataclass(frozen=True, kw_only=True)
class Crm(Lipschitz):
    """Training that maximises certified radii. Radii and their inverses are in units of pixels in [0, 1].

    Attributes:
        weight, sharpness, radius_cap, form, misclassified, boosted: of :func:`lipfast.losses.crm`; the first three are the
            paper's lambda, t and r_0.
        robust_start: the epoch at which the radii come in; before, the loss is the cross entropy.
    """

    weight: float
    sharpness: float
    radius_cap: float
    form: str = "soft_min"
    misclassified: bool = False
    boosted: bool = False
    robust_start: float = 0.0
    method: str = "liplt"
    iterations: int = 5

    certificate: ClassVar[str] = "liplt"
    force: ClassVar[str] = "weight"
    in_epochs: ClassVar[tuple[str, ...]] = (*Recipe.in_epochs, "robust_start")

    def __post_init__(self):
        super().__post_init__()
        for name in ("weight", "sharpness", "radius_cap"):
            self.require(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        self.require("form", self.form in FORMS, f"one of {', '.join(FORMS)}")
        self.require("robust_start", 0 <= self.robust_start < math.inf, "at least 0 and finite")

    @classmethod
    def preset(cls, data: str) -> "Crm":
        """The authors' settings, in pixel units; for digits a short one of our own.

        >>> Crm.preset("mnist").radius_cap
        2.2
        """
        if data not in _PRESETS:
            raise ValueError(f"crm: no preset for {data!r}; there are {', '.join(_PRESETS)}")
        return _PRESETS[data]

    def schedule(self, epoch: float) -> dict[str, float]:
        """Weight of the radii."""
        return {"weight": self.weight if epoch >= self.robust_start else 0.0}

    def robust_loss(
        self, model: nn.Module, x: Tensor, y: Tensor, now: dict[str, float], memory: Memory
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logits, constants = model(x), self.constants(model, x, memory)
        options = now["weight"], self.sharpness, self.radius_cap, self.form, self.misclassified, self.boosted
        total = losses.crm(logits, constants, y, *options)
        radius, prediction = certified_radius(logits.detach(), constants.detach())
        parts = {
            "robust_loss": total.detach() - F.cross_entropy(logits.detach(), y),
            "radius": radius.where(prediction == y, 0.0).clamp(max=self.radius_cap).mean(),
            "lipschitz": constants.detach().amax(),
        }
        return total, logits, parts


_MNIST = Crm(
    data="mnist",
    model="mnist_4c3f",
    epochs=400,
    batch_size=512,
    lr=1e-3,
    decay_start=25,
    lr_end=1e-6,
    eps=1.58,
    weight=30,
    sharpness=5,
    radius_cap=2.2,
    robust_start=10,
    iterations=10,
)
_PRESETS = {
    "digits": Crm(
        data="digits",
        model="cnn_small",
        epochs=40,
        batch_size=64,
        lr=3e-3,
        decay_start=20,
        lr_end=1e-4,
        eps=0.3,
        weight=30,
        sharpness=20,
        radius_cap=0.4,
        iterations=1,
    ),
    "mnist": _MNIST,
    "fashion-mnist": dataclasses.replace(_MNIST, data="fashion-mnist"),
    # The authors' images are 2 x - 1, so their radii are twice those in pixels. They take weight 15, sharpness 5 and cap 0.2:
    # (15/5) log sum exp(-5 (2 R)) is (30/10) log sum exp(-10 R). Their eps, 0.141, is 18/255 in pixels.
    "cifar10": Crm(
        data="cifar10",
        model="crm_6c2f",
        epochs=400,
        batch_size=512,
        lr=1e-3,
        decay_start=200,
        lr_end=1e-6,
        flip=True,
        rotate=10,
        shift=0.1,
        eps=36 / 255,
        weight=30,
        sharpness=10,
        radius_cap=0.1,
        robust_start=10,
    ),
    "tiny-imagenet": Crm(
        data="tiny-imagenet",
        model="tiny_8c2f",
        arguments={"padding": 0},
        epochs=300,
        batch_size=256,
        lr=1e-4,
        decay_start=100,
        lr_end=1e-7,
        flip=True,
        rotate=20,
        shift=0.2,
        eps=36 / 255,
        weight=150,
        sharpness=12,
        radius_cap=0.2,
        robust_start=10,
    ),
}
