import math

import pytest
import torch

import lipfast.ops.cayley as module
from lipfast import cayley, skew
from lipfast.ops._cayley_around import cayley_around
from tests.checks import DTYPES, TOLERANCE, assert_near, check_op

#        leading sizes, N
CASES = [((), 5), ((), 1), ((0,), 4), ((2, 3), 17), ((), 0), ((), 65), ((2,), 129)]
LARGE = {"1024x1024": ((), 1024), "32x256x256": ((32,), 256)}
if torch.cuda.is_available():
    LARGE |= {"64x256x256": ((64,), 256), "4096x4096": ((), 4096)}


def inputs(lead, N, device, dtype):
    return torch.randn(*lead, N, N, device=device, dtype=dtype)


def skew_of_norm(norm, N, device, dtype):
    matrix = skew(torch.randn(N, N, device=device, dtype=torch.float64))
    return (matrix * (norm / torch.linalg.matrix_norm(matrix, 2).clamp(min=1e-9))).to(dtype)


def defect(Q):
    Q = Q.double()
    return torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(Q.shape[-1], device=Q.device), 2).max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, device):
    matrix = inputs(*case, device, dtype)
    check_op(module, (matrix,), gradient=matrix.numel() > 0)


@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_large(case, device):
    Q = cayley(inputs(*case, device, torch.float32))
    assert defect(Q) <= 4 * torch.finfo(Q.dtype).eps


@pytest.mark.parametrize("norm", [1e-20, 0.1, 1.0, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("N", [1, 2, 3, 32, 33, 100, 257])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_is_a_rotation_of_any_norm(dtype, N, norm, device):
    if norm > 1e3 and device == "cuda" and dtype == torch.float32:
        pytest.skip("more than is promised there")
    Q = cayley(skew_of_norm(norm, N, device, dtype))
    slack = 4 if dtype == torch.float32 else 4 * N**0.5
    assert defect(Q) <= slack * torch.finfo(dtype).eps
    torch.testing.assert_close(torch.linalg.det(Q.double()).item(), 1.0, rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", [1e3, 3e3, 1e4, 1e5, 1e6])
def test_no_large_matrix_out_of_many_loses_orthogonality(norm):
    """Few do where factors grow; on a CPU."""
    for N in (100, 257):
        for _ in range(12):
            A = skew_of_norm(norm, N, "cpu", torch.float32)
            assert defect(cayley(A)) <= 4 * torch.finfo(torch.float32).eps
            assert defect(cayley_around(torch.eye(N), A)) <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("norm", [1e-3, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_a_linear_solver(dtype, norm, device):
    A = skew_of_norm(norm, 65, device, dtype)
    eye = torch.eye(65, device=device, dtype=torch.float64)
    want = torch.linalg.solve(eye + A.double(), eye - A.double())
    assert_near(cayley(A), want, dtype)


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_blocks_and_parts_change_nothing(dtype, scale, device):
    A = (scale * torch.randn(4, 180, 180, device=device, dtype=dtype)).requires_grad_()
    eye, seed = torch.eye(180, device=device, dtype=torch.float64), torch.randn_like(A)
    mirror = A.detach().double().requires_grad_()
    want = torch.stack([torch.linalg.solve(eye + S, eye - S) for S in skew(mirror)])
    assert_near(cayley(A), want, dtype)
    (got,), (slope,) = torch.autograd.grad(cayley(A), A, seed), torch.autograd.grad(want, mirror, seed.double())
    assert_near(got, slope, dtype)


def test_is_its_own_inverse(device):
    A = skew_of_norm(3.0, 40, device, torch.float64)
    Q, eye = cayley(A), torch.eye(40, device=device, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.solve(eye + Q, eye - Q), A)
    torch.testing.assert_close(cayley(-A), Q.mT)
    torch.testing.assert_close(Q @ A, A @ Q)


def test_only_the_skew_part_counts(device):
    matrix = torch.randn(3, 50, 50, device=device)
    assert torch.equal(cayley(matrix), cayley(skew(matrix)))


@pytest.mark.parametrize("norm", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradient_agrees_with_that_of_a_linear_solver(dtype, norm, device):
    A = skew_of_norm(norm, 70, device, dtype).requires_grad_()
    mirror, eye = A.detach().double().requires_grad_(), torch.eye(70, device=device, dtype=torch.float64)
    seed = torch.randn_like(A)
    part = (mirror - mirror.mT) / 2
    (want,) = torch.autograd.grad(torch.linalg.solve(eye + part, eye - part), mirror, seed.double())
    (got,) = torch.autograd.grad(cayley(A), A, seed)
    assert_near(got, want, dtype)
    assert torch.equal(got, -got.mT)


def test_stays_orthogonal_through_optimiser_steps(device):
    parameter = torch.zeros(24, 24, device=device, requires_grad=True)
    target = torch.linalg.qr(torch.randn(24, 24, device=device)).Q
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    for _ in range(50):
        optimizer.zero_grad()
        (cayley(parameter) - target).square().sum().backward()
        optimizer.step()
    assert defect(cayley(parameter)) <= 4 * torch.finfo(torch.float32).eps


def test_half_types_are_rounded_once(device):
    matrix = inputs((), 40, device, torch.bfloat16)
    assert_near(cayley(matrix), cayley(matrix.double()), torch.bfloat16, slack=0.25)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("N", [7, 80])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_nan_and_inf_stay_visible(dtype, N, value, device):
    matrix = inputs((2,), N, device, dtype)
    matrix[1, 0, N - 1] = value
    got = cayley(matrix)
    assert got[0].isfinite().all()
    assert got[1].isnan().all()


def test_differentiates_twice(device):
    matrix = torch.randn(2, 3, 3, device=device, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(cayley, matrix)
    torch.autograd.gradgradcheck(cayley, matrix)


def test_compiles_without_graph_break(device):
    matrix = torch.randn(40, 40, device=device, requires_grad=True)
    loss = lambda m: (cayley(m) ** 3).sum()
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(matrix), matrix)
    torch.testing.assert_close(got, torch.autograd.grad(loss(matrix), matrix)[0])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(3), r"skew must be \(\*, N, N\), got \(3,\)"),
        (torch.zeros(2, 3, 4), r"skew must be \(\*, 4, 4\), got \(2, 3, 4\)"),
        (torch.zeros(3, 3, dtype=torch.int64), "skew must be a float64"),
        (None, "skew must be a float64"),
    ],
)
def test_names_the_wrong_argument(matrix, message):
    with pytest.raises(ValueError, match=f"cayley: {message}"):
        cayley(matrix)


def test_float32_does_not_lose_to_its_tolerance(device):
    """The halves are multiplied in float64: float32 would leave a thousand times this."""
    A = skew_of_norm(1e3, 256, device, torch.float32)
    assert_near(cayley(A), cayley(A.double()), torch.float32, slack=1e-7 / TOLERANCE[torch.float32])


@pytest.mark.parametrize("side", [5, 40, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_definition_has_the_derivative_of_the_op(dtype, side, device):
    """torch's own, through every step of the inversion."""
    matrix, seed = (torch.randn(2, side, side, device=device, dtype=dtype) for _ in range(2))
    grads = []
    for function in (cayley, module.reference):
        leaf = matrix.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(leaf), leaf, seed)[0])
    assert_near(grads[0], grads[1].double(), dtype, slack=2)
