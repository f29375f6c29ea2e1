import pytest
import torch
from torch import nn

import lipfast.nn
from lipfast.bounds import norms
from tests.networks import jacobian, svd_slack

GRID = (4, 6, 5)


def batch_norm():
    module = nn.BatchNorm2d(5).eval()
    for t in (module.weight, module.bias, module.running_mean):
        nn.init.normal_(t)
    nn.init.uniform_(module.running_var, 0.1, 3.0)
    return module


def operators():
    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(9, 7), (9,)),
        "tokens": (nn.Linear(6, 7), (4, 6)),
        "conv1d": (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (4, 9)),
        "conv2d": (nn.Conv2d(4, 5, 3, 2, 1), GRID),
        "normalised": (nn.Sequential(lipfast.nn.Normalize([0.1] * 4, [0.2, 0.5, 1.0, 3.0]), nn.Conv2d(4, 5, 3, 1, 1)), GRID),
        "normalised groups": (
            nn.Sequential(lipfast.nn.Normalize([0.1] * 4, [0.2, 0.5, 1.0, 3.0]), nn.Conv2d(4, 6, 3, 1, 1, groups=2)),
            GRID,
        ),
        "batch norm": (nn.Sequential(nn.Conv2d(4, 5, 3, 1, 1), batch_norm()), GRID),
        "both": (
            nn.Sequential(lipfast.nn.Normalize([0.1] * 4, [0.2, 0.5, 1.0, 3.0]), nn.Conv2d(4, 5, 3, 1, 1), batch_norm()),
            GRID,
        ),
    }


@pytest.mark.parametrize("name", list(operators()))
def test_bound_and_estimate_enclose_the_norm_of_a_layer_with_its_scalings(name):
    module, shape = operators()[name]
    (bound,) = norms(module, shape).sigma.values()
    (estimate,) = norms(module, shape, kind="estimate", iterations=300).sigma.values()
    true = torch.linalg.matrix_norm(jacobian(module, shape), 2)
    assert bound.dtype == torch.float64
    assert true - svd_slack(true) <= bound <= true * 1.002
    assert true * 0.9999 <= estimate.double() <= true * (1 + 1e-5)
    module.float()


def test_vectors_of_one_call_start_the_next():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    first = norms(model, (3, 6, 6), kind="estimate", iterations=1)
    again = norms(model, (3, 6, 6), kind="estimate", iterations=1, vectors=first.vectors)
    assert first.vectors["0"].shape == (3, 6, 6)
    assert not any(v.requires_grad for v in first.vectors.values())
    assert all(again.sigma[name] > first.sigma[name] for name in ("0", "3"))


def test_estimates_have_gradients_and_bounds_have_none():
    model = nn.Sequential(nn.Linear(4, 3))
    assert norms(model, (4,), kind="estimate").sigma["0"].requires_grad
    assert not norms(model, (4,)).sigma["0"].requires_grad


def test_a_layer_used_twice_is_listed_for_each_of_its_image_sizes():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3)

        def forward(self, x):
            return self.conv(torch.relu(self.conv(x)))

    found = norms(Twice(), (2, 5, 5), kind="estimate", iterations=3)
    assert [v.shape for v in found.vectors.values()] == [(2, 5, 5), (2, 3, 3)]


def test_a_scaling_that_somebody_else_reads_stays_apart():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            scaled = self.first(x) * 5.0
            return self.second(scaled) + scaled

    model = Fork()
    found = norms(model, (3,)).sigma
    torch.testing.assert_close(found["first"], torch.linalg.matrix_norm(5 * model.first.weight.double(), 2), rtol=1e-3, atol=0)
    torch.testing.assert_close(found["second"], torch.linalg.matrix_norm(model.second.weight.double(), 2), rtol=1e-3, atol=0)


def test_names_what_is_wrong():
    with pytest.raises(ValueError, match="kind: 'bound' or 'estimate' expected, got 'upper'"):
        norms(nn.Linear(2, 2), (2,), kind="upper")
    with pytest.raises(ValueError, match="got -1"):
        norms(nn.Linear(2, 2), (2,), kind="estimate", iterations=-1)
    with pytest.raises(ValueError, match="layer '0': ConvTranspose2d is not supported"):
        norms(nn.Sequential(nn.ConvTranspose2d(2, 2, 2)), (2, 4, 4))
