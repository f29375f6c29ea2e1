import math

import pytest
import torch
from torch import nn

from lipfast import losses
from lipfast.bounds import interval, interval_margin
from lipfast.recipes import Interval, Recipe, find


def tiny():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


def batch(device):
    torch.manual_seed(0)
    return torch.rand(16, 1, 8, 8, device=device), torch.arange(16, device=device) % 10


def test_initialisation_keeps_the_width_of_boxes(device):
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(400, 400), nn.ReLU())], nn.Linear(400, 10)).to(device)
    last = model[-1].weight.clone()
    Interval.preset("digits").initialise(model)
    widths = [
        (u - l).mean().item()
        for l, u in interval(model, torch.rand(8, 400, device=device), 0.1, kind="estimate").layers.values()
    ]
    assert 0.5 < widths[-1] / widths[0] < 2
    assert torch.equal(model[-1].weight, last)


def test_the_loss_is_that_of_its_parts(device):
    recipe = Interval.preset("digits").with_settings({"kappa_start": 0.8, "kappa_end": 0.2})
    model, (x, y) = tiny().to(device), batch(device)
    middle = recipe.ramp_start + recipe.ramp_length / 2
    total, parts = recipe.loss(model, x, y, middle, {})
    now = recipe.schedule(middle)
    assert now["kappa"] == pytest.approx(0.5)
    assert 0 < now["eps"] < recipe.eps * recipe.eps_factor
    weight = recipe.regulariser * (1 - now["eps"] / (recipe.eps * recipe.eps_factor))
    want = 0.5 * parts["natural_loss"] + 0.5 * parts["robust_loss"] + weight * parts["regulariser"]
    torch.testing.assert_close(total.detach(), want)
    assert model.training
    assert "regulariser" not in recipe.loss(model, x, y, recipe.epochs, {})[1]


def test_every_setting_of_the_loss_changes_it(device):
    recipe = Interval.preset("digits").with_settings({"kappa_start": 0.8, "kappa_end": 0.2})
    model, (x, y) = tiny().to(device), batch(device)
    at = recipe.ramp_start + recipe.ramp_length / 2
    base = recipe.loss(model, x, y, at, {})[0]
    changed = {
        "eps": 0.2,
        "eps_factor": 3,
        "ramp_start": 1,
        "ramp_length": 30,
        "kappa_start": 1,
        "kappa_end": 0,
        "regulariser": 0,
    }
    for name, value in changed.items():
        assert recipe.with_settings({name: value}).loss(model, x, y, at, {})[0] != base, name


def test_batch_norm_moves_its_statistics_and_bounds_use_them(device):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)).to(device)
    x, y = batch(device)
    recipe = Interval.preset("digits")
    total, _ = recipe.loss(model, x, y, recipe.epochs, {})
    assert model[2].num_batches_tracked == 1
    model.eval()
    margin = interval_margin(model, x, y, recipe.eps * recipe.eps_factor, kind="estimate", pixel_range=(0, 1))
    torch.testing.assert_close(total, losses.interval(margin, y))


def test_certified_means_every_margin_is_positive(device):
    model, (x, y) = tiny().to(device).eval(), batch(device)
    recipe = Interval.preset("digits").with_settings({"eps": 1e-4})
    y = model(x).argmax(1)
    margin = interval_margin(model, x, y, 1e-4, kind="estimate", pixel_range=(0, 1))
    want = [all(v > 0 for j, v in enumerate(row) if j != label) for row, label in zip(margin.tolist(), y.tolist(), strict=True)]
    assert recipe.certified(model, x, y, 1, {}).tolist() == want
    assert any(want)
    with torch.no_grad():
        model[-1].bias[0] = math.nan
    assert not recipe.certified(model, x, y, 1, {}).any()
    for parameter in model[-1].parameters():
        nn.init.zeros_(parameter)
    assert not recipe.certified(model, x, y, 1, {}).any()  # a tie is no certificate


def test_settings_come_as_text_or_values():
    recipe = Interval.preset("digits")
    got = recipe.with_settings({"eps": "8/255", "milestones": "3,4.5", "flip": "true", "batch_size": "1e2", "optimizer": "sgd"})
    assert (got.eps, got.milestones, got.flip, got.batch_size, got.optimizer) == (8 / 255, (3.0, 4.5), True, 100, "sgd")
    assert recipe.with_settings({"milestones": "", "arguments": '{"width": 2}'}).arguments == {"width": 2}
    wrong = "eps=-0.1 eps=nan eps=x epochs=0 epochs=2.5 lr=0 optimizer=lbfgs kappa_end=2 flip=perhaps milestones=a arguments=["
    for name, value in (word.split("=") for word in wrong.split()):
        with pytest.raises(ValueError, match=f"recipe: {name} must be") as caught:
            recipe.with_settings({name: value})
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="recipe: no field 'epsilon'; fields are data, model"):
        recipe.with_settings({"epsilon": 1})


def test_epochs_stretch_the_schedules():
    recipe = Interval.preset("cifar10")
    half = recipe.with_epochs(80)
    assert (half.epochs, half.milestones, half.ramp_start, half.ramp_length) == (80, (60, 70), 0.5, 40)
    assert half.schedule(20) == pytest.approx(recipe.schedule(40))
    assert half.lr_at(59) == recipe.lr
    assert half.lr_at(60) == pytest.approx(recipe.lr * recipe.lr_decay)
    assert half.lr_at(75) == pytest.approx(recipe.lr * recipe.lr_decay**2)


def test_names_that_are_not_there_are_told_with_those_that_are():
    assert isinstance(find("interval", "mnist"), Recipe)
    with pytest.raises(ValueError, match="recipe must be one of interval, gloro, local, crm, lipnext, graft, got 'gloro2'"):
        find("gloro2", "mnist")
    with pytest.raises(ValueError, match="no preset for 'imagenet'; there are digits, mnist"):
        find("interval", "imagenet")
