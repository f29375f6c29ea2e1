import math

import pytest
import torch
import torch.nn.functional as F

from lipfast import losses
from lipfast.ops.certified_radius import certified_radius
from tests.checks import DTYPES, assert_near


def sample(device, B=40, K=5, dtype=torch.float64):
    logits = torch.randn(B, K, device=device, dtype=dtype)
    lipschitz = torch.rand(K, K, device=device, dtype=dtype) + 0.5
    lipschitz = (lipschitz + lipschitz.mT) * (1 - torch.eye(K, device=device, dtype=dtype))
    return logits, lipschitz, torch.randint(K, (B,), device=device)


def by_hand(logits, lipschitz, label, eps, least=0.01):
    """The objective, image after image and class after class; and how often each of its three cases came."""
    total, cases = 0.0, [0, 0, 0]
    for z, y in zip(logits.tolist(), label.tolist(), strict=True):
        raised = []
        for i, v in enumerate(z):
            reach = 0.0 if i == y else eps * lipschitz[y, i].item()
            part = (z[y] - v) / max(reach, 1e-8)
            if i != y:
                cases[0 if part >= 1 else 1 if part > least else 2] += 1
            raised.append(v + min(max(part, least), 1.0) * reach)
        total += math.log(sum(math.exp(w) for w in raised)) - raised[y]
    return total / len(logits), cases


@pytest.mark.parametrize("least", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.7])
def test_is_the_sum_over_the_images(eps, least, device):
    logits, lipschitz, label = sample(device)
    want, cases = by_hand(logits, lipschitz, label, eps, least)
    assert losses.emma(logits, lipschitz, label, eps, least).item() == pytest.approx(want, rel=1e-12)
    assert min(cases) > 0 or eps == 0 or least == 1
    assert eps > 0 or want == pytest.approx(F.cross_entropy(logits, label).item())


def test_a_certified_image_is_raised_by_all_of_eps(device):
    logits, lipschitz, _ = sample(device)
    radius, label = certified_radius(logits, lipschitz)
    eps = radius.amin().item() * 0.99
    assert eps > 0
    want = F.cross_entropy(logits + eps * lipschitz[label], label)
    torch.testing.assert_close(losses.emma(logits, lipschitz, label, eps), want)


def test_an_image_that_is_not_ties_with_the_class_that_it_confuses(device):
    z = torch.tensor([[1.0, 0.8]], device=device)
    loss = losses.emma(z, 1 - torch.eye(2, device=device), torch.tensor([0], device=device), 0.5)
    assert loss.item() == pytest.approx(math.log(2))


def test_radii_are_constants_to_the_gradient(device):
    logits, lipschitz, label = sample(device)
    leaves = [logits.requires_grad_(), lipschitz.requires_grad_()]
    reach = 0.3 * lipschitz[label]
    margin = logits.gather(1, label[:, None]) - logits
    part = (margin / reach.clamp_min(1e-8)).clamp(0.01, 1).detach()
    wants = torch.autograd.grad(F.cross_entropy(logits + part * reach, label), leaves)
    grads = torch.autograd.grad(losses.emma(logits, lipschitz, label, 0.3), leaves)
    torch.testing.assert_close(grads[0], wants[0])
    torch.testing.assert_close(grads[1], wants[1] * (1 - torch.eye(5, device=device)))
    assert (grads[1] > 0).sum() == 20  # every constant but the diagonal's is pulled down


def test_a_matrix_per_image_and_one_for_all_agree(device):
    logits, lipschitz, label = sample(device)
    want = losses.emma(logits, lipschitz, label, 0.3)
    torch.testing.assert_close(losses.emma(logits, lipschitz.expand(40, 5, 5), label, 0.3), want)
    own = lipschitz * torch.rand(40, 1, 1, dtype=torch.float64, device=device)
    parts = [losses.emma(z[None], lip, y[None], 0.3) for z, lip, y in zip(logits, own, label, strict=True)]
    torch.testing.assert_close(losses.emma(logits, own, label, 0.3), torch.stack(parts).mean())


def test_a_pair_of_equal_rows_and_a_diagonal_that_is_not_zero_do_no_harm(device):
    logits, lipschitz, label = sample(device)
    lipschitz[0, 1] = lipschitz[1, 0] = 0
    logits[label == 0, 1] = logits[label == 0, 0]  # 0 / 0
    logits.requires_grad_()
    loss = losses.emma(logits, lipschitz, label, 0.3)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()
    torch.testing.assert_close(losses.emma(logits, lipschitz + torch.eye(5, device=device), label, 0.3), loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_same_in_every_dtype(dtype, device):
    logits, lipschitz, label = sample(device, dtype=dtype)
    want = losses.emma(logits.double(), lipschitz.double(), label, 0.3)
    assert_near(losses.emma(logits, lipschitz, label, 0.3), want, dtype)
    assert losses.emma(logits, lipschitz, label, 0.0).isfinite()


def test_names_the_wrong_argument():
    logits, lipschitz, label = sample("cpu")
    wrong = {
        r"logits must be \(B, K\)": {"logits": logits[0]},
        r"lipschitz must be \(5, 5\) or \(40, 5, 5\), got \(4, 4\)": {"lipschitz": lipschitz[1:, 1:]},
        "eps must be at least 0 and finite, got -1": {"eps": -1.0},
        "eps must be at least 0 and finite, got nan": {"eps": math.nan},
        "eps must be at least 0 and finite, got inf": {"eps": math.inf},
        "least must be from 0 to 1, got 2": {"least": 2.0},
    }
    right = {"logits": logits, "lipschitz": lipschitz, "label": label, "eps": 0.1}
    for message, argument in wrong.items():
        with pytest.raises(ValueError, match=f"emma: {message}"):
            losses.emma(**(right | argument))
