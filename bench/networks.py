"""Whole networks: lipfast's box against what a user would otherwise run. One process, in turns, medians.

Peers: the nominal network twice (the floor of any box), center and radius written by hand, the same under torch.compile,
and auto_LiRPA's IBP where it is installed.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.timing import quartiles, ratio, rounds
from lipfast import models
from lipfast.bounds import interval
from tests.checks import assert_near

EPS = 2 / 255
TARGETS = {  # the least ratio aimed at, by pass
    "6C2F": {"fwd": {"auto_LiRPA": 2.5, "compiled": 1.1}, "both": {"auto_LiRPA": 1.8, "compiled": 1.5}},
}


def mlp() -> tuple[nn.Sequential, tuple[int, ...]]:
    widths = [3072, 1024, 1024, 512]
    hidden = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(512, 10)), (3072,)


def small() -> tuple[nn.Sequential, tuple[int, ...]]:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)), (1, 8, 8)


NETWORKS = {"6C2F": lambda: (models.cifar_6c2f(), (3, 32, 32)), "MLP": mlp}


def run(name: str, build: Callable, device: str, batch: int, repeats: int) -> list[dict[str, Any]]:
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
    rows = []
    for backward in (False, True):
        turns = {peer: _pass(net, bounds, backward) for peer, bounds in candidates.items()}
        times = rounds(turns, repeats, device)
        row = {
            "network": name,
            "batch": batch,
            "pass": "both" if backward else "fwd",
            "seconds": {peer: quartiles(samples) for peer, samples in times.items()},
            "ratios": {peer: ratio(times, peer, "lipfast") for peer in times if peer != "lipfast"},
        }
        print(_line(row), flush=True)
        rows.append(row)
    return rows


def _candidates(net: nn.Sequential, x: Tensor) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    def lipfast_box() -> tuple[Tensor, Tensor]:
        boxes = interval(net, x, EPS, kind="estimate", pixel_range=(0, 1), keep_layers=False)
        return boxes.lower, boxes.upper

    compiled = torch.compile(_by_hand, fullgraph=True, dynamic=False)
    candidates = {
        "lipfast": lipfast_box,
        "nominal x2": lambda: (net(x), net(x)),
        "by hand": lambda: _by_hand(net, x),
        "compiled": lambda: compiled(net, x),
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


def _line(row: dict) -> str:
    peers = ("nominal x2", "by hand", "compiled", "auto_LiRPA")
    targets = TARGETS.get(row["network"], {}).get(row["pass"], {})
    cells = []
    for peer in peers:
        goal = f" (target {targets[peer]})" if peer in targets else ""
        cells.append(f"{peer} {row['ratios'][peer]:.2f}x{goal}" if peer in row["ratios"] else f"{peer} not installed")
    return (
        f"{row['network']} batch {row['batch']} {row['pass']:5} {row['seconds']['lipfast'][1] * 1e3:8.2f} ms   "
        + "   ".join(cells)
    )
