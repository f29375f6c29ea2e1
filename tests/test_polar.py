import math

import pytest
import torch

import lipfast.ops.polar as module
from lipfast import polar
from tests.checks import DTYPES, assert_near, check_op
from tests.test_cayley import defect

#        leading sizes, O, I
SIZES = [((), 5, 5), ((), 1, 1), ((0,), 4, 3), ((2, 3), 17, 9), ((2,), 9, 17), ((), 0, 3), ((), 3, 0), ((2,), 64, 64)]
CASES = [(*size, spread) for size in SIZES for spread in (0.01, 0.7)]
LARGE = {"1024x1024, within 1e-3": ((), 1024, 1024, 1e-3), "32x256x256, within 1e-3": ((32,), 256, 256, 1e-3)}
if torch.cuda.is_available():
    LARGE |= {"64x256x256, within 1e-3": ((64,), 256, 256, 1e-3), "4096x4096, within 1e-3": ((), 4096, 4096, 1e-3)}


def inputs(lead, O, I, spread, device, dtype):
    """Of singular values within 1 -+ spread."""
    rank = min(O, I)
    U, V = (torch.linalg.qr(torch.randn(*lead, n, rank, device=device, dtype=torch.float64)).Q for n in (O, I))
    values = 1 + spread * (2 * torch.rand(*lead, rank, device=device, dtype=torch.float64) - 1)
    return ((U * values[..., None, :]) @ V.mT).to(dtype)


def nearest(matrix):
    U, _, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U @ Vh


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, device):
    matrix = inputs(*case, device, dtype)
    check_op(module, (matrix,), gradient=matrix.numel() > 0)


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3, 0.03, 0.2, 0.999])
@pytest.mark.parametrize("shape", [(1, 1), (40, 40), (40, 7), (7, 40), (257, 257)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_is_the_nearest_orthonormal_matrix(dtype, shape, spread, device):
    matrix = inputs((), *shape, spread, device, dtype)
    Q = polar(matrix)
    assert defect(Q if shape[0] >= shape[1] else Q.mT) <= 20 * torch.finfo(dtype).eps
    least = torch.linalg.svdvals(matrix.double()).min().item()
    assert_near(Q, nearest(matrix), dtype, slack=max(1, 1 / least))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale, device):
    matrix = torch.randn(2, 20, 20, device=device)
    torch.testing.assert_close(polar(matrix * scale), polar(matrix), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(9, 9), (9, 5), (5, 9)])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_is_orthonormal_without_full_rank(rank, shape, device):
    matrix = torch.randn(shape[0], rank, device=device) @ torch.randn(rank, shape[1], device=device)
    Q = polar(matrix)
    assert defect(Q if shape[0] >= shape[1] else Q.mT) <= 20 * torch.finfo(Q.dtype).eps
    torch.testing.assert_close((Q * matrix).sum(), torch.linalg.svdvals(matrix).sum())  # as near as any


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_series_leaves_out_only_what_rounding_would(dtype, device):
    for off in torch.logspace(-9, math.log10(0.2), 60):
        for value in (1 + off.item(), 1 - off.item()):
            got = polar(torch.tensor([[value]], dtype=dtype, device=device))
            assert abs(got.item() - 1) <= 2 * torch.finfo(dtype).eps, value


@pytest.mark.parametrize("spread", [1e-4, 1e-3, 0.01, 0.03])
def test_batches_of_several_parts(spread, device):
    matrix = inputs((3,), 320, 300, spread, device, torch.float32)
    assert_near(polar(matrix), nearest(matrix), torch.float32)


def test_large(device):
    Q = polar(inputs((), 512, 512, 1e-3, device, torch.float32))
    assert defect(Q) <= 20 * torch.finfo(Q.dtype).eps


def test_leaves_an_orthonormal_matrix_and_keeps_the_determinants_sign(device):
    Q = torch.linalg.qr(torch.randn(6, 30, 30, device=device, dtype=torch.float64)).Q
    torch.testing.assert_close(polar(Q), Q)
    drifted = Q + 1e-3 * torch.randn_like(Q)
    assert torch.equal(torch.linalg.det(polar(drifted)).sign(), torch.linalg.det(Q).sign())


def test_a_batch_may_mix_near_far_and_broken(device):
    near, far = inputs((2,), 12, 12, 0.01, device, torch.float64), torch.randn(2, 12, 12, device=device, dtype=torch.float64)
    broken = torch.ones(2, 12, 12, device=device, dtype=torch.float64)
    broken[0, 3, 4], broken[1, 0, 0] = math.nan, math.inf
    got = polar(torch.stack([far, near, broken]))
    torch.testing.assert_close(got[0], nearest(far))
    torch.testing.assert_close(got[1], nearest(near))
    assert got[2].isnan().all()


