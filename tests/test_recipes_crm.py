"""The recipe that maximises certified radii, and LipLT in the recipes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lipfast import bounds, losses
from lipfast.ops.certified_radius import certified_radius
from lipfast.recipes import Crm, find
from tests.checks import assert_near

SHAPE = (1, 8, 8)
LATE = 30.0  # an epoch at which the radii count


def tiny(device):
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    return nn.Sequential(*layers).to(device)


def batch(model):
    """Images, and labels of which three in four are predicted."""
    torch.manual_seed(1)
    weight = next(model.parameters())
    x = torch.rand(16, *SHAPE, device=weight.device)
    y = model.eval()(x).argmax(1)
    model.train()
    return x, torch.where(torch.arange(16, device=weight.device) < 12, y, (y + 1) % 10)


@pytest.fixture
def recipe():
    """Radii of the tiny network are some hundredths."""
    return find("crm", "digits").with_settings({"radius_cap": 0.1, "sharpness": 50})


@pytest.mark.parametrize("method", ["liplt", "product"])
@pytest.mark.parametrize("form", ["soft_min", "min"])
def test_crm_is_its_paper(form, method, recipe, device):
    recipe = recipe.with_settings({"form": form, "method": method, "misclassified": True, "boosted": True})
    model = tiny(device)
    x, y = batch(model)
    total, parts = recipe.loss(model, x, y, LATE, {})
    logits, constants = model(x), bounds.lipschitz(model, SHAPE, 2, method, "estimate", iterations=100)
    want = losses.crm(logits, constants, y, recipe.weight, 50, 0.1, form, True, True)
    torch.testing.assert_close(total, want)
    natural = F.cross_entropy(logits, y).detach()
    torch.testing.assert_close(parts["natural_loss"], natural)
    torch.testing.assert_close(parts["robust_loss"], want.detach() - natural)
    torch.testing.assert_close(parts["lipschitz"], constants.detach().amax())
    radius, prediction = certified_radius(logits, constants)
    right = [min(r, 0.1) if p == t else 0.0 for r, p, t in zip(radius.tolist(), prediction.tolist(), y.tolist(), strict=True)]
    assert parts["radius"].item() == pytest.approx(sum(right) / 16, rel=1e-4)
    assert model.training
    total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_radii_come_in_at_robust_start(recipe, device):
    model, recipe, memory = tiny(device), recipe.with_settings({"robust_start": 5}), {}
    x, y = batch(model)
    early, parts = recipe.loss(model, x, y, 4.99, memory)
    assert torch.equal(early, F.cross_entropy(model(x), y))
    assert parts.keys() == {"natural_loss"}
    assert not memory
    assert [recipe.schedule(epoch)["weight"] for epoch in (0, 4.99, 5, 40)] == [0, 0, recipe.weight, recipe.weight]
    assert recipe.loss(model, x, y, 5.0, {})[0] != early


def test_every_setting_of_the_loss_changes_it(recipe, device):
    model = tiny(device)
    x, y = batch(model)
    vectors = bounds.liplt(model, SHAPE, 1).vectors
    loss = lambda recipe: recipe.loss(model, x, y, 8.0, {"vectors": dict(vectors)})[0]
    changed = {"weight": 1, "sharpness": 20, "radius_cap": 0.01, "form": "min", "misclassified": True, "boosted": True}
    changed |= {"robust_start": 9, "iterations": 40, "method": "product"}
    for name, value in changed.items():
        assert loss(recipe.with_settings({name: value})) != loss(recipe), name


@pytest.mark.parametrize("name", ["crm", "gloro"])
def test_vectors_of_liplt_go_on_from_step_to_step_and_begin_anew_with_an_empty_memory(name, device, monkeypatch):
    recipe = find(name, "digits").with_settings({"method": "liplt"})
    model, memory, calls, real = tiny(device), {}, [], bounds.liplt
    x, y = batch(model)

    def watched(model, shape, iterations, vectors):
        found = real(model, shape, iterations, vectors)
        calls.append((iterations, vectors, found.vectors))
        return found

    monkeypatch.setattr(bounds, "liplt", watched)
    for held in (memory, memory, memory, {}):
        recipe.loss(model, x, y, LATE, held)
    evaluation = {}
    for _ in range(2):
        recipe.certified(model.eval(), x, y, LATE, evaluation)
    iterations, given, found = zip(*calls, strict=True)
    assert iterations == (100, recipe.iterations, recipe.iterations, 100, 100)
    assert given[0] is given[3] is given[4] is None
    assert given[1] is found[0]
    assert given[2] is found[1]
    assert not any(v.requires_grad for v in found[2].values())


def test_gloro_takes_the_constants_of_liplt(device):
    recipe = find("gloro", "digits").with_settings({"method": "liplt"})
    model = tiny(device)
    x, y = batch(model)
    constants = bounds.lipschitz(model, SHAPE, 2, "liplt", "estimate", iterations=100)
    torch.testing.assert_close(recipe.loss(model, x, y, LATE, {})[0], losses.gloro(model(x), constants, y, recipe.eps_train))


def test_constants_are_those_of_eval_mode_and_statistics_move_once(recipe, device):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)).to(device)
    x, y = torch.rand(16, *SHAPE, device=device), torch.arange(16, device=device) % 10
    total, parts = recipe.loss(model, x, y, LATE, {})
    assert model[2].num_batches_tracked == 1
    assert model.training
    model.eval()
    torch.testing.assert_close(parts["natural_loss"], F.cross_entropy(model(x), y).detach())
    total.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in (model[1].weight, model[2].weight, model[4].weight))


@pytest.mark.parametrize("name", ["crm", "gloro"])
def test_certified_means_a_radius_above_eps(name, device):
    recipe = find(name, "digits").with_settings({"method": "liplt"})
    model = tiny(device)
    x, y = batch(model)
    constants = bounds.lipschitz(model.eval(), SHAPE, 2, "liplt", "estimate", iterations=100)
    radius, prediction = certified_radius(model(x), constants)
    recipe = recipe.with_settings({"eps": radius.median().item()})
    want = (radius > recipe.eps) & (prediction == y)
    assert torch.equal(recipe.certified(model, x, y, LATE, {}), want)
    assert 0 < want.sum() < (radius > recipe.eps).sum()
    with torch.no_grad():
        model[-1].bias[0] = math.nan
    assert not recipe.certified(model, x, y, LATE, {}).any()
    for parameter in model[-1].parameters():
        nn.init.zeros_(parameter)
    assert not recipe.certified(model, x, y, LATE, {}).any()  # a tie is no certificate


def test_a_step_makes_radii_grow(recipe, device):
    model = tiny(device)
    x, y = batch(model)
    optimizer, radius = torch.optim.SGD(model.parameters(), lr=1e-4), []
    for _ in range(20):
        loss, parts = recipe.with_settings({"weight": 100}).loss(model, x, y, LATE, {})
        radius.append(parts["radius"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert radius[-1] > 1.1 * radius[0]


@pytest.mark.parametrize("data", ["digits", "mnist", "fashion-mnist", "cifar10", "tiny-imagenet"])
def test_presets_are_whole(data):
    recipe = find("crm", data)
    assert recipe.data == data
    assert recipe.robust_start < recipe.epochs
    assert recipe.lr_at(0) == recipe.lr
    assert recipe.lr_end <= recipe.lr_at(recipe.epochs - 1) < recipe.lr / 10


def test_cifar10_in_pixels_is_the_authors_objective_on_images_from_minus_one_to_one(device):
    recipe = Crm.preset("cifar10")
    logits, label = torch.randn(32, 10, device=device, dtype=torch.float64), torch.arange(32, device=device) % 10
    label = logits.argmax(1).where(label < 8, label)
    pixels = torch.full((10, 10), 20.0, device=device, dtype=torch.float64)  # constants; half of them per unit of 2 x - 1
    ours = losses.crm(logits, pixels, label, recipe.weight, recipe.sharpness, recipe.radius_cap)
    assert_near(ours, losses.crm(logits, pixels / 2, label, 15, 5, 0.2), torch.float64)
    assert ours != F.cross_entropy(logits, label)


def test_epochs_stretch_the_phases():
    recipe = Crm.preset("mnist").with_epochs(40)
    assert (recipe.decay_start, recipe.robust_start) == (2.5, 1.0)


def test_wrong_settings_are_named():
    wrong = "eps=0 weight=0 weight=nan sharpness=-1 radius_cap=inf form=max robust_start=-1 method=local iterations=0 rotate=-1"
    for name, value in (word.split("=") for word in wrong.split()):
        with pytest.raises(ValueError, match=f"recipe: {name} must be"):
            find("crm", "digits").with_settings({name: value})
    with pytest.raises(ValueError, match="recipe: method must be one of product, liplt, got 'local'"):
        find("gloro", "digits").with_settings({"method": "local"})
    with pytest.raises(ValueError, match="crm: no preset for 'imagenet'; there are digits, mnist"):
        find("crm", "imagenet")
