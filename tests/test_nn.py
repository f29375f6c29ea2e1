import math

import pytest
import torch

from lipfast import clipped_relu, max_min
from lipfast.nn import ClippedMaxMin, ClippedReLU, MaxMin, Normalize


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


def test_clipped_max_min_sorts_and_clips(device):
    upper, lower = torch.rand(3, 2, 2, device=device), -torch.rand(3, 2, 2, device=device)
    x = torch.randn(5, 6, 2, 2, device=device)
    out = ClippedMaxMin(upper, lower).to(device)(x)
    for c in range(3):
        pair = torch.stack((x[:, c], x[:, c + 3]))
        assert torch.equal(out[:, c], torch.minimum(pair.amax(0), upper[c]))
        assert torch.equal(out[:, c + 3], torch.maximum(pair.amin(0), lower[c]))
    y = x + 1e-2 * torch.randn_like(x)
    layer = ClippedMaxMin(0.3, -0.1)
    for p in (1, 2, math.inf):
        assert ((layer(x) - layer(y)).flatten(1).norm(p, 1) <= (x - y).flatten(1).norm(p, 1)).all()


def test_clipped_max_min_has_a_pair_of_thresholds_per_pair_of_units(device):
    layer = ClippedMaxMin(0.5, shape=(4, 3, 3), learnable=True).to(device)
    assert layer.upper.unique().tolist() == [0.5]
    assert layer.lower.unique().tolist() == [-0.5]
    x = torch.full((2, 4, 3, 3), 2.0, device=device)
    x[:, 2:] = -3
    x.requires_grad_()
    layer(x).sum().backward()  # both of every pair are clipped
    assert torch.equal(layer.upper.grad, torch.full((2, 3, 3), 2.0, device=device))
    assert torch.equal(layer.lower.grad, torch.full((2, 3, 3), 2.0, device=device))
    assert not x.grad.any()
    assert sorted(ClippedMaxMin(torch.ones(2)).state_dict()) == ["lower", "upper"]
    assert not list(ClippedMaxMin().parameters())


def test_clipped_max_min_differentiates_twice_and_compiles(device):
    layer = ClippedMaxMin(0.5, shape=(4,), learnable=True).double().to(device)
    x = torch.randn(5, 4, device=device, dtype=torch.float64, requires_grad=True)
    leaves, seed = [x, *layer.parameters()], torch.randn_like(x)
    of = lambda upper, lower: {"upper": upper, "lower": lower}
    function = lambda x, *ends: torch.func.functional_call(layer, of(*ends), (x,))
    assert torch.autograd.gradcheck(function, leaves)
    (first,) = torch.autograd.grad(layer(x).sum(), x)  # 1 where the unit is not clipped
    (slope,) = torch.autograd.grad((layer(x) ** 2).sum(), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(slope.sum(), x)[0], 2 * first)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, want in zip(*(torch.autograd.grad(f(x), leaves, seed) for f in (compiled, layer)), strict=True):
        assert torch.equal(got, want)


def test_clipped_max_min_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="ClippedMaxMin: upper must be a number"):
        ClippedMaxMin(math.nan)
    with pytest.raises(ValueError, match="ClippedMaxMin: lower must be a number"):
        ClippedMaxMin(1.0, math.nan)
    with pytest.raises(ValueError, match=r"ClippedMaxMin: shape must be \(C, ...\) with C even, got \(3, 2, 2\)"):
        ClippedMaxMin(shape=(3, 2, 2))
    with pytest.raises(ValueError, match="max_min: x must be"):
        ClippedMaxMin()(torch.zeros(2, 3))


@pytest.mark.parametrize(("mean", "std"), [([0.1, 0.2], [1.0]), ([0.1], [0.0]), ([0.1], [math.nan]), (0.1, 1.0)])
def test_normalize_refuses_what_does_not_fit(mean, std):
    with pytest.raises(ValueError, match="Normalize: "):
        Normalize(mean, std)
