"""What recipes that train with l2 Lipschitz constants share: power iterations that go on, and a radius that grows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipfast import bounds
from lipfast.bounds import Norms
from lipfast.ops.certified_radius import certified_radius
from lipfast.recipes.recipe import Memory, Recipe, normalises
from lipfast.schedules import linear_ramp, log_ramp

_RAMPS: dict[str, Callable[[float, float, float], float]] = {"linear": linear_ramp, "log": log_ramp}
CONVERGED = 100  # power iterations from a start that knows nothing; GloRo's code takes at most as many


@dataclass(frozen=True, kw_only=True)
class Lipschitz(Recipe):
    """Certified training in the l2 norm with constants from power iterations, which estimate each norm from below.

    Their vectors are kept from step to step, and converge anew when an epoch begins and for every evaluation.

    Attributes:
        method: of the constants, of :func:`lipfast.bounds.lipschitz`.
        iterations: of the power method per step.
        init: of the weights, "orthogonal" (GloRo) or "fan_out" (Local-Lip's code).
    """

    method: str = "product"
    iterations: int = 2
    init: str = "orthogonal"

    p: ClassVar[float] = 2.0
    methods: ClassVar[tuple[str, ...]] = ("product", "liplt")
    force: ClassVar[str] = "eps"  # the scheduled quantity that is 0 as long as the loss is the cross entropy

    def __post_init__(self):
        super().__post_init__()
        self.require("eps", 0 < self.eps < math.inf, "positive and finite")
        self.require("method", self.method in self.methods, f"one of {', '.join(self.methods)}")
        self.require("iterations", self.iterations >= 1, "at least 1")
        self.require("init", self.init in _INITIALISATIONS, f"one of {', '.join(_INITIALISATIONS)}")

    def initialise(self, model: nn.Module) -> None:
        _INITIALISATIONS[self.init](model)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, epoch: float, memory: Memory) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`Recipe.loss`. Constants, and the logits beside them, are those of the network in eval mode: batch norm with
        its running statistics, which a pass of the images has just moved."""
        now = self.schedule(epoch)
        if now[self.force] == 0:
            natural = F.cross_entropy(model(x), y)
            return natural, {"natural_loss": natural.detach()}
        if normalises(model):
            with torch.no_grad():
                model(x)
        model.eval()
        total, logits, parts = self.robust_loss(model, x, y, now, memory)
        model.train()
        return total, {"natural_loss": F.cross_entropy(logits.detach(), y)} | parts

    def robust_loss(
        self, model: nn.Module, x: Tensor, y: Tensor, now: dict[str, float], memory: Memory
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The objective where ``force`` > 0, the logits, and the parts; ``now`` is the schedule's, ``model`` in eval mode."""
        raise NotImplementedError

    def certified(self, model: nn.Module, x: Tensor, y: Tensor, epoch: float, memory: Memory) -> Tensor:
        if "constants" not in memory:
            memory["constants"] = self.constants(model, x, {})
        radius, prediction = certified_radius(model(x), memory["constants"])
        return (prediction == y) & (radius > self.eps)

    def constants(self, model: nn.Module, x: Tensor, memory: Memory) -> Tensor:  # (K, K)
        """Estimates of the constants over all inputs, from the vectors in ``memory``, which are then moved on."""
        shape = tuple(x.shape[1:])
        if self.method == "product":
            return bounds.lipschitz(model, shape, 2, "product", "estimate", self.norms(model, x, memory))
        vectors = memory.get("vectors")
        found = bounds.liplt(model, shape, CONVERGED if vectors is None else self.iterations, vectors)
        memory["vectors"] = found.vectors
        return found.pairwise

    def norms(self, model: nn.Module, x: Tensor, memory: Memory) -> Norms:
        """Estimates of the layers' norms, from and to ``memory`` alike."""
        vectors = memory.get("vectors")
        iterations = CONVERGED if vectors is None else self.iterations
        norms = bounds.norms(model, tuple(x.shape[1:]), "estimate", iterations, vectors)
        memory["vectors"] = norms.vectors
        return norms


@dataclass(frozen=True, kw_only=True)
class Growing(Lipschitz):
    """Training for a radius that grows.

    Attributes:
        eps_train: the radius of training when it is full.
        ramp: how it grows there: "linear" or "log", see :mod:`lipfast.schedules`.
        ramp_start, ramp_length: the epochs during which it grows; before, while it is 0, the loss is the cross entropy.
    """

    eps_train: float
    ramp: str = "linear"
    ramp_start: float = 0.0
    ramp_length: float = 0.0

    in_epochs: ClassVar[tuple[str, ...]] = (*Recipe.in_epochs, "ramp_start", "ramp_length")

    def __post_init__(self):
        super().__post_init__()
        self.require("eps_train", 0 < self.eps_train < math.inf, "positive and finite")
        for name in ("ramp_start", "ramp_length"):
            self.require(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        self.require("ramp", self.ramp in _RAMPS, f"one of {', '.join(_RAMPS)}")

    def schedule(self, epoch: float) -> dict[str, float]:
        """eps of training."""
        return {"eps": self.eps_train * _RAMPS[self.ramp](epoch, self.ramp_start, self.ramp_length)}


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
