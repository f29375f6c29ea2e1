import math

import pytest
import torch

from lipfast import clipped_relu, max_min
from lipfast.nn import ClippedReLU, MaxMin, Normalize


def test_layers_are_their_ops(device):
    x = torch.randn(2, 4, 3, 3, device=device)
    assert torch.equal(MaxMin()(x), max_min(x))
    assert torch.equal(ClippedReLU(0.5).to(device)(x), clipped_relu(x, x.new_tensor(0.5)))


def test_a_threshold_per_unit_learns(device):
    layer = ClippedReLU(0.5, shape=(4, 3, 3), learnable=True).to(device)
    layer(torch.full((2, 4, 3, 3), 2.0, device=device)).sum().backward()
    assert torch.equal(layer.threshold.grad, torch.full((4, 3, 3), 2.0, device=device))


def test_a_fixed_threshold_is_saved_but_not_learned():
    layer = ClippedReLU(torch.tensor([0.5, 1.0]))
    assert list(layer.state_dict()) == ["threshold"]
    assert not list(layer.parameters())


def test_a_threshold_is_a_copy():
    start = torch.ones(3)
    layer = ClippedReLU(start, learnable=True)
    with torch.no_grad():
        layer.threshold.zero_()
    assert start.sum() == 3
    ClippedReLU(1.0, shape=(3,)).threshold[0] = 2  # expanded memory would refuse


@pytest.mark.parametrize("threshold", [-1.0, math.nan, torch.tensor([1.0, -1.0])])
def test_refuses_a_negative_threshold(threshold):
    with pytest.raises(ValueError, match="ClippedReLU: threshold"):
        ClippedReLU(threshold)


def test_normalize_is_per_channel(device):
    mean, std = [0.1, 0.2, 0.3], [1.0, 2.0, 4.0]
    layer = Normalize(mean, std).to(device)
    out = layer(torch.full((2, 3, 4, 5), 0.5, device=device))
    for c in range(3):
        torch.testing.assert_close(out[:, c], torch.full((2, 4, 5), (0.5 - mean[c]) / std[c], device=device))
    assert list(layer.state_dict()) == ["mean", "std"]


@pytest.mark.parametrize(("mean", "std"), [([0.1, 0.2], [1.0]), ([0.1], [0.0]), ([0.1], [math.nan]), (0.1, 1.0)])
def test_normalize_refuses_what_does_not_fit(mean, std):
    with pytest.raises(ValueError, match="Normalize: "):
        Normalize(mean, std)
