"""Of the losses of linearity grafting the slope's and l1; gradient alignment has a file of its own."""

import math

import pytest
import torch
from torch import nn

from lipfast import losses
from lipfast.nn import GraftedReLU, orthogonal


def boxes(device, shape=(5, 7), dtype=torch.float64):
    lower = torch.randn(shape, device=device, dtype=dtype)
    return lower, lower + 2 * torch.rand_like(lower)


COSTS = {
    "product": lambda l, u: 4 * u / (u - l) * (1 - u / (u - l)),
    "distance": lambda l, u: min(u / (u - l), 1 - u / (u - l)),
    "power": lambda l, u: 1 - abs(2 * u / (u - l) - 1) ** 3,
    "exponential": lambda l, u: math.exp(-3 * abs(2 * u / (u - l) - 1)),
    "volume": lambda l, u: -l * u,
    "rs": lambda l, u: -math.tanh(1 + l * u),
}


@pytest.mark.parametrize("form", COSTS)
def test_slope_is_the_mean_over_units_that_are_neither_grafted_nor_stable(form, device):
    """Over two layers at once; and the sum over units, mean over samples."""
    layers = [(*boxes(device), None), (*boxes(device, (5, 2, 3, 2)), torch.rand(2, 3, 2, device=device) < 0.4)]
    costs = []
    for lower, upper, grafted in layers:
        mask = torch.zeros_like(lower, dtype=torch.bool) if grafted is None else grafted.expand_as(lower)
        units = zip(lower.flatten().tolist(), upper.flatten().tolist(), mask.flatten().tolist(), strict=True)
        costs += [COSTS[form](l, u) for l, u, g in units if not g and (l < 0 < u or form == "rs")]
    assert 20 < len(costs) < (95 if form == "rs" else 60)
    got = losses.slope(layers, form, sharpness=3.0)
    assert got.item() == pytest.approx(sum(costs) / len(costs), rel=1e-12)
    total = losses.slope(layers, form, sharpness=3.0, reduction="sum")
    assert total.item() == pytest.approx(sum(costs) / 5, rel=1e-12)
    layers[1] = (*layers[1][:2], layers[1][2][None])  # as bounds keep a mask, with a batch of one
    assert losses.slope(layers, form, sharpness=3.0) == got


def test_two_forms_are_powers(device):
    layers = [(*boxes(device), None)]
    torch.testing.assert_close(losses.slope(layers), losses.slope(layers, "power", 2.0))
    torch.testing.assert_close(2 * losses.slope(layers, "distance"), losses.slope(layers, "power", 1.0))


@pytest.mark.parametrize("form", COSTS)
def test_slope_pulls_units_to_the_nearer_end(form, device):
    lower = torch.tensor([[-1.0, -3.0, -1.0]], device=device, requires_grad=True)
    upper = torch.tensor([[3.0, 1.0, 2.0]], device=device, requires_grad=True)
    mask = torch.tensor([False, False, True], device=device)
    low, high = torch.autograd.grad(losses.slope([(lower, upper, mask)], form), (lower, upper))
    assert not low[0, 2]
    assert not high[0, 2]
    # Down the gradient the nearer end moves towards 0.
    assert low[0, 0] < 0
    assert high[0, 1] > 0


@pytest.mark.parametrize("form", COSTS)
def test_gradients_of_slope_agree_with_finite_differences(form, device):
    lower, upper = (t.requires_grad_() for t in boxes(device, (2, 6)))
    mask = torch.arange(6, device=device) == 2
    for share in (1.0, 0.4):
        function = lambda l, u, share=share: losses.slope([(l, u, mask)], form, 3.0, share, "sum")
        assert torch.autograd.gradcheck(function, (lower, upper))


