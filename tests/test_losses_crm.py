import math

import pytest
import torch
import torch.nn.functional as F

from lipfast import losses
from lipfast.losses.crm import FORMS
from lipfast.ops.certified_radius import certified_radius
from tests.checks import assert_near

SETTING = {"weight": 3.0, "sharpness": 5.0, "radius_cap": 1.0}


def sample(device, B=12, K=5, dtype=torch.float64):
    """Logits, labels of which two in three are predicted, and constants of logit differences."""
    torch.manual_seed(0)
    logits = torch.randn(B, K, device=device, dtype=dtype)
    lipschitz = torch.rand(K, K, device=device, dtype=dtype) + 0.5
    lipschitz = (lipschitz + lipschitz.mT) * (1 - torch.eye(K, device=device, dtype=dtype))
    label = logits.argmax(1)
    return logits, lipschitz, torch.where(torch.arange(B, device=device) % 3 == 0, (label + 1) % K, label)


def by_hand(logits, lipschitz, label, weight, sharpness, radius_cap, form="soft_min", misclassified=False, boosted=False):
    """The paper's objective, image after image and class after class."""
    total = 0.0
    for z, y in zip(logits.tolist(), label.tolist(), strict=True):
        p = [math.exp(v) / sum(math.exp(w) for w in z) for v in z]
        total -= math.log(p[y])
        if boosted:
            total -= math.log(1 - max(v for j, v in enumerate(p) if j != y))
        c = max(range(len(z)), key=lambda j: z[j])
        radii = [(z[c] - v) / lipschitz[c, j].item() for j, v in enumerate(z) if j != c and lipschitz[c, j] > 0]
        if radii and min(radii) < radius_cap and (c == y or misclassified):
            among = radii if form == "soft_min" else [min(radii)]
            inside = sum(math.exp(-sharpness * r) for r in among)
            total += weight / sharpness * (math.log(inside) if form == "soft_min" else inside)
    return total / len(logits)


