import math

import pytest
import torch

import lipfast.ops.cholesky_orthogonal as module
from lipfast import cholesky_orthogonal
from tests.checks import DTYPES, assert_near, check_op

#        leading sizes, O, I
CASES = [
    ((), 5, 5),
    ((), 1, 1),
    ((), 1, 4),
    ((0,), 3, 4),
    ((2, 3), 7, 11),
    ((), 11, 7),
    ((), 0, 3),
    ((3,), 0, 0),
    ((2,), 33, 65),
]
LARGE = {"1024x1024": ((), 1024, 1024), "8x256x512": ((8,), 256, 512)}
if torch.cuda.is_available():
    LARGE |= {"2048x2048": ((), 2048, 2048), "8x512x2048": ((8,), 512, 2048)}


def inputs(lead, O, I, device, dtype):
    return torch.randn(*lead, O, I, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, device):
    matrix = inputs(*case, device, dtype)
    check_op(module, (matrix,), gradient=matrix.numel() > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_with_another_shift(dtype, device):
    check_op(module, (inputs((2,), 6, 9, device, dtype),), eps=0.1)


@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_large(case, device):
    matrix = inputs(*case, device, torch.float32)
    assert_near(cholesky_orthogonal(matrix), cholesky_orthogonal(matrix.double()), torch.float32)


@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize(("O", "I"), [(6, 6), (4, 9), (9, 4)])
def test_is_contractive_with_the_singular_values_of_the_formula(O, I, eps, device):
    matrix = inputs((3,), O, I, device, torch.float64)
    W = cholesky_orthogonal(matrix, eps)
    s = torch.linalg.svdvals(matrix).square()
    want = (s / (s + eps * s.mean(-1, keepdim=True))).sqrt()
    got = torch.linalg.svdvals(W)
    torch.testing.assert_close(got, want)
    assert (got <= 1 + 1e-12).all()
    assert eps == 0 or (got < 1).all()


def test_is_a_triangular_combination_of_the_rows(device):
    """So the first rows of W see only the first rows of X, but for the shift."""
    matrix = inputs((), 5, 8, device, torch.float64)
    L = torch.linalg.lstsq(cholesky_orthogonal(matrix, 0.0).mT, matrix.mT).solution.mT
    assert L.triu(1).abs().max() < 1e-12
    assert (L.diagonal() > 0).all()


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_any_scale_gives_the_same(factor, device):
    matrix = inputs((), 9, 12, device, torch.float32)
    want = cholesky_orthogonal(matrix)
    scaled = (matrix * factor).requires_grad_()
    got = cholesky_orthogonal(scaled)
    assert_near(got, want, torch.float32)
    (grad,) = torch.autograd.grad(got.square().sum() + got.sum(), scaled)
    assert grad.isfinite().all()
    assert grad.any()
    inner = (grad.double() * scaled.double()).sum() / (grad.double().norm() * scaled.double().norm())
    assert inner.abs() < 1e-6


def test_rank_may_be_lost(device):
    matrix = inputs((), 6, 8, device, torch.float64)
    matrix[5] = matrix[4]
    for dtype in (torch.float64, torch.float32):
        W = cholesky_orthogonal(matrix.to(dtype))
        assert torch.linalg.svdvals(W.double())[0] <= 1 + torch.finfo(dtype).eps
        assert_near(W, cholesky_orthogonal(matrix), dtype)


@pytest.mark.parametrize(("O", "I"), [(5, 5), (3, 6), (6, 3)])
@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.3])
def test_differentiates_twice(O, I, eps, device):
    matrix = inputs((2,), O, I, device, torch.float64).requires_grad_()
    function = lambda m: cholesky_orthogonal(m, eps)
    assert torch.autograd.gradcheck(function, matrix)
    assert torch.autograd.gradgradcheck(function, matrix)


def test_compiles(device):
    matrix = inputs((), 5, 7, device, torch.float32).requires_grad_()
    compiled = torch.compile(cholesky_orthogonal, fullgraph=True, backend="aot_eager")
    seed = torch.randn(5, 7, device=device)
    got, want = (torch.autograd.grad(f(matrix), matrix, seed)[0] for f in (compiled, cholesky_orthogonal))
    assert torch.equal(got, want)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_nan_inf_and_zero_stay_visible(dtype, value, device):
    matrix = inputs((2,), 4, 6, device, dtype)
    if value == 0:
        matrix[1] = 0
    else:
        matrix[1, 2, 3] = value
    got = cholesky_orthogonal(matrix)
    assert got[0].isfinite().all()
    assert got[1].isnan().all()


def test_a_factorisation_that_fails_is_all_nan(device):
    matrix = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]], device=device)  # the first's second pivot is 0
    got = cholesky_orthogonal(matrix, 0.0)
    assert got[0].isnan().all()
    assert torch.equal(got[1], matrix[1])


@pytest.mark.parametrize(
    ("matrix", "eps", "message"),
    [
        (torch.zeros(3), 1e-3, r"matrix must be \(\*, O, I\), got \(3,\)"),
        (torch.zeros(3, 3, dtype=torch.int64), 1e-3, "matrix must be a float64"),
        (None, 1e-3, "matrix must be a float64"),
        (torch.eye(2), -1.0, "eps must be a finite number of at least 0, got -1.0"),
        (torch.eye(2), math.nan, "eps must be a finite number of at least 0, got nan"),
    ],
)
def test_names_the_wrong_argument(matrix, eps, message):
    with pytest.raises(ValueError, match=f"cholesky_orthogonal: {message}"):
        cholesky_orthogonal(matrix, eps)
