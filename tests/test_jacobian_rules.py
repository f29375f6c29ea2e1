"""One rule per layer kind: geometry, rounding and gradients."""

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import lipfast.nn
from lipfast.bounds import jacobian
from tests.test_jacobian import grafted, steepest


class Step(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def geometries():
    conv, flat = nn.Conv2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), groups=2), nn.Flatten()
    return {
        "strides": (nn.Sequential(conv, nn.ReLU(), nn.Conv2d(6, 4, 4, (3, 2), 2), flat), (4, 9, 12)),
        "lines": (nn.Sequential(nn.Conv1d(4, 6, 4, 3, 2, 2, groups=2), nn.ReLU(), nn.Conv1d(6, 2, 1, 2)), (4, 17)),
        "max": (nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.ReLU(), flat), (2, 8, 7)),
        "max apart": (nn.Sequential(nn.MaxPool2d(2, 3, dilation=2), nn.Conv2d(2, 2, 2)), (2, 9, 11)),
        "max lines": (nn.Sequential(nn.MaxPool1d(3, 1, 1), nn.Conv1d(2, 2, 2)), (2, 8)),
        "l2": (nn.Sequential(nn.Conv2d(2, 3, 3), nn.LPPool2d(2, 3, 2), nn.LPPool2d(2, 2, ceil_mode=True)), (2, 11, 9)),
        "pads": (nn.Sequential(nn.ReplicationPad2d((2, 1, 0, 3)), nn.ReflectionPad2d(2), nn.Conv2d(2, 2, 3, 2)), (2, 6, 6)),
        "average": (nn.Sequential(nn.AvgPool2d(3, 2, 1, True, False), nn.Hardtanh(), nn.AdaptiveAvgPool2d(2)), (2, 8, 8)),
        "turned": (nn.Sequential(nn.Conv2d(2, 3, 2), Step(lambda x: x.permute(0, 3, 1, 2)), nn.Conv2d(4, 2, 2)), (2, 3, 5)),
        "pairs": (nn.Sequential(conv, lipfast.nn.MaxMin(), nn.ZeroPad2d((-1, 1, 0, 2)), lipfast.nn.BetaAbs()), (4, 9, 12)),
    }


