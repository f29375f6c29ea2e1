"""CROWN's margins, proven in float64, beside auto_LiRPA's in float32 where it is installed."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from bench import peers
from bench.problem import OWN, Problem
from lipfast import models
from lipfast.bounds import crown_margin

EPS = 2 / 255
AGREE = 1e-3  # of the largest margin
NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...], int]] = {"CNN-B": (models.cnn_b, (3, 32, 32), 4)}


def problems(
    size: str, build: Callable[[], nn.Sequential], shape: tuple[int, ...], batch: int, device: str
) -> Iterator[Problem]:
    torch.manual_seed(0)
    net = build().to(device)
    x = torch.rand(batch, *shape, device=device)
    label = net(x).argmax(1)
    margin = lambda kind: crown_margin(net, x, label, EPS, kind=kind, pixel_range=(0, 1))
    turns: dict[str, Callable[[], object]] = {OWN: lambda: margin("bound")}
    if peers.installed("auto_LiRPA"):
        turns["auto_LiRPA"] = lambda: margin("estimate")
        bound, estimate = margin("bound"), margin("estimate")
        assert ((bound - estimate).abs() <= AGREE * estimate.abs().amax()).all(), (bound, estimate)
    yield Problem("crown", f"{size}, batch {batch}", "forward", turns)
