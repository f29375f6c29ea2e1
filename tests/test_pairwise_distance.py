import math
from fractions import Fraction

import pytest
import torch

import lipfast.ops.pairwise_distance as module
from lipfast import pairwise_distance
from tests.checks import DTYPES, TOLERANCE, assert_near, check_op

NORMS = [1.0, 2.0, math.inf]
#        leading sizes, K, I
SIZES = [
    ((), 5, 7),
    ((), 1, 1),
    ((0,), 4, 3),
    ((2, 3), 17, 33),
    ((), 0, 5),
    ((), 3, 0),
    ((), 65, 129),
    ((2,), 16, 600),
    ((), 70, 700),
]
CASES = [(*size, p) for size in SIZES for p in NORMS]
LARGE = {
    "10 rows of 512": ((), 10, 512, 2.0),
    "200 rows of 1024": ((), 200, 1024, 2.0),
}
if torch.cuda.is_available():
    LARGE |= {
        "200 rows of 1024, l_1": ((), 200, 1024, 1.0),
        "200 rows of 1024, l_inf": ((), 200, 1024, math.inf),
        "1000 rows of 2048": ((), 1000, 2048, 2.0),
        "10 rows of 1000000": ((), 10, 1_000_000, 2.0),
    }


def inputs(shape, n_rows, n_in, p, device, dtype):
    return torch.randn(*shape, n_rows, n_in, device=device, dtype=dtype), {"p": p}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, device):
    rows, options = inputs(*case, device, dtype)
    check_op(module, (rows,), gradient=rows.numel() > 0, **options)


@pytest.mark.parametrize("p", NORMS)
def test_is_symmetric_with_a_zero_diagonal(p, device):
    distance = pairwise_distance(torch.randn(70, 33, device=device), p)
    assert torch.equal(distance, distance.mT)
    assert (distance.diagonal() == 0).all()
    assert (distance + torch.eye(70, device=device) > 0).all()


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_differences_keep_their_accuracy(dtype, p, device):
    base = torch.rand(40, dtype=dtype, device=device) + 1
    steps = torch.randint(0, 3, (3, 40), device=device) * torch.finfo(dtype).eps
    rows = base + steps.to(dtype)  # a few units in the last place apart
    got, exact = pairwise_distance(rows, p), [[Fraction(v) for v in row] for row in rows.double().tolist()]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        sizes = [abs(a - b) for a, b in zip(exact[i], exact[j], strict=True)]
        want = (
            max(sizes)
            if p == math.inf
            else sum(sizes)
            if p == 1
            else Fraction(math.isqrt(int(sum(s * s for s in sizes) * 4**200)), 2**200)
        )
        assert abs(got[i, j].item() / float(want) - 1) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fraction", [0.9, -0.9])
def test_squares_stay_in_range(fraction, dtype, p, device):
    scale = 2.0 ** round(math.log2(torch.finfo(dtype).max if fraction > 0 else torch.finfo(dtype).tiny) * abs(fraction))
    rows = torch.randn(20, 70, device=device, dtype=dtype)
    rows[3] = rows[4]
    got = pairwise_distance(rows * scale, p)
    torch.testing.assert_close(got / scale, pairwise_distance(rows, p))


