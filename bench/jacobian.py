"""l-infinity local Lipschitz constants by interval Jacobians, beside auto_LiRPA's Jacobian bounds where it is installed.

Theirs (Shi et al. 2022, examples/vision/jacobian.py) are plain CROWN through the gradient graph, for one class at a time, with
a matrix for every convolution and without the optimisation of slopes that is their default. The matrices of a batch do not
fit, so a round is the whole batch for ours, one image and one class for theirs; seconds are per image, theirs of all classes.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.problem import OWN, Problem
from lipfast import models
from lipfast.bounds import jacobian

EPS = 2 / 255
TARGETS = {"CNN-B": 5.0}  # the least ratio aimed at


def small() -> nn.Sequential:
    pad = nn.ZeroPad2d((1, 2, 1, 2))
    return nn.Sequential(pad, nn.Conv2d(1, 4, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...], int]] = {"CNN-B": (models.cnn_b, (3, 32, 32), 64)}
SMALL: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...], int]] = {"small": (small, (1, 8, 8), 2)}


def problem(size: str, build: Callable[[], nn.Sequential], shape: tuple[int, ...], batch: int, device: str) -> Problem:
    torch.manual_seed(0)
    net = build().to(device)
    x = torch.rand(batch, *shape, device=device)
    K = len(net[-1].weight)
    ours = lambda kind: jacobian(net, x, EPS, kind=kind, pixel_range=(0, 1))
    turns: dict[str, Callable[[], object]] = {
        OWN: lambda: ours("bound"),
        "lipfast estimate": torch.no_grad()(lambda: ours("estimate")),
        "lipfast estimate, gradient": lambda: torch.autograd.grad(ours("estimate").sum(), _weights(net)),
    }
    each = dict.fromkeys(turns, 1 / batch)
    theirs = peer(_their_network(net), x[:1], EPS)
    tightness = {"sampled": _sampled(net, x[:1]), "bound": jacobian(_one_class(net), x[:1], EPS, pixel_range=(0, 1)).item()}
    if theirs is not None:
        tightness["auto_LiRPA"] = theirs(0).item()
        turns["auto_LiRPA"], each["auto_LiRPA"] = lambda: theirs(0), K
    assert all(tightness["sampled"] <= value * (1 + 1e-5) for value in tightness.values()), tightness
    facts = {"batch": batch, "first_class_of_the_first_image": tightness}
    targets = {"auto_LiRPA": TARGETS[size]} if size in TARGETS else {}
    return Problem("jacobian", f"{size}, per image", "forward", turns, targets=targets, scale=each, facts=facts)


def peer(net: nn.Module, x: Tensor, eps: float) -> Callable[[int], Tensor] | None:
    """A function from a class to auto_LiRPA's bounds (B,) on the l1 norm of its gradient; None where it is not installed."""
    try:
        from auto_LiRPA import BoundedModule, BoundedTensor
        from auto_LiRPA.jacobian import GradNorm, JacobianOP
        from auto_LiRPA.perturbations import PerturbationLpNorm
    except ImportError:
        return None

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.norm = net, GradNorm(norm=1)

        def forward(self, x, chosen):
            return self.norm(JacobianOP.apply(self.net(x).matmul(chosen), x))

    chosen = F.one_hot(torch.zeros(1, dtype=torch.long), net(x).shape[1]).T.to(x)  # (K, 1)
    bounded = BoundedModule(Norm(), (BoundedTensor(x), chosen), bound_opts={"conv_mode": "matrix"}, device=x.device)
    ball = PerturbationLpNorm(norm=math.inf, x_L=(x - eps).clamp(0, 1), x_U=(x + eps).clamp(0, 1))

    def bound(k: int) -> Tensor:
        chosen.zero_()[k] = 1
        return bounded.compute_jacobian_bounds((BoundedTensor(x, ball), chosen), optimize=False, bound_lower=False)[1][:, 0]

    return torch.no_grad()(bound)


def _their_network(net: nn.Sequential) -> nn.Sequential:
    """The same function without a padding layer, which they do not read: a kernel with a row and a column of zeros in front."""
    pad, first, *rest = net
    assert pad.padding == (1, 2, 1, 2), pad
    merged = nn.Conv2d(first.in_channels, first.out_channels, first.kernel_size[0] + 1, first.stride, 2)
    merged.weight, merged.bias = nn.Parameter(F.pad(first.weight.detach(), (1, 0, 1, 0))), first.bias
    return nn.Sequential(merged, *rest)


def _one_class(net: nn.Sequential) -> nn.Sequential:
    last = nn.Linear(net[-1].in_features, 1, bias=False)
    last.weight = nn.Parameter(net[-1].weight[:1].detach())
    return nn.Sequential(*net[:-1], last)


def _weights(net: nn.Module) -> list[Tensor]:
    return [p for p in net.parameters() if p.ndim > 1]


def _sampled(net: nn.Module, x: Tensor) -> float:
    """The largest of 100 gradients within the ball, of the first class."""
    z = x + EPS * (2 * torch.rand(100, *x.shape[1:], device=x.device) - 1)
    z = z.clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(net(z)[:, 0].sum(), z)
    return gradient.abs().flatten(1).sum(1).max().item()