@pytest.mark.parametrize("boosted", [False, True])
@pytest.mark.parametrize("misclassified", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_is_the_sum_over_the_images(form, misclassified, boosted, device):
    logits, lipschitz, label = sample(device)
    options = {"form": form, "misclassified": misclassified, "boosted": boosted}
    seen = set()
    for cap in (0.1, 0.5, 1e6):
        setting = SETTING | {"radius_cap": cap}
        want = by_hand(logits, lipschitz, label, **setting, **options)
        assert losses.crm(logits, lipschitz, label, **setting, **options).item() == pytest.approx(want, rel=1e-12)
        seen.add(want)
    assert len(seen) == 3


def test_the_soft_minimum_is_below_the_minimum_by_log_k_over_t_at_most(device):
    logits, lipschitz, _ = sample(device)
    radius, label = certified_radius(logits, lipschitz)
    natural = F.cross_entropy(logits, label)
    for t in (0.5, 5.0, 50.0):
        soft = (natural - losses.crm(logits, lipschitz, label, 1.0, t, 1e6)).item()
        assert radius.mean().item() - math.log(4) / t <= soft <= radius.mean().item()


def test_scaling_the_last_layer_changes_no_pull(device):
    logits, lipschitz, label = sample(device)
    for form in FORMS:
        pull = lambda scale, form=form: (
            losses.crm(scale * logits, scale * lipschitz, label, **SETTING, form=form) - F.cross_entropy(scale * logits, label)
        )
        assert_near(pull(7.0), pull(1.0), torch.float64)


@pytest.mark.parametrize("form", FORMS)
def test_only_right_images_below_the_cap_pull(form, device):
    logits, lipschitz, label = sample(device)
    radius, predicted = certified_radius(logits, lipschitz)
    cap = radius.median().item()
    setting = SETTING | {"radius_cap": cap, "form": form}
    for misclassified in (False, True):
        leaf = logits.clone().requires_grad_()
        total = losses.crm(leaf, lipschitz, label, **setting, misclassified=misclassified) - F.cross_entropy(leaf, label)
        (grad,) = torch.autograd.grad(total, leaf)
        want = (radius < cap) & ((predicted == label) | misclassified)
        assert torch.equal((grad.abs() > 1e-12).any(1), want)
        assert (grad[want, predicted[want]] < 0).all()  # a larger margin is a smaller loss
    assert 0 < (want & (predicted == label)).sum() < want.sum() < len(want)


@pytest.mark.parametrize("boosted", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_function(form, boosted, device):
    logits, lipschitz, label = sample(device)
    leaves = logits.requires_grad_(), lipschitz.requires_grad_()
    assert torch.autograd.gradcheck(lambda z, L: losses.crm(z, L, label, **SETTING, form=form, boosted=boosted), leaves)
    (grad,) = torch.autograd.grad(losses.crm(logits, lipschitz, label, **SETTING, form=form), lipschitz)
    assert (grad >= 0).all()  # smaller constants are a smaller loss
    assert (grad.diagonal() == 0).all()
    assert grad.any()


@pytest.mark.parametrize("value", [0.0, 1e-30, math.inf, math.nan])
@pytest.mark.parametrize("form", FORMS)
def test_a_constant_without_a_finite_radius_pulls_at_nothing(form, value, device):
    logits, lipschitz, label = sample(device, dtype=torch.float32)
    lipschitz[0, 1] = lipschitz[1, 0] = value
    logits, lipschitz = logits.requires_grad_(), lipschitz.requires_grad_()
    loss = losses.crm(logits, lipschitz, label, **SETTING, form=form)
    loss.backward()
    want = by_hand(logits, lipschitz.detach().nan_to_num(0, posinf=0), label, **SETTING, form=form)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert logits.grad.isfinite().all()
    assert lipschitz.grad.isfinite().all()
    assert lipschitz.grad[0, 1] == lipschitz.grad[1, 0] == 0


@pytest.mark.parametrize("form", FORMS)
def test_where_nothing_pulls_the_loss_is_the_cross_entropy(form, device):
    logits, lipschitz, label = sample(device)
    wrong = (logits.argmax(1) + 1) % 5
    for case in ((lipschitz, wrong, 1.0), (lipschitz, label, 1e-9), (0 * lipschitz, label, 1.0)):
        leaves = logits.clone().requires_grad_(), case[0].clone().requires_grad_()
        loss = losses.crm(*leaves, case[1], 3.0, 5.0, case[2], form)
        assert_near(loss, F.cross_entropy(logits, case[1]), torch.float64)
        grads = torch.autograd.grad(loss, leaves)
        assert grads[0].isfinite().all()
        assert (grads[1] == 0).all()


def test_of_equal_logits_only_the_pair_with_a_constant_of_zero_is_left_out(device):
    logits, lipschitz = torch.ones(1, 3, device=device, requires_grad=True), torch.ones(3, 3, device=device)
    lipschitz[0, 1] = 0
    label = logits.argmax(1)
    loss = losses.crm(logits, lipschitz.requires_grad_(), label, **SETTING) - F.cross_entropy(logits, label)
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-3.0, 0.0, 3.0]], device=device))
    assert lipschitz.grad.isfinite().all()


def test_a_certain_prediction_keeps_the_boosted_loss_finite(device):
    logits = torch.tensor([[200.0, 0.0, -500.0], [0.0, 200.0, -500.0]], device=device, requires_grad=True)
    lipschitz, label = torch.ones(3, 3, device=device), torch.tensor([0, 0], device=device)
    loss = losses.crm(logits, lipschitz, label, 0.0, 5.0, 1.0, boosted=True)
    assert loss.item() == pytest.approx((0 + 200 + 200) / 2)
    loss.backward()
    assert logits.grad.isfinite().all()


def test_wrong_arguments_are_named(device):
    logits, lipschitz, label = sample(device)
    cases = {
        "weight must be at least 0 and finite, got -1": {"weight": -1},
        "weight must be at least 0 and finite, got nan": {"weight": math.nan},
        "sharpness must be positive and finite, got 0": {"sharpness": 0},
        "radius_cap must be positive and finite, got inf": {"radius_cap": math.inf},
        "form must be one of soft_min, min, got 'max'": {"form": "max"},
        r"lipschitz must be \(5, 5\), got \(4, 5\)": {"lipschitz": lipschitz[1:]},
        r"logits must be \(B, K\) of two classes or more, got \(12, 1\)": {"logits": logits[:, :1]},
    }
    for message, changes in cases.items():
        arguments = {"logits": logits, "lipschitz": lipschitz, "label": label, **SETTING, **changes}
        with pytest.raises(ValueError, match=f"crm: {message}"):
            losses.crm(**arguments)
