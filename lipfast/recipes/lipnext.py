"""LipNeXt (Hu et al. 2026, https://arxiv.org/abs/2601.18513): EMMA, orthogonal matrices kept so by the optimiser.

The published text leaves open much of the training; what it does not tell is LiResNet's (Hu et al. 2023,
https://arxiv.org/abs/2301.12549, and its code), whose own network trains here as well: ``--set model=liresnet``.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lipfast import losses
from lipfast.ops.pairwise_distance import pairwise_distance
from lipfast.optim import ManifoldAdam, parameter_groups
from lipfast.recipes.lipschitz import Lipschitz
from lipfast.recipes.recipe import Memory
from lipfast.schedules import cosine, linear_ramp


@dataclass(frozen=True, kw_only=True)
class Lipnext(Lipschitz):
    """Training for a radius that grows past ``eps``.

    A model with orthogonal parameters takes :class:`lipfast.optim.ManifoldAdam`, and all of it but its last layer counts as
    1-Lipschitz in the loss; the certificate measures. Any other model takes ``optimizer`` and power iterations.

    Attributes:
        reach, reach_start: the radius of training is ``eps`` times a factor that grows in a straight line from ``reach_start``
            to ``reach`` over the first ``ramp_length`` epochs.
        least: of :func:`lipfast.losses.emma`.
        temperature: logits and constants are divided by it in the loss, which leaves radii as they are. A 1-Lipschitz network's
            logits differ by no more than its images do, so small images need one below 1.
        warmup: epochs in which the learning rate rises in a straight line; from then on it falls as a cosine to ``lr_end``.
            Both are set anew at each step.
        lookahead, retraction: of ManifoldAdam.
        autocast: "float32", or "bfloat16" for products in that type beside float32 parameters.
    """

    reach: float = 3.0
    reach_start: float = 0.1
    ramp_length: float = 0.0
    least: float = 0.01
    temperature: float = 1.0
    warmup: float = 0.0
    lookahead: int = 6
    retraction: int = 50
    autocast: str = "float32"
    optimizer: str = "nadam"

    certificate: ClassVar[str] = "product"
    in_epochs: ClassVar[tuple[str, ...]] = (*Lipschitz.in_epochs, "ramp_length", "warmup")

    def __post_init__(self):
        super().__post_init__()
        for name in ("reach", "reach_start", "ramp_length", "warmup"):
            self.require(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        self.require("temperature", 0 < self.temperature < math.inf, "positive and finite")
        self.require("least", 0 <= self.least <= 1, "from 0 to 1")
        for name in ("lookahead", "retraction"):
            self.require(name, getattr(self, name) >= 0, "a number of steps, 0 for none")
        self.require("autocast", self.autocast in ("float32", "bfloat16"), "'float32' or 'bfloat16'")

    @classmethod
    def preset(cls, data: str) -> "Lipnext":
        """The published sizes for CIFAR, Tiny-ImageNet and ImageNet, for digits and MNIST small ones of our own.

        >>> Lipnext.preset("cifar10").arguments
        {'depth': 32, 'width': 1024}
        """
        if data not in _PRESETS:
            raise ValueError(f"lipnext: no preset for {data!r}; there are {', '.join(_PRESETS)}")
        return _PRESETS[data]

    def initialise(self, model: nn.Module) -> None:
        """Nothing: these models begin as they are built."""

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        groups = parameter_groups(model)
        if not any(group["orthogonal"] for group in groups):
            return super().make_optimizer(model)
        return ManifoldAdam(
            groups, self.lr, weight_decay=self.weight_decay, lookahead=self.lookahead, retraction=self.retraction
        )

    def lr_at(self, epoch: float) -> float:
        if epoch < self.warmup:
            return self.lr * (epoch + 1e-3 * self.warmup) / (1.001 * self.warmup)  # a first step of 0 would be no step
        return self.lr_end + (self.lr - self.lr_end) * cosine(epoch, self.warmup, self.epochs - self.warmup)

    def schedule(self, epoch: float) -> dict[str, float]:
        """eps of training."""
        growth = linear_ramp(epoch, 0.0, self.ramp_length)
        return {"eps": self.eps * (self.reach_start + (self.reach - self.reach_start) * growth)}

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, epoch: float, memory: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast == "bfloat16"):
            logits = model(x)
        logits = logits.float()
        model.eval()
        constants = self.constants(model, x, memory)
        model.train()
        eps = self.schedule(epoch)["eps"]
        total = losses.emma(logits / self.temperature, constants / self.temperature, y, eps, self.least)
        parts = {"natural_loss": F.cross_entropy(logits.detach(), y), "lipschitz": constants.detach().amax()}
        return total, parts

    def constants(self, model: nn.Module, x: Tensor, memory: Memory) -> Tensor:
        if any(group["orthogonal"] for group in parameter_groups(model)):
            *_, head = (module for module in model.modules() if isinstance(module, nn.Linear))
            return pairwise_distance(head.weight)
        return super().constants(model, x, memory)


_CIFAR = Lipnext(
    data="cifar10",
    model="lipnext",
    arguments={"depth": 32, "width": 1024},
    epochs=800,
    batch_size=256,
    lr=1e-3,
    lr_end=1e-8,
    warmup=20,
    ramp_length=400,
    clip=3.0,
    crop=4,
    flip=True,
    randaugment=0.5,
    eps=36 / 255,
    autocast="bfloat16",
)
_PRESETS = {
    "digits": Lipnext(
        data="digits",
        model="lipnext",
        arguments={"depth": 4, "width": 128},
        epochs=40,
        batch_size=64,
        lr=1e-2,
        warmup=2,
        ramp_length=20,
        reach=1.5,
        temperature=0.1,
        eps=0.3,
    ),
    "mnist": Lipnext(
        data="mnist",
        model="lipnext",
        arguments={"depth": 6, "width": 128, "patch": 4},
        epochs=20,
        batch_size=256,
        lr=1e-2,
        warmup=1,
        ramp_length=10,
        reach=1.0,
        temperature=0.5,
        eps=1.58,
    ),
    "cifar10": _CIFAR,
    "cifar100": dataclasses.replace(_CIFAR, data="cifar100", arguments={"depth": 32, "width": 2048}),
    "tiny-imagenet": dataclasses.replace(
        _CIFAR, data="tiny-imagenet", arguments={"depth": 32, "width": 2048, "patch": 4, "checkpointing": True}, crop=8
    ),
    "imagenet": dataclasses.replace(
        _CIFAR,
        data="imagenet",
        arguments={"depth": 32, "width": 4096, "patch": 16, "checkpointing": True},
        epochs=400,
        ramp_length=200,
        reach=2.0,
        crop=0,  # these images are cropped as they are read
    ),
}
_PRESETS["images"] = dataclasses.replace(_PRESETS["imagenet"], data="images")
