"""Orthogonal matrices: the maps onto them and an optimiser's step on them, beside what a user would otherwise run.

Maps: forward and backward pass of :func:`lipfast.nn.orthogonal`, which multiplies by a base as do the parametrizations of torch
and of geotorch (Lezcano-Casado 2019); all from the same skew matrix and random base. Re-projection:
the polar factor of a matrix that has drifted, beside a singular value decomposition. Steps: ManifoldAdam beside geoopt's
RiemannianAdam (Kochurov et al. 2020) on both of its Stiefel manifolds, each on gradients of noise that change at every step,
after the first steps, which are longer than all others; once without the lookahead, which geoopt lacks, and once with it, a
period of which is a sample. geotorch and geoopt may be missing.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lipfast
from bench import peers
from bench.ceilings import Work
from bench.problem import OWN, Problem
from lipfast.optim import ManifoldAdam

SIZES = ((1024, 1024), (32, 256, 256))
TINY = ((8, 8), (2, 6, 6))
DRIFTS = (1e-6, 1e-4, 1e-2)  # spectral norms, about
LOOKAHEAD = 6  # steps, ManifoldAdam's default
WARM = 10  # steps
GRADIENTS = 5
TARGETS = {"cayley": 1.7, "exponential": 7.0, "re-projection": 4.0, "step": 4.0}  # the least ratios aimed at
_OPS = {"cayley": lipfast.cayley, "exponential": lipfast.skew_exponential}
_SCALES = {"cayley": -2.0, "exponential": 1.0}  # theirs is (I + A/2)(I - A/2)^-1
_TORCH = {"cayley": "cayley", "exponential": "matrix_exp"}
_GEOTORCH = {"cayley": "cayley", "exponential": "expm"}
_AGREE = {"cayley": 1e-5, "exponential": 1e-4}  # torch's matrix_exp errs by several 1e-5 in float32
_ORTHOGONAL = 1e-5


def problems(shape: tuple[int, ...], device: str) -> Iterator[Problem]:
    size = "x".join(map(str, shape))
    product = 2 * math.prod(shape) * shape[-1]
    moved = 4 * math.prod(shape)
    for name in _OPS:
        flops = {"cayley": 5.5, "exponential": 9.5}[name] * product  # the op's, and the base's: one product there, one back
        yield Problem(
            name=f"orthogonal, {name}",
            size=size,
            direction="both",
            turns=_maps(name, shape, device),
            work=Work(5 * moved, round(flops)),
            targets=dict.fromkeys(("torch.nn", "geotorch"), TARGETS[name]),
        )
    for drift in DRIFTS:
        turns = _projections(drift, shape, device)
        targets = {"svd": TARGETS["re-projection"]}
        work = Work(2 * moved, round(1.5 * product))
        yield Problem(f"polar, {drift:g} away", size, "forward", turns, work=work, targets=targets)
    for name, steps, lookahead in (("ManifoldAdam", 1, 0), ("ManifoldAdam, lookahead", LOOKAHEAD, LOOKAHEAD)):
        # half a product for the skew gradient, half for its square, one for the step; the matrix, its gradient and moments
        work = Work(7 * moved, 2 * product) * steps
        turns = _steps(steps, lookahead, shape, device)
        targets = {"geoopt canonical": TARGETS["step"]}
        yield Problem(name, size, "forward", turns, work=work, targets=targets, facts={"steps": steps})


class _Layer(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())


def _maps(name: str, shape: tuple[int, ...], device: str) -> dict[str, Callable]:
    torch.manual_seed(0)
    base = _orthogonal(shape, device)
    skew = lipfast.skew(torch.randn(shape, device=device) / shape[-1] ** 0.5)
    seed = torch.randn(shape, device=device)
    layers: dict[str, Any] = {OWN: lipfast.nn.orthogonal(_Layer(base), name)}
    layers["torch.nn"] = parametrizations.orthogonal(_Layer(base), orthogonal_map=_TORCH[name])
    if geotorch := peers.installed("geotorch"):
        layers["geotorch"] = _Layer(base)
        geotorch.orthogonal(layers["geotorch"], "weight", triv=_GEOTORCH[name])
        layers["geotorch"].weight = base  # it starts from another
    raw = {who: layer.parametrizations.weight.original for who, layer in layers.items()}
    with torch.no_grad():
        want = base @ _OPS[name](skew)
        for who, layer in layers.items():
            raw[who].copy_(skew if who == OWN else _SCALES[name] * skew.tril(-1))
            assert (layer.weight - want).abs().max() <= _AGREE[name], who
    both = lambda who: lambda: torch.autograd.grad(layers[who].weight, raw[who], seed)
    return {who: both(who) for who in layers}


def _projections(drift: float, shape: tuple[int, ...], device: str) -> dict[str, Callable]:
    torch.manual_seed(0)
    matrix = _orthogonal(shape, device) + drift / 2 * torch.randn(shape, device=device) / shape[-1] ** 0.5

    def svd() -> Tensor:
        U, _, Vh = torch.linalg.svd(matrix)
        return U @ Vh

    assert (lipfast.polar(matrix) - svd()).abs().max() <= _ORTHOGONAL
    return {OWN: lambda: lipfast.polar(matrix), "svd": svd}


def _steps(steps: int, lookahead: int, shape: tuple[int, ...], device: str) -> dict[str, Callable]:
    torch.manual_seed(0)
    start, noise = _orthogonal(shape, device), torch.randn(GRADIENTS, *shape, device=device)
    parameters = {"lipfast": nn.Parameter(start.clone())}
    groups = [{"params": [parameters["lipfast"]], "orthogonal": True}]
    optimisers: dict[str, torch.optim.Optimizer] = {"lipfast": ManifoldAdam(groups, lr=1e-3, lookahead=lookahead)}
    if geoopt := peers.installed("geoopt"):
        for name, manifold in (("canonical", geoopt.CanonicalStiefel()), ("Euclidean", geoopt.EuclideanStiefel())):
            parameters[f"geoopt {name}"] = parameter = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
            optimisers[f"geoopt {name}"] = geoopt.optim.RiemannianAdam([parameter], lr=1e-3)
    turns: dict[str, Callable[..., Any]] = {}
    for who, parameter in parameters.items():
        gradients = itertools.cycle(noise)
        _take(1, optimisers[who], parameter, gradients)
        assert (parameter.detach() * noise[0]).sum() < (start * noise[0]).sum(), who  # down the slope
        _take(WARM - 1, optimisers[who], parameter, gradients)
        Q = parameter.detach()
        assert (Q.mT @ Q - torch.eye(shape[-1], device=device)).abs().max() <= _ORTHOGONAL, who
        turns[who] = functools.partial(_take, steps, optimisers[who], parameter, gradients)
    return turns


def _take(steps: int, optimiser: torch.optim.Optimizer, parameter: Tensor, gradients: Iterator[Tensor]) -> None:
    for _ in range(steps):
        parameter.grad = next(gradients)
        optimiser.step()


def _orthogonal(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.linalg.qr(torch.randn(shape, device=device)).Q
