import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lipfast.nn
from lipfast import models
from lipfast.attacks import pgd
from lipfast.bounds import crown, crown_margin, interval, interval_margin
from tests.networks import NAMES, images, jacobian, third_party

EPS = 0.01
NORMS = [1, 2, math.inf]
GOLDEN = [(name, intermediate) for name in NAMES for intermediate in ("interval", "crown")]
GOLDEN.remove(("resnet2b", "crown"))  # auto_LiRPA does not intersect its boxes with those of intervals


def mlp(seed: int = 0, inputs: int = 2, classes: int = 3, activation=nn.ReLU) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = [nn.Linear(inputs, 12), activation(), nn.Linear(12, 12), activation()]
    return nn.Sequential(*hidden, nn.Linear(12, classes)).double()


def grafted(model: nn.Module, ratio: float) -> nn.Module:
    """With some units made lines of any slope."""
    for layer in model.modules():
        if isinstance(layer, lipfast.nn.GraftedReLU):
            layer.mask.copy_(torch.rand(layer.mask.shape) < ratio)
            nn.init.uniform_(layer.slope, -0.5, 1.0), nn.init.normal_(layer.intercept, std=0.1)
    return model.eval()


def ball(p: float, dims: int, count: int) -> torch.Tensor:
    """Points of the unit ball, many of them on its rim, in float64."""
    d = torch.randn(count, dims, dtype=torch.float64) if p == 2 else torch.rand(count, dims, dtype=torch.float64) * 2 - 1
    if p == math.inf:
        return torch.cat([d, d.sign()])
    d = d * (torch.rand_like(d) < torch.rand(count, 1)) + 1e-9
    d = d / torch.linalg.vector_norm(d, p, dim=1, keepdim=True) * (1 - 1e-12)
    return torch.cat([d, d * torch.rand(count, 1)])


def margins(logits: torch.Tensor, label: int) -> torch.Tensor:
    return logits[:, label, None] - logits


@pytest.mark.parametrize(("name", "intermediate"), GOLDEN)
def test_equals_auto_lirpa(name, intermediate):
    """Its margins, kept with the version that gave them by tests/golden/auto_lirpa_crown.py."""
    golden = json.loads((Path(__file__).parent / "golden" / "auto_lirpa_crown.json").read_text())[name]
    model, x = third_party(name).double(), images(name, 2).double()
    found = crown_margin(model, x, model(x).argmax(1), EPS, intermediate=intermediate)
    want = torch.tensor(golden[intermediate], dtype=torch.float64)
    torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-7)
    assert (found <= want + 1e-12).all()


@pytest.mark.parametrize("name", NAMES)
def test_lies_between_boxes_and_what_samples_and_attacks_find(name):
    model, x = third_party(name), images(name, 2)
    label = model(x).argmax(1)
    found = crown_margin(model, x, label, EPS)
    boxes = interval_margin(model, x, label, EPS)
    assert (found >= boxes).all()
    assert (found > boxes + 0.1).any()
    model, x = model.double(), x.double()
    attacked = pgd(model, x, label, EPS, steps=20, restarts=2, pixel_range=None)
    noise = EPS * ball(math.inf, x[0].numel(), 300).reshape(-1, *x.shape[1:])
    for i, y in enumerate(label):
        assert (found[i] <= margins(model(torch.cat([x[i] + noise, attacked[i : i + 1]])), y)).all()


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("activation", [nn.ReLU, lambda: nn.LeakyReLU(0.2), lambda: nn.LeakyReLU(-0.5)])
def test_is_sound_and_tighter_than_boxes_in_the_plane(activation, p):
    x, points = torch.randn(8, 2, dtype=torch.float64), ball(p, 2, 4000)
    for seed in range(4):
        model = mlp(seed, activation=activation)
        label, radius = model(x).argmax(1), torch.linspace(0.02, 0.6, 8)
        found, boxes = (f(model, x, label, radius, p=p) for f in (crown_margin, interval_margin))
        for i in range(8):
            assert (found[i] <= margins(model(x[i] + radius[i].item() * points), label[i])).all()
        assert (found >= boxes).all()
        assert found.mean() > boxes.mean() + 0.01
        alone = torch.cat([crown_margin(model, x[i : i + 1], label[i : i + 1], radius[i].item(), p=p) for i in range(8)])
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("p", "pixel_range"), [(1, None), (2, None), (math.inf, None), (math.inf, (0.2, 0.9))])
def test_is_exact_where_every_unit_is_grafted(p, pixel_range, device):
    model = grafted(models.resnet2b((3, 8, 8), activation="grafted_relu"), 1.0).double().to(device)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, device=device).clamp(0.2, 0.9)
    label = model(x).argmax(1)
    found = crown_margin(model, x, label, 0.1, p=p, pixel_range=pixel_range)
    low, high = ((x + s).clamp(*(pixel_range or (None, 9.0))) - x for s in (-0.1, 0.1))
    rows = jacobian(model, (3, 8, 8))
    for i, y in enumerate(label):
        apart, at = rows[y] - rows, margins(model(x[i : i + 1]), y)[0]
        least = torch.minimum(apart * low[i].flatten(), apart * high[i].flatten()).sum(1)
        exact = at + {1: -0.1 * apart.abs().amax(1), 2: -0.1 * apart.norm(dim=1), math.inf: least}[p]
        torch.testing.assert_close(found[i], exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("p", [1, 2])
def test_a_ball_within_a_pixel_range_is_within_both(p):
    model, x, label = mlp(inputs=6), torch.rand(8, 6).double(), torch.zeros(8).long()
    eps = {1: 2.0, 2: 1.0}[p]
    both = crown_margin(model, x, label, eps, p=p, pixel_range=(0.0, 1.0))
    for alone in (crown_margin(model, x, label, eps, p=p), crown_margin(model, x, label, eps, pixel_range=(0.0, 1.0))):
        assert (both > alone + 1e-3).any()


def test_each_sample_has_its_own_radius_and_any_number_of_classes():
    model = mlp(classes=1000)
    x, label, eps = torch.rand(3, 2).double(), torch.tensor([999, 0, 7]), torch.tensor([0.0, 0.1, 0.2])
    found = crown_margin(model, x, label, eps)
    assert found.shape == (3, 1000)
    for i in range(3):
        alone = crown_margin(model, x[i : i + 1], label[i : i + 1], eps[i].item())
        torch.testing.assert_close(found[i : i + 1], alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0], margins(model(x), 999)[0], rtol=0, atol=1e-9)
    assert crown_margin(model, x[:0], label[:0], 0.1).shape == (0, 1000)


