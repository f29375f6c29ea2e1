import math
from fractions import Fraction

import pytest
import torch

import lipfast.ops.spectral_norm_bound as module
from lipfast import spectral_norm_bound
from lipfast.ops._gram_gradient import gram_gradient
from lipfast.ops._gram_norm import gram_norm
from tests.checks import DTYPES, TOLERANCE, assert_near, check_op

#        leading sizes of weight, input mask and output mask (None: absent), O, I
CASES = [
    ((), None, None, 5, 4),
    ((), (3,), (3,), 17, 33),
    ((), (2, 1), (3,), 9, 7),
    ((3,), None, (2, 1), 6, 11),
    ((2, 1), (3,), None, 4, 4),
    ((), (4,), None, 1, 1),
    ((), (0,), None, 5, 4),
    ((), (3,), (3,), 0, 4),
    ((2,), None, None, 4, 0),
]
LARGE = {"1024x1024": ((), None, None, 1024, 1024), "512x512, 16 masks": ((), (16,), (16,), 512, 512)}

SVD = 1 - TOLERANCE[torch.float64]  # what the computed singular values may be wrong by: about min(O, I) eps


def inputs(lead, input_lead, output_lead, n_out, n_in, device, dtype):
    mask = lambda lead, n: None if lead is None else torch.rand(*lead, n, device=device) < 0.7
    weight = torch.randn(*lead, n_out, n_in, device=device, dtype=dtype) / max(1, n_in) ** 0.5
    return weight, mask(input_lead, n_in), mask(output_lead, n_out)


def masked(weight, input_mask=None, output_mask=None):
    """The matrices themselves in float64, one for each sample."""
    weight = weight.double()
    if output_mask is not None:
        weight = weight * output_mask[..., None]
    return weight if input_mask is None else weight * input_mask[..., None, :]


def norm(matrices):
    return torch.linalg.svdvals(matrices)[..., 0]


