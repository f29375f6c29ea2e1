"""Estimates of CROWN by auto_LiRPA, where it is installed."""

import sys

import pytest
import torch
from torch import nn

import lipfast.nn
from lipfast import models
from lipfast.bounds import crown_margin, interval_margin
from tests.networks import images, third_party
from tests.test_crown import EPS, grafted, mlp


@pytest.fixture
def auto_lirpa():
    return pytest.importorskip("auto_LiRPA", reason="auto_LiRPA, an optional extra, is not installed")


def networks():
    """With layers of every kind that estimates read, and the shape of a sample."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4).eval()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias), nn.init.normal_(norm.running_mean)
    conv = lambda: nn.Conv2d(2, 4, 3, 2, 1)
    tail = lambda features: nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(features, 3))
    image = (2, 8, 8)
    return {
        "vectors": (mlp(inputs=6), (6,)),
        "batch norm": (nn.Sequential(conv(), nn.ReLU(), nn.Conv2d(4, 4, 2), norm, tail(36)), image),
        "normalize": (nn.Sequential(lipfast.nn.Normalize([0.5, 0.4], [0.2, 0.3]), conv(), tail(64)), image),
        "average": (nn.Sequential(conv(), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), tail(16)), image),
        "pad left": (nn.Sequential(nn.ZeroPad2d((2, 1, 0, 1)), conv(), tail(120)), image),
        "pad right": (nn.Sequential(nn.ZeroPad2d((0, 2, 3, 1)), conv(), tail(120)), image),
        "grafted": (grafted(models.cnn_b(image, 3, "grafted_relu"), 0.3), image),
        "nothing grafted": (grafted(models.cnn_b(image, 3, "grafted_relu"), 0.0), image),
        "residual": (grafted(models.resnet2b(image, 3, "grafted_relu"), 0.3), image),
    }


@pytest.mark.parametrize("intermediate", ["interval", "crown"])
@pytest.mark.parametrize("name", list(networks()))
def test_estimates_are_near_the_bounds_and_not_below(name, intermediate, auto_lirpa):
    model, shape = networks()[name]
    model.double()
    x, eps = torch.rand(3, *shape, dtype=torch.float64), torch.tensor([0.01, 0.02, 0.04])
    label = model(x).argmax(1)
    for pixel_range in (None, (0.0, 1.0)):
        bound, estimate = (
            crown_margin(model, x, label, eps, kind=kind, pixel_range=pixel_range, intermediate=intermediate)
            for kind in ("bound", "estimate")
        )
        torch.testing.assert_close(bound, estimate, rtol=1e-6, atol=1e-6)
        assert estimate.dtype == x.dtype
        assert (bound <= estimate + 1e-12).all()


def test_estimates_know_layers_that_bounds_do_not(auto_lirpa):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.rand(2, 1, 8, 8)
    label = model(x).argmax(1)
    estimate = crown_margin(model, x, label, 0.01, kind="estimate")
    assert (estimate >= interval_margin(model, x, label, 0.01)).all()
    assert (estimate <= model(x).gather(1, label[:, None]) - model(x) + 1e-6).all()


class Pixels(nn.Module):
    """Each pixel times its own number, which auto_LiRPA's patches do not know."""

    def __init__(self, *shape):
        super().__init__()
        self.factor = nn.Parameter(torch.rand(shape))

    def forward(self, x):
        return x * self.factor


def test_estimates_take_matrices_where_patches_fail(auto_lirpa):
    model = nn.Sequential(Pixels(2, 8, 8), nn.Conv2d(2, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten())
    model, x = nn.Sequential(model, nn.Linear(4, 3)), torch.rand(2, 2, 8, 8)
    bound, estimate = (crown_margin(model, x, model(x).argmax(1), 0.05, kind=kind) for kind in ("bound", "estimate"))
    torch.testing.assert_close(bound, estimate, rtol=1e-6, atol=1e-6)


def test_slopes_that_move_improve_estimates(auto_lirpa):
    model, x = third_party("mnist_fc_3layer"), images("mnist_fc_3layer", 2)
    label = model(x).argmax(1)
    still, moved = (crown_margin(model, x, label, 2 * EPS, kind="estimate", iterations=n) for n in (0, 5))
    assert (moved >= still - 1e-4).all()
    assert moved.sum() > still.sum() + 0.5
    assert (moved.gather(1, label[:, None]) == 0).all()


def test_tells_in_one_line_that_auto_lirpa_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "auto_LiRPA", None)
    with pytest.raises(
        ValueError, match=r"needs auto_LiRPA: pip install git\+https://github.com/.*kind 'bound' needs nothing"
    ) as e:
        crown_margin(mlp(), torch.zeros(1, 2).double(), torch.tensor([0]), 0.1, kind="estimate")
    assert "\n" not in str(e.value)
    assert crown_margin(mlp(), torch.zeros(1, 2).double(), torch.tensor([0]), 0.1).isfinite().all()


def test_tells_of_a_network_that_auto_lirpa_does_not_read(auto_lirpa):
    model = nn.Sequential(nn.CircularPad2d(1), nn.Conv2d(1, 2, 3), nn.Flatten(), nn.ReLU(), nn.Linear(32, 2))
    with pytest.raises(ValueError, match=r"model: auto_LiRPA does not read this network \(.*\); kind 'bound' may") as error:
        crown_margin(model, torch.zeros(1, 1, 4, 4), torch.tensor([0]), 0.1, kind="estimate")
    assert "\n" not in str(error.value)


def test_estimates_know_one_norm():
    with pytest.raises(ValueError, match=r"p: inf expected for an estimate, got 2"):
        crown_margin(mlp(), torch.zeros(1, 2).double(), torch.tensor([0]), 0.1, p=2, kind="estimate")
