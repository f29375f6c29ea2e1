"""Certificates by CROWN."""

import math
import sys

import pytest
import torch
from torch import nn

from lipfast.bounds import crown_margin
from lipfast.certify import certify
from tests.attacked import broken
from tests.networks import images, third_party
from tests.test_crown import ball, mlp

EPS = (0.02, 0.05, 0.1)


def net(seed: int = 0) -> nn.Sequential:
    """Whose classes share the unit square."""
    model = mlp(seed)
    with torch.no_grad():
        model[0].weight.mul_(4)
        model[4].bias.sub_(model(torch.rand(200, 2).double()).mean(0))
    return model


def data(model: nn.Module, B: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(B, 2).double()
    return x, model(x).argmax(1)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_no_point_of_a_certified_ball_has_another_class(p):
    model = net(1)
    x, labels = data(model)
    certificate = certify(model, (x, labels), EPS, p=p, method="crown", progress=False)
    assert len(labels.unique()) > 1
    assert (certificate.radius > certify(model, (x, labels), EPS, p=p, progress=False).radius).any()
    for center, radius, y in zip(x, certificate.radius, labels, strict=True):
        assert (model(center + radius * ball(p, 2, 2000)).argmax(1) == y).all()


@pytest.mark.parametrize("name", ["kw_mnist", "mnist_fc_3layer"])
def test_no_attack_finds_another_class(name):
    model, x = third_party(name), images(name, 16)
    certificate = certify(model, (x, model(x).argmax(1)), (0.01, 0.02, 0.04), method="crown", batch_size=7, progress=False)
    assert (certificate.p, certificate.kind, certificate.method) == (math.inf, "bound", "crown")
    assert not broken(certificate, model, x).any()
    assert broken(certificate, model, x, times=20).any()


def test_accuracy_at_a_listed_eps_is_that_of_one_test_there():
    model, x = third_party("kw_mnist"), images("kw_mnist", 12)
    label = model(x).argmax(1)
    levels = (0.02, 0.06, 0.1, 0.14)
    certificate = certify(model, (x, label), levels, method="crown", pixel_range=(0, 1), progress=False)
    reached = [certificate.certified_accuracy(eps) for eps in levels]
    assert reached == sorted(reached, reverse=True)
    assert len(set(reached)) > 2
    for eps, accuracy in zip(levels, reached, strict=True):
        found = crown_margin(model, x, label, eps, pixel_range=(0.0, 1.0)).scatter(1, label[:, None], math.inf)
        assert accuracy == (found > 0).all(1).double().mean().item()


def test_never_proves_less_than_boxes():
    pair = data(model := net(2))
    boxes, lines = (certify(model, pair, EPS, method=method, progress=False) for method in ("interval", "crown"))
    assert (lines.radius >= boxes.radius).all()
    assert (lines.radius > boxes.radius).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_certifies_nothing(value):
    model = mlp()
    pair = data(model)
    with torch.no_grad():
        model[2].weight[0, 0] = value
    assert (certify(model, pair, EPS, method="crown", progress=False).radius == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "alpha-crown"}, "kind must be 'estimate' for method 'alpha-crown', which rounds to nearest; 'crown' has"),
        ({"method": "alpha-crown", "kind": "estimate", "p": 2}, "p must be inf for method 'alpha-crown', got 2"),
        ({"method": "crown", "p": 3}, "p must be 1 or 2 or inf for method 'crown', got 3"),
        ({"method": "crown", "model": nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))}, "'1'.*no linear relaxation"),
        ({"method": "crown", "kind": "estimate"}, "needs auto_LiRPA: pip install git"),
        ({"method": "alpha-crown", "kind": "estimate"}, "needs auto_LiRPA: pip install git"),
    ],
)
def test_names_what_it_cannot_do(changes, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "auto_LiRPA", None)
    arguments = {"model": mlp(), "data": data(mlp()), "eps": 0.1, **changes}
    with pytest.raises(ValueError, match=message) as error:
        certify(**arguments, progress=False)
    assert "\n" not in str(error.value)


def test_estimates_are_those_of_auto_lirpa():
    pytest.importorskip("auto_LiRPA", reason="auto_LiRPA, an optional extra, is not installed")
    model, x = third_party("mnist_fc_3layer"), images("mnist_fc_3layer", 8)
    pair, levels = (x, model(x).argmax(1)), (0.01, 0.016, 0.022, 0.028, 0.034)
    proven = certify(model, pair, levels, method="crown", progress=False)
    estimate = certify(model, pair, levels, method="crown", kind="estimate", progress=False)
    moved = certify(model, pair, levels, method="alpha-crown", kind="estimate", progress=False)
    assert "estimate: not a certificate" in repr(moved)
    torch.testing.assert_close(estimate.radius, proven.radius, rtol=0, atol=1e-4)
    assert (moved.radius >= estimate.radius).all()
    assert (moved.radius > estimate.radius).any()
