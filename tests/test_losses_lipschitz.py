import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lipfast import losses
from lipfast.bounds import interval_margin
from lipfast.nn import ClippedMaxMin, ClippedReLU


def sample(device, B=7, K=4):
    """Logits, labels of which some are predicted, and constants of logit differences, one matrix per image."""
    logits = torch.randn(B, K, device=device, dtype=torch.float64)
    lipschitz = torch.rand(B, K, K, device=device, dtype=torch.float64)
    lipschitz = (lipschitz + lipschitz.mT) * (1 - torch.eye(K, device=device))
    return logits, torch.arange(B, device=device) % K, lipschitz


def with_bottom(logits, worst, but):
    """The K+1 logits: the last is the largest of ``worst`` but for one class, found class by class."""
    rows = [max(w for i, w in enumerate(row) if i != own) for row, own in zip(worst.tolist(), but.tolist(), strict=True)]
    return torch.cat([logits, logits.new_tensor(rows)[:, None]], 1)


def test_gloro_is_the_cross_entropy_of_one_class_more(device):
    logits, y, lipschitz = sample(device)
    predicted = logits.argmax(1)
    for constants in (lipschitz, lipschitz[0]):
        rows = torch.stack([(constants if constants.ndim == 2 else constants[b])[j] for b, j in enumerate(predicted.tolist())])
        want = F.cross_entropy(with_bottom(logits, logits + 0.7 * rows, predicted), y)
        torch.testing.assert_close(losses.gloro(logits, constants, y, 0.7), want)
    assert (predicted != y).any()


def test_trades_weighs_the_divergence_of_the_certificate(device):
    """The paper's CE(z, y) + lambda KL((softmax(z), 0) || softmax(z, bottom))."""
    logits, y, lipschitz = sample(device)
    predicted = logits.argmax(1)
    rows = lipschitz[torch.arange(len(y)), predicted]
    more = with_bottom(logits, logits + 0.7 * rows, predicted).log_softmax(1)[:, :-1]
    divergence = (logits.softmax(1) * (logits.log_softmax(1) - more)).sum(1).mean()
    for trades in (0.0, 1.0, 2.5):
        want = F.cross_entropy(logits, y) + trades * divergence
        torch.testing.assert_close(losses.gloro(logits, lipschitz, y, 0.7, trades), want)


def test_gloro_pulls_at_the_constants_of_the_predicted_class_alone(device):
    logits, y, lipschitz = sample(device)
    (grad,) = torch.autograd.grad(losses.gloro(logits, lipschitz.requires_grad_(), y, 0.7), lipschitz)
    rows = grad[torch.arange(len(y)), logits.argmax(1)]
    assert ((rows > 0).sum(1) == 1).all()
    assert (grad != 0).sum() == len(y)


def test_form_b_bounds_the_loss_of_every_point(device):
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 4)).double().to(device)
    x, y = torch.rand(8, 5, device=device, dtype=torch.float64), torch.arange(8, device=device) % 4
    margin = interval_margin(model, x, y, 0.1, p=2, kind="estimate")
    bound = losses.local_lipschitz(margin, y, model(x))
    for _ in range(200):
        assert F.cross_entropy(model(x + 0.1 * F.normalize(torch.randn_like(x))), y) <= bound


def test_the_two_forms_are_the_papers(device):
    logits, y, _ = sample(device)
    margin = torch.randn_like(logits).scatter(1, y[:, None], 0.0)
    worst = logits.gather(1, y[:, None]) - margin
    natural = F.cross_entropy(logits, y)
    robust = {"B": F.cross_entropy(worst, y), "G": F.cross_entropy(with_bottom(logits, worst, y), y)}
    for form, loss in robust.items():
        for kappa in (0.0, 0.3, 1.0):
            got = losses.local_lipschitz(margin, y, logits, kappa, form)
            torch.testing.assert_close(got, kappa * natural + (1 - kappa) * loss)


def test_sparsity_is_the_sum_of_its_distances(device):
    lower = torch.randn(5, 6, device=device, dtype=torch.float64)
    upper = lower + torch.rand_like(lower)
    relu = ClippedReLU(torch.rand(6, dtype=torch.float64)).to(device)
    sort = ClippedMaxMin(0.4, -0.2).double().to(device)
    thresholds = relu.threshold.tolist()
    to_zero = to_threshold = to_upper = to_lower = 0.0
    for l, u in zip(lower.tolist(), upper.tolist(), strict=True):
        to_zero += sum(max(0.0, v) for v in u) / 30
        to_threshold += sum(max(0.0, t - v) for t, v in zip(thresholds, l, strict=True)) / 30
        to_upper += sum(max(0.0, 0.4 - max(l[c], l[c + 3])) for c in range(3)) / 15
        to_lower += sum(max(0.0, min(u[c], u[c + 3]) + 0.2) for c in range(3)) / 15
    got = losses.sparsity([(lower, upper, relu)], balance=0.3).item()
    assert got == pytest.approx(to_zero + 0.3 * to_threshold)
    assert losses.sparsity([(lower, upper, sort)]).item() == pytest.approx(to_upper + to_lower)
    both = losses.sparsity([(lower, upper, relu), (lower, upper, sort)]).item()
    assert both == pytest.approx(to_zero + 0.1 * to_threshold + to_upper + to_lower)
    assert losses.sparsity([]) == 0


def test_sparsity_moves_thresholds_and_boxes_towards_each_other(device):
    lower = torch.tensor([[0.5, -2.0]], device=device, requires_grad=True)
    upper = torch.tensor([[0.8, -1.0]], device=device, requires_grad=True)
    relu = ClippedReLU(1.0, (2,), learnable=True).to(device)
    losses.sparsity([(lower, upper, relu)]).backward()
    assert upper.grad.tolist() == [[0.5, 0.0]]
    torch.testing.assert_close(lower.grad, torch.full_like(lower, -0.05))
    torch.testing.assert_close(relu.threshold.grad, torch.full_like(relu.threshold, 0.05))


def test_wrong_arguments_are_named(device):
    logits, y, lipschitz = sample(device)
    with pytest.raises(ValueError, match=r"gloro: lipschitz must be \(4, 4\) or \(7, 4, 4\), got \(7, 4\)"):
        losses.gloro(logits, lipschitz[:, 0], y, 0.1)
    for name, values in {"eps": (-0.1, 1.0), "trades": (0.1, math.nan)}.items():
        with pytest.raises(ValueError, match=f"gloro: {name} must be at least 0, got"):
            losses.gloro(logits, lipschitz, y, *values)
    with pytest.raises(ValueError, match="local_lipschitz: form must be one of B, G, got 'C'"):
        losses.local_lipschitz(logits, y, logits, form="C")
    with pytest.raises(ValueError, match="local_lipschitz: kappa must be from 0 to 1, got 2"):
        losses.local_lipschitz(logits, y, logits, 2)
    with pytest.raises(ValueError, match=r"local_lipschitz: logits must be \(7, 4\) as margin, got \(7, 3\)"):
        losses.local_lipschitz(logits, y, logits[:, 1:])
    with pytest.raises(ValueError, match="sparsity: layers must be of ClippedReLU or ClippedMaxMin, got ReLU"):
        losses.sparsity([(logits, logits, nn.ReLU())])