def exceeds_exactly(bound: float, matrix) -> bool:
    """Whether bound^2 I - A A^T is positive semidefinite: Gaussian elimination with rational numbers."""
    A = [[Fraction(v) for v in row] for row in matrix.tolist()]
    gram = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in A] for x in A]
    M = [[(i == j) * Fraction(bound) ** 2 - v for j, v in enumerate(row)] for i, row in enumerate(gram)]
    while M:
        (pivot, *first), *rest = M
        if pivot < 0 or (pivot == 0 and any(first)):
            return False
        M = [[v - r[0] * f / pivot for v, f in zip(r[1:], first, strict=True)] if pivot else r[1:] for r in rest]
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, device):
    check_op(module, inputs(*case, device, dtype), gradient=False, iterations=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("iterations", [0, 1, 5, 12, 20])
@pytest.mark.parametrize("case", [c for c in CASES if c[-2] * c[-1]], ids=str)
def test_is_never_below_the_norm(case, iterations, dtype, device):
    args = inputs(*case, device, dtype)
    bound, exact = spectral_norm_bound(*args, iterations=iterations).double(), norm(masked(*args))
    assert (bound >= exact * SVD).all()
    assert (bound <= exact * (min(case[-2:]) ** 2 ** -(iterations + 1)) * (1 + torch.finfo(dtype).eps) / SVD).all()


def orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


def with_values(values):
    U, V = (orthogonal(len(values)) for _ in range(2))
    return U * torch.tensor(values, dtype=torch.float64) @ V.T


TIGHT = {
    "random": lambda: torch.randn(300, 200),
    "random of 1024": lambda: torch.randn(1024, 1024),
    "wide": lambda: torch.randn(10, 2000),
    "identity": lambda: torch.eye(64),
    "orthogonal": lambda: orthogonal(128),
    "clustered": lambda: with_values([1 - 1e-6 * n for n in range(60)] + [0.5] * 40),
    "graded": lambda: with_values([10.0**-n for n in range(60)]),
    "rank one": lambda: torch.outer(torch.randn(40), torch.randn(50)),
}


@pytest.mark.parametrize("name", TIGHT)
def test_is_within_a_thousandth_of_the_norm(name, device):
    weight = TIGHT[name]().to(device)
    exact = norm(weight.double())
    assert exact * SVD <= spectral_norm_bound(weight).double() <= 1.001 * exact
    if "identity" in name or "orthogonal" in name:
        assert_near(spectral_norm_bound(weight), exact, weight.dtype)


def test_more_iterations_tighten(device):
    weight = torch.randn(40, 40, device=device, dtype=torch.float64)
    bounds = torch.stack([spectral_norm_bound(weight, iterations=n) for n in range(6)])
    assert (bounds.diff() < 0).all()


# Products that round down, cancel or lose everything below their leading bits: an eigenvalue of the computed Gram matrix,
# or its Frobenius norm, can lie below the exact one.
ADVERSARIAL = {
    "one": [[1.0]],
    "low bits": [[1 + 2.0**-27 + 2.0**-52]],
    "below one": [[1 - 2.0**-53]],
    "third": [[1 / 3, 2 / 3, 1 / 7]],
    "nearly singular": [[1.0, 1.0], [1.0, 1 + 2.0**-52]],
    "cancelling": [[1.0, 1.0], [1.0, -1 + 2.0**-53]],
    "hadamard": [[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]],
    "lauchli": [[1.0, 1, 1], [2.0**-30, 0, 0], [0, 2.0**-30, 0], [0, 0, 2.0**-30]],
    "graded": [[1.0, 2.0**-26, 2.0**-52], [2.0**-26, 2.0**-52, 2.0**-78], [2.0**-52, 2.0**-78, 1.0]],
    "mixed scales": [[1e300, 1e-300], [1e-300, -1e300]],
    "huge": [[1e300, 3e300], [2e300, -1e300]],
    "tiny": [[1e-320, 3e-310], [5e-324, 2e-315]],
    "smallest": [[5e-324, 5e-324], [0.0, 5e-324]],
    "zero": [[0.0, 0.0], [0.0, 0.0]],
}


@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 12, 30])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_exceeds_the_exact_norm_of_hard_matrices(name, iterations, device):
    weight = torch.tensor(ADVERSARIAL[name], dtype=torch.float64, device=device)
    for matrix in (weight, weight.T):
        assert exceeds_exactly(spectral_norm_bound(matrix, iterations=iterations).item(), matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("iterations", [0, 1, 12])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 2), (5, 5)], ids=str)
def test_exceeds_the_exact_norm(shape, iterations, dtype, device):
    weight = torch.randn(20, *shape, device=device, dtype=dtype)
    weight[:10] = weight[:10, :, :1] * weight[:10, :1, :]  # nearly of rank one: the Frobenius norm has no room to spare
    for matrix, bound in zip(weight, spectral_norm_bound(weight, iterations=iterations).tolist(), strict=True):
        assert exceeds_exactly(bound, matrix.double())


@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_exceeds_the_exact_norm_where_sums_lose_their_small_terms(rows, iterations, device):
    small = 2.0**-26.51  # a running sum of 1024 absorbs hundreds of its squares, one by one or a block at a time
    weight = torch.full((rows, 2**18), small, dtype=torch.float64, device=device)
    weight[:, :1024] = 1.0
    exact = rows * (1024 + (2**18 - 1024) * Fraction(small) ** 2)
    for matrix in (weight, weight.T):
        assert Fraction(spectral_norm_bound(matrix, iterations=iterations).item()) ** 2 >= exact


def test_check_by_rational_numbers_can_fail():
    weight = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    assert exceeds_exactly(5.0, weight)
    assert not exceeds_exactly(math.nextafter(5.0, 0.0), weight)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale, device):
    weight = torch.randn(20, 30, device=device)
    assert_near(spectral_norm_bound(weight * scale) / scale, spectral_norm_bound(weight), torch.float32)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_zero_matrix_and_empty_masks_give_zero(lead, device):
    weight = torch.randn(*lead, 6, 5, device=device, requires_grad=True)
    nothing = {name: torch.zeros(3, n, dtype=torch.bool, device=device) for name, n in (("input_mask", 5), ("output_mask", 6))}
    for bound in (
        spectral_norm_bound(weight * 0),
        spectral_norm_bound(weight, input_mask=nothing["input_mask"]),
        spectral_norm_bound(weight, output_mask=nothing["output_mask"]),
        spectral_norm_bound(weight, **nothing),
    ):
        assert not bound.any()
        assert not torch.autograd.grad(bound.sum(), weight)[0].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("iterations", [0, 1, 12])
