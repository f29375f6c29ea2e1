import math

import pytest
import torch

import lipfast.ops.beta_abs as module
from lipfast import beta_abs, max_min
from lipfast.nn import BetaAbs
from tests.checks import DTYPES, check_op

CASES = [
    ((3, 6), {"beta": 0.5}),
    ((2, 5, 3, 5), {"beta": 0.5}),
    ((1, 1), {"beta": 1.0}),
    ((0, 4), {"beta": 0.5}),
    ((2, 0), {"beta": 0.5}),
    ((2, 7, 3), {"beta": 0.0}),
    ((2, 1, 1, 1), {"beta": 0.5}),
]
LARGE = [((256, 1024, 16, 16), {"beta": 0.5})]


def inputs(shape, device, dtype):
    return torch.randn(shape, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_op(shape, options, dtype, device):
    check_op(module, (inputs(shape, device, dtype),), **options)


@pytest.mark.parametrize(
    ("C", "beta", "n"), [(7, 0.5, 3), (4, 0.0, 0), (4, 1.0, 4), (100, 0.29, 29), (8, 1 / 3, 2), (3, 1 / 3, 1)]
)
def test_folds_the_first_floor_of_beta_c_channels(C, beta, n, device):
    x = -1 - torch.rand(2, C, 3, device=device)
    assert torch.equal(beta_abs(x, beta), torch.cat((-x[:, :n], x[:, n:]), 1))


def test_max_min_is_it_between_orthogonal_matrices(device):
    """Theorem 2 of the paper."""
    eye = torch.eye(3, dtype=torch.float64, device=device)
    R = torch.cat((torch.cat((eye, -eye), 1), torch.cat((eye, eye), 1))) / math.sqrt(2)
    torch.testing.assert_close(R.mT @ R, torch.eye(6, dtype=torch.float64, device=device))
    x = torch.randn(50, 6, dtype=torch.float64, device=device)
    x[:10, 3:] = x[:10, :3]  # ties
    torch.testing.assert_close(beta_abs(x @ R.mT) @ R, max_min(x))


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_keeps_norms_of_values_and_gradients(p, device):
    x = torch.randn(5, 8, 3, 3, device=device, dtype=torch.float64).round(decimals=0).requires_grad_()  # zeros among them
    seed = torch.randn_like(x)
    (grad,) = torch.autograd.grad(beta_abs(x), x, seed)
    norms = lambda t: t.flatten(1).norm(p, 1)
    torch.testing.assert_close(norms(beta_abs(x)), norms(x))
    torch.testing.assert_close(norms(grad), norms(seed))


def test_keeps_the_gradient_at_zero(device):
    x = torch.tensor([[0.0, -0.0, 0.0, 0.0]], device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(beta_abs(x), x, torch.tensor([[3.0, -2.0, 1.0, 5.0]], device=device))
    assert grad.tolist() == [[3.0, -2.0, 1.0, 5.0]]


def test_is_1_lipschitz_across_zero(device):
    x, y = torch.randn(2, 1000, 4, device=device, dtype=torch.float64)
    assert ((beta_abs(x) - beta_abs(y)).norm(dim=1) <= (x - y).norm(dim=1) * (1 + 1e-12)).all()


def test_differentiates_twice(device):
    x = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(beta_abs, x)
    torch.autograd.gradgradcheck(beta_abs, x)


def test_compiles_without_graph_break(device):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    loss = lambda t: (beta_abs(t) * torch.arange(1, 5, device=device)).sum()
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    assert torch.equal(got, torch.autograd.grad(loss(x), x)[0])


def test_gradients_per_sample_are_those_of_the_batch(device):
    x = torch.randn(5, 4, 2, device=device)
    single = torch.func.grad(lambda t: (beta_abs(t[None]) ** 3).sum())
    torch.testing.assert_close(torch.func.vmap(single)(x), torch.func.grad(lambda t: (beta_abs(t) ** 3).sum())(x))


def test_channels_last_stays(device):
    x = torch.randn(2, 6, 3, 5, device=device).to(memory_format=torch.channels_last)
    assert beta_abs(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(beta_abs(x), beta_abs(x.contiguous()))


def test_nan_stays(device):
    x = torch.randn(2, 4, device=device)
    x[0, 1], x[1, 3] = math.nan, math.nan
    assert torch.equal(beta_abs(x).isnan(), x.isnan())


def test_the_layer_is_the_op(device):
    x = torch.randn(2, 8, 3, device=device)
    for beta in (0.25, 0.5):
        assert torch.equal(BetaAbs(beta)(x), beta_abs(x, beta))
    assert not BetaAbs().state_dict()
    with pytest.raises(ValueError, match="BetaAbs: beta must be from 0 to 1, got 2"):
        BetaAbs(2)


def test_names_the_wrong_argument():
    for shape in ((4,), ()):
        with pytest.raises(ValueError, match=r"beta_abs: x must be \(B, C, \.\.\.\), got"):
            beta_abs(torch.zeros(shape))
    with pytest.raises(ValueError, match="beta_abs: x must be a float64"):
        beta_abs(torch.zeros(2, 4, dtype=torch.int64))
    for wrong in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="beta_abs: beta must be from 0 to 1, got"):
            beta_abs(torch.zeros(2, 4), wrong)
