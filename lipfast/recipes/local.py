"""Local-Lip: training with local Lipschitz bounds (Huang et al. 2021, https://arxiv.org/abs/2111.01395), and the method that it
builds on, box constraint propagation (BCP; Lee et al. 2020, https://arxiv.org/abs/2006.09699).

While eps grows from 0 to its full size

    loss = kappa CE(image) + (1 - kappa) (robust + sparsity L_sparsity),

``robust`` as of :func:`lipfast.losses.local_lipschitz` or :func:`lipfast.losses.gloro`.

A step with local bounds costs several plain ones. ``local_start``, which is ours and not the papers', puts it off: until then
the same loss takes the network's constants over all inputs, at little more than the price of a plain step.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipfast import bounds, losses
from lipfast.bounds import Norms
from lipfast.losses import FORMS
from lipfast.nn import ClippedMaxMin, ClippedReLU
from lipfast.recipes.lipschitz import Growing
from lipfast.recipes.recipe import Memory
from lipfast.schedules import linear_ramp


@dataclass(frozen=True, kw_only=True)
class Local(Growing):
    """Training with the Lipschitz constant of each image's ball.

    Attributes:
        method: of :func:`lipfast.bounds.local`; "global" is BCP.
        local_start: the epoch at which its bounds come in; before, in the loss as in evaluations,
            :func:`lipfast.bounds.lipschitz` stands in for them, with neither boxes nor the sparsity loss.
        form: of the loss. "B" and "G": :func:`lipfast.losses.local_lipschitz`; "gloro": :func:`lipfast.losses.gloro` with each
            image's constants, without the last layer's box.
        kappa_start, kappa_end: weight of the image's own loss before and after the ramp, linear in between. The papers take
            1 and 0 for "B", 0 for the others.
        sparsity: weight of :func:`lipfast.losses.sparsity`.
        iterations: of the power method per step, for the layers' vectors and for each image's own.
        test_iterations: for each image's own in an evaluation; they start at the layers' converged vectors.
    """

    local_start: float = 0.0
    form: str = "B"
    kappa_start: float = 1.0
    kappa_end: float = 0.0
    sparsity: float = 0.0
    test_iterations: int = 10
    init: str = "fan_out"

    certificate: ClassVar[str] = "local"
    methods: ClassVar[tuple[str, ...]] = ("product", "liplt", "global")
    in_epochs: ClassVar[tuple[str, ...]] = (*Growing.in_epochs, "local_start")

    def __post_init__(self):
        super().__post_init__()
        self.require("local_start", 0 <= self.local_start < math.inf, "at least 0 and finite")
        self.require("form", self.form in (*FORMS, "gloro"), f"one of {', '.join(FORMS)}, gloro")
        for name in ("kappa_start", "kappa_end"):
            self.require(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        self.require("sparsity", 0 <= self.sparsity < math.inf, "at least 0 and finite")
        self.require("test_iterations", self.test_iterations >= 0, "at least 0")

    @classmethod
    def preset(cls, data: str) -> "Local":
        """The paper's settings, the ReLU networks'; for digits a short one of our own.

        >>> Local.preset("mnist").form
        'G'
        """
        if data not in _PRESETS:
            raise ValueError(f"local: no preset for {data!r}; there are {', '.join(_PRESETS)}")
        return _PRESETS[data]

    def schedule(self, epoch: float) -> dict[str, float]:
        """eps of training, kappa, and whether bounds are local, 0 or 1."""
        done = linear_ramp(epoch, self.ramp_start, self.ramp_length)
        kappa = self.kappa_start + (self.kappa_end - self.kappa_start) * done
        return super().schedule(epoch) | {"kappa": kappa, "local": float(epoch >= self.local_start)}

    def robust_loss(
        self, model: nn.Module, x: Tensor, y: Tensor, now: dict[str, float], memory: Memory
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        eps, kappa = now["eps"], now["kappa"]
        ball = self._ball(model, x, eps, self.norms(model, x, memory), now["local"] == 1, self.iterations)
        logits = ball.logits
        if self.form == "gloro":
            robust = losses.gloro(logits, ball.pairwise(), y, eps)
            total = kappa * F.cross_entropy(logits, y) + (1 - kappa) * robust
        else:
            margin = ball.margin(y)
            robust = losses.local_lipschitz(margin.detach(), y, logits.detach(), 0.0, self.form)
            total = losses.local_lipschitz(margin, y, logits, kappa, self.form)
        parts = {"robust_loss": robust.detach()}
        if isinstance(ball, _Everywhere):
            return total, logits, parts
        parts["lipschitz"] = ball.lipschitz.detach().mean()
        if self.sparsity:
            modules = dict(model.named_modules())
            boxes = [(*box, modules.get(name)) for name, box in ball.layers.items()]
            penalty = losses.sparsity((l, u, m) for l, u, m in boxes if isinstance(m, (ClippedReLU, ClippedMaxMin)))
            total = total + (1 - kappa) * self.sparsity * penalty
            parts["sparsity"] = penalty.detach()
        return total, logits, parts

    def certified(self, model: nn.Module, x: Tensor, y: Tensor, epoch: float, memory: Memory) -> Tensor:
        """With the bounds that the steps before ``epoch`` had."""
        local = self.local_start == 0 or epoch > self.local_start
        ball = self._ball(model, x, self.eps, self.converged(model, x, memory), local, self.test_iterations)
        margin = ball.margin(y)
        others = torch.arange(margin.shape[1], device=y.device) != y[:, None]
        return ((margin > 0) | ~others).all(1)

    def converged(self, model: nn.Module, x: Tensor, memory: Memory) -> Norms:
        """The same for an evaluation, where the parameters stay: computed at the first batch."""
        if "norms" not in memory:
            memory["norms"] = self.norms(model, x, {})
        return memory["norms"]

    def _ball(
        self, model: nn.Module, x: Tensor, eps: float, norms: Norms, local: bool, iterations: int
    ) -> "bounds.Local | _Everywhere":
        if local:
            lean = self.form == "gloro" and not self.sparsity  # no box enters the loss
            return bounds.local(model, x, eps, self.method, "estimate", norms, iterations, self.sparsity > 0, not lean)
        return _Everywhere(model(x), bounds.lipschitz(model, tuple(x.shape[1:]), 2, "product", "estimate", norms), eps)


@dataclass(frozen=True)
class _Everywhere:
    """What :class:`lipfast.bounds.Local` says of a ball, from the constants over all inputs."""

    logits: Tensor  # (B, K)
    constants: Tensor  # (K, K)
    eps: float

    def margin(self, label: Tensor) -> Tensor:  # (B,) -> (B, K)
        return self.logits.gather(1, label[:, None]) - self.logits - self.eps * self.constants[label]

    def pairwise(self) -> Tensor:  # (K, K)
        return self.constants


_MNIST = Local(
    data="mnist",
    model="mnist_4c3f",
    arguments={"activation": "clipped_relu"},
    epochs=300,
    batch_size=256,
    lr=1e-3,
    decay_start=175,
    lr_end=5e-6,
    eps=1.58,
    eps_train=1.75,
    ramp_length=150,
    iterations=5,
    form="G",
    kappa_start=0.0,
)
_PRESETS = {
    "digits": Local(
        data="digits",
        model="cnn_small",
        arguments={"activation": "clipped_relu"},
        epochs=40,
        batch_size=64,
        lr=5e-3,
        decay_start=25,
        lr_end=1e-4,
        eps=0.3,
        eps_train=0.3,
        ramp_length=15,
    ),
    "mnist": _MNIST,
    "fashion-mnist": dataclasses.replace(_MNIST, data="fashion-mnist"),
    "cifar10": Local(
        data="cifar10",
        model="cifar_6c2f",
        arguments={"activation": "clipped_relu"},
        epochs=800,
        batch_size=256,
        lr=1e-3,
        decay_start=425,
        lr_end=1e-6,
        crop=4,
        flip=True,
        eps=36 / 255,
        eps_train=1.1 * 36 / 255,
        ramp_start=20,
        ramp_length=400,
    ),
    "tiny-imagenet": Local(
        data="tiny-imagenet",
        model="tiny_8c2f",
        arguments={"activation": "clipped_relu"},
        epochs=250,
        batch_size=128,
        lr=2.5e-4,
        decay_start=150,
        lr_end=5e-7,
        crop=4,
        flip=True,
        eps=36 / 255,
        eps_train=0.16,
        ramp_length=125,
        iterations=1,
        sparsity=0.01,
    ),
}
