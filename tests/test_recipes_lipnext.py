import json
import math
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from lipfast import bounds, losses, models, train
from lipfast.data import load
from lipfast.ops.certified_radius import certified_radius
from lipfast.optim import ManifoldAdam
from lipfast.recipes import find
from lipfast.recipes.lipnext import Lipnext

SHAPE = (1, 8, 8)
SMALL = {"depth": 2, "width": 16}
BASELINE = {"depth": 2, "width": 8, "dense": 2, "dense_width": 16}


def recipe(**settings):
    return Lipnext.preset("digits").with_settings({"arguments": SMALL, **settings})


def network(device, name="lipnext", **arguments):
    torch.manual_seed(0)
    return models.build(name, shape=SHAPE, **(arguments or SMALL)).to(device)


def batch(device, count=24):
    data = load("digits", limit=count).to(device)
    return data.pixels(), data.labels


def test_the_loss_is_emma_with_the_heads_distances(device):
    model, (x, y) = network(device), batch(device)
    plan = recipe(temperature=0.25, least=0.1, reach=2, reach_start=0.5, ramp_length=10)
    total, parts = plan.loss(model, x, y, 5.0, {})
    head = model[4].weight
    apart = (head[:, None] - head).square().sum(2).clamp_min(1e-30).sqrt()
    want = losses.emma(model(x) / 0.25, apart / 0.25, y, plan.eps * 1.25, 0.1)
    torch.testing.assert_close(total, want)
    assert parts["lipschitz"].item() == pytest.approx(apart.max().item(), rel=1e-5)
    assert model.training
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_half_precision_products_leave_float32_parameters(device):
    model, (x, y) = network(device), batch(device)
    full, _ = recipe().loss(model, x, y, 5.0, {})
    half, _ = recipe(autocast="bfloat16").loss(model, x, y, 5.0, {})
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().item() < 0.05 * full.item()


def test_schedules_rise_and_fall():
    plan = recipe(epochs=20, warmup=4, ramp_length=10, reach=3, reach_start=0.1, lr=0.1, lr_end=1e-3, eps=0.5)
    assert [plan.schedule(e)["eps"] for e in (0, 5, 10, 20)] == pytest.approx([0.05, 0.775, 1.5, 1.5])
    rates = [plan.lr_at(e / 10) for e in range(201)]
    assert 0 < rates[0] < 1e-3
    assert rates[20] == pytest.approx(0.05, rel=1e-2)
    assert rates[40] == pytest.approx(0.1)
    assert rates[120] == pytest.approx((0.1 + 1e-3) / 2)
    assert rates[200] == pytest.approx(1e-3)
    assert max(abs(a - b) for a, b in pairwise(rates)) < 0.003  # at every step a little
    assert plan.with_epochs(40).lr_at(8) == pytest.approx(0.1)
    assert recipe(warmup=0).lr_at(0) == recipe().lr


def test_orthogonal_models_take_manifold_adam_and_others_their_own(device):
    plan = recipe(lookahead=3, retraction=7, weight_decay=0.1)
    optimizer = plan.make_optimizer(network(device))
    assert isinstance(optimizer, ManifoldAdam)
    kept = {"lr": plan.lr, "lookahead": 3, "retraction": 7, "weight_decay": 0.1}
    assert [{k: group[k] for k in kept} for group in optimizer.param_groups] == [kept, kept]
    assert type(plan.make_optimizer(nn.Linear(2, 2))) is torch.optim.NAdam
    assert type(recipe(optimizer="sgd").make_optimizer(nn.Linear(2, 2))) is torch.optim.SGD


def test_the_baseline_trains_with_its_own_constants(device):
    model, (x, y) = network(device, "liresnet", **BASELINE), batch(device)
    plan, memory = recipe(model="liresnet", arguments=BASELINE, iterations=3), {}
    total, parts = plan.loss(model, x, y, 5.0, memory)
    norms = bounds.norms(model.eval(), SHAPE, "estimate", 100)
    want = bounds.lipschitz(model, SHAPE, 2, "product", "estimate", norms).amax().item()
    assert parts["lipschitz"].item() == pytest.approx(want, rel=1e-3)
    assert memory["vectors"]
    total.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["lipnext", "liresnet"])
def test_certified_means_a_radius_above_eps(name, device):
    model, (x, y) = network(device, name, **(BASELINE if name == "liresnet" else SMALL)).eval(), batch(device)
    y = model(x).argmax(1).where(y < 5, y)
    constants = bounds.lipschitz(model, SHAPE, method="product").to(x)
    radius, prediction = certified_radius(model(x), constants)
    eps = radius.median().item()
    want = (radius > eps * 1.01) & (prediction == y)
    got = recipe(eps=eps).certified(model, x, y, 5.0, {})
    assert (want <= got).all()
    assert (got <= ((radius > eps * 0.97) & (prediction == y))).all()
    assert 0 < got.sum() < len(y)


@pytest.mark.parametrize("name", ["lipnext", "liresnet"])
def test_a_run_trains_and_resumes_to_the_bit(name, tmp_path, monkeypatch):
    arguments = BASELINE if name == "liresnet" else SMALL
    settings = {"model": name, "arguments": arguments, "temperature": 0.1, "lookahead": 2, "retraction": 3, "crop": 1}
    quiet = {"device": "cpu", "progress": False, "limit": 200}
    whole = train("lipnext", "digits", tmp_path / "whole", epochs=3, settings=settings, **quiet)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] or name == "liresnet"
    assert all(math.isfinite(line["test_loss"]) for line in lines)

    loop = sys.modules["lipfast.train"]
    evaluate = loop.evaluate

    def killed(recipe, model, data, epoch, group):
        if epoch == 2:
            raise KeyboardInterrupt
        return evaluate(recipe, model, data, epoch, group)

    monkeypatch.setattr(loop, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        train("lipnext", "digits", tmp_path / "half", epochs=3, settings=settings, **quiet)
    monkeypatch.undo()
    half = train("lipnext", "digits", tmp_path / "half", epochs=3, settings=settings, resume=True, **quiet)
    assert (half / "checkpoint.safetensors").read_bytes() == (whole / "checkpoint.safetensors").read_bytes()


@pytest.mark.parametrize("data", ["digits", "mnist", "cifar10", "cifar100", "tiny-imagenet", "imagenet", "images"])
def test_presets_are_whole(data):
    plan = find("lipnext", data)
    assert plan.data == data
    assert plan.certificate == "product"
    assert plan.ramp_length <= plan.epochs
    assert plan.lr_at(plan.warmup) == plan.lr
    assert plan.schedule(plan.epochs)["eps"] == pytest.approx(plan.reach * plan.eps)


def test_wrong_settings_are_named():
    wrong = "eps=0 reach=-1 reach_start=nan ramp_length=inf warmup=-1 least=2 temperature=0 autocast=float16 lookahead=-1"
    for name, value in (word.split("=") for word in f"{wrong} retraction=-1 randaugment=1.5 optimizer=adagrad".split()):
        with pytest.raises(ValueError, match=f"recipe: {name} must be"):
            recipe(**{name: value})
    with pytest.raises(ValueError, match="lipnext: no preset for 'fashion'; there are digits, mnist"):
        find("lipnext", "fashion")
