import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lipfast import losses
from lipfast.bounds import interval, interval_margin
from lipfast.recipes import Interval, Recipe, find
from lipfast.schedules import linear_ramp, smooth_ramp


def boxes(device, widths=(0.1, 3.0), shape=(4, 6)):
    torch.manual_seed(1)
    centers = [torch.randn(shape, device=device, dtype=torch.float64) for _ in widths]
    return [(c - w / 2, c + w / 2) for c, w in zip(centers, widths, strict=True)]


def test_worst_case_loss_bounds_that_of_every_point(device):
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 4)).double().to(device)
    x, y = torch.rand(8, 5, device=device, dtype=torch.float64), torch.arange(8, device=device) % 4
    bound = losses.interval(interval_margin(model, x, y, 0.1, kind="estimate"), y)
    for _ in range(200):
        point = x + (torch.rand_like(x) * 2 - 1).sign() * 0.1
        assert F.cross_entropy(model(point), y) <= bound
    exact = interval_margin(model, x, y, 0.0, kind="estimate")
    torch.testing.assert_close(losses.interval(exact, y), F.cross_entropy(model(x), y))


def test_kappa_mixes_the_two_losses(device):
    margin, logits = torch.randn(6, 3, device=device), torch.randn(6, 3, device=device)
    y = torch.tensor([0, 1, 2, 0, 1, 2], device=device)
    margin = margin.scatter(1, y[:, None], 0.0)
    natural, robust = F.cross_entropy(logits, y), F.cross_entropy(-margin, y)
    for kappa in (0.0, 0.3, 1.0):
        torch.testing.assert_close(losses.interval(margin, y, logits, kappa), kappa * natural + (1 - kappa) * robust)
    with pytest.raises(ValueError, match=r"interval: kappa must be from 0 to 1, got 1\.5"):
        losses.interval(margin, y, logits, 1.5)
    with pytest.raises(ValueError, match=r"interval: logits must be \(6, 3\)"):
        losses.interval(margin, y, None, 0.5)


def test_tightness_is_the_papers_sum(device):
    start = (torch.zeros(4, 3, device=device).double(), torch.full((4, 3), 0.5, device=device).double())
    got = losses.tightness(boxes(device), start)  # widths 0.1 and 3: only the second is wider than 0.5/tau
    assert got.item() == pytest.approx((0.5 - 0.5 / 3) / (2 * 0.5))
    got = losses.tightness(boxes(device), start, tolerance=0.8)
    assert got.item() == pytest.approx((0.8 - 0.5 / 3) / (2 * 0.8))


def test_relu_balance_is_the_papers_sum(device):
    layers = boxes(device, (0.1, 0.4))
    want = 0.0
    for lower, upper in layers:
        c = ((lower + upper) / 2).flatten().tolist()
        low, high = lower.flatten().tolist(), upper.flatten().tolist()
        mean = sum(c) / len(c)
        on, off = [i for i, v in enumerate(low) if v > 0], [i for i, v in enumerate(high) if v < 0]
        alpha = sum(c[i] for i in on) / -sum(c[i] for i in off)
        beta = sum((c[i] - mean) ** 2 for i in on) / sum((c[i] - mean) ** 2 for i in off)
        want += max(0.0, 0.9 - min(alpha, 1 / alpha)) + max(0.0, 0.9 - min(beta, 1 / beta))
    assert want > 0
    assert losses.relu_balance(layers, tolerance=0.9).item() == pytest.approx(want / (2 * 0.9))


def test_regularisers_of_a_dead_layer_are_finite_with_finite_gradients(device):
    for shift in (-5.0, 0.0, 5.0):
        weight = torch.zeros(4, 3, device=device, requires_grad=True)
        center = weight + shift
        layers = [(center - 1e-3, center + 1e-3), (center, center)]
        start = (torch.zeros(4, 3, device=device), torch.ones(4, 3, device=device))
        loss = losses.tightness(layers, start) + losses.relu_balance(layers)
        (grad,) = torch.autograd.grad(loss, weight)
        assert loss.isfinite()
        assert grad.isfinite().all()


