"""The ways to a bound on a spectral norm that only a CPU takes, beside the chain of Gram matrices that it may take anywhere."""

import math

import pytest
import torch

from lipfast.ops import _gram_norm as module
from lipfast.ops._gram_gradient import eigen_gradient, gram_gradient
from lipfast.ops._gram_norm import gram_norm, largest_norm
from tests.checks import assert_near
from tests.test_spectral_norm_bound import SVD, TIGHT, exceeds_exactly, norm


def random(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype) / shape[-1] ** 0.5


@pytest.mark.parametrize("iterations", [7, 12, 30])
@pytest.mark.parametrize("name", [*TIGHT, "complex", "wide of 600 rows"])
def test_factor_makes_the_bound_close(name, iterations):
    others = {"complex": lambda: random(90, 70, dtype=torch.complex128), "wide of 600 rows": lambda: random(600, 700)}
    matrix = (TIGHT | others)[name]()
    matrix = matrix if matrix.is_complex() else matrix.double()
    bound, exact = gram_norm(matrix, iterations), norm(matrix)
    assert exact * SVD <= bound <= exact * (1 + 2.0**-20)


@pytest.fixture(params=[0.0, 0.5, 1 - 1e-9, 2.0])
def share(request, monkeypatch):
    eigenvalues = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda P: eigenvalues(P) * request.param)
    return request.param


def test_a_wrong_eigenvalue_costs_closeness_alone(share):
    matrix = random(3, 30, 20)
    bound = gram_norm(matrix, 12)
    assert (bound >= norm(matrix) * SVD).all()
    assert (bound <= norm(matrix) * max(1.001, share)).all()
    assert share == 2.0 or torch.equal(bound, gram_norm(matrix, 12, chain=True))


def test_a_wrong_eigenvalue_costs_the_largest_of_many_closeness_alone(share):
    batch = random(9, 30, 20)
    bound, _ = largest_norm(batch, 12)
    assert norm(batch).amax() * SVD <= bound <= norm(batch).amax() * max(1.001, share)


@pytest.mark.parametrize("iterations", [0, 3, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 4), (20, 40, 30), (20, 3, 50)], ids=str)
def test_largest_of_many(shape, dtype, iterations):
    batch = random(*shape, dtype=dtype) * torch.logspace(0, -200, shape[0], dtype=torch.float64).flip(0)[:, None, None]
    exact, error = norm(batch), torch.tensor(0.25, dtype=torch.float64)
    bound, first = largest_norm(batch, iterations)
    assert first == exact.argmax()
    assert exact[first] * SVD <= bound <= gram_norm(batch[first], iterations) * (1 + 2.0**-20)
    assert exact[first] * SVD + error <= largest_norm(batch, iterations, error)[0] <= bound * (1 + 1e-9) + error
    for floor, given in ((bound * 2, None), (bound * 2 + error, error)):
        assert largest_norm(batch, iterations, given, floor)[0] <= floor
    again, still = largest_norm(batch, iterations, floor=bound / 2)
    assert still == first
    torch.testing.assert_close(again, bound, rtol=1e-9, atol=0)


@pytest.mark.parametrize("n", range(1, 5))
def test_largest_of_many_exceeds_the_exact_norms(n):
    batch = random(30, n, 5) * 10.0 ** torch.linspace(0, -2, 30, dtype=torch.float64)[:, None, None]
    bound, _ = largest_norm(batch, 12)
    assert all(exceeds_exactly(bound.item(), matrix) for matrix in batch)


def test_largest_of_many_with_nan_is_nan():
    batch = random(4, 5, 6)
    batch[2, 3, 4] = math.nan
    assert largest_norm(batch, 12)[0].isnan()
    assert largest_norm(batch * 0, 12)[0].isnan()
    assert largest_norm(torch.zeros_like(batch), 12)[0] == 0


def test_a_wrong_factor_costs_closeness_alone(monkeypatch):
    """Whatever it is: the bound is computed from the product of what was found."""
    matrix = random(4, 4)
    for spoil in (torch.zeros_like, lambda L: L * 1.5, lambda L: L + 0.1 * torch.ones_like(L).tril(), lambda L: L * (1 - 1e-9)):
        monkeypatch.undo()
        factor = torch.linalg.cholesky_ex
        monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda M, f=factor, s=spoil: (s(f(M).L), f(M).info))
        assert exceeds_exactly(gram_norm(matrix, 12).item(), matrix)


@pytest.mark.parametrize(("slack", "rest_slack"), [(1e-3, 0.0), (0.0, 1e-3)])
def test_pays_for_the_errors_of_both_products(slack, rest_slack):
    matrix = random(20, 30)
    P = matrix @ matrix.T
    largest, trace = torch.linalg.eigvalsh(P)[-1], P.trace()
    bound, found = module._by_cholesky(P, trace.sqrt() * (1 + 1e-12), slack, rest_slack, 12)
    assert found
    assert bound**2 >= largest + slack * trace + rest_slack * (20 * largest - trace)


@pytest.mark.parametrize("n", range(1, 5))
def test_exceeds_the_exact_norm(n):
    for power in range(20):
        matrix = random(n, 5) + 10.0**-power * random(n, 5)
        matrix[:, power % 5] *= 10.0 ** (power % 7)
        assert exceeds_exactly(gram_norm(matrix, 12).item(), matrix)


def test_batches_may_mix_zeros_numbers_and_what_is_no_number():
    matrix = random(5, 40, 30)
    matrix[1], matrix[2, 3, 4], matrix[3, 0, 0] = 0.0, math.nan, math.inf
    bound = gram_norm(matrix, 12)
    assert bound.isfinite().tolist() == [True, True, False, False, True]
    assert bound[1] == 0
    assert_near(bound[[0, 4]], norm(matrix[[0, 4]]), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_lanczos_finds_the_largest_eigenvalue_from_below(dtype):
    for matrix in (random(520, 600, dtype=dtype), torch.eye(520, dtype=dtype), torch.zeros(520, 520, dtype=dtype)):
        P = matrix @ matrix.mH
        exact = torch.linalg.eigvalsh(P)[-1]
        assert exact * (1 - 1e-6) <= module._lanczos(P) <= exact * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("iterations", [3, 7, 12])
@pytest.mark.parametrize("shape", [(40, 50), (50, 40), (3, 36, 36), (0, 40, 40), (4, 5)], ids=str)
def test_gradient_by_eigenvectors_is_that_by_products(shape, iterations, dtype):
    matrix = random(*shape, dtype=dtype)
    bound = gram_norm(matrix, iterations)
    got, want = (f(matrix, bound, iterations) for f in (eigen_gradient, gram_gradient))
    assert_near(torch.view_as_real(got.to(torch.complex128)), torch.view_as_real(want.to(torch.complex128)), torch.float64)


def test_gradient_by_eigenvectors_of_zeros_is_zero_and_of_nan_nan():
    matrix = random(3, 40, 40)
    matrix[0], matrix[1, 2, 3] = 0.0, math.nan
    gradient = eigen_gradient(matrix, gram_norm(matrix, 12), 12)
    assert not gradient[0].any()
    assert gradient[1].isnan().all()
    assert gradient[2].isfinite().all()


@pytest.mark.parametrize("n", [40, 64])
def test_gradient_of_an_orthogonal_matrix_counts_all_directions(n):
    Q = torch.linalg.qr(random(n, n)).Q
    assert_near(eigen_gradient(Q, gram_norm(Q, 12), 12), Q / n, torch.float32)
