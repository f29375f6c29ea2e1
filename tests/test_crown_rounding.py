"""What floating point may take from CROWN's margins."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from lipfast.bounds import crown_margin, interval_margin
from lipfast.bounds._relaxation import lines
from lipfast.bounds.layers import RELU
from lipfast.bounds.network import Node
from tests.test_crown import margins, mlp


def exact_least(model: nn.Sequential, low: Fraction, high: Fraction, label: int) -> list[Fraction]:
    """The minima of the margins over an interval, of one number through a hidden layer of ReLU."""
    (w, b), (v, c) = (
        [[[Fraction(t) for t in row] for row in m.weight.tolist()], list(map(Fraction, m.bias.tolist()))]
        for m in (model[0], model[2])
    )
    corners = [low, high] + [-o / k for (k,), o in zip(w, b, strict=True) if k and low < -o / k < high]
    found = []
    for x in corners:
        hidden = [max(Fraction(0), k * x + o) for (k,), o in zip(w, b, strict=True)]
        z = [sum(k * h for k, h in zip(row, hidden, strict=True)) + o for row, o in zip(v, c, strict=True)]
        found.append([z[label] - t for t in z])
    return [min(column) for column in zip(*found, strict=True)]


def test_is_below_the_exact_rational_minimum_where_numbers_cancel():
    beaten = 0
    for seed in range(100):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2)).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2.0 ** torch.randint(0, 40, parameter.shape))
            model[2].weight[1] = model[2].weight[0] * (1 + 2.0**-40)  # so that margins are small differences of large numbers
        x, eps = torch.rand(1, 1).double(), 0.01
        found = crown_margin(model, x, torch.tensor([0]), eps)[0]
        middle, radius = Fraction(x.item()), Fraction(eps)
        exact = exact_least(model, middle - radius, middle + radius, 0)
        assert all(Fraction(f) <= e for f, e in zip(found.tolist(), exact, strict=True))
        computed = margins(model(torch.cat([x - eps, x, x + eps])), 0).amin(0)
        beaten += computed[1].item() > exact[1]
    assert beaten > 10  # rounding to nearest says too much, often


class Thrice(nn.Module):
    """A sum of three linear maps of one number, each of three layers."""

    def __init__(self):
        super().__init__()
        linear = lambda i, o: nn.Linear(i, o, bias=False)
        self.parts = nn.ModuleList(nn.Sequential(linear(1, 5), linear(5, 1), linear(1, 2)) for _ in range(3))

    def forward(self, x):
        a, b, c = (part(x) for part in self.parts)
        return a + b + c

    def slope(self) -> Fraction:
        """Of the difference of the outputs."""
        exact = lambda t: [Fraction(value) for value in t.flatten().tolist()]
        found = Fraction(0)
        for first, second, third in self.parts:
            inner = sum(v * w for v, w in zip(exact(second.weight), exact(first.weight), strict=True))
            found += inner * (exact(third.weight)[0] - exact(third.weight)[1])
        return found


@pytest.mark.parametrize("where", ["layers", "readers"])
def test_is_below_the_exact_rational_minimum_where_rows_cancel(where):
    beaten = 0
    for seed in range(100):
        torch.manual_seed(seed)
        model = Thrice().double()
        with torch.no_grad():
            for first, second, _ in model.parts if where == "layers" else ():
                v, w = second.weight[0], first.weight[:, 0]
                w[4] = -(v[:4] @ w[:4]) / v[4]
            if where == "readers":
                slopes = [(part[1].weight @ part[0].weight).item() for part in model.parts]
                model.parts[0][2].weight[0] = 2.0**20
                model.parts[2][2].weight[0] = -(2.0**20) * slopes[0] / slopes[2]
        x, eps = torch.rand(1, 1).double(), 2.0**-60
        found = crown_margin(model, x, torch.tensor([0]), eps)[0, 1].item()
        exact = min(model.slope() * (Fraction(x.item()) + sign * Fraction(eps)) for sign in (-1, 1))
        assert exact - Fraction(2.0**-20) < found <= exact
        logits = model(x)[0]
        beaten += Fraction((logits[0] - logits[1]).item()) > exact
    assert beaten > 10


def test_lines_are_on_their_sides_of_a_relu():
    for seed in range(20):
        torch.manual_seed(seed)
        lower, upper = -torch.rand(50).double() * 10.0 ** torch.randint(-9, 9, (50,)), torch.rand(50).double()
        found = lines(Node("relu", RELU, (0,), (50,)), (lower, upper))
        assert (found.slope == (upper > -lower)).all()
        ends = (map(Fraction, t.tolist()) for t in (lower, upper, found.slope, found.turn, found.lift))
        for low, high, slope, turn, lift in zip(*ends, strict=True):
            assert (slope + turn) * low + lift >= 0
            assert (slope + turn) * high + lift >= high
            assert lift <= -low * high / (high - low) * (1 + Fraction(2.0**-45)) + high * Fraction(2.0**-50)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_what_is_not_finite_proves_nothing(at, value):
    model, x = mlp(), torch.rand(4, 2).double()
    for parameter in ("weight", "bias"):
        with torch.no_grad():
            getattr(model[at], parameter).flatten()[0] = value
        assert (crown_margin(model, x, torch.zeros(4).long(), 0.1)[:, 1:] == -math.inf).all()


def test_numbers_too_large_for_its_rounding_prove_what_boxes_do():
    model, x, label = mlp(), torch.rand(4, 2).double(), torch.zeros(4).long()
    before = crown_margin(model, x, label, 0.1)
    for weight in (model[0].weight, model[0].bias, model[2].bias):
        weight.data.mul_(2.0**110)
    boxes = interval_margin(model, x, label, 0.1)
    assert torch.equal(crown_margin(model, x, label, 0.1), boxes)
    assert (before * 2.0**110 > boxes + 2.0**100).any()


def test_half_precision_is_rounded_down():
    model, x = mlp(), torch.rand(4, 2).double()
    label = model(x).argmax(1)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        low = crown_margin(model, x.to(dtype), label, 0.1)
        assert low.dtype == dtype
        high = crown_margin(model.double(), x.to(dtype).double(), label, 0.1)
        assert (low.double() <= high).all()
        torch.testing.assert_close(low.double(), high, rtol=1e-2, atol=1e-2)