def test_no_layers_no_penalty(device):
    start = (torch.zeros(2, 3, device=device), torch.ones(2, 3, device=device))
    assert losses.tightness([], start) == 0
    assert losses.relu_balance([]) == 0


def test_gradients_agree_with_finite_differences(device):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double().to(device)
    x, y = torch.rand(5, 4, device=device, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1], device=device)

    def objective(weight):
        names = {"0.weight": weight}
        layers = torch.func.functional_call(_Bounds(model), {f"model.{k}": v for k, v in names.items()}, (x,))
        return losses.tightness(layers, (x - 0.3, x + 0.3)) + losses.relu_balance(layers)

    assert torch.autograd.gradcheck(objective, model[0].weight.detach().clone().requires_grad_())
    assert y.ndim == 1


class _Bounds(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return tuple(interval(self.model, x, 0.3, kind="estimate").layers.values())


@pytest.mark.parametrize("ramp", [linear_ramp, smooth_ramp])
def test_ramps_rise_from_0_to_1(ramp):
    values = [ramp(e / 10, 2, 5) for e in range(100)]
    assert values[:21] == [0.0] * 21
    assert values[70:] == [1.0] * 30
    assert all(a < b for a, b in pairwise(values[20:71]))
    assert ramp(0, 0, 0) == 1
    assert ramp(0.5, 1, 0) == 0
    assert ramp(1, 1, 0) == 1


def test_smooth_ramp_has_no_corner():
    step = 1e-6
    slope = lambda t: (smooth_ramp(t + step, 0, 1) - smooth_ramp(t - step, 0, 1)) / (2 * step)
    assert slope(1e-3) < 1e-6
    assert slope(0.25 - 2 * step) == pytest.approx(slope(0.25 + 2 * step), rel=1e-4)
    assert slope(0.3) == pytest.approx(slope(0.9), rel=1e-6)


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
    total, parts = recipe.loss(model, x, y, middle)
    now = recipe.schedule(middle)
    assert now["kappa"] == pytest.approx(0.5)
    assert 0 < now["eps"] < recipe.eps * recipe.eps_factor
    weight = recipe.regulariser * (1 - now["eps"] / (recipe.eps * recipe.eps_factor))
    want = 0.5 * parts["natural_loss"] + 0.5 * parts["robust_loss"] + weight * parts["regulariser"]
    torch.testing.assert_close(total.detach(), want)
    assert model.training
    assert "regulariser" not in recipe.loss(model, x, y, recipe.epochs)[1]


def test_every_setting_of_the_loss_changes_it(device):
    recipe = Interval.preset("digits").with_settings({"kappa_start": 0.8, "kappa_end": 0.2})
    model, (x, y) = tiny().to(device), batch(device)
    at = recipe.ramp_start + recipe.ramp_length / 2
    base = recipe.loss(model, x, y, at)[0]
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
        assert recipe.with_settings({name: value}).loss(model, x, y, at)[0] != base, name


def test_batch_norm_moves_its_statistics_and_bounds_use_them(device):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)).to(device)
    x, y = batch(device)
    recipe = Interval.preset("digits")
    total, _ = recipe.loss(model, x, y, recipe.epochs)
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
    assert recipe.certified(model, x, y).tolist() == want
    assert any(want)
    with torch.no_grad():
        model[-1].bias[0] = math.nan
    assert not recipe.certified(model, x, y).any()
    for parameter in model[-1].parameters():
        nn.init.zeros_(parameter)
    assert not recipe.certified(model, x, y).any()  # a tie is no certificate


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
    with pytest.raises(ValueError, match="recipe must be one of interval, got 'gloro2'"):
        find("gloro2", "mnist")
    with pytest.raises(ValueError, match="no preset for 'imagenet'; there are digits, mnist"):
        find("interval", "imagenet")
