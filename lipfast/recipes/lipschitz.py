"""What recipes that train with l2 Lipschitz constants share: a radius that grows, and power iterations that go on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipfast import bounds
from lipfast.bounds import Norms
from lipfast.recipes.recipe import Memory, Recipe, normalises
from lipfast.schedules import linear_ramp, log_ramp

_RAMPS: dict[str, Callable[[float, float, float], float]] = {"linear": linear_ramp, "log": log_ramp}
_CONVERGED = 100  # power iterations from a start that knows nothing; GloRo's code takes at most as many


@dataclass(frozen=True, kw_only=True)
class Lipschitz(Recipe):
    """Certified training in the l2 norm with constants from power iterations, which estimate each norm from below.

    One vector per layer is kept from step to step, and converges anew when an epoch begins and for every evaluation.

    Attributes:
        eps_train: the radius of training when it is full.
        ramp: how it grows there: "linear" or "log", see :mod:`lipfast.schedules`.
        ramp_start, ramp_length: the epochs during which it grows; before, while it is 0, the loss is the cross entropy.
        iterations: of the power method per step.
        init: of the weights, "orthogonal" (GloRo) or "fan_out" (Local-Lip's code).
    """

    eps_train: float
    ramp: str = "linear"
    ramp_start: float = 0.0
    ramp_length: float = 0.0
    iterations: int = 2
    init: str = "orthogonal"

    p: ClassVar[float] = 2.0
    in_epochs: ClassVar[tuple[str, ...]] = (*Recipe.in_epochs, "ramp_start", "ramp_length")

    def __post_init__(self):
        super().__post_init__()
        for name in ("eps", "eps_train"):
            self.require(name, 0 < getattr(self, name) < math.inf, "positive and finite")
        for name in ("ramp_start", "ramp_length"):
            self.require(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        self.require("ramp", self.ramp in _RAMPS, f"one of {', '.join(_RAMPS)}")
        self.require("iterations", self.iterations >= 1, "at least 1")
        self.require("init", self.init in _INITIALISATIONS, f"one of {', '.join(_INITIALISATIONS)}")

    def initialise(self, model: nn.Module) -> None:
        _INITIALISATIONS[self.init](model)

    def schedule(self, epoch: float) -> dict[str, float]:
        """eps of training."""
        return {"eps": self.eps_train * _RAMPS[self.ramp](epoch, self.ramp_start, self.ramp_length)}

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, epoch: float, memory: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`Recipe.loss`. Constants, and the logits beside them, are those of the network in eval mode: batch norm with
        its running statistics, which a pass of the images has just moved."""
        now = self.schedule(epoch)
        if now["eps"] == 0:
            natural = F.cross_entropy(model(x), y)
            return natural, {"natural_loss": natural.detach()}
        if normalises(model):
            with torch.no_grad():
                model(x)
        model.eval()
        total, logits, parts = self.robust_loss(model, x, y, now, self.norms(model, x, memory))
        model.train()
        return total, {"natural_loss": F.cross_entropy(logits.detach(), y)} | parts

    def robust_loss(
        self, model: nn.Module, x: Tensor, y: Tensor, now: dict[str, float], norms: Norms
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The objective where eps > 0, the logits, and the parts; ``now`` is the schedule's, ``model`` in eval mode."""
        raise NotImplementedError

    def norms(self, model: nn.Module, x: Tensor, memory: Memory) -> Norms:
        """Estimates of the layers' norms, from the vectors in ``memory``, which are then moved on."""
        vectors = memory.get("vectors")
        iterations = _CONVERGED if vectors is None else self.iterations
        norms = bounds.norms(model, tuple(x.shape[1:]), "estimate", iterations, vectors)
        memory["vectors"] = norms.vectors
        return norms

    def converged(self, model: nn.Module, x: Tensor, memory: Memory) -> Norms:
        """The same for an evaluation, where the parameters stay: computed at the first batch."""
        if "norms" not in memory:
            memory["norms"] = self.norms(model, x, {})
        return memory["norms"]


def _orthogonal(model: nn.Module) -> None:
    """Orthogonal matrices as weights, a convolution's as (O, C kH kW), and no bias."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.orthogonal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _fan_out(model: nn.Module) -> None:
    """Convolutions from N(0, 2/(O kH kW)) and without bias; linear layers as torch makes them. So does Local-Lip's code."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            std = math.sqrt(2 / (module.weight.numel() / module.weight.shape[1]))
            torch.nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


_INITIALISATIONS: dict[str, Callable[[nn.Module], None]] = {"fan_out": _fan_out, "orthogonal": _orthogonal}
