"""The table of a robust network: each number against what it claims to be, on disk, in the report and on the command line."""

import json
import math

import pytest
import torch
from torch import nn

from lipfast import checkpoint, models
from lipfast.attacks import pgd
from lipfast.bounds import crown, interval_margin, jacobian
from lipfast.cli import main
from lipfast.data import load
from lipfast.evaluation import Evaluation, evaluate
from lipfast.nn import GraftedReLU
from lipfast.report import report

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EPS = 0.005


@pytest.fixture(scope="module")
def model():
    """Trained for a moment, so that some images are right and some are certain, with random units grafted."""
    torch.manual_seed(0)
    net, data = models.cnn_small((1, 8, 8), activation="grafted_relu"), load("digits", split="train")
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for start in range(0, 1024, 64):
        loss = nn.functional.cross_entropy(net(data.pixels(slice(start, start + 64))), data.labels[start : start + 64])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for module in net.modules():
        if isinstance(module, GraftedReLU):
            module.mask.bernoulli_(0.2)
    return net


@pytest.fixture(scope="module")
def data():
    return load("digits", split="test")


@pytest.fixture(scope="module")
def found(model, data):
    return evaluate(model, data, EPS, limit=70, steps=10, restarts=2, batch_size=32, progress=False)


def test_every_number_is_what_it_says(model, data, found):
    x, y, net = data.pixels(slice(70)), data.labels[:70], model.eval()
    mean = lambda t: t.double().mean().item()
    assert (found.images, found.data, found.eps, found.attack) == (70, "digits", EPS, (10, 2))
    assert found.clean_accuracy == mean(net(x).argmax(1) == y)
    attacked = pgd(net, x, y, EPS, steps=10, step_size=EPS / 4)
    assert found.attacked_accuracy <= mean(net(attacked).argmax(1) == y)
    interval = interval_margin(net, x, y, EPS, pixel_range=(0, 1)).scatter(1, y[:, None], math.inf).amin(1)
    proof = crown(net, x, EPS, pixel_range=(0, 1))
    linear = proof.margin(y).scatter(1, y[:, None], math.inf).amin(1)
    for method, least in (("interval", interval), ("crown", linear)):
        assert found.verified_accuracy[method] == mean(least > 0)
        assert found.lower_bound[method] == pytest.approx(mean(least), rel=1e-6)
    assert found.lipschitz == pytest.approx(mean(jacobian(net, x, EPS, pixel_range=(0, 1), layers=proof.layers)))
    masks = {name: m.mask for name, m in net.named_modules() if isinstance(m, GraftedReLU)}
    unstable = sum(((low < 0) & (high > 0) & ~masks[name]).sum().item() for name, (low, high) in proof.layers.items())
    units = sum(mask.numel() for mask in masks.values())
    assert found.unstable_ratio["crown"] == pytest.approx(unstable / (70 * units))
    assert found.grafted_ratio == sum(int(mask.sum()) for mask in masks.values()) / units
    assert found.seconds.keys() == {"attack", "interval", "crown", "lipschitz"}


def test_numbers_are_in_their_order(found):
    verified = found.verified_accuracy
    assert 0 < verified["interval"] <= verified["crown"] <= found.attacked_accuracy <= found.clean_accuracy
    assert found.lower_bound["interval"] <= found.lower_bound["crown"]
    assert found.unstable_ratio["crown"] <= found.unstable_ratio["interval"]


def test_comes_back_from_disk(found, tmp_path):
    found.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == found
    for damage in ("", "[]", '{"eps": 1}', (tmp_path / "evaluation.json").read_text()[:-9]):
        (tmp_path / "evaluation.json").write_text(damage)
        with pytest.raises(ValueError, match="damaged or no evaluation"):
            Evaluation.load(tmp_path / "evaluation.json")


def test_leaves_the_mode_as_it_was(model, data):
    model.train()
    evaluate(model, data, EPS, ("interval",), limit=3, steps=1, progress=False)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"eps": 0}, "eps must be positive"),
        ({"eps": math.nan}, "eps must be positive"),
        ({"methods": ("interval", "magic")}, "methods must be of interval, crown, got 'magic'"),
        ({"methods": ()}, "methods must be of interval, crown, got none"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_names_what_is_wrong(model, data, change, fault):
    with pytest.raises(ValueError, match=f"evaluate: {fault}"):
        evaluate(model, data, **{"eps": EPS, "progress": False} | change)


def test_command_and_report(model, found, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    about = {"data": "digits", "root": None, "recipe": "graft", "settings": {"eps": EPS}}
    checkpoint.save(run / checkpoint.NAME, model, "cnn_small", {"shape": (1, 8, 8), "activation": "grafted_relu"}, about)
    (run / "config.json").write_text(json.dumps({"recipe": "graft", "data": "digits"}))
    assert main(["evaluate", str(run), "--limit", "70", "--steps", "10", "--restarts", "2"]) == 0
    told = capsys.readouterr().out
    stored = Evaluation.load(run / "evaluation.json")
    assert stored.verified_accuracy == found.verified_accuracy
    assert f"{100 * found.verified_accuracy['crown']:.2f} %" in told
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    page = report([run, other], tmp_path / "report.html").read_text()
    assert "Robustness at one radius" in page
    assert "verified, crown (bound)" in page
    assert f"{100 * found.verified_accuracy['crown']:.2f} % at {EPS:g} (l_inf, crown, pixels in [0, 1])" in page
    assert "Robustness" not in report([other], tmp_path / "other.html").read_text()
    assert main(["evaluate", str(run), "--methods", "magic"]) == 2
    assert "methods must be of interval, crown" in capsys.readouterr().err
