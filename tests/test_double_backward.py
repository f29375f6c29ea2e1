"""Gradient alignment differentiates the network's gradient: that is right through every layer that the library ships, and
through torch's that it reads.

The cross entropy is curved, so the second derivative with respect to each parameter is not zero though most activations are
made of straight pieces.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipfast.nn
from lipfast import models
from lipfast.nn import (
    BetaAbs,
    ClippedMaxMin,
    ClippedReLU,
    GraftedReLU,
    L2Pool,
    LipNeXtBlocks,
    LiResConv2d,
    MaxMin,
    Normalize,
    Patches,
    cholesky_rows,
    lires_linear,
    orthogonal,
    unit_rows,
)
from tests.checks import assert_near

TORCH = [nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.ELU, nn.CELU, nn.SELU, nn.Tanh, nn.Sigmoid, nn.Softsign]
TORCH += [nn.Softplus, nn.GELU, nn.SiLU]
ACTIVATIONS = {
    **{kind.__name__: lambda shape, kind=kind: kind() for kind in TORCH},
    "BetaAbs": lambda shape: BetaAbs(),
    "MaxMin": lambda shape: MaxMin(),
    "ClippedReLU": lambda shape: ClippedReLU(0.3, shape, learnable=True),
    "ClippedMaxMin": lambda shape: ClippedMaxMin(0.2, -0.1, shape, learnable=True),
    "GraftedReLU": lambda shape: GraftedReLU(shape, torch.rand(shape) < 0.5, 0.3, 0.1),
    "GraftedReLU, all grafted": lambda shape: GraftedReLU(shape, torch.ones(shape, dtype=torch.bool)),
}


def around(activation):
    """A convolution and two linear layers."""
    layers = [nn.Conv2d(2, 4, 3), activation((4, 4, 4)), nn.Flatten(), nn.Linear(64, 6), activation((6,)), nn.Linear(6, 3)]
    return nn.Sequential(*layers)


def before_head(*layers):
    return nn.Sequential(nn.LazyConv2d(4, 3), *layers, nn.Flatten(), nn.LazyLinear(3))


NETWORKS = {
    **{name: lambda make=make: around(make) for name, make in ACTIVATIONS.items()},
    "L2Pool": lambda: before_head(nn.ReLU(), L2Pool()),
    "LipNeXtBlocks": lambda: before_head(LipNeXtBlocks(3, 4, (4, 4), 0.25), L2Pool()),
    "LipNeXtBlocks, checkpointing": lambda: before_head(LipNeXtBlocks(3, 4, (4, 4), 0.25, checkpointing=True), L2Pool()),
    "Patches": lambda: nn.Sequential(Normalize([0.5, 0.4], [0.5, 1.0]), Patches(2, 2, 9), before_head(nn.ReLU())),
    "LiResConv2d": lambda: before_head(MaxMin(), LiResConv2d(4), MaxMin()),
    "LiResConv2d, eval": lambda: before_head(MaxMin(), LiResConv2d(4), MaxMin()).eval(),
    "lires_linear": lambda: before_head(nn.ReLU(), nn.Flatten(), lires_linear(64), MaxMin()),
    "cholesky_rows": lambda: before_head(nn.ReLU(), cholesky_rows(nn.Conv2d(4, 8, 2, 2)), MaxMin()),
    "unit_rows": lambda: before_head(nn.ReLU(), unit_rows(nn.Conv2d(4, 4, 2)), MaxMin()),
    **{
        f"orthogonal, {map}": lambda map=map: before_head(nn.ReLU(), nn.Flatten(), orthogonal(nn.Linear(64, 6), map), MaxMin())
        for map in ("cayley", "exponential", "polar")
    },
    "resnet2b": lambda: models.resnet2b((2, 6, 6), 3),
    "batch norm and pooling": lambda: before_head(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2)).eval(),
}


def alignment(model, x, y, other):
    """Mean cosine of the gradients and fixed directions."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x, create_graph=True)
    return F.cosine_similarity(gradient.flatten(1), other).mean()


def problem(name, device, dtype):
    """The same numbers in every dtype."""
    torch.manual_seed(1)
    model, x = NETWORKS[name](), 2 * torch.rand(5, 2, 6, 6)
    model(x)  # lazy layers
    with torch.no_grad():
        for p in model.parameters():  # none at a start that is special, such as 0
            p += 0.1 * torch.randn_like(p)
    y, other = torch.tensor([0, 1, 2, 0, 1]), torch.randn(5, 72)
    return model.to(device, dtype), x.to(device, dtype), y.to(device), other.to(device, dtype)


@pytest.mark.parametrize("name", NETWORKS)
def test_second_derivatives_agree_with_finite_differences(name, device):
    model, x, y, other = problem(name, device, torch.float64)
    parameters = dict(model.named_parameters())
    slopes = torch.autograd.grad(alignment(model, x, y, other), list(parameters.values()))
    for (key, p), slope in zip(parameters.items(), slopes, strict=True):
        direction, ends = torch.randn_like(p), []
        for step in (1e-6, -1e-6):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                moved.get_parameter(key).add_(direction, alpha=step)
            ends.append(alignment(moved, x, y, other).item())
        want = (ends[0] - ends[1]) / 2e-6
        assert abs(want) > 1e-6, key
        assert (slope * direction).sum().item() == pytest.approx(want, rel=1e-5), key


@pytest.mark.parametrize("name", NETWORKS)
def test_second_derivatives_in_float32_are_those_of_float64(name, device):
    found = []
    for dtype in (torch.float32, torch.float64):
        model, x, y, other = problem(name, device, dtype)
        found.append(torch.autograd.grad(alignment(model, x, y, other), list(model.parameters())))
    for got, want in zip(*found, strict=True):
        assert got.dtype == torch.float32
        assert_near(got, want, torch.float32)


def test_no_layer_is_forgotten():
    assert set(lipfast.nn.__all__) - {"Orthogonal", "UnitRows"} <= set(globals())  # these two are parametrizations, used above
