"""CROWN on networks of all shapes: windows, sums, values that several layers read."""

import math
import random

import pytest
import torch
from torch import nn

from lipfast import models
from lipfast.bounds import _relaxation, crown, crown_margin, interval, interval_margin
from tests.networks import jacobian
from tests.test_crown import NORMS, ball, grafted, margins
from tests.test_random_networks import RandomNetwork


class Twice(nn.Module):
    """A sum of two readers: rows on a window and rows on all of the image, which goes round."""

    def __init__(self):
        super().__init__()
        self.zeros, self.circle = (nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode) for mode in ("zeros", "circular"))

    def forward(self, x):
        return self.zeros(x) + self.circle(x)


class Convex(RandomNetwork):
    """Of the layers that have lines."""

    def activation(self, channels):
        return self.random.choice([nn.ReLU(), nn.LeakyReLU(0.2), nn.ReLU(), nn.Identity()])

    def linear(self, shape):
        layer = super().linear(shape)
        return self.linear(shape) if isinstance(layer, nn.MaxPool2d) else layer


@pytest.mark.parametrize("seed", range(40))
def test_is_sound_on_networks_that_nobody_designed(seed, monkeypatch):
    model = Convex(seed)
    x = torch.randn(2, *model.shape, dtype=torch.float64)
    eps, p = random.Random(seed).choice([(0.05, math.inf), (0.5, 2), (0.5, 1)][: 1 if len(model.shape) == 2 else 3])
    label = model(x).argmax(1)
    bounds, boxes = crown(model, x, eps, p), interval(model, x, eps, p)
    assert torch.equal(bounds.margin(label), crown_margin(model, x, label, eps, p))
    assert (bounds.margin(label) >= boxes.margin(label)).all()
    noise = eps * ball(p, x[0].numel(), 200).reshape(-1, *x.shape[1:])
    values: list = []
    for name in bounds.layers:
        model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: values.append(inputs[0]))
    for i in range(2):
        values.clear()
        found = margins(model(x[i] + noise), label[i])
        assert (bounds.margin(label)[i] <= found + 1e-12 * found.abs().max()).all()
        for value, (lower, upper), outer in zip(values, bounds.layers.values(), boxes.layers.values(), strict=True):
            assert (lower[i] <= value + 1e-12).all()
            assert (value - 1e-12 <= upper[i]).all()
            assert (lower >= outer[0] - 1e-12).all()
    monkeypatch.setattr(_relaxation, "_TILE", 2**40)
    for name, whole in crown(model, x, eps, p).layers.items():
        torch.testing.assert_close(whole, bounds.layers[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_is_exact_where_no_unit_changes(seed):
    model, eps = Convex(seed), 1e-6
    x = torch.randn(1, *model.shape, dtype=torch.float64)
    y = model(x).argmax(1)
    rows = torch.autograd.functional.jacobian(model, x).reshape(-1, x.numel())
    apart = rows[y] - rows
    duals = [(math.inf, apart.abs().sum(1)), (2, apart.norm(dim=1)), (1, apart.abs().amax(1))]
    for p, dual in duals[: 1 if len(model.shape) == 2 else 3]:  # boxes of other balls do not know a Linear on lines
        moved = margins(model(x), y[0]) - crown_margin(model, x, y, eps, p)
        torch.testing.assert_close(moved[0] / eps, dual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize(
    "layers",
    [
        (nn.Linear(24, 9), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 2)),
        (nn.Unflatten(1, (1, 4, 6)), nn.ZeroPad2d((0, 1, 1, 0)), nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)),
        (nn.Unflatten(1, (1, 4, 6)), Twice(), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)),
        (nn.Unflatten(1, (1, 24)), nn.Conv1d(1, 4, 3, 2, 1), nn.Conv1d(4, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(66, 2)),
    ],
)
def test_boxes_before_the_first_activation_are_exact(layers, p):
    model, x, eps = nn.Sequential(*layers).double(), torch.randn(1, 24).double(), 2.0
    at = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU))
    ((lower, upper),) = crown(model, x, eps, p=p).layers.values()
    middle, rows = model[:at](x).flatten(), jacobian(model[:at], (24,))
    width = eps * {1: rows.abs().amax(1), 2: rows.norm(dim=1), math.inf: rows.abs().sum(1)}[p]
    crosses = width > middle.abs()
    assert crosses.any()
    torch.testing.assert_close(lower.flatten()[crosses], (middle - width)[crosses], rtol=0, atol=1e-10)
    torch.testing.assert_close(upper.flatten()[crosses], (middle + width)[crosses], rtol=0, atol=1e-10)


def test_a_window_or_the_whole_image_say_the_same(monkeypatch):
    model = grafted(models.resnet2b((3, 12, 12), activation="grafted_relu"), 0.3)
    x = torch.rand(3, 3, 12, 12)
    found = []
    for tile, part in ((0, 2**17), (2**13, 2**17), (2**40, 2**17), (2**13, 2**12)):
        monkeypatch.setattr(_relaxation, "_TILE", tile)
        monkeypatch.setattr(_relaxation, "_PART", part)
        found.append(crown_margin(model.double(), x.double(), torch.tensor([0, 1, 2]), 0.05))
        torch.testing.assert_close(found[-1], found[0], rtol=0, atol=1e-9)
    assert (found[0] > interval_margin(model, x.double(), torch.tensor([0, 1, 2]), 0.05) + 1e-3).any()


def test_units_that_see_nothing_but_padding():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.ZeroPad2d(3), nn.Conv2d(2, 2, 2, bias=False), nn.ReLU())
    x = torch.randn(1, 1, 4, 4)
    lower, upper = crown(nn.Sequential(model, nn.Flatten(), nn.Linear(128, 2)), x, 0.5).layers["0.4"]
    assert lower.shape == (1, 2, 8, 8)
    assert -1e-30 < lower[0, :, 0, 0].amin() <= 0 <= upper[0, :, 0, 0].amax() < 1e-30
    assert (upper - lower > 0.1)[0, :, 3:5, 3:5].all()
