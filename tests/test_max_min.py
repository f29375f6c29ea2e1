import math

import pytest
import torch

import lipfast.ops.max_min as module
from lipfast import max_min
from tests.checks import DTYPES, check_op

CASES = [((3, 6),), ((2, 4, 3, 5),), ((1, 2),), ((0, 4),), ((2, 0),), ((2, 2, 7),)]
LARGE = {"256x64x32x32": ((256, 64, 32, 32),)}


def inputs(shape, device, dtype):
    """Without ties, where torch shares the gradient that ours hands to one."""
    x = torch.randn(shape, device=device, dtype=dtype)
    a, b = x.chunk(2, 1)
    b += a == b
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, device):
    check_op(module, (inputs(*case, device, dtype),))


def test_sorts_channel_c_with_channel_c_plus_half(device):
    x = torch.randn(5, 6, 3, device=device)
    out = max_min(x)
    for c in range(3):
        pair = torch.stack((x[:, c], x[:, c + 3]))
        assert torch.equal(out[:, c], pair.amax(0))
        assert torch.equal(out[:, c + 3], pair.amin(0))


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_keeps_norms_of_values_and_gradients(p, device):
    x = torch.randn(5, 8, 3, 3, device=device, dtype=torch.float64, requires_grad=True)
    seed = torch.randn_like(x)
    (grad,) = torch.autograd.grad(max_min(x), x, seed)
    norms = lambda t: t.flatten(1).norm(p, 1)
    torch.testing.assert_close(norms(max_min(x)), norms(x))
    torch.testing.assert_close(norms(grad), norms(seed))
    assert torch.equal(grad.flatten(1).sort().values, seed.flatten(1).sort().values)


def test_a_tie_counts_as_sorted(device):
    x = torch.ones(1, 2, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(max_min(x), x, torch.tensor([[3.0, 1.0]], device=device))
    assert grad.tolist() == [[3.0, 1.0]]


def test_is_1_lipschitz_across_ties(device):
    x, y = (torch.randn(1000, 4, device=device, dtype=torch.float64).round(decimals=0) for _ in range(2))
    assert ((max_min(x) - max_min(y)).norm(dim=1) <= (x - y).norm(dim=1) * (1 + 1e-12)).all()


def test_differentiates_twice(device):
    torch.autograd.gradgradcheck(max_min, torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True))


def test_compiles_without_graph_break(device):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    loss = lambda t: (max_min(t) * torch.arange(4, device=device)).sum()
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    assert torch.equal(got, torch.autograd.grad(loss(x), x)[0])


def test_gradients_per_sample_are_those_of_the_batch(device):
    x = torch.randn(5, 4, device=device)
    single = torch.func.grad(lambda t: (max_min(t[None]) ** 3).sum())
    torch.testing.assert_close(torch.func.vmap(single)(x), torch.func.grad(lambda t: (max_min(t) ** 3).sum())(x))


def test_nan_reaches_both_of_a_pair(device):
    x = torch.randn(2, 4, device=device)
    x[0, 1] = math.nan
    assert max_min(x).isnan().tolist() == [[False, True, False, True], [False] * 4]


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 4, 4), (4,), ()])
def test_names_the_wrong_argument(shape):
    with pytest.raises(ValueError, match="max_min: x must be"):
        max_min(torch.zeros(shape))
    with pytest.raises(ValueError, match="max_min: x must be"):
        max_min(torch.zeros(2, 4, dtype=torch.int64))