@pytest.mark.parametrize("form", COSTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_slope_of_degenerate_boxes_has_finite_gradients(form, dtype, device):
    ends = [(0, 0), (5, 5), (-6e4, -6e4), (0, 3), (-3, 0), (-6e4, 6e4), (-6e-8, 6e-8), (6e4, 6e4), (-2e-45, 2e-45)]
    for share in (1.0, 0.3):
        boxes = [torch.tensor(t, device=device, dtype=dtype)[None].requires_grad_() for t in zip(*ends, strict=True)]
        value = losses.slope([(*boxes, None)], form, sharpness=9.0, share=share)
        assert value.isfinite()
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        if dtype != torch.float16 or form in ("volume", "rs"):  # of the others the smallest box exceeds its range
            assert all(g.isfinite().all() for g in torch.autograd.grad(value, boxes))


def test_a_share_takes_the_costliest_units_of_each_sample(device):
    lower, upper = boxes(device, (5, 7))
    lower, upper = lower - 1, upper + 1  # so that most samples have more than three
    lower[0], upper[0] = -1.0, -0.5  # and one has none
    want = []
    for l, u in zip(lower.tolist(), upper.tolist(), strict=True):
        want += sorted((4 * a * -b / (a - b) ** 2 for a, b in zip(u, l, strict=True) if b < 0 < a), reverse=True)[:3]
    got = losses.slope([(lower, upper, None)], share=0.4)  # of 7, rounded up
    assert got.item() == pytest.approx(sum(want) / len(want))


def test_nothing_unstable_costs_nothing(device):
    assert losses.slope([]) == 0
    lower = torch.ones(2, 3, device=device, requires_grad=True)
    value = losses.slope([(lower, lower + 1, None), (-lower - 1, lower + 1, torch.ones(3, dtype=torch.bool, device=device))])
    assert value == 0
    assert not torch.autograd.grad(value, lower)[0].any()
    for share in (1.0, 0.5):
        assert losses.slope([(lower * math.nan, lower, None)], share=share).isnan()


def test_slope_compiles_without_graph_break(device):
    lower, upper = boxes(device)
    mask = torch.arange(7, device=device) < 2
    for options in ({}, {"form": "rs"}, {"share": 0.5, "reduction": "sum"}):
        function = lambda l, u, options=options: losses.slope([(l, u, mask)], **options)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(lower, upper), function(lower, upper))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "chord"}, "form must be one of product, distance, power, exponential, rs, volume, got 'chord'"),
        ({"reduction": "max"}, "reduction must be one of mean, sum, got 'max'"),
        ({"form": "power", "sharpness": 0.5}, "sharpness must be at least 1 and finite, got 0.5"),
        ({"form": "exponential", "sharpness": math.nan}, "sharpness must be at least 0 and finite, got nan"),
        ({"share": 0.0}, "share must be above 0 and at most 1, got 0.0"),
        ({"share": 1.5}, "share must be above 0 and at most 1, got 1.5"),
    ],
)
def test_slope_names_the_wrong_argument(options, message):
    with pytest.raises(ValueError, match=f"slope: {message}"):
        losses.slope([], **options)


def weights_model(device):
    layers = [nn.Conv2d(1, 4, 3), GraftedReLU((4, 4, 4)), nn.Conv1d(4, 2, 1), nn.Flatten(), nn.Linear(32, 3), nn.BatchNorm1d(3)]
    return nn.Sequential(*layers).to(device)


def test_l1_sums_the_weights_of_linear_layers_and_convolutions(device):
    model = weights_model(device)
    want = sum(abs(w) for i in (0, 2, 4) for w in model[i].weight.flatten().tolist())
    assert losses.l1(model).item() == pytest.approx(want, rel=1e-5)
    losses.l1(model).backward()
    assert torch.equal(model[0].weight.grad, model[0].weight.sign())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"0.weight", "2.weight", "4.weight"}
    assert losses.l1(nn.ReLU()) == 0
    layer = orthogonal(nn.Linear(4, 4)).to(device)
    assert losses.l1(layer).item() == pytest.approx(layer.weight.abs().sum().item(), rel=1e-5)
    half = nn.Linear(300, 300, device=device, dtype=torch.float16)
    nn.init.constant_(half.weight, 1.0)
    assert losses.l1(half).item() == 90000
