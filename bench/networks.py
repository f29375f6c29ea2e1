"""Whole networks: lipfast's box against what a user would otherwise run. One process, in turns, medians.

Peers: the nominal network twice (the floor of any box), center and radius written by hand, the same under torch.compile,
and auto_LiRPA's IBP where it is installed.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import timing, work
from bench.problem import COMPILED, DEFINITION, OWN, Problem
from lipfast import models
from lipfast.bounds import interval
from tests.checks import assert_near

EPS = 2 / 255
TARGETS = {  # the least ratio aimed at, by pass
    "6C2F": {"forward": {"auto_LiRPA": 2.5, COMPILED: 1.1}, "both": {"auto_LiRPA": 1.8, COMPILED: 1.5}},
}


def mlp() -> tuple[nn.Sequential, tuple[int, ...]]:
    widths = [3072, 1024, 1024, 512]
    hidden = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(512, 10)), (3072,)


def small() -> tuple[nn.Sequential, tuple[int, ...]]:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)), (1, 8, 8)


NETWORKS = {"6C2F": lambda: (models.cifar_6c2f(), (3, 32, 32)), "MLP": mlp}


def problems(size: str, build: Callable, batch: int, device: str) -> Iterator[Problem]:
    torch.manual_seed(0)
    net, shape = build()
    net = net.to(device)
    x = torch.rand(batch, *shape, device=device)
    candidates = _candidates(net, x)
    with torch.no_grad():
        want = _by_hand(net, x)
        for peer, bounds in candidates.items():
            if peer != "nominal x2":  # never time a wrong box
                for got, w in zip(bounds(), want, strict=True):
                    assert_near(got, w, torch.float32)
    nominal = work.of_network(net, x)
    for direction in ("forward", "both"):
        turns = {peer: _pass(net, bounds, direction == "both") for peer, bounds in candidates.items()}
        if device == "cuda":
            turns |= timing.graphed("lipfast graph", turns[OWN])
        yield Problem(
            name="interval",
            size=f"{size}, batch {batch}",
            direction=direction,
            turns=turns,
            work=nominal * (2 if direction == "forward" else 6),  # center and radius
            targets=TARGETS.get(size, {}).get(direction, {}),
        )


def _candidates(net: nn.Sequential, x: Tensor) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    def lipfast_box() -> tuple[Tensor, Tensor]:
        boxes = interval(net, x, EPS, kind="estimate", pixel_range=(0, 1), keep_layers=False)
        return boxes.lower, boxes.upper

    compiled = torch.compile(_by_hand, fullgraph=True, dynamic=False)
    candidates = {
        OWN: lipfast_box,
        "nominal x2": lambda: (net(x), net(x)),
        DEFINITION: lambda: _by_hand(net, x),
        COMPILED: lambda: compiled(net, x),
    }
    try:
        from auto_LiRPA import BoundedModule, BoundedTensor
        from auto_LiRPA.perturbations import PerturbationLpNorm
    except ImportError:
        return candidates
    bounded = BoundedModule(net, x, device=x.device)

    def peer_box() -> tuple[Tensor, Tensor]:
        low, high = _pixels(x)
        ball = PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=high)
        return bounded.compute_bounds((BoundedTensor(x, ball),), method="IBP")

    return {**candidates, "auto_LiRPA": peer_box}


def _pixels(x: Tensor) -> tuple[Tensor, Tensor]:
    return (x - EPS).clamp(0, 1), (x + EPS).clamp(0, 1)


def _by_hand(net: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = _pixels(x)
    for m in net:
        if isinstance(m, nn.Conv2d):
            center = F.conv2d((low + high) / 2, m.weight, m.bias, m.stride, m.padding)
            radius = F.conv2d((high - low) / 2, m.weight.abs(), None, m.stride, m.padding)
            low, high = center - radius, center + radius
        elif isinstance(m, nn.Linear):
            center, radius = F.linear((low + high) / 2, m.weight, m.bias), F.linear((high - low) / 2, m.weight.abs())
            low, high = center - radius, center + radius
        else:  # ReLU and Flatten
            low, high = m(low), m(high)
    return low, high


def _pass(net: nn.Module, bounds: Callable[[], tuple[Tensor, Tensor]], backward: bool) -> Callable[[], object]:
    if not backward:
        return torch.no_grad()(bounds)

    def both():
        low, high = bounds()
        return torch.autograd.grad((high - low).sum() + high.square().mean(), list(net.parameters()))

    return both
