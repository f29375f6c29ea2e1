import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import remove_parametrizations

from lipfast import bounds, pairwise_distance
from lipfast.nn import unit_rows
from tests.checks import DTYPES, TOLERANCE, assert_near

LAYERS = [(lambda: nn.Linear(5, 3)), (lambda: nn.Conv2d(2, 4, 3)), (lambda: nn.Conv1d(3, 1, 2)), (lambda: nn.Linear(1, 2))]


def lengths(weight):
    return torch.linalg.vector_norm(weight.double().flatten(1), dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", LAYERS)
def test_rows_have_unit_length_and_keep_their_direction(make, dtype, device):
    layer = make().to(device, dtype)
    before = layer.weight.detach().double()
    assert unit_rows(layer) is layer
    want = before / lengths(before).reshape(-1, *[1] * (before.ndim - 1))
    assert layer.weight.dtype == dtype
    assert_near(layer.weight, want, dtype)
    assert (lengths(layer.weight) - 1).abs().max() <= 2 * torch.finfo(dtype).eps


def test_rows_stay_unit_through_optimiser_steps(device):
    layer = unit_rows(nn.Linear(6, 4)).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    x = torch.randn(16, 6, device=device)
    before = layer.weight.detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(layer.weight, before, atol=1e-2)
    assert (lengths(layer.weight) - 1).abs().max() <= 4 * torch.finfo(torch.float32).eps


def test_gradient_is_that_of_the_formula(device):
    layer = unit_rows(nn.Linear(5, 3)).double().to(device)
    raw = layer.parametrizations.weight.original
    function = lambda raw: torch.func.functional_call(layer.parametrizations.weight[0], {}, (raw,))
    assert torch.autograd.gradcheck(function, raw)
    assert torch.autograd.gradgradcheck(function, raw)
    (grad,) = torch.autograd.grad(layer.weight.square().sum(), raw)  # lengths do not change
    assert grad.abs().max() <= TOLERANCE[torch.float64]


def test_takes_another_weight_and_becomes_plain_again(device):
    layer = unit_rows(nn.Linear(2, 2)).to(device)
    layer.weight = torch.tensor([[3.0, 4.0], [0.0, -2.0]], device=device)
    want = torch.tensor([[0.6, 0.8], [0.0, -1.0]], device=device)
    torch.testing.assert_close(layer.weight, want)
    x = torch.randn(3, 2, device=device)
    before = layer(x)
    remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    torch.testing.assert_close(layer.weight.data, want)
    assert torch.equal(layer(x), before)


def test_is_saved_copied_and_compiled(device):
    first, second = (unit_rows(nn.Linear(7, 3)).to(device) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(5, 7, device=device)
    for other in (second, copy.deepcopy(first), torch.compile(first, fullgraph=True, backend="aot_eager")):
        assert torch.equal(other(x), first(x))


def test_bounds_read_the_unit_rows(device):
    head = unit_rows(nn.Linear(8, 4)).to(device)
    with torch.no_grad():
        head.parametrizations.weight.original.mul_(100)
    constants = bounds.lipschitz(head, (8,), method="product")
    want = pairwise_distance(head.weight.double())
    assert (constants >= want).all()
    torch.testing.assert_close(constants.to(want), want, rtol=1e-3, atol=0)


def test_names_what_is_wrong():
    with pytest.raises(ValueError, match="unit_rows: name must be that of a plain parameter of Linear, got 'wheel'"):
        unit_rows(nn.Linear(2, 2), "wheel")
    with pytest.raises(ValueError, match="got 'bias'"):
        unit_rows(nn.Linear(2, 2, bias=False), "bias")
    with pytest.raises(ValueError, match=r"unit_rows: bias must be \(O, I\) or \(O, C, ...\), got \(2,\)"):
        unit_rows(nn.Linear(2, 2), "bias")
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int32), requires_grad=False)
    with pytest.raises(ValueError, match="unit_rows: weight must be a float64"):
        unit_rows(layer)
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.weight[0])
    with pytest.raises(ValueError, match="unit_rows: weight must have no zero row"):
        unit_rows(layer)
    assert type(layer) is nn.Linear