def test_scales_may_differ_from_pair_to_pair(device):
    rows = torch.tensor([[1e-30, 0.0], [0.0, 1e-30], [1e30, 0.0], [1e30, 1e24]], device=device)
    got = pairwise_distance(rows)
    torch.testing.assert_close(got[0, 1].item(), 2**0.5 * 1e-30, rtol=1e-6, atol=0)
    torch.testing.assert_close(got[2, 3].item(), 1e24, rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", NORMS)
def test_many_columns_are_summed_accurately(p, device):
    rows = torch.rand(3, 300_001, device=device)
    torch.testing.assert_close(
        pairwise_distance(rows, p).double(), pairwise_distance(rows.double(), p), rtol=TOLERANCE[torch.float32], atol=0
    )


@pytest.mark.parametrize("p", NORMS)
def test_rows_beyond_one_tile_agree_with_vector_norm(p, device, monkeypatch):
    rows = torch.randn(2, 90, 37, device=device, dtype=torch.float64)
    seed = torch.randn(2, 90, 90, device=device, dtype=torch.float64)
    want = torch.linalg.vector_norm(rows[:, :, None] - rows[:, None], p, dim=-1)
    want_grad = module.backward_reference(seed, rows, want, p)  # in one tile
    monkeypatch.setattr(module, "_TILE", 2 * 37 * 32**2)  # parts of 32, 32 and 26 rows
    torch.testing.assert_close(module.reference(rows, p), want)
    torch.testing.assert_close(module.backward_reference(seed, rows, want, p), want_grad)


@pytest.mark.parametrize("p", NORMS)
def test_nan_and_inf_stay_visible(p, device):
    rows = torch.randn(20, 70, device=device)
    rows[2, 69], rows[5, 0], rows[7, 3] = math.nan, math.inf, -math.inf
    got = pairwise_distance(rows, p)
    assert got[2].isnan().all()
    assert got[5, 5].isnan()
    assert got[5, [0, 7, 9]].isinf().all()
    good = [i for i in range(20) if i not in (2, 5, 7)]
    assert got[good][:, good].isfinite().all()


@pytest.mark.parametrize("p", NORMS)
def test_gradient_is_zero_where_rows_agree(p, device):
    rows = torch.ones(3, 4, device=device, requires_grad=True)
    assert (torch.autograd.grad(pairwise_distance(rows, p).sum(), rows)[0] == 0).all()


def test_gradient_keeps_its_accuracy_between_close_rows(device):
    rows = torch.tensor([[1.0, 2.0], [1.0 + 2**-20, 2.0]], device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(pairwise_distance(rows)[0, 1], rows)
    torch.testing.assert_close(grad.cpu(), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))


@pytest.mark.parametrize("scale", [1.0, 2.0**70, 2.0**-70])
def test_gradient_of_clusters_agrees_with_differences(scale, device):
    """Rows far from zero, some close together: a plain matrix product would lose the small differences."""
    clusters = torch.randn(6, 50, device=device).repeat_interleave(5, 0)
    rows = (clusters + 1e-4 * torch.randn(30, 50, device=device) + 10) * scale
    seed = torch.randn(30, 30, device=device)
    leaf = rows.clone().requires_grad_()
    (grad,) = torch.autograd.grad(pairwise_distance(leaf), leaf, seed)
    want = module.backward_reference(seed.double(), rows.double(), module.reference(rows.double()), 2.0)
    assert_near(grad, want, torch.float32)


def test_gradient_of_the_largest_difference_goes_to_the_first(device):
    rows = torch.tensor([[0.0, 3.0, -3.0], [0.0, 0.0, 0.0]], device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(pairwise_distance(rows, math.inf)[0, 1], rows)
    assert grad.tolist() == [[0, 1, 0], [0, -1, 0]]


@pytest.mark.parametrize("p", NORMS)
def test_differentiates_twice(p, device):
    rows = torch.randn(2, 3, 2, device=device, dtype=torch.float64, requires_grad=True)
    off = 1 - torch.eye(3, device=device, dtype=torch.float64)
    torch.autograd.gradgradcheck(lambda r: (pairwise_distance(r, p) + torch.eye(3, device=device)) ** 2 * off, rows)


def test_compiles_without_graph_break(device):
    rows = torch.randn(5, 4, device=device, requires_grad=True)
    loss = lambda r: (pairwise_distance(r) ** 3).sum()
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(rows), rows)
    torch.testing.assert_close(got, torch.autograd.grad(loss(rows), rows)[0])


@pytest.mark.parametrize(
    ("rows", "p", "message"),
    [
        (torch.zeros(3), 2.0, r"rows must be \(\*, K, I\), got \(3,\)"),
        (torch.zeros(3, 2, dtype=torch.int64), 2.0, "rows must be a float64"),
        (None, 2.0, "rows must be a float64"),
        (torch.zeros(3, 2), 3.0, "p must be 1, 2 or inf, got 3.0"),
        (torch.zeros(3, 2), math.nan, "p must be 1, 2 or inf, got nan"),
    ],
)
def test_names_the_wrong_argument(rows, p, message):
    with pytest.raises(ValueError, match=f"pairwise_distance: {message}"):
        pairwise_distance(rows, p)
