"""Beside tests/test_orthogonal.py, which asks it of square weights."""

import math

import pytest
import torch

from lipfast import cayley, skew
from lipfast.ops._cayley_around import cayley_around
from tests.checks import assert_near

LEADS = [(), (3,), (0,)]


def orthogonal(*shape, device):
    return torch.linalg.qr(torch.randn(shape, dtype=torch.float64, device=device)).Q.float()


def of_norm(norm, kind, *shape, device):
    """Skew: alike in all directions, or large in one plane of one matrix."""
    matrix = skew(torch.randn(shape, dtype=torch.float64, device=device))
    if kind == "all" or shape[-1] == 1:
        return (norm * matrix / torch.linalg.matrix_norm(matrix, 2).clamp(min=1e-9)[..., None, None]).float()
    u, v = torch.linalg.qr(torch.randn(shape[-1], 2, dtype=torch.float64, device=device)).Q.T
    matrix /= shape[-1] ** 0.5
    matrix.reshape(-1, *shape[-2:])[-1] += norm * (torch.outer(u, v) - torch.outer(v, u))
    return matrix.float()


@pytest.mark.parametrize("norm", [0.0, 1e-20, 1.0, 3.0, 30.0, 1e4])
@pytest.mark.parametrize("kind", ["all", "plane"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (100, 100), (3, 65, 65)], ids=str)
def test_is_orthogonal_for_any_norm(shape, kind, norm, device):
    base, A = orthogonal(*shape, device=device), of_norm(norm, kind, *shape, device=device)
    W = cayley_around(base, A)
    assert_near(W, base.double() @ cayley(A.double()), torch.float32)
    W = W.double()
    defect = torch.linalg.matrix_norm(W.mT @ W - torch.eye(shape[-1], device=device), 2).max()
    assert defect <= 40 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_gradient_is_that_of_the_product(lead, dtype, device):
    base, seed = orthogonal(*lead, 70, 70, device=device).to(dtype), torch.randn(*lead, 70, 70, device=device, dtype=dtype)
    A = torch.randn(*lead, 70, 70, device=device, dtype=dtype).requires_grad_()
    mirror = A.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(base.double() @ cayley(mirror), mirror, seed.double())
    (got,) = torch.autograd.grad(cayley_around(base, A), A, seed)
    assert_near(got, want, dtype)
    assert torch.equal(got, -got.mT)


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=str)
def test_differentiates_twice(lead, device):
    base, A = orthogonal(*lead, 3, 3, device=device).double(), torch.randn(*lead, 3, 3, device=device, dtype=torch.float64)
    function = lambda A: cayley_around(base, A)
    assert torch.autograd.gradcheck(function, A.requires_grad_())
    assert torch.autograd.gradgradcheck(function, A)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_is_registered_whole(lead, dtype, device):
    base, A = orthogonal(*lead, 40, 40, device=device).to(dtype), torch.randn(*lead, 40, 40, device=device, dtype=dtype)
    torch.library.opcheck(torch.ops.lipfast.cayley_around.default, (base, A.requires_grad_()))
    assert torch.equal(cayley_around(base, A), cayley_around(base, A))
    strided = torch.stack([A, A], -1)[..., 0]
    assert torch.equal(cayley_around(base, strided), cayley_around(base, A))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("N", [7, 80])
def test_nan_and_inf_stay_visible(N, value, device):
    A = torch.randn(2, N, N, device=device)
    A[1, 0, N - 1] = value
    W = cayley_around(orthogonal(2, N, N, device=device), A)
    assert W[0].isfinite().all()
    assert W[1].isnan().all()