@pytest.mark.parametrize("name", list(geometries()))
def test_is_the_gradient_in_a_tiny_ball_and_above_it_in_a_large_one(name, device):
    torch.manual_seed(3)
    model, shape = geometries()[name]
    model, x = model.double().to(device), torch.randn(3, *shape, dtype=torch.float64, device=device)
    exact = torch.autograd.functional.jacobian(lambda v: model(v).sum(0).flatten(), x).transpose(0, 1).flatten(2)
    tiny = jacobian(model, x, 1e-12)
    torch.testing.assert_close(tiny, exact.abs().sum(2).amax(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(jacobian(model, x, 0.0, kind="estimate"), tiny, rtol=1e-9, atol=0)
    for eps in (0.1, 1.0):
        assert (steepest(model, x, eps) <= jacobian(model, x, eps) * (1 + 1e-9)).all()


def exact_norm(layers, shape):
    """Of the product of the matrices of layers that map 0 to 0, each of whose entries float64 has exactly."""
    total = None
    for layer in copy.deepcopy(layers).double():
        columns = layer(torch.eye(math.prod(shape)).double().reshape(-1, *shape)).detach()
        matrix, shape = np.vectorize(Fraction)(columns.flatten(1).T.numpy()), columns.shape[1:]
        total = matrix if total is None else matrix.dot(total)
    return max(sum(map(abs, row)) for row in total)


def rounding_layers():
    """Kinds that round, one at a time, before a last layer that does not."""
    graft = lipfast.nn.GraftedReLU((1, 3, 3), torch.arange(9).reshape(1, 3, 3) != 4, slope=0.7)
    return {
        "linear": [nn.Flatten(), nn.Linear(9, 5, bias=False)],
        "conv": [nn.Conv2d(1, 4, 2, 2, 1, bias=False)],
        "groups": [nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 4, 2, (1, 2), 1, (2, 1), groups=2, bias=False)],
        "scale": [Step(lambda x: x * 0.7)],
        "average": [nn.AvgPool2d(2, 1)],
        "pad": [nn.ReflectionPad2d(1)],
        "sum": [Step(lambda x: x - x.transpose(2, 3))],
        "graft": [graft],
        "leaky": [nn.LeakyReLU(0.7)],
        "norm": [nn.Flatten()],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", list(rounding_layers()))
def test_holds_in_exact_arithmetic_where_an_estimate_does_not(name, dtype):
    missed = 0
    for seed in range(8):
        torch.manual_seed(seed)
        layers, x = rounding_layers()[name], torch.rand(1, 1, 3, 3)
        last = nn.Linear(nn.Sequential(*layers)(x).numel(), 2, bias=False)
        model, x = nn.Sequential(*layers, nn.Flatten(), last).to(dtype), x.to(dtype)
        last.weight.data.normal_()
        exact = exact_norm(model, (1, 3, 3))
        assert exact <= Fraction(jacobian(model, x, 0.0).item()) <= exact * Fraction(1.001)
        missed += Fraction(jacobian(model, x, 0.0, kind="estimate").item()) < exact
    assert missed or (name == "norm" and dtype == torch.float32)  # sums of float32 are exact in float64


@pytest.mark.parametrize("size", [1.0, 1e-44])
def test_one_product_with_a_slope_holds(size):
    slope = 0.5 + 2.0**-24 + 0.99 * 2.0**-25  # nearly half a spacing away from float32
    for layer in (nn.LeakyReLU(slope), lipfast.nn.GraftedReLU((1,), torch.ones(1, dtype=torch.bool), slope=0.7)):
        exact = Fraction(slope) if isinstance(layer, nn.LeakyReLU) else Fraction(layer.slope.item())
        for _ in range(60):
            last = nn.Linear(1, 1, bias=False)
            last.weight.data.mul_(size)
            bound = jacobian(nn.Sequential(layer, last), -torch.ones(1, 1), 0.1).item()
            assert Fraction(bound) >= abs(Fraction(last.weight.item()) * exact)


def matrix(*rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows)
    return layer


BOTH = (matrix([1.0], [1.0]), nn.Hardtanh(-9, 0.5), matrix([1.0, -3.0]))  # slopes from -3 to 1 around 0.5
BY_HAND = {
    "row": ([], [3.0, -4.0], 7.0),
    "whole factor": ([Step(lambda x: x * torch.tensor(3)), matrix([1.0, 2.0])], [0.0, 0.0], 9.0),
    "falling": ([nn.LeakyReLU(-2.0), *BOTH], [0.0], 6.0),
    "greater, undecided": ([matrix([1.0, 0.0], [0.0, 2.0]), lipfast.nn.MaxMin(), matrix([3.0, 0.0])], [0.3, 0.0], 9.0),
    "less, undecided": ([matrix([1.0, 0.0], [0.0, 2.0]), lipfast.nn.MaxMin(), matrix([0.0, 3.0])], [0.3, 0.0], 9.0),
    "first": ([matrix([1.0, 0.0], [0.0, 2.0]), lipfast.nn.MaxMin(), matrix([3.0, 1.0])], [5.0, 0.0], 5.0),
    "second": ([matrix([1.0, 0.0], [0.0, 2.0]), lipfast.nn.MaxMin(), matrix([3.0, 1.0])], [-5.0, 0.0], 7.0),
    "one for both windows": ([nn.MaxPool1d(2, 1), matrix([3.0, -3.0])], [[0.0, 5.0, 0.0]], 0.0),
    "either of two": ([nn.MaxPool1d(2, 1), matrix([3.0, -2.0])], [[0.0, 0.0, 9.0]], 8.0),
    "norms": ([nn.LPPool1d(2, 2, 1), matrix([1.0, -1.0])], [[-0.5, 2.0, 0.5]], 3 - 11.25**-0.5),
    "norms, falling": ([nn.LPPool1d(2, 2, 1), matrix([1.0, -1.0])], [[-0.5, -2.0, 0.5]], 3 - 11.25**-0.5),
    "norm, undecided": ([nn.LPPool1d(2, 2, 1), matrix([0.25]), *BOTH], [[-0.5, 2.0]], 1.5),
}


@pytest.mark.parametrize("name", list(BY_HAND))
def test_is_what_a_hand_finds(name):
    """Boxes of radius 1."""
    layers, x, expected = BY_HAND[name]
    model = nn.Sequential(*layers) if layers else matrix(x)
    bound = jacobian(model.double(), torch.tensor([x]).double(), 1.0).item()
    assert expected <= bound <= expected * (1 + 1e-12) + 1e-12


def test_knows_the_dual_norms():
    found = [jacobian(matrix([3.0, -4.0]), torch.zeros(1, 2), 1.0, p).item() for p in (math.inf, 2, 1)]
    assert found == pytest.approx([7.0, 5.0, 4.0], rel=1e-12)
    assert jacobian(matrix([3e-180, 4e-180]).double(), torch.zeros(1, 2).double(), 1.0, 2) >= 5e-180  # squares vanish


def test_holds_for_a_bfloat16_model():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), lipfast.nn.MaxMin(), nn.Flatten(), nn.Linear(64, 5)).bfloat16()
    x = torch.randn(3, 2, 6, 6).bfloat16()
    bound = jacobian(model, x, 0.1)
    assert (steepest(model.double(), x, 0.1) <= bound).all()
    affine = nn.Sequential(*list(model)[:1], nn.Flatten(), model[-1]).bfloat16()
    exact = jacobian(copy.deepcopy(affine).double(), x.double(), 0.1)
    found = jacobian(affine, x, 0.1)
    assert ((exact <= found) & (found <= exact * 1.001)).all()


def test_an_estimate_is_differentiable_in_the_parameters():
    trunk = [nn.Conv2d(2, 4, 3, 2), nn.MaxPool2d(3, 1, 1), lipfast.nn.MaxMin(), nn.AvgPool2d(2, 1), nn.ReflectionPad2d(1)]
    model = nn.Sequential(*trunk, nn.AvgPool2d(2), Step(lambda x: 0.7 * x), nn.Flatten(), *grafted((16, 8, 3), 0.5)).double()
    x = torch.randn(3, 2, 9, 9).double()
    value = lambda: jacobian(model, x, 0.05, kind="estimate").square().sum()
    parameters = [p for name, p in model.named_parameters() if "bias" not in name and "intercept" not in name]
    for p, gradient in zip(parameters, torch.autograd.grad(value(), parameters), strict=True):
        way, before = torch.randn_like(p), p.detach().clone()
        ends = []
        for step in (1e-6, -1e-6):
            p.data = before + step * way
            ends.append(value().item())
        p.data = before
        assert math.isclose((ends[0] - ends[1]) / 2e-6, (gradient * way).sum().item(), rel_tol=1e-5, abs_tol=1e-6)
    assert not jacobian(model, x, 0.05).requires_grad
