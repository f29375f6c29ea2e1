"""LipLT over all inputs, as a training step meets it, beside the authors' own code where it is on the path; and its proof.

Theirs is Fazlyab et al. 2023 (https://github.com/o4lc/CRM-LipLT): put its folder on PYTHONPATH. Above 101 classes it falls
back to a looser bound, so there is nothing to compare with.
"""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench import timing, work
from bench.ceilings import Work
from bench.problem import OWN, Problem
from lipfast import models
from lipfast.bounds import liplt, lipschitz

ITERATIONS = 5
_CONVERGED = 300
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "CRM 6C2F": (models.crm_6c2f, (3, 32, 32)),
    "CRM 6C2F, 200 classes": (lambda: models.crm_6c2f(classes=200), (3, 32, 32)),
    "25 layers": (lambda: deep(25), (3, 16, 16)),
}
TARGETS = {"CRM 6C2F": {"authors": 2.5}}  # the least ratio aimed at
SECONDS = {
    ("CRM 6C2F", "both"): 0.12,
    ("CRM 6C2F, 200 classes", "both"): 1.0,
    ("CRM 6C2F", "proven"): 3.0,
}  # and the most seconds
PROOFS = ("CRM 6C2F",)
# classes, pixels, blocks, width, iterations
LARGE = (1000, 64, (3, 4, 6, 3), 64, 1)  # what fits 24 GiB
TINY = (3, 32, (1, 1), 4, 1)


def small() -> nn.Sequential:
    head = (nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 4, 2), nn.ReLU(), *head)


def deep(layers: int, width: int = 16) -> nn.Sequential:
    between = [m for _ in range(layers - 3) for m in (nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1))]
    last = (nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, 10))
    return nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), *between, *last)


def problems(size: str, build: Callable[[], nn.Module], shape: tuple[int, ...], device: str) -> Iterator[Problem]:
    torch.manual_seed(0)
    net = build().to(device)
    parameters = list(net.parameters())
    vectors = liplt(net, shape, ITERATIONS).vectors  # those of the step before
    bounds = {OWN: lambda: liplt(net, shape, ITERATIONS, vectors).pairwise}
    classes = len(parameters[-1])
    theirs = _theirs(net, shape, device) if classes <= 101 and not size.endswith("layers") else None
    if theirs is not None:
        bounds["authors"] = theirs
        _check(net, shape, theirs)
    read = sum(p.numel() * p.element_size() for p in parameters)
    flops = work.flops(bounds[OWN])  # of the recursion that batches all sub-products of a layer
    for direction in ("forward", "both"):
        turns = {who: _pass(bound, parameters, direction == "both") for who, bound in bounds.items()}
        if device == "cuda":
            turns |= timing.graphed("lipfast graph", turns[OWN])
        yield Problem(
            name="liplt",
            size=size,
            direction=direction,
            turns=turns,
            work=Work(read, flops) if direction == "forward" else None,
            targets=TARGETS.get(size, {}) if direction == "both" else {},
            facts={"iterations": ITERATIONS, "seconds_aimed_at": SECONDS.get((size, direction))},
        )


def proof(size: str, build: Callable[[], nn.Module], shape: tuple[int, ...], device: str) -> Problem:
    """The bound, and by how much it exceeds a converged estimate, which cannot exceed it."""
    torch.manual_seed(0)
    net = build().to(device)
    estimate = liplt(net, shape, _CONVERGED).pairwise.detach().double()
    bound = lipschitz(net, shape)
    apart = ~torch.eye(len(bound), dtype=torch.bool, device=device)
    above = (bound / estimate)[apart]
    assert (above >= 1 - 1e-5).all()  # float32 estimates
    facts = {"seconds_aimed_at": SECONDS.get((size, "proven")), "above_the_estimate": above.mean().item() - 1}
    return Problem("liplt, proven", size, "forward", {OWN: lambda: lipschitz(net, shape)}, facts=facts)


def large(device: str, classes: int, pixels: int, blocks: tuple[int, ...], width: int, iterations: int) -> dict[str, Any]:
    """One bound and backward pass of a network like ResNet-50."""
    torch.manual_seed(0)
    net = bottlenecks(classes, blocks, width).to(device)
    start = time.perf_counter()
    constants = liplt(net, (3, pixels, pixels), iterations).pairwise
    assert constants.isfinite().all()
    forward = time.perf_counter() - start
    constants.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    both = time.perf_counter() - start
    on_cpu = device == "cpu"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if on_cpu else torch.cuda.max_memory_allocated()
    parameters = sum(p.numel() for p in net.parameters())
    size = f"{parameters / 1e6:.1f} M parameters, {classes} classes, {pixels} pixels"
    print(f"liplt, large: {size}: forward {forward:.1f} s, both {both:.1f} s, peak {peak / 2**30:.1f} GiB", flush=True)
    facts = {"blocks": blocks, "width": width, "iterations": iterations, "parameters": parameters, "peak_bytes": peak}
    return {"name": "liplt, large", "size": size, "seconds": {"forward": forward, "both": both}, **facts}


class _Bottleneck(nn.Module):
    def __init__(self, c_in: int, width: int, c_out: int, stride: int):
        super().__init__()
        body = (nn.Conv2d(c_in, width, 1), nn.ReLU(), nn.Conv2d(width, width, 3, stride, 1), nn.ReLU())
        self.body = nn.Sequential(*body, nn.Conv2d(width, c_out, 1))
        self.shortcut = nn.Identity() if c_in == c_out and stride == 1 else nn.Conv2d(c_in, c_out, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def bottlenecks(classes: int, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64) -> nn.Sequential:
    """ResNet-50 without batch norm; its pooling windows do not overlap."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(2)]
    c_in = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            inner = width * 2**stage
            layers.append(_Bottleneck(c_in, inner, 4 * inner, 2 if stage and not block else 1))
            c_in = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes))


class _Authors:
    """Their bound on the same parameters, with the vectors of one step before."""

    def __init__(self, network: type, net: nn.Module, shape: tuple[int, ...], device: str):
        settings = {"perClassLipschitz": False, "pairwiseLipschitz": True, "numberOfPowerIterations": ITERATIONS}
        self.peer = network(list(net.children()), shape, torch.device(device), **settings)
        with torch.no_grad():
            self.peer.calculateNetworkLipschitz()
        self.start = self.peer.batchEigenVectorDictionary

    def __call__(self) -> Tensor:
        self.peer.batchEigenVectorDictionary = [v.detach() for v in self.start]
        return self.peer.calculateNetworkLipschitz()


def _theirs(net: nn.Module, shape: tuple[int, ...], device: str) -> _Authors | None:
    try:
        from Networks.NetworkModels import SequentialLipltLipschitz
    except ImportError:
        return None
    return _Authors(SequentialLipltLipschitz, net, shape, device)


@torch.no_grad()
def _check(net: nn.Module, shape: tuple[int, ...], theirs: _Authors) -> None:
    """Never time a wrong bound: converged, both are the same."""
    own = liplt(net, shape, _CONVERGED).pairwise
    theirs.peer.numberOfPowerIterations = _CONVERGED
    got = theirs()
    theirs.peer.numberOfPowerIterations = ITERATIONS
    torch.testing.assert_close(got, own, rtol=2e-2, atol=0)


def _pass(bound: Callable[[], Tensor], parameters: Sequence[Tensor], backward: bool) -> Callable[[], object]:
    if not backward:
        return torch.no_grad()(bound)
    return lambda: torch.autograd.grad(bound().sum(), parameters, allow_unused=True)