def test_nan_and_inf_stay_visible(bad, iterations, device):
    weight = torch.randn(3, 4, 5, device=device)
    weight[1, 2, 3] = bad
    rows = torch.ones(4, dtype=torch.bool, device=device)
    rows[2] = False
    for bound in (spectral_norm_bound(weight, None, m, iterations=iterations) for m in (None, rows)):
        assert bound.isfinite().tolist() == [True, False, True]


def test_masks_only_lower_it_and_parts_change_nothing(device, monkeypatch):
    weight, columns, rows = inputs((), (7,), (7,), 12, 9, device, torch.float64)
    bound = spectral_norm_bound(weight, columns, rows)
    assert (bound <= spectral_norm_bound(weight)).all()
    leaf = weight.clone().requires_grad_()
    (want,) = torch.autograd.grad(spectral_norm_bound(leaf, columns, rows).sum(), leaf)
    monkeypatch.setattr(module, "_PART", dict.fromkeys(module._PART, 2 * weight.numel()))
    assert_near(spectral_norm_bound(weight, columns, rows), bound, torch.float64)
    assert_near(torch.autograd.grad(spectral_norm_bound(leaf, columns, rows).sum(), leaf)[0], want, torch.float64)
    for n in range(7):
        assert_near(spectral_norm_bound(weight, columns[n], rows[n]), bound[n], torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_is_that_of_the_schatten_norm(case, dtype, device):
    weight, columns, rows = inputs(*case, device, dtype)
    bound = spectral_norm_bound(weight.requires_grad_(), columns, rows, iterations=2)
    seed = torch.randn_like(bound)
    (got,) = torch.autograd.grad(bound, weight, seed)
    mirror = weight.detach().double().requires_grad_()
    A = masked(mirror, columns, rows).expand(*bound.shape, -1, -1)
    logarithm = (A @ A.mT @ A @ A.mT).square().sum((-2, -1)).clamp(min=1e-300).log() / 8
    (want,) = torch.autograd.grad((logarithm * seed.double() * bound.detach().double()).sum(), mirror)
    assert got.dtype == dtype
    assert_near(got, want, dtype)
    torch.library.opcheck(torch.ops.lipfast.spectral_norm_bound.default, (weight, columns, rows, 2))


def test_differentiates_twice(device):
    weight = torch.randn(2, 2, 3, device=device, dtype=torch.float64, requires_grad=True)
    for matrix in (weight, weight.mT):
        torch.autograd.gradcheck(lambda w: spectral_norm_bound(w, iterations=4), matrix)
        torch.autograd.gradgradcheck(lambda w: spectral_norm_bound(w, iterations=4), matrix)


def test_gradient_is_that_of_the_norm_when_converged(device):
    weight, columns, rows = inputs((), (5,), (5,), 12, 9, device, torch.float64)
    weight.requires_grad_()
    scale = torch.randn(5, device=device, dtype=torch.float64)
    (got,) = torch.autograd.grad((spectral_norm_bound(weight, columns, rows, iterations=20) * scale).sum(), weight)
    (want,) = torch.autograd.grad((norm(masked(weight, columns, rows)) * scale).sum(), weight)
    assert_near(got, want, torch.float64)


@pytest.mark.parametrize("iterations", [0, 1, 12])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 3), (4, 4)], ids=str)
def test_complex_matrices_are_bounded_exactly(shape, iterations, device):
    matrix = torch.randn(10, *shape, device=device, dtype=torch.complex128)
    real = torch.cat([torch.cat([matrix.real, -matrix.imag], -1), torch.cat([matrix.imag, matrix.real], -1)], -2)
    for bound, equal in zip(gram_norm(matrix, iterations).tolist(), real, strict=True):  # of the same norm
        assert exceeds_exactly(bound, equal)


