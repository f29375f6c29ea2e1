import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lipfast import losses


def problem(device, dtype=torch.float64, B=6):
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)]
    x = torch.rand(B, 1, 6, 6, device=device, dtype=dtype)
    return nn.Sequential(*layers).to(device, dtype), x, torch.arange(B, device=device) % 3


def seeded(device):
    return torch.Generator(device).manual_seed(7)


def gradient(model, x, label):
    """Of each sample alone, (B, ...) flat."""
    rows = []
    for image, y in zip(x, label, strict=True):
        leaf = image[None].detach().requires_grad_()
        rows.append(torch.autograd.grad(F.cross_entropy(model(leaf), y[None]), leaf)[0].flatten())
    return torch.stack(rows)


def shift(x, eps):
    return eps * (2 * torch.rand(x.shape, device=x.device, dtype=x.dtype, generator=seeded(x.device)) - 1)


def test_alignment_is_the_mean_of_the_cosines(device):
    model, x, y = problem(device)
    for eps in (0.05, 1.5):
        pairs = zip(gradient(model, x, y), gradient(model, x + shift(x, eps), y), strict=True)
        want = 1 - sum((a @ b / (a.norm() * b.norm())).item() for a, b in pairs) / len(x)
        assert want > 1e-4
        got = losses.gradient_alignment(model, x, y, eps, seeded(device))
        assert got.item() == pytest.approx(want, abs=1e-12)
    assert not x.requires_grad
    assert losses.gradient_alignment(model.float(), x.float(), y, 0.0) == 0  # without the cancellation of 1 - cos


def test_alignment_of_a_turned_gradient_is_two(device):
    kinked = lambda x: torch.cat((x.abs(), -x.abs()), 1)  # whose gradient at x = -1 is that at 1 turned round
    x, y = torch.full((1, 1), 1e-3, device=device), torch.tensor([0], device=device)
    values = [losses.gradient_alignment(kinked, x, y, 1.0).item() for _ in range(20)]
    assert sorted(set(values)) == [0.0, 2.0]  # which also shows that the shifts differ


def test_gradient_of_alignment_agrees_with_finite_differences(device):
    model, x, y = problem(device)
    weights, eps, step = list(model.parameters()), 0.3, 1e-6
    at_x, nearby = gradient(model, x, y), x + shift(x, eps)
    value = lambda: -F.cosine_similarity(at_x, gradient(model, nearby, y)).mean().item()  # the first gradient is held
    got = torch.autograd.grad(losses.gradient_alignment(model, x, y, eps, seeded(device)), weights)
    for weight, slope in zip(weights[:-1], got[:-1], strict=True):
        direction = torch.randn_like(weight)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * step * direction
            ends.append(value())
            with torch.no_grad():
                weight -= sign * step * direction
        want = (ends[0] - ends[1]) / (2 * step)
        assert abs(want) > 1e-5
        assert (slope * direction).sum().item() == pytest.approx(want, rel=1e-5)
    assert all(weight.grad is None for weight in weights)
    with torch.no_grad():
        assert not losses.gradient_alignment(model, x, y, eps).requires_grad


def test_samples_without_a_gradient_are_left_out(device):
    model, x, y = problem(device)
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.zero_()
    dead = torch.full_like(x, -9.0)
    both, labels = torch.cat((x, dead)), torch.cat((y, y))
    nearby = (both + shift(both, 0.3))[: len(x)]
    got = losses.gradient_alignment(model, both, labels, 0.3, seeded(device))
    torch.testing.assert_close(got, 1 - F.cosine_similarity(gradient(model, x, y), gradient(model, nearby, y)).mean())
    half_dead = lambda x: torch.cat((x.relu(), -x.relu()), 1)  # nearby, or where the image is
    for place in (1e-3, -1e-3):
        line = torch.full((30, 1), place, device=device)
        assert losses.gradient_alignment(half_dead, line, torch.zeros(30, dtype=torch.int64, device=device), 1.0) == 0
    none = losses.gradient_alignment(model, dead, y, 0.3)
    assert none == 0
    for slope in torch.autograd.grad(none, list(model.parameters()), materialize_grads=True):
        assert not slope.any()


def test_alignment_does_not_depend_on_the_size_of_gradients_until_their_squares_underflow(device):
    model, x, y = problem(device, torch.float32)
    nn.init.zeros_(model[-1].bias)
    scaled = copy.deepcopy(model)
    values = []
    for size in (1e-5, 1e-17, 1e-20):
        with torch.no_grad():
            scaled[-1].weight.copy_(size * model[-1].weight)
        values.append(losses.gradient_alignment(scaled, x, y, 0.5, seeded(device)).item())
    assert values[0] > 1e-3
    assert values[1] == pytest.approx(values[0], rel=1e-3)
    assert scaled[-1].weight.abs().max() > 1e-22  # so no gradient is 0, but the squares are subnormal
    assert values[2] == 0


def test_alignment_leaves_autocast_and_the_pixel_range(device):
    model, x, y = problem(device, torch.float32)
    want = losses.gradient_alignment(model, x, y, 0.3, seeded(device))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(losses.gradient_alignment(model, x, y, 0.3, seeded(device)), want)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    losses.gradient_alignment(model, x, y, 0.5, seeded(device))
    assert torch.equal(seen[0], x)
    torch.testing.assert_close(seen[1], x + shift(x, 0.5))
    assert seen[1].min() < 0


def test_gradient_alignment_names_the_wrong_argument(device):
    model, x, y = problem(device)
    with pytest.raises(ValueError, match=r"gradient_alignment: x must be a float32 or float64 tensor, got torch\.bfloat16"):
        losses.gradient_alignment(model, x.bfloat16(), y, 0.1)
    for eps in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="gradient_alignment: eps must be at least 0 and finite, got"):
            losses.gradient_alignment(model, x, y, eps)
