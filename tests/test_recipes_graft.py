"""The recipe that grafts: what its loss is, what happens between the phases, and that a run can be cut anywhere."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lipfast import checkpoint, losses, models
from lipfast.attacks import fgsm
from lipfast.bounds import interval
from lipfast.data import load
from lipfast.evaluation import Evaluation
from lipfast.grafting import score, select
from lipfast.nn import GraftedReLU
from lipfast.recipes import Graft, find
from lipfast.train import train
from tests.test_train import assert_same_run, metrics

pytest.importorskip("sklearn")

SHAPE = (1, 8, 8)
SHORT = {"batch_size": 40, "epochs": 4, "pretrain": 2, "calibration": 60, "evaluation": 0, "lr": 5e-3}


def run(out, settings=(), **options):
    return train("graft", "digits", out, **{"limit": 200, "progress": False, "settings": SHORT | dict(settings), **options})


def grafts(folder) -> dict[str, torch.Tensor]:
    return {name: m.mask for name, m in checkpoint.load(folder).named_modules() if isinstance(m, GraftedReLU)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("graft") / "run")


def test_the_loss_is_as_told(device):
    recipe = find("graft", "digits")
    torch.manual_seed(0)
    model = models.cnn_small(SHAPE, activation="grafted_relu").to(device)
    x, y = torch.rand(16, *SHAPE, device=device), torch.randint(10, (16,), device=device)
    masks = {name: m.mask.bernoulli_(0.3) for name, m in model.named_modules() if isinstance(m, GraftedReLU)}
    torch.manual_seed(1)
    before, parts = recipe.loss(model, x, y, recipe.pretrain - 0.5, {})
    assert parts.keys() == {"adversarial_loss", "misalignment"}
    torch.manual_seed(1)
    attacked = fgsm(model.eval(), x, y, recipe.eps, step_size=1.25 * recipe.eps)
    want = F.cross_entropy(model(attacked), y) + 0.2 * losses.gradient_alignment(model, x, y, recipe.eps)
    torch.testing.assert_close(before, want)
    boxes = interval(model, x, recipe.eps, kind="estimate", pixel_range=(0, 1)).layers
    slope = losses.slope([(*box, masks[name]) for name, box in boxes.items()], reduction="sum")
    torch.manual_seed(1)
    after, parts = recipe.loss(model.train(), x, y, recipe.pretrain, {})
    torch.testing.assert_close(after, want + recipe.slope_weight * slope + recipe.l1_weight * losses.l1(model))
    assert parts.keys() == {"adversarial_loss", "misalignment", "slope_loss", "l1"}
    assert model.training
    after.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_every_setting_of_the_loss_changes_it():
    recipe = find("graft", "digits")
    torch.manual_seed(0)
    model = models.cnn_small(SHAPE, activation="grafted_relu")
    x, y = torch.rand(16, *SHAPE), torch.randint(10, (16,))

    def loss(recipe):
        torch.manual_seed(1)
        return recipe.loss(model, x, y, 20.0, {})[0].item()

    changed = {"eps": 0.1, "step": 0.5, "alignment": 0, "slope_weight": 0.1, "slope_form": "distance", "l1_weight": 0.1}
    for name, value in changed.items():
        assert loss(recipe.with_settings({name: value})) != loss(recipe), name


def test_units_are_grafted_once_between_the_phases(finished):
    lines = metrics(finished)
    masks = grafts(finished)
    share = sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    assert [line["grafted_ratio"] for line in lines] == pytest.approx([0, 0, share, share])
    for mask in masks.values():
        assert 0 < mask.sum() <= math.ceil(0.15 * mask.numel())
    model = checkpoint.load(finished)
    layer = next(m for m in model.modules() if isinstance(m, GraftedReLU))
    assert (layer.slope[layer.mask] != 0.4).any()  # learned
    assert (layer.slope[~layer.mask] == 0.4).all()
    assert all(0 <= line["unstable_ratio"] <= 1 and 0 <= line["fgsm_accuracy"] <= line["clean_accuracy"] for line in lines)


def test_the_optimiser_starts_afresh_with_the_grafted_network():
    recipe = find("graft", "digits").with_settings({"calibration": 8})
    model, data = models.cnn_small(SHAPE, activation="grafted_relu"), load("digits", limit=20)
    optimizer = recipe.make_optimizer(model)
    recipe.loss(model.train(), data.pixels(), data.labels, 0.0, {})[0].backward()
    optimizer.step()
    for epoch, kept in ((recipe.grafted_at - 1, True), (recipe.grafted_at, False)):
        recipe.before_epoch(model, optimizer, data, epoch)
        assert bool(optimizer.state) == kept
    assert model.training


def test_grafted_units_count_as_stable():
    recipe, data = find("graft", "digits"), load("digits", split="test", limit=30)
    torch.manual_seed(0)
    model = models.cnn_small(SHAPE, activation="grafted_relu").eval()
    x, y = data.pixels(), data.labels
    boxes = interval(model, x, recipe.eps, kind="estimate", pixel_range=(0, 1)).layers
    unstable = torch.stack([((low < 0) & (high > 0)).flatten(1).sum(1) for low, high in boxes.values()]).sum(0)
    units = sum(low[0].numel() for low, _ in boxes.values())
    with torch.no_grad():
        torch.testing.assert_close(recipe.measures(model, x, y)["unstable_ratio"], unstable / units)
        for module in model.modules():
            if isinstance(module, GraftedReLU):
                module.mask.fill_(True)
        assert not recipe.measures(model, x, y)["unstable_ratio"].any()


def test_masks_are_those_of_the_network_before(finished, tmp_path):
    first = run(tmp_path / "first", {"epochs": 2})  # the first phase alone
    assert not any(mask.any() for mask in grafts(first).values())
    model, data = checkpoint.load(first), load("digits", split="train", limit=200)
    recipe = find("graft", "digits")
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:60]
    masks = select(model, score(model, data.pixels(rows), recipe.eps, progress=False))
    for name, mask in grafts(finished).items():
        assert torch.equal(mask, masks[name])


def test_a_phase_can_start_from_the_other(finished, tmp_path):
    """Training, and scoring with fine-tuning, as two runs: the same masks, and learning rates of the second phase."""
    first = run(tmp_path / "first", {"epochs": 2})
    second = run(tmp_path / "second", {"epochs": 2, "pretrain": 0, "start": str(first)})
    for name, mask in grafts(finished).items():
        assert torch.equal(mask, grafts(second)[name])
    assert [line["lr"] for line in metrics(second)] == [line["lr"] for line in metrics(finished)[2:]]


def test_starts_from_a_plain_relu_network(tmp_path):
    plain = models.cnn_small(SHAPE)
    checkpoint.save(tmp_path / "relu.safetensors", plain, "cnn_small", {"shape": SHAPE})
    out = run(tmp_path / "run", {"epochs": 1, "pretrain": 1, "start": str(tmp_path / "relu.safetensors"), "lr": 1e-9})
    for key, t in plain.state_dict().items():
        torch.testing.assert_close(checkpoint.load(out).state_dict()[key], t, atol=1e-6, rtol=0)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_that_is_cut_goes_on_to_the_same_bits(finished, tmp_path, after, monkeypatch):
    from lipfast._run import Run

    whole = Run.commit

    def cut(self, model, optimizer, line):
        whole(self, model, optimizer, line)
        if line["epoch"] == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "commit", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run")
    monkeypatch.undo()
    assert_same_run(run(tmp_path / "run", resume=True), finished)


CHANGES = [{"ratio": 0.05}, {"rule": "random"}, {"pool_fraction": 0.2}, {"measure": "error"}, {"restrict_rows": "grafted"}]
CHANGES += [{"calibration": 10}, {"pool": "layer", "pool_fraction": 0.3}, {"bounds": "crown"}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_setting_of_the_choice_changes_the_masks(finished, tmp_path, change):
    other = grafts(run(tmp_path / "run", {"epochs": 3} | change))
    assert any(not torch.equal(mask, other[name]) for name, mask in grafts(finished).items())


@pytest.mark.parametrize(
    "change", [{"line": "chord"}, {"line_slope": 0.3}, {"line_intercept": 0.1}, {"line_lr": 0.1}, {"prune": 0.01}]
)
def test_every_setting_of_the_lines_changes_the_network(finished, tmp_path, change):
    model, other = (checkpoint.load(folder).state_dict() for folder in (finished, run(tmp_path / "run", change)))
    assert any(not torch.equal(t, other[key]) for key, t in model.items())
    if "prune" in change:
        assert (other["0.weight"] == 0).any()
        assert not (model["0.weight"] == 0).any()


def test_ratio_0_is_the_baseline(tmp_path):
    assert not any(mask.any() for mask in grafts(run(tmp_path / "run", {"epochs": 3, "ratio": 0})).values())


def test_learning_rates_of_weights_and_lines():
    recipe = find("graft", "digits").with_settings({"epochs": 20, "pretrain": 10, "milestones": "4,8"})
    assert [recipe.lr_at(e) for e in (0, 4, 9)] == pytest.approx([2e-3, 4e-4, 8e-5])
    assert [recipe.lr_at(e) for e in (10, 15, 20)] == pytest.approx([5e-4, 2.5e-4, 0])
    model = models.cnn_small(SHAPE, activation="grafted_relu")
    weights, lines = recipe.with_settings({"weight_decay": 0.1}).make_optimizer(model).param_groups
    assert (weights["weight_decay"], lines["weight_decay"], lines["lr_factor"]) == (0.1, 0, 10)
    assert {id(p) for p in lines["params"]} == {
        id(p) for m in model.modules() if isinstance(m, GraftedReLU) for p in m.parameters()
    }
    assert len(weights["params"]) + len(lines["params"]) == len(list(model.parameters()))
    assert recipe.with_epochs(10).grafted_at == 5


def test_ends_with_an_evaluation(tmp_path):
    out = run(tmp_path / "run", {"evaluation": 30, "epochs": 2, "pretrain": 1})
    found = Evaluation.load(out / "evaluation.json")
    assert (found.images, found.eps, found.data) == (30, 0.05, "digits")
    (out / "evaluation.json").unlink()
    run(tmp_path / "run", {"evaluation": 30, "epochs": 2, "pretrain": 1}, resume=True)  # was killed there
    again = json.loads((out / "evaluation.json").read_text())
    assert again["verified_accuracy"] == found.verified_accuracy


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"pretrain": 9}, "pretrain must be from 0 to epochs"),
        ({"ratio": 1.5}, "ratio must be from 0 to 1"),
        ({"line": "bent"}, "line must be one of fixed, chord"),
        ({"slope_form": "steep"}, "slope_form must be one of product"),
        ({"rule": "best"}, "rule must be one of"),
        ({"calibration": 0}, "calibration must be at least 1"),
        ({"arguments": {"activation": "relu"}}, "must have GraftedReLU activations"),
        ({"start": "nowhere"}, "nowhere"),
    ],
)
def test_names_what_is_wrong(tmp_path, settings, fault):
    with pytest.raises(ValueError, match=fault):
        run(tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


def test_a_start_from_another_network_is_refused(tmp_path):
    checkpoint.save(tmp_path / "mlp.safetensors", nn.Sequential(*models.mlp((64, 10))), "mlp", {"sizes": [64, 10]})
    with pytest.raises(ValueError, match="another model"):
        run(tmp_path / "run", {"start": str(tmp_path / "mlp.safetensors")})


def test_presets():
    assert {find("graft", data).eps for data in ("mnist", "fashion-mnist")} == {0.1}
    cifar = Graft.preset("cifar10")
    assert (cifar.eps, cifar.finetune_lr, cifar.line_lr, cifar.epochs - cifar.pretrain) == (2 / 255, 1e-3, 1e-2, 100)
    with pytest.raises(ValueError, match="no preset"):
        Graft.preset("imagenet")