def test_error_of_the_matrix_is_added(device):
    matrix = torch.randn(4, 6, 5, device=device, dtype=torch.complex128)
    error = torch.rand(4, device=device, dtype=torch.float64)
    assert (gram_norm(matrix, 12, error) >= norm(matrix) * SVD + error).all()
    assert (gram_norm(matrix * 0, 12, error) >= error).all()
    assert (gram_norm(matrix[..., :0], 12, error) >= error).all()


@pytest.mark.parametrize("wide", [True, False])
def test_gradient_of_a_complex_norm(wide, device):
    shape = (2, 3, 4) if wide else (2, 4, 3)
    matrix = torch.randn(shape, device=device, dtype=torch.complex128, requires_grad=True)
    (want,) = torch.autograd.grad(norm(matrix).sum(), matrix)
    got = gram_gradient(matrix.detach(), gram_norm(matrix.detach(), 20), 20)
    assert_near(torch.view_as_real(got), torch.view_as_real(want), torch.float64)


def test_compiles_without_graph_break(device):
    weight, columns, rows = inputs((), (3,), (3,), 5, 4, device, torch.float32)
    weight.requires_grad_()
    loss = lambda weight: spectral_norm_bound(weight, columns, rows).square().sum()
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(weight), weight)
    torch.testing.assert_close(got, torch.autograd.grad(loss(weight), weight))


@pytest.mark.parametrize(("index", "word"), [(1, "input_mask"), (2, "output_mask")])
@pytest.mark.parametrize("spoil", [lambda t: t[..., :-1], lambda t: t.char(), lambda t: t.to("meta"), lambda t: t[:2]])
def test_names_the_wrong_argument(index, word, spoil):
    args = list(inputs((3,), (3,), (3,), 5, 4, "cpu", torch.float32))
    args[index] = spoil(args[index])
    with pytest.raises(ValueError, match=f"spectral_norm_bound: {word} must"):
        spectral_norm_bound(*args)


def test_names_a_weight_that_is_no_matrix_and_negative_iterations():
    with pytest.raises(ValueError, match="spectral_norm_bound: weight must be"):
        spectral_norm_bound(torch.randn(3))
    with pytest.raises(ValueError, match="spectral_norm_bound: iterations must be 0 or more, got -1"):
        spectral_norm_bound(torch.randn(3, 3), iterations=-1)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("drift", [0.0, 1e-12, 1e-7, 1e-5, 1e-3, 0.03])
def test_near_an_orthogonal_matrix_is_never_below_and_hardly_above(drift, scale, device):
    weight = (
        torch.stack([orthogonal(96) for _ in range(3)]) + drift * torch.randn(3, 96, 96, dtype=torch.float64) / 10
    ) * scale
    exact = norm(weight)
    bound = spectral_norm_bound(weight.to(device)).cpu()
    assert (bound >= exact * SVD).all()
    assert (bound <= exact * (1 + 2e-3 * min(1.0, drift * 1e3) + 1e-11)).all()


def test_near_an_orthogonal_matrix_exceeds_exactly(device):
    for n in range(40):
        weight = (orthogonal(4) + 10.0 ** -(n % 17) * torch.randn(4, 4, dtype=torch.float64)).to(device)
        assert exceeds_exactly(spectral_norm_bound(weight).item(), weight)


def test_a_batch_with_one_matrix_far_from_orthogonal_is_bounded_matrix_by_matrix(device):
    near = orthogonal(40) + 1e-6 * torch.randn(40, 40, dtype=torch.float64)
    weight = torch.stack([near, torch.randn(40, 40, dtype=torch.float64)]).to(device)
    bound, exact = spectral_norm_bound(weight), norm(weight)
    assert (bound >= exact * SVD).all()
    assert (bound <= 1.001 * exact).all()
    assert bound[0] <= exact[0] * (1 + 2e-5)  # where the chain alone would add 4e-4
