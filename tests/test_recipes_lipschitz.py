"""The recipes that train with l2 Lipschitz constants."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lipfast import bounds, losses
from lipfast.nn import ClippedMaxMin, ClippedReLU
from lipfast.recipes import Gloro, Local, find
from tests.checks import assert_near

SHAPE = (1, 8, 8)
FULL = 30.0  # an epoch at which the presets' eps and kappa are final


def tiny(device, activation=None):
    activations = [ClippedReLU(1.0, (32,), learnable=True) if activation is None else activation for _ in range(2)]
    layers = nn.Flatten(), nn.Linear(64, 32), activations[0], nn.Linear(32, 32), activations[1], nn.Linear(32, 10)
    return nn.Sequential(*layers).to(device)


def batch(device):
    torch.manual_seed(0)
    return torch.rand(16, *SHAPE, device=device), torch.arange(16, device=device) % 10


def converged(model, iterations=300):
    return bounds.norms(model, SHAPE, "estimate", iterations)


@pytest.fixture(params=["gloro", "local"])
def recipe(request):
    return find(request.param, "digits").with_settings({"ramp_start": 1, "ramp_length": 20})


def test_gloro_is_its_paper(device):
    recipe = Gloro.preset("digits").with_settings({"trades_start": 1, "trades_end": 3, "iterations": 300, "epochs": 40})
    model, (x, y) = tiny(device), batch(device)
    total, parts = recipe.loss(model, x, y, FULL, {})
    logits, constants = model(x), bounds.lipschitz(model, SHAPE, 2, "product", "estimate", converged(model, 100))
    torch.testing.assert_close(total, losses.gloro(logits, constants, y, recipe.eps_train, 1 + 2 * FULL / 40))
    torch.testing.assert_close(parts["robust_loss"], losses.gloro(logits, constants, y, recipe.eps_train).detach())
    torch.testing.assert_close(parts["natural_loss"], F.cross_entropy(logits, y).detach())
    assert model.training


@pytest.mark.parametrize("method", ["product", "global", "liplt"])
@pytest.mark.parametrize("form", ["B", "G", "gloro"])
def test_local_is_its_paper(form, method, device):
    settings = {"form": form, "method": method, "kappa_start": 0.2, "kappa_end": 0.2, "sparsity": 0.5, "iterations": 3}
    recipe = Local.preset("digits").with_settings(settings)
    model, (x, y) = tiny(device), batch(device)
    total, parts = recipe.loss(model, x, y, FULL, {})
    ball = bounds.local(model, x, recipe.eps_train, method, "estimate", norms=converged(model, 100), iterations=3)
    logits = model(x)
    if form == "gloro":
        robust = losses.gloro(logits, ball.pairwise(), y, recipe.eps_train)
    else:
        robust = losses.local_lipschitz(ball.margin(y), y, logits, 0.0, form)
    penalty = losses.sparsity((*ball.layers[name], model[int(name)]) for name in ("2", "4"))
    torch.testing.assert_close(total, 0.2 * F.cross_entropy(logits, y) + 0.8 * (robust + 0.5 * penalty))
    torch.testing.assert_close(parts["robust_loss"], robust.detach())
    torch.testing.assert_close(parts["sparsity"], penalty.detach())
    assert model.training


@pytest.mark.parametrize("form", ["B", "G", "gloro"])
def test_global_constants_stand_in_until_local_start(form, device):
    recipe = Local.preset("digits").with_settings({"form": form, "local_start": 20, "ramp_length": 5, "sparsity": 0.5})
    model, (x, y) = tiny(device), batch(device)
    total, parts = recipe.loss(model, x, y, 19.9, {})
    logits = model(x)
    constants = bounds.lipschitz(model, SHAPE, 2, "product", "estimate", converged(model, 100))
    margin = torch.stack([z[own] - z - recipe.eps_train * constants[own] for z, own in zip(logits, y.tolist(), strict=True)])
    if form == "gloro":
        want = losses.gloro(logits, constants, y, recipe.eps_train)
    else:
        want = losses.local_lipschitz(margin, y, logits, 0.0, form)
    torch.testing.assert_close(total, want)
    assert "sparsity" not in parts
    late = recipe.loss(model, x, y, 20.0, {})
    torch.testing.assert_close(late[0], recipe.with_settings({"local_start": 0}).loss(model, x, y, 20.0, {})[0])
    assert late[1]["robust_loss"] < parts["robust_loss"]


def test_evaluations_follow_the_phase(device):
    recipe = Local.preset("digits").with_settings({"local_start": 20, "test_iterations": 100})
    model, (x, _) = tiny(device).eval(), batch(device)
    y = model(x).argmax(1)
    constants = bounds.lipschitz(model, SHAPE, 2, "product", "estimate", converged(model, 100))
    everywhere = [recipe.eps * constants[own] for own in y.tolist()]
    eps = (model(x).gather(1, y[:, None]) - model(x)).masked_fill(F.one_hot(y, 10) > 0, math.inf) / torch.stack(everywhere)
    recipe = recipe.with_settings({"eps": recipe.eps * eps.amin(1).median().item()})  # half of them hold with global constants
    first, last = (recipe.certified(model, x, y, epoch, {}) for epoch in (20, 21))
    assert 0 < first.sum() < last.sum()
    assert (first <= last).all()
    assert torch.equal(recipe.with_settings({"local_start": 0}).certified(model, x, y, 0, {}), last)


def test_local_bounds_know_the_logits_already(device):
    model, (x, y) = tiny(device), batch(device)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    Local.preset("digits").loss(model, x, y, FULL, {})
    assert not passes


def test_without_eps_the_loss_is_the_cross_entropy(recipe, device):
    model, (x, y), memory = tiny(device), batch(device), {}
    total, parts = recipe.loss(model, x, y, 0.9, memory)
    assert torch.equal(total, F.cross_entropy(model(x), y))
    assert torch.equal(parts["natural_loss"], total)
    assert not memory


def test_every_setting_of_the_loss_changes_it(recipe, device):
    model, (x, y) = tiny(device), batch(device)
    if isinstance(recipe, Local):
        recipe = recipe.with_settings({"kappa_start": 0.8, "kappa_end": 0.2})
        changed = {"kappa_start": 1, "kappa_end": 0, "sparsity": 1, "form": "G", "method": "global", "local_start": 30}
    else:
        changed = {"trades_start": 2, "trades_end": 2}
    changed |= {"eps_train": 0.5, "ramp": "log", "ramp_start": 3, "ramp_length": 30, "iterations": 1}
    memory = {"vectors": {str(i): torch.ones_like(model[i].weight[0]) for i in (1, 3, 5)}}
    base = recipe.loss(model, x, y, 8.0, dict(memory))[0]
    for name, value in changed.items():
        assert recipe.with_settings({name: value}).loss(model, x, y, 8.0, dict(memory))[0] != base, name


def test_vectors_go_on_from_step_to_step_and_begin_anew_with_an_empty_memory(recipe, device, monkeypatch):
    model, (x, y), memory = tiny(device), batch(device), {}
    calls, real = [], bounds.norms

    def watched(model, shape, kind, iterations, vectors):
        found = real(model, shape, kind, iterations, vectors)
        calls.append((iterations, vectors, found.vectors))
        return found

    monkeypatch.setattr(bounds, "norms", watched)
    for held in (memory, memory, memory, {}):
        recipe.loss(model, x, y, FULL, held)
    model.eval()
    evaluation = {}
    for _ in range(2):
        recipe.certified(model, x, y, FULL, evaluation)
    iterations, given, found = zip(*calls, strict=True)
    assert iterations == (100, recipe.iterations, recipe.iterations, 100, 100)
    assert given[0] is given[3] is given[4] is None
    assert given[1] is found[0]
    assert given[2] is found[1]
    assert not any(v.requires_grad for v in found[2].values())


def test_batch_norm_moves_its_statistics_once_and_bounds_use_them(recipe, device):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)).to(device)
    x, y = batch(device)
    total, parts = recipe.loss(model, x, y, FULL, {})
    assert model[2].num_batches_tracked == 1
    assert model.training
    torch.testing.assert_close(parts["natural_loss"], F.cross_entropy(model.eval()(x), y).detach())
    total.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in (model[1].weight, model[2].weight, model[4].weight))


def test_certified_means_every_margin_is_positive(recipe, device):
    model, (x, y) = tiny(device).eval(), batch(device)
    recipe = recipe.with_settings({"eps": 1e-4})
    y = torch.where(torch.arange(16, device=device) < 12, model(x).argmax(1), y)
    margin = bounds.local(model, x, 1e-4, "product", "estimate", norms=converged(model), iterations=100).margin(y)
    want = [all(v > 0 for j, v in enumerate(row) if j != label) for row, label in zip(margin.tolist(), y.tolist(), strict=True)]
    assert recipe.certified(model, x, y, FULL, {}).tolist() == want
    assert any(want)
    assert not all(want)
    y = model(x).argmax(1)
    assert not recipe.with_settings({"eps": 1e3}).certified(model, x, y, FULL, {}).any()
    with torch.no_grad():
        model[-1].bias[0] = math.nan
    assert not recipe.certified(model, x, y, FULL, {}).any()
    for parameter in model[-1].parameters():
        nn.init.zeros_(parameter)
    assert not recipe.certified(model, x, y, FULL, {}).any()  # a tie is no certificate
    if isinstance(recipe, Local):
        assert not recipe.with_settings({"local_start": 100}).certified(model, x, y, FULL, {}).any()


def test_thresholds_of_the_clipped_relu_stay_at_least_zero(recipe, device):
    model = nn.Sequential(ClippedReLU(1.0, (3,), learnable=True), ClippedMaxMin(-1.0, -2.0, (4,), learnable=True)).to(device)
    with torch.no_grad():
        model[0].threshold += torch.tensor([-2.0, -1.0, 1.0], device=device)
    recipe.project(model)
    assert model[0].threshold.tolist() == [0.0, 0.0, 2.0]
    assert model[1].upper.tolist() == [-1.0, -1.0]  # any threshold of a clipped MaxMin is 1-Lipschitz


def test_weights_start_as_in_the_papers(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 16, 3), nn.Flatten(), nn.Linear(400, 20)).to(device)
    for recipe in (Gloro.preset("digits"), Local.preset("digits").with_settings({"init": "orthogonal"})):
        recipe.initialise(model)
        for i in (0, 1, 3):
            sigma = torch.linalg.svdvals(model[i].weight.detach().flatten(1).double())
            assert_near(sigma, torch.ones_like(sigma), torch.float32)
            assert not model[i].bias.any()
            nn.init.ones_(model[i].bias)
    linear = model[3].weight.clone()
    Local.preset("digits").with_settings({"init": "fan_out"}).initialise(model)
    assert model[0].weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)
    assert model[1].weight.std().item() == pytest.approx(math.sqrt(2 / (16 * 9)), rel=0.05)
    assert torch.equal(model[3].weight, linear)


@pytest.mark.parametrize("data", ["digits", "mnist", "fashion-mnist", "cifar10", "tiny-imagenet"])
@pytest.mark.parametrize("name", ["gloro", "local"])
def test_presets_are_whole(name, data):
    recipe = find(name, data)
    assert recipe.data == data
    assert recipe.eps <= recipe.eps_train
    assert recipe.schedule(0)["eps"] <= recipe.schedule(recipe.epochs)["eps"] == recipe.eps_train
    assert recipe.lr_at(0) == recipe.lr
    assert recipe.lr_end <= recipe.lr_at(recipe.epochs - 1) < recipe.lr / 10


def test_epochs_stretch_the_phases():
    recipe = Local.preset("cifar10").with_settings({"local_start": 600}).with_epochs(80)
    assert (recipe.decay_start, recipe.ramp_start, recipe.ramp_length, recipe.local_start) == (42.5, 2, 40, 60)
    half = recipe.schedule(22)
    assert half["eps"] == pytest.approx(recipe.eps_train / 2)
    assert half["kappa"] == pytest.approx(0.5)
    assert (recipe.schedule(59.9)["local"], recipe.schedule(60)["local"]) == (0, 1)


def test_wrong_settings_are_named():
    wrong = {
        "gloro": "eps=0 eps_train=-1 ramp=cubic ramp_length=-1 iterations=0 trades_start=-1 trades_end=-1 lr_end=-1",
        "local": "form=C method=ibp kappa_start=2 kappa_end=-1 sparsity=-1 test_iterations=-1 local_start=-1 init=zero",
    }
    for recipe, settings in wrong.items():
        for name, value in (word.split("=") for word in settings.split()):
            with pytest.raises(ValueError, match=f"recipe: {name} must be"):
                find(recipe, "digits").with_settings({name: value})
    with pytest.raises(ValueError, match="gloro: no preset for 'imagenet'; there are digits, mnist"):
        find("gloro", "imagenet")
    with pytest.raises(ValueError, match="local: no preset for 'imagenet'; there are digits, mnist"):
        find("local", "imagenet")
