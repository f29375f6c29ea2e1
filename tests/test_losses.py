import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lipfast import losses
from lipfast.bounds import interval, interval_margin


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
