"""Local Lipschitz training steps: bound, loss and backward pass, beside the authors' own code where it is on the path.

Theirs is Huang et al. 2021 (https://github.com/yjhuangcd/local-lipschitz): put its folder on PYTHONPATH. It asks for packages
and for CUDA where the bound needs neither, so its two files are read without their imports, and tensors stay where they are.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import work
from bench.ceilings import Work
from bench.problem import OWN, Problem
from lipfast import bounds, losses, models
from lipfast.nn import ClippedReLU

EPS = 36 / 255
ITERATIONS = 2
_CHECKED = 100  # iterations of what is compared
# What a machine without CUDA, or a Python from 3.9 on, does not take.
_MENDED = {".type(torch.cuda.FloatTensor)": ".float()", "y.cuda()": "y", "(*self.in_size[i])": "self.in_size[i]"}
TARGETS = {"6C2F": {"both": {"authors": 2.0}}, "6C2F, 200 classes": {"both": {"authors": 60.0}}}  # the least ratio aimed at


def small() -> nn.Sequential:
    layers = [nn.Conv2d(3, 4, 3), ClippedReLU(1.0, (4, 30, 30), True), nn.Conv2d(4, 4, 4, 2)]
    tail = [ClippedReLU(1.0, (4, 14, 14), True), nn.Flatten(), nn.Linear(784, 16), ClippedReLU(1.0, (16,), True)]
    return nn.Sequential(*layers, *tail, nn.Linear(16, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], int]] = {  # and the batch
    "6C2F": (lambda: models.cifar_6c2f(activation="clipped_relu"), 64),
    "6C2F, 200 classes": (lambda: models.cifar_6c2f(classes=200, activation="clipped_relu"), 4),
}


def problems(size: str, build: Callable[[], nn.Sequential], batch: int, device: str) -> Iterator[Problem]:
    net, x, label = problem(build, batch, device)
    candidates = steps(net, x, label)
    candidates = {OWN: candidates.pop("translation"), "lipfast scalar": candidates.pop("scalar"), **candidates}
    if peer := load_peer():
        check(net, x[:2], label[:2], peer)
        candidates["authors"] = _theirs(net, x, label, peer)
    for direction in ("forward", "both"):
        yield Problem(
            name="local",
            size=f"{size}, batch {batch}",
            direction=direction,
            turns={who: step.run(direction == "both") for who, step in candidates.items()},
            work=_work(net, x, label, direction),
            targets=TARGETS.get(size, {}).get(direction, {}),
            facts={"iterations": ITERATIONS},
        )


def _work(net: nn.Sequential, x: Tensor, label: Tensor, direction: str) -> Work:
    """Each sample's products: those of the network, its box's two, two an iteration and one at the end; the backward pass
    has two for each of the network's, of the box's, and of the last. The norms of the layers are shared by all samples."""
    forth = 1 + 2 + 2 * ITERATIONS + 1
    return work.of_network(net, x) * (forth if direction == "forward" else forth + 2 * (1 + 2 + 1))


def problem(build: Callable[[], nn.Sequential], batch: int, device: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    net = build().to(device)
    return net, torch.rand(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % classes(net)


def classes(net: nn.Sequential) -> int:
    return len(list(net.parameters())[-1])


def load_peer() -> dict[str, Any] | None:
    """The names of the authors' utils.py and Local_bound.py, or None where they are not on the path."""
    folder = next((Path(p) for p in sys.path if p and (Path(p) / "Local_bound.py").exists()), None)
    if folder is None:
        return None
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "math": math}
    for file in ("utils.py", "Local_bound.py"):
        source = (folder / file).read_text()
        for old, new in _MENDED.items():
            source = source.replace(old, new)
        kept = [line for line in source.splitlines() if not line.startswith(("import ", "from "))]
        exec(compile("\n".join(kept), str(folder / file), "exec"), names)
    return names


def their_network(net: nn.Sequential, peer: dict[str, Any]) -> nn.Sequential:
    """The same layers, sharing their parameters, with the authors' clipped ReLU."""
    layers: list[nn.Module] = []
    for layer in net:
        if isinstance(layer, ClippedReLU):
            clipped = peer["ReLU_x"](torch.Size([1, *layer.threshold.shape]))
            clipped.threshold = nn.Parameter(layer.threshold.detach()[None])
            layers.append(clipped)
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


