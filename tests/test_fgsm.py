"""What sets the training attack apart; what it shares with pgd is tested in test_attacks.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lipfast.attacks import fgsm
from tests.test_attacks import NORMS, problem


@pytest.mark.parametrize("p", NORMS)
def test_a_step_stays_in_the_ball_and_the_pixel_range(p, device):
    model, x, label = problem(device)
    eps = torch.tensor([0.0, 1e-3, 8 / 255, 0.1, 0.5, 3.0], device=device)
    for start in ("random", "zero"):
        found = fgsm(model, x, label, eps, p, 10 * eps, start=start)
        assert found.dtype == x.dtype
        assert found.min() >= 0
        assert found.max() <= 1
        inside = fgsm(model, x, label, eps, p, pixel_range=None, start=start)
        for point in (found, inside):
            distance = (point - x).double().flatten(1).norm(p, 1)
            assert (distance <= eps + 8 * torch.finfo(x.dtype).eps).all()  # 64 pixels below 4 round by eps each at most
        assert (distance[1:] >= 0.2 * eps[1:]).all()
        assert torch.equal(found[0], x[0])


@pytest.mark.parametrize("p", NORMS)
def test_a_step_is_along_the_gradient_of_the_cross_entropy(p, device):
    model, x, label = problem(device, torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), label), x)
    unit = gradient.sign() if p == math.inf else F.normalize(gradient.flatten(1)).reshape(x.shape)
    options = {"p": p, "pixel_range": None, "start": "zero"}
    for size, length in ((0.03, 0.03), (0.2, 0.1), (None, 0.1)):
        torch.testing.assert_close(fgsm(model, x, label, 0.1, step_size=size, **options), x + length * unit)


def test_a_step_starts_at_a_random_point_of_the_box_within_the_pixels(device):
    seen = []

    class Seen(nn.Linear):
        def forward(self, x):
            seen.append(x.detach())
            return super().forward(x)

    model = Seen(4000, 2).to(device)
    model.weight.register_hook(lambda grad: pytest.fail("the gradient of the weights was computed"))
    x, label = torch.linspace(0, 1, 4000, device=device)[None], torch.tensor([0], device=device)
    generator = lambda: torch.Generator(device).manual_seed(2)
    found = fgsm(model, x, label, 0.2, generator=generator())
    torch.testing.assert_close(found, (seen[0] + 0.25 * (found - seen[0]).sign()).clamp(x - 0.2, x + 0.2).clamp(0, 1))
    assert torch.equal(fgsm(model, x, label, 0.2, generator=generator()), found)
    assert seen[0].min() >= 0
    assert seen[0].max() <= 1
    (free,) = seen[0][:, 800:3200] - x[:, 800:3200]  # where the pixel range does not matter
    for part in (-0.5, 0.0, 0.7):
        assert (free < 0.2 * part).double().mean().item() == pytest.approx((1 + part) / 2, abs=0.04)
    assert len(seen) == 2


def test_a_step_starts_uniformly_in_the_euclidean_ball(device):
    model, x = nn.Linear(2, 2).to(device), torch.zeros(4000, 2, device=device)
    label = torch.zeros(4000, dtype=torch.int64, device=device)
    start = fgsm(model, x, label, 0.5, 2, step_size=0.0, pixel_range=None)
    radii = start.norm(dim=1)
    for part in (0.3, 0.5, 0.8):
        assert (radii < 0.5 * part).double().mean().item() == pytest.approx(part**2, abs=0.04)
    assert (start > 0).double().mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.04)
