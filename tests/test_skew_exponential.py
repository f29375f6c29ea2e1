import math

import numpy as np
import pytest
import torch

import lipfast.ops.skew_exponential as module
from lipfast import skew, skew_exponential
from tests.checks import DTYPES, assert_near, check_op
from tests.test_cayley import defect, skew_of_norm

#        leading sizes, N
CASES = [((), 5), ((), 1), ((0,), 4), ((2, 3), 17), ((), 0), ((2,), 65)]
LARGE = {"1024x1024": ((), 1024), "32x256x256": ((32,), 256)}
if torch.cuda.is_available():
    LARGE |= {"64x256x256": ((64,), 256), "4096x4096": ((), 4096)}


def inputs(lead, N, device, dtype):
    return (torch.randn(*lead, N, N, device=device, dtype=torch.float64) / max(1, N) ** 0.5).to(dtype)


@pytest.mark.parametrize("squarings", [None, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, squarings, device):
    matrix = inputs(*case, device, dtype)
    check_op(module, (matrix,), gradient=matrix.numel() > 0, squarings=squarings)


@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_large(case, device):
    Q = skew_exponential(inputs(*case, device, torch.float32))
    assert defect(Q) <= 20 * torch.finfo(Q.dtype).eps


@pytest.mark.parametrize("norm", [1e-20, 0.1, 0.5, 1.0, 3.0, 30.0, 1e3, 1e10, 1e30])
@pytest.mark.parametrize("N", [1, 2, 3, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_is_a_rotation_of_any_norm(dtype, N, norm, device):
    Q = skew_exponential(skew_of_norm(norm, N, device, dtype))
    assert defect(Q) <= 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(torch.linalg.det(Q.double()).item(), 1.0, rtol=1e-3, atol=0)


def exponential(A):
    """By the series, scaled and squared, in numpy's longest type: a float64 reference would err as much as what it judges."""
    if np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("numpy has no type longer than float64 here")
    A = A.double().cpu().numpy().astype(np.longdouble)
    squarings = max(0, int(np.ceil(np.log2(max(np.linalg.norm(A.astype(np.float64), 2), 1e-300)))) + 3)
    A = A / 2.0**squarings
    term = total = np.eye(len(A), dtype=np.longdouble)
    for k in range(1, 25):
        term = term @ A / k
        total = total + term
    for _ in range(squarings):
        total = total @ total
    return torch.from_numpy(total.astype(np.float64))


@pytest.mark.parametrize("norm", [1e-20, 1e-3, 0.4, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_agrees_with_the_series_in_higher_precision(dtype, norm, device):
    A = skew_of_norm(norm, 64, device, dtype)
    error = torch.linalg.matrix_norm(skew_exponential(A).double().cpu() - exponential(A), 2)
    assert error <= torch.finfo(dtype).eps * (40 + norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_matrix_exp(dtype, device):
    matrix = inputs((3,), 40, device, dtype)
    assert_near(skew_exponential(matrix), torch.linalg.matrix_exp(skew(matrix.double())), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_series_covers_its_range(dtype, device):
    """A plane's eigenvalues are its angle, which is known exactly to be in range: no squaring follows."""
    angle = torch.linspace(0, module._RANGE[dtype], 201, device=device, dtype=dtype)
    A = torch.zeros(201, 2, 2, device=device, dtype=dtype)
    A[:, 1, 0], A[:, 0, 1] = angle, -angle
    cos, sin = angle.double().cos(), angle.double().sin()
    want = torch.stack([cos, -sin, sin, cos], -1).view(-1, 2, 2)
    got = skew_exponential(A, squarings=0)[:200].double()  # the last may be called too large, by a rounding
    assert (got - want[:200]).abs().max() <= 2 * torch.finfo(dtype).eps


def test_blocks_and_parts_change_nothing(device):
    A = inputs((3,), 300, device, torch.float32).requires_grad_()
    mirror, seed = A.detach().double().requires_grad_(), torch.randn_like(A)
    want = torch.linalg.matrix_exp(skew(mirror))
    assert_near(skew_exponential(A), want, torch.float32)
    (got,), (slope,) = torch.autograd.grad(skew_exponential(A), A, seed), torch.autograd.grad(want, mirror, seed.double())
    assert torch.linalg.norm(got - slope) <= 1e-6 * torch.linalg.norm(slope)


def test_inverts_adds_and_commutes(device):
    A = skew_of_norm(2.0, 40, device, torch.float64)
    Q = skew_exponential(A)
    torch.testing.assert_close(skew_exponential(-A), Q.mT)
    torch.testing.assert_close(skew_exponential(1.5 * A), Q @ skew_exponential(A / 2))
    torch.testing.assert_close(Q @ A, A @ Q)


def test_turns_a_plane_by_its_angle(device):
    angle = 0.75
    A = torch.tensor([[0.0, -angle], [angle, 0.0]], device=device)
    want = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], device=device)
    torch.testing.assert_close(skew_exponential(A), want)


@pytest.mark.parametrize("norm", [1e-3, 0.4, 1.0, 4.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradient_agrees_with_that_of_matrix_exp(dtype, norm, device):
    A = skew_of_norm(norm, 60, device, dtype).requires_grad_()
    mirror = A.detach().double().requires_grad_()
    seed = torch.randn_like(A)
    (want,) = torch.autograd.grad(torch.linalg.matrix_exp(skew(mirror)), mirror, seed.double())
    (got,) = torch.autograd.grad(skew_exponential(A), A, seed)
    limit = 1e-6 if dtype == torch.float32 else 1e-13
    assert torch.linalg.norm(got - want) <= limit * max(1, norm) * torch.linalg.norm(want)
    assert torch.equal(got, -got.mT)


def test_a_number_of_squarings_is_enough_or_nan(device):
    A = torch.stack([skew_of_norm(norm, 8, device, torch.float32) for norm in (0.1, 2.0, 17.0)])
    got = skew_exponential(A, squarings=2)
    torch.testing.assert_close(got[:2], skew_exponential(A[:2]))
    assert got[2].isnan().all()


def test_a_batch_may_mix_norms(device):
    A = torch.stack([skew_of_norm(norm, 20, device, torch.float64) for norm in (1e-8, 1.0, 100.0)])
    torch.testing.assert_close(skew_exponential(A), torch.linalg.matrix_exp(A))


def test_only_the_skew_part_counts(device):
    matrix = inputs((3,), 50, device, torch.float32)
    assert torch.equal(skew_exponential(matrix), skew_exponential(skew(matrix)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_stay_visible(value, device):
    matrix = inputs((2,), 9, device, torch.float32) * 1e30
    matrix[1, 0, 8] = value
    got = skew_exponential(matrix)
    assert torch.equal(got[0], skew_exponential(matrix[0]))  # as if it were alone
    assert got[1].isnan().all()


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
def test_differentiates_twice(scale, device):
    matrix = torch.randn(2, 3, 3, device=device, dtype=torch.float64) * scale
    torch.autograd.gradcheck(skew_exponential, matrix.requires_grad_())
    torch.autograd.gradgradcheck(skew_exponential, matrix)


def test_compiles_without_graph_break(device):
    matrix = inputs((), 20, device, torch.float32).requires_grad_()
    loss = lambda m: (skew_exponential(m) ** 3).sum()
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(matrix), matrix)
    torch.testing.assert_close(got, torch.autograd.grad(loss(matrix), matrix)[0])


@pytest.mark.parametrize(
    ("matrix", "squarings", "message"),
    [
        (torch.zeros(3), None, r"skew must be \(\*, N, N\), got \(3,\)"),
        (torch.zeros(2, 3, 4), None, r"skew must be \(\*, 4, 4\), got \(2, 3, 4\)"),
        (torch.zeros(3, 3, dtype=torch.int64), None, "skew must be a float64"),
        (torch.zeros(3, 3), -1, "squarings must be 0 or more, got -1"),
        (None, None, "skew must be a float64"),
    ],
)
def test_names_the_wrong_argument(matrix, squarings, message):
    with pytest.raises(ValueError, match=f"skew_exponential: {message}"):
        skew_exponential(matrix, squarings)