@pytest.mark.parametrize("shape", [(6, 6), (8, 5), (5, 8)])
@pytest.mark.parametrize("spread", [0.01, 0.8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_agrees_with_that_of_a_decomposition(dtype, spread, shape, device):
    matrix = inputs((2,), *shape, spread, device, dtype).requires_grad_()
    mirror = matrix.detach().double().requires_grad_()
    seed = torch.randn_like(matrix)
    (want,) = torch.autograd.grad(nearest(mirror), mirror, seed.double())
    (got,) = torch.autograd.grad(polar(matrix), matrix, seed)
    assert_near(got, want, dtype, slack=2)


def test_gradient_of_a_batch_of_large_matrices_is_that_of_each(device):
    batch = inputs((4,), 220, 180, 0.5, device, torch.float64).requires_grad_()
    seed = torch.randn_like(batch)
    slope = lambda M, G: torch.autograd.grad(polar(M), M, G)[0]
    assert_near(slope(batch, seed), torch.stack([slope(*one) for one in zip(batch, seed, strict=True)]), torch.float64)


def test_gradient_of_large_matrices_near_the_factor_is_that_of_the_series(device):
    batch = inputs((3,), 300, 270, 1e-3, device, torch.float32).requires_grad_()
    mirror, seed = batch.detach().double().requires_grad_(), torch.randn_like(batch)
    (want,) = torch.autograd.grad(module.reference(mirror), mirror, seed.double())
    (got,) = torch.autograd.grad(polar(batch), batch, seed)
    assert_near(got, want, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sum_leaves_out_only_what_rounding_would(dtype, device):
    R, eye = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=dtype, device=device), torch.eye(2, dtype=dtype, device=device)
    for off in torch.logspace(-9, math.log10(0.4), 60, dtype=dtype):
        for value in (1 + off, 1 - off):
            got = torch.ops.lipfast.polar_sylvester(value * eye, R)
            assert (got * 2 * value - R).abs().max() <= 4 * torch.finfo(dtype).eps, value


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_gradient_scales_with_its_seed(scale, device):
    near, far = inputs((2,), 12, 12, 0.02, device, torch.float32)[0], torch.randn(12, 12, device=device)
    matrix = torch.stack([near, far]).requires_grad_()
    seeds = torch.randn(2, 12, 12, device=device)
    slope = lambda seed: torch.autograd.grad(polar(matrix), matrix, seed)[0]
    torch.testing.assert_close(slope(scale * seeds), scale * slope(seeds), rtol=1e-4, atol=1e-5 * scale)
    one = torch.stack([scale * seeds[0], seeds[1]])  # the other one's is not disturbed
    assert_near(slope(one)[1], slope(seeds)[1], torch.float32)


def test_gradient_of_a_broken_matrix_is_nan_and_of_the_others_as_if_alone(device):
    near, far = inputs((), 12, 12, 0.01, device, torch.float64), torch.randn(12, 12, device=device, dtype=torch.float64)
    broken = torch.full_like(near, math.nan)
    seed = torch.randn_like(near)
    slope = lambda M: torch.autograd.grad(polar(M), M, seed.expand_as(M))[0]
    got = slope(torch.stack([far, broken, near]).requires_grad_())
    for alone, of_batch in ((far, got[0]), (near, got[2])):
        torch.testing.assert_close(of_batch, slope(alone.requires_grad_()))
    assert got[1].isnan().all()


def test_gradient_is_tangent_at_an_orthonormal_matrix(device):
    """There the equal singular values of a decomposition have no derivative; the factor has."""
    Q = torch.eye(7, device=device, dtype=torch.float64).requires_grad_()
    seed = torch.randn_like(Q)
    (got,) = torch.autograd.grad(polar(Q), Q, seed)
    torch.testing.assert_close(got, (seed - seed.mT) / 2)


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4)])
@pytest.mark.parametrize("spread", [0.05, 0.8])
def test_differentiates_twice(spread, shape, device):
    matrix = inputs((2,), *shape, spread, device, torch.float64).requires_grad_()
    torch.autograd.gradcheck(polar, matrix)
    torch.autograd.gradgradcheck(polar, matrix)


def test_differentiates_twice_at_an_orthonormal_matrix(device):
    matrix = torch.eye(3, device=device, dtype=torch.float64).requires_grad_()
    torch.autograd.gradgradcheck(polar, matrix)


def test_compiles_without_graph_break(device):
    matrix = torch.randn(20, 12, device=device, requires_grad=True)
    loss = lambda m: (polar(m) ** 3).sum()
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(matrix), matrix)
    torch.testing.assert_close(got, torch.autograd.grad(loss(matrix), matrix)[0])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(3), r"matrix must be \(\*, O, I\), got \(3,\)"),
        (torch.zeros(3, 3, dtype=torch.int64), "matrix must be a float64"),
        (None, "matrix must be a float64"),
    ],
)
def test_names_the_wrong_argument(matrix, message):
    with pytest.raises(ValueError, match=f"polar: {message}"):
        polar(matrix)