def check(net: nn.Sequential, x: Tensor, label: Tensor, peer: dict[str, Any]) -> None:
    """In a ball so small that the boxes decide nothing the constants agree; in a larger one ours, whose boxes use the local
    radii, is never looser. Percents: products of norms that have nearly converged on both sides, from different starts."""
    network = their_network(net, peer)
    with torch.no_grad():
        for eps in (1e-5, EPS):
            own = bounds.local(net, x, eps, kind="estimate", norms=_norms(net, x, _CHECKED), iterations=_CHECKED)
            theirs = _propagate(network, x, eps, peer, _CHECKED)
            constant = theirs[2] / eps
            assert (own.lipschitz <= 1.05 * constant).all(), (own.lipschitz, constant)
            assert eps == EPS or (own.lipschitz >= 0.95 * constant).all(), (own.lipschitz, constant)
            margin, bcp = own.margin(label), _their_margin(theirs, label, peer, _CHECKED)
            slack = 0.05 * (net(x).abs().amax() + bcp.abs().amax())
            assert (margin >= bcp - slack).all(), (margin, bcp)
            assert eps == EPS or (margin <= bcp + slack).all(), (margin, bcp)


@dataclass(frozen=True)
class _Step:
    net: nn.Module
    loss: Callable[[], Tensor]

    def run(self, backward: bool) -> Callable[[], object]:
        if not backward:
            return torch.no_grad()(self.loss)
        return lambda: torch.autograd.grad(self.loss(), list(self.net.parameters()))


def steps(net: nn.Sequential, x: Tensor, label: Tensor) -> dict[str, _Step]:
    own = {form: _ours(net, x, label, form) for form in ("translation", "scalar")}
    return {"nominal": _Step(net, lambda: F.cross_entropy(net(x), label)), **own}


def _ours(net: nn.Sequential, x: Tensor, label: Tensor, form: str = "translation") -> _Step:
    """``form``: of the loss, by the margins of the last layer's box and ball, or by the "scalar" constants of the logits."""
    vectors = _norms(net, x, ITERATIONS).vectors  # those of the step before

    def loss() -> Tensor:
        norms = _norms(net, x, ITERATIONS, vectors)
        local = bounds.local(net, x, EPS, kind="estimate", norms=norms, iterations=ITERATIONS)
        if form == "scalar":
            return losses.gloro(local.logits, local.pairwise(), label, EPS)
        return losses.interval(local.margin(label), label)

    return _Step(net, loss)


def _norms(net: nn.Sequential, x: Tensor, iterations: int, vectors: dict[str, Tensor] | None = None) -> bounds.Norms:
    return bounds.norms(net, tuple(x.shape[1:]), kind="estimate", iterations=iterations, vectors=vectors)


def _theirs(net: nn.Sequential, x: Tensor, label: Tensor, peer: dict[str, Any]) -> _Step:
    network = their_network(net, peer)
    vectors = _start_vectors(network, x)
    mixed = peer["net_Local_Lip"](network, SimpleNamespace(model="relux"))
    peer["one_hot"] = lambda labels: F.one_hot(
        labels, classes(net)
    ).float()  # theirs stops at ten but in another copy of the file

    def loss() -> Tensor:  # as in their training loop, with its settings for CIFAR-10
        return peer["robust_loss"](mixed, EPS, x, label, None, list(vectors), ITERATIONS, 1)[0]

    return _Step(network, loss)


def _start_vectors(network: nn.Sequential, x: Tensor) -> list[Tensor | None]:
    """One vector per sample and layer, which their loop keeps between the epochs."""
    vectors: list[Tensor | None] = []
    with torch.no_grad():
        for layer in list(network)[:-1]:
            vectors.append(torch.randn_like(x) if isinstance(layer, (nn.Conv2d, nn.Linear)) else None)
            x = layer(x)
    return vectors


def _propagate(network: nn.Sequential, x: Tensor, eps: float, peer: dict[str, Any], iterations: int) -> tuple:
    mixed = peer["net_Local_Lip"](network, SimpleNamespace(model="relux"))
    return mixed(x, eps, None, [], iterations)


def _their_margin(out: tuple, label: Tensor, peer: dict[str, Any], iterations: int) -> Tensor:
    logits, mu, radius, _, center, half, weight, *_ = out
    rise = peer["BCP_translation"](mu, radius, center, half, weight, iterations, False)
    worst = logits + rise[torch.arange(len(label)), :, label].scatter(1, label[:, None], 0.0)
    return logits.gather(1, label[:, None]) - worst
