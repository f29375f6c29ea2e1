import math

import pytest
import torch
from torch import nn

from lipfast.attacks import fgsm, pgd
from lipfast.models import cnn_small

NORMS = [2, math.inf]


def problem(device, dtype=torch.float32):
    torch.manual_seed(0)
    model = cnn_small((1, 8, 8)).to(device, dtype).eval()
    x = torch.rand(6, 1, 8, 8, device=device, dtype=dtype)
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    return model, x, torch.arange(6, device=device)


def margin(model, x, label):
    logits = model(x)
    return logits.scatter(1, label[:, None], -math.inf).amax(1) - logits.gather(1, label[:, None]).squeeze(1)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1e-4, 0.1, 8 / 255, 1.58])
def test_stays_in_the_ball_and_the_pixel_range(eps, dtype, p, device):
    model, x, label = problem(device, dtype)
    for pixel_range in ((0.0, 1.0), None):
        adversarial = pgd(model, x, label, eps, p, steps=5, restarts=2, pixel_range=pixel_range)
        distance = (adversarial.double() - x.double()).flatten(1).norm(p, 1)
        # x and eps round to float64, each pixel by 2^-53 at most.
        assert (distance <= eps + 64 * 2.0**-53).all()
        assert (distance > 0.2 * eps).all() or pixel_range
    assert adversarial.isfinite().all()


def test_stays_in_the_pixel_range(device):
    model, x, label = problem(device)
    for p in NORMS:
        adversarial = pgd(model, x, label, 2.0, p, steps=5, restarts=3, pixel_range=(-0.5, 1.25))
        assert adversarial.min() >= -0.5
        assert adversarial.max() <= 1.25
        assert adversarial.min() < 0


@pytest.mark.parametrize("p", NORMS)
def test_finds_the_optimum_of_a_linear_model(p, device):
    torch.manual_seed(0)
    model = nn.Linear(20, 2).to(device)
    x, label = torch.randn(8, 20, device=device), torch.tensor([0, 1] * 4, device=device)
    eps = torch.linspace(0, 0.7, 8, device=device)
    row = model.weight[1 - label] - model.weight[label]
    best = margin(model, x, label) + eps * row.norm(1 if p == math.inf else 2, 1)
    got = margin(model, pgd(model, x, label, eps, p, pixel_range=None), label)
    torch.testing.assert_close(got, best, rtol=1e-5, atol=1e-5)


def test_finds_the_optimum_of_a_linear_model_within_the_pixels(device):
    torch.manual_seed(0)
    model = nn.Linear(20, 2).to(device)
    x, label = torch.rand(8, 20, device=device), torch.tensor([0, 1] * 4, device=device)
    row = model.weight[1 - label] - model.weight[label]
    corner = torch.where(row > 0, (x + 0.3).clamp(max=1), (x - 0.3).clamp(min=0))
    torch.testing.assert_close(margin(model, pgd(model, x, label, 0.3), label), margin(model, corner, label))


@pytest.mark.parametrize("p", NORMS)
def test_is_never_weaker_with_another_restart_or_than_no_attack(p, device):
    model, x, label = problem(device)
    none = margin(model, x, label)
    attack = lambda **o: margin(
        model, pgd(model, x, label, 0.1, p, generator=torch.Generator(device).manual_seed(1), **o), label
    )
    assert (attack(steps=0) == none).all()
    one, three = attack(steps=3), attack(steps=3, restarts=3)
    assert (one > none).all()
    assert (three >= one).all()
    assert (three > one).any()
    assert not torch.equal(attack(steps=3, step_size=0.01), one)


@pytest.mark.parametrize("p", NORMS)
def test_one_generator_state_gives_one_answer_whatever_else_is_random(p, device):
    model, x, label = problem(device)
    answers = []
    for _ in range(2):
        generator = torch.Generator(device).manual_seed(3)
        answers.append(pgd(model, x, label, 0.5, p, steps=2, restarts=3, generator=generator))
        torch.rand(7, device=device)
    assert torch.equal(*answers)


@pytest.mark.parametrize("p", NORMS)
def test_eps_0_returns_the_input(p, device):
    model, x, label = problem(device)
    assert torch.equal(pgd(model, x, label, 0.0, p, restarts=2), x)
    eps = torch.tensor([0.0, 0.3] * 3, device=device)
    moved = (pgd(model, x, label, eps, p) != x).flatten(1).any(1)
    assert moved.tolist() == [False, True] * 3


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_leaves_the_model_and_the_input_alone(attack, device):
    model, x, label = problem(device)
    before, state = x.clone(), {k: v.clone() for k, v in model.state_dict().items()}
    for options in ({}, {"start": "zero"}) if attack is fgsm else ({},):
        with torch.no_grad():
            adversarial = attack(model, x, label, 0.1, **options)
        assert torch.equal(attack(model, x, label, 0.1, **options) != x, adversarial != x)
        assert not adversarial.requires_grad
        assert not attack(model, x.clone().requires_grad_(), label, 0.1, **options).requires_grad
    assert not model.training
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_point_with_nan_logits_counts_as_the_worst(device):
    class Hole(nn.Module):
        def forward(self, x):
            hole = torch.where(x.sum(1) > 1.0, math.nan, 0.0)
            return torch.stack((-x.sum(1), x.sum(1) + hole), 1)

    x, label = torch.full((1, 2), 0.4, device=device), torch.tensor([0], device=device)
    assert Hole()(pgd(Hole(), x, label, 0.3)).isnan().any()


@pytest.mark.parametrize("attack", [fgsm, pgd])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"p": 1}, "p must be"),
        ({"eps": -0.1}, "eps must"),
        ({"eps": torch.tensor([0.1] * 5 + [-0.1])}, "eps must"),
        ({"eps": math.nan}, "eps must"),
        ({"eps": torch.ones(5)}, "eps must"),
        ({"x": torch.rand(6, 1, 8, 8).half()}, "x must be a float32"),
    ],
)
def test_names_the_wrong_argument(change, word, attack):
    model, x, label = problem("cpu")
    with pytest.raises(ValueError, match=f"{attack.__name__}: {word}"):
        attack(**{"model": model, "x": x, "label": label, "eps": 0.1, **change})


@pytest.mark.parametrize(
    ("attack", "change", "word"),
    [
        (pgd, {"x": torch.full((6, 1, 8, 8), 1.5)}, "x must lie in"),
        (pgd, {"x": torch.full((6, 1, 8, 8), math.nan)}, "x must lie in"),
        (pgd, {"steps": -1}, "steps must"),
        (pgd, {"restarts": 0}, "steps must"),
        (fgsm, {"start": "ones"}, "start must be random or zero, got 'ones'"),
        (fgsm, {"step_size": -0.1}, "step_size must not be negative"),
        (fgsm, {"step_size": torch.ones(5)}, "step_size must be one number or one per sample"),
    ],
)
def test_names_the_wrong_argument_of_its_own(attack, change, word):
    test_names_the_wrong_argument(change, word, attack)
