import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from lipfast.grafting.prune import prune
from lipfast.nn import orthogonal
from tests.test_losses_grafting import weights_model

WEIGHTS = ("0.weight", "2.weight", "4.weight")


def test_prune_zeroes_small_weights_and_nothing_else(device):
    model = weights_model(device)
    with torch.no_grad():
        model[0].weight[0, 0, 0] = torch.tensor([1e-4, -9e-4, 0.0], device=device)
        model[4].weight[1, :2] = torch.tensor([-1e-3, 1e-4], device=device)
        model[4].bias[0] = model[1].slope[0, 0, 0] = 1e-5
    before = copy.deepcopy(model.state_dict())
    assert prune(model, 0.0) == 0
    assert prune(model) == sum(int(((before[n].abs() < 1e-3) & (before[n] != 0)).sum()) for n in WEIGHTS)
    for name, value in model.state_dict().items():
        want = before[name].where(before[name].abs() >= 1e-3, 0) if name in WEIGHTS else before[name]
        assert torch.equal(value, want)
    assert model[4].weight[1, 0] != 0  # float32's -1e-3 is longer than float64's
    assert prune(model) == 0
    assert model[0].weight.requires_grad


def test_prune_refuses_what_it_cannot_do():
    for wrapped in (orthogonal(nn.Linear(3, 3)), parametrizations.weight_norm(nn.Linear(3, 3)), spectral_norm(nn.Linear(3, 3))):
        model = nn.Sequential(nn.Linear(3, 3), wrapped)
        before = model[0].weight.clone()
        with pytest.raises(ValueError, match="prune: the weight of layer '1' must be a plain parameter"):
            prune(model, 1.0)
        assert torch.equal(model[0].weight, before)
    for threshold in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="prune: threshold must be at least 0 and finite, got"):
            prune(model, threshold)
