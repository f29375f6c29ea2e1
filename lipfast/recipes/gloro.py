"""GloRo: globally robust networks (Leino et al. 2021, https://arxiv.org/abs/2102.08452).

The loss is :func:`lipfast.losses.gloro` with the network's global Lipschitz constants, so a step costs little more than a plain
one, whatever the batch. Once converged the same constants certify every image.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lipfast import losses
from lipfast.recipes.lipschitz import Growing
from lipfast.recipes.recipe import Memory
from lipfast.schedules import linear_ramp


@dataclass(frozen=True, kw_only=True)
class Gloro(Growing):
    """Training with global Lipschitz constants.

    Attributes:
        trades_start, trades_end: weight of the certificate's term at the start and the end of the run, linear in between; 1
            for the paper's cross entropy, else its TRADES form.
    """

    trades_start: float = 1.0
    trades_end: float = 1.0
    iterations: int = 5

    certificate: ClassVar[str] = "product"

    def __post_init__(self):
        super().__post_init__()
        for name in ("trades_start", "trades_end"):
            self.require(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")

    @classmethod
    def preset(cls, data: str) -> "Gloro":
        """The paper's settings; for digits a short one of our own. Augmentation is Local-Lip's.

        >>> Gloro.preset("cifar10").trades_end
        1.2
        """
        if data not in _PRESETS:
            raise ValueError(f"gloro: no preset for {data!r}; there are {', '.join(_PRESETS)}")
        return _PRESETS[data]

    def schedule(self, epoch: float) -> dict[str, float]:
        """eps of training and the TRADES weight."""
        done = linear_ramp(epoch, 0, self.epochs)
        return super().schedule(epoch) | {"trades": self.trades_start + (self.trades_end - self.trades_start) * done}

    def robust_loss(
        self, model: nn.Module, x: Tensor, y: Tensor, now: dict[str, float], memory: Memory
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logits = model(x)
        constants = self.constants(model, x, memory)
        total = losses.gloro(logits, constants, y, now["eps"], now["trades"])
        robust = losses.gloro(logits.detach(), constants.detach(), y, now["eps"])
        return total, logits, {"robust_loss": robust, "lipschitz": constants.detach().amax()}


_MNIST = Gloro(
    data="mnist",
    model="mnist_4c3f",
    epochs=300,
    batch_size=256,
    lr=1e-3,
    decay_start=150,
    lr_end=5e-6,
    eps=1.58,
    eps_train=1.75,
    iterations=10,
)
_PRESETS = {
    "digits": Gloro(
        data="digits",
        model="cnn_small",
        arguments={"activation": "max_min"},
        epochs=40,
        batch_size=64,
        lr=5e-3,
        decay_start=20,
        lr_end=1e-4,
        eps=0.3,
        eps_train=0.3,
        ramp_length=10,
    ),
    "mnist": _MNIST,
    "fashion-mnist": dataclasses.replace(_MNIST, data="fashion-mnist"),
    "cifar10": Gloro(
        data="cifar10",
        model="cifar_6c2f",
        epochs=800,
        batch_size=256,
        lr=1e-3,
        decay_start=400,
        lr_end=1e-6,
        crop=4,
        flip=True,
        eps=36 / 255,
        eps_train=1.1 * 36 / 255,
        ramp="log",
        ramp_start=20,
        ramp_length=400,
        trades_start=1.2,
        trades_end=1.2,
    ),
    "tiny-imagenet": Gloro(
        data="tiny-imagenet",
        model="tiny_8c2f",
        epochs=250,
        batch_size=256,
        lr=2.5e-4,
        decay_start=125,
        lr_end=5e-7,
        crop=4,
        flip=True,
        eps=36 / 255,
        eps_train=0.16,
    ),
}