def test_samples_are_taken_in_parts_that_fit_memory(monkeypatch):
    model = mlp()
    x, label = torch.randn(5, 2).double(), torch.tensor([0, 1, 2, 1, 0])
    for p, eps in ((math.inf, torch.linspace(0.1, 0.5, 5)), (2, torch.linspace(0.1, 0.5, 5)), (1, 0.3)):
        whole = crown(model, x, eps, p, pixel_range=(-1.0, 1.0))
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["lipfast.bounds.crown"], "_KEPT", 100)
            parts = crown(model, x, eps, p, pixel_range=(-1.0, 1.0))
        torch.testing.assert_close(parts.layers, whole.layers, rtol=0, atol=1e-12)
        torch.testing.assert_close(parts.margin(label), whole.margin(label), rtol=0, atol=1e-12)


def test_boxes_are_in_the_dtype_of_the_model_and_rounded_outward(device):
    model, x = models.cnn_small((1, 10, 10)).to(device), torch.rand(2, 1, 10, 10, device=device)
    boxes, wide = (crown(m, v, 0.1).layers for m, v in ((model, x), (copy.deepcopy(model).double(), x.double())))
    assert list(boxes) == list(interval(model, x, 0.1).layers)
    for (lower, upper), (low, high) in zip(boxes.values(), wide.values(), strict=True):
        assert lower.dtype == torch.float32
        assert (lower <= low).all()
        assert (high <= upper).all()
        torch.testing.assert_close(upper.double(), high, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", [nn.Tanh(), lipfast.nn.MaxMin(), lipfast.nn.ClippedReLU(1.0), nn.LeakyReLU(1.5), nn.ReLU6()])
def test_names_a_layer_without_lines(layer):
    model = nn.Sequential(nn.Linear(2, 4), layer, nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"layer '1': .* has no linear relaxation here; the method 'interval' knows it"):
        crown_margin(model, torch.zeros(1, 2), torch.tensor([0]), 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": -0.1}, "eps: finite and not negative"),
        ({"p": 3}, "p: 1, 2 or inf"),
        ({"label": torch.tensor([3])}, "label: class indices from 0 to 2"),
        ({"x": torch.full((1, 2), math.nan).double()}, "x: finite values"),
        ({"kind": "guess"}, "kind: 'bound' or 'estimate'"),
        ({"intermediate": "guess"}, "intermediate: 'crown' or 'interval' expected, got 'guess'"),
        ({"iterations": 5}, "iterations: 0 expected, or more for an estimate"),
        ({"iterations": -1, "kind": "estimate"}, "iterations: 0 expected, or more for an estimate"),
    ],
)
def test_names_the_wrong_argument(changes, message):
    arguments = {"model": mlp(), "x": torch.rand(1, 2).double(), "label": torch.tensor([0]), "eps": 0.1, **changes}
    with pytest.raises(ValueError, match=message):
        crown_margin(**arguments)
