from types import SimpleNamespace

import pytest
import torch

import lipfast.ops.spectral_norm_estimate as module
from lipfast import spectral_norm_estimate
from tests.checks import DTYPES, TOLERANCE, assert_near, check_op

#        leading sizes of weight, input mask, output mask and start (None: absent), O, I, options
CASES = [
    ((), (3,), (3,), (), 17, 33, {"iterations": 4}),
    ((), None, None, None, 5, 4, {"iterations": 10}),
    ((), (2, 1), (3,), (2, 3), 9, 7, {"iterations": 3}),
    ((3,), None, (2, 1), None, 6, 11, {"iterations": 3}),
    ((2,), None, None, (2,), 8, 8, {"iterations": 0}),
    ((), (200,), (200,), (), 41, 70, {"iterations": 1}),
    ((), (4,), None, None, 1, 1, {"iterations": 2}),
    ((), (0,), None, None, 5, 4, {"iterations": 2}),
    ((), (3,), (3,), None, 0, 4, {"iterations": 2}),
    ((2,), None, None, None, 4, 0, {"iterations": 2}),
]
LARGE = {
    "512x512, 256 masks": ((), (256,), (256,), (), 512, 512, {"iterations": 5}),
    "512x4096, 256 masks": ((), (256,), (256,), (), 512, 4096, {"iterations": 2}),
}

# The op also returns its left vectors, and only sigma has a gradient.
op = torch.ops.lipfast.spectral_norm_estimate
VECTORS = SimpleNamespace(__name__=module.__name__, reference=module.reference, spectral_norm_estimate=op)
SIGMA = SimpleNamespace(
    __name__=module.__name__,
    reference=lambda *args, **options: module.reference(*args, **options)[0],
    spectral_norm_estimate=lambda *args, **options: spectral_norm_estimate(*args, **options)[0],
)


def inputs(lead, input_lead, output_lead, start_lead, n_out, n_in, device, dtype):
    mask = lambda lead, n: None if lead is None else torch.rand(*lead, n, device=device) < 0.7
    weight = torch.randn(*lead, n_out, n_in, device=device, dtype=dtype) / max(1, n_in) ** 0.5
    start = None if start_lead is None else torch.randn(*start_lead, n_in, device=device, dtype=dtype)
    return weight, mask(input_lead, n_in), mask(output_lead, n_out), start


def masked(weight, input_mask=None, output_mask=None):
    """The matrices themselves in float64, one for each sample."""
    weight = weight.double()
    if output_mask is not None:
        weight = weight * output_mask[..., None]
    return weight if input_mask is None else weight * input_mask[..., None, :]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, device):
    args = inputs(*case[:-1], device, dtype)
    check_op(VECTORS, args, gradient=False, **case[-1])
    check_op(SIGMA, args, **case[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("iterations", [0, 1, 5, 40])
@pytest.mark.parametrize("case", [c for c in CASES if c[-3] * c[-2]], ids=str)
def test_is_never_above_the_norm(case, iterations, dtype, device):
    args = inputs(*case[:-1], device, dtype)
    sigma = spectral_norm_estimate(*args, iterations=iterations)[0].double()
    exact = torch.linalg.svdvals(masked(*args[:3]))[..., 0].expand_as(sigma)
    assert (sigma <= exact * (1 + TOLERANCE[dtype])).all()


def test_converges_to_the_norm(device):
    weight, rows, columns, _ = inputs((), (5,), (5,), None, 30, 20, device, torch.float64)
    sigma, right = spectral_norm_estimate(weight, rows, columns, iterations=2000)
    matrices = masked(weight, rows, columns)
    assert_near(sigma, torch.linalg.svdvals(matrices)[:, 0], torch.float64)
    assert_near((matrices @ right[..., None]).norm(dim=(-2, -1)), sigma, torch.float64)
    assert_near(right.norm(dim=-1), torch.ones_like(sigma), torch.float64)
    assert not (right * ~rows).any()


def test_shared_weight_gives_each_sample_what_it_would_get_alone(device):
    weight, columns, rows, start = inputs((), (6,), (6,), (6,), 12, 9, device, torch.float64)
    sigma, right = spectral_norm_estimate(weight, columns, rows, start, iterations=3)
    for n in range(6):
        alone, vector = spectral_norm_estimate(weight, columns[n], rows[n], start[n], iterations=3)
        assert_near(sigma[n], alone, torch.float64)
        assert_near(right[n], vector, torch.float64)
    matrices = masked(weight, columns, rows)
    assert_near(spectral_norm_estimate(matrices, start=start, iterations=3)[0], sigma, torch.float64)


def test_warm_start_goes_on_where_the_last_call_stopped(device):
    weight = torch.randn(40, 30, device=device, dtype=torch.float64)
    whole = spectral_norm_estimate(weight, iterations=8)
    half = spectral_norm_estimate(weight, iterations=4)
    both = spectral_norm_estimate(weight, start=7 * half[1], iterations=4)
    assert_near(both[1], whole[1], torch.float64)
    assert half[0] < both[0] <= torch.linalg.svdvals(weight)[0]


def test_gradient_is_that_of_the_norm_when_converged(device):
    weight, columns, rows, _ = inputs((), (5,), (5,), None, 12, 9, device, torch.float64)
    weight.requires_grad_()
    scale = torch.randn(5, device=device, dtype=torch.float64)
    (got,) = torch.autograd.grad((spectral_norm_estimate(weight, columns, rows, iterations=3000)[0] * scale).sum(), weight)
    (want,) = torch.autograd.grad((torch.linalg.svdvals(masked(weight, columns, rows))[:, 0] * scale).sum(), weight)
    assert_near(got, want, torch.float64)


@pytest.mark.parametrize("iterations", [0, 3])
def test_gradient_holds_the_vectors_constant(iterations, device):
    weight = torch.randn(3, 6, 5, device=device, dtype=torch.float64, requires_grad=True)
    sigma, left, right = op(weight, None, None, None, iterations)
    (got,) = torch.autograd.grad(sigma.sum(), weight)
    assert_near(got, left[..., None] * right[..., None, :], torch.float64)
    assert_near((left * (weight @ right[..., None])[..., 0]).sum(-1), sigma, torch.float64)
    assert not spectral_norm_estimate(weight)[1].requires_grad


def test_scale_does_not_matter_and_may_differ_in_a_batch(device):
    scales = torch.tensor([1.0, 1e-30, 0.0, 1e30], device=device)
    weight = torch.randn(4, 20, 30, device=device)
    got, want = spectral_norm_estimate(weight * scales[:, None, None]), spectral_norm_estimate(weight)
    assert torch.equal(got[0][0], want[0][0])
    for n in (1, 3):
        assert_near(got[0][n] / scales[n], want[0][n], torch.float32)
        assert_near(got[1][n], want[1][n], torch.float32)
    assert got[0][2] == 0


@pytest.mark.parametrize("lead", [(), (3,)])
def test_zero_matrix_and_empty_masks_give_zero(lead, device):
    weight = torch.randn(*lead, 6, 5, device=device, requires_grad=True)
    nothing = {name: torch.zeros(3, n, dtype=torch.bool, device=device) for name, n in (("input_mask", 5), ("output_mask", 6))}
    for sigma, right in (
        spectral_norm_estimate(weight * 0),
        spectral_norm_estimate(weight, input_mask=nothing["input_mask"]),
        spectral_norm_estimate(weight, output_mask=nothing["output_mask"]),
        spectral_norm_estimate(weight, **nothing),
    ):
        assert (sigma == 0).all()
        assert right.isfinite().all()
        assert not torch.autograd.grad(sigma.sum(), weight)[0].any()


def test_start_orthogonal_to_a_rank_one_matrix_is_left_behind(device):
    left, right, start = (torch.tensor(v, device=device) for v in ([2.0, 4.0], [1.0, 1.0, 2.0], [1.0, -1.0, 0.0]))
    # powers of two: the product vanishes with fused arithmetic too
    assert spectral_norm_estimate(torch.outer(left, right), start=start, iterations=0)[0] == 0
    sigma, _ = spectral_norm_estimate(torch.outer(left, right), start=start, iterations=1)
    assert_near(sigma, left.norm() * right.norm(), torch.float32)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_unusable_start_is_replaced_in_its_sample_only(bad, device):
    weight = torch.randn(8, 6, device=device)
    start = torch.randn(3, 6, device=device)
    spoiled = start.clone()
    spoiled[1] = spoiled[1] * bad
    got, want = (spectral_norm_estimate(weight, start=s, iterations=2) for s in (spoiled, start))
    cold = spectral_norm_estimate(weight, iterations=2)
    assert torch.equal(got[0][[0, 2]], want[0][[0, 2]])
    assert_near(got[0][1], cold[0], torch.float32)
    assert_near(got[1][1], cold[1], torch.float32)


def test_start_under_its_mask_is_replaced(device):
    weight, mask = torch.randn(4, 5, device=device), torch.tensor([False, True, True, True, True], device=device)
    start = torch.eye(5, device=device)[0]
    assert_near(*(spectral_norm_estimate(weight, mask, start=s)[0] for s in (start, None)), torch.float32)


def test_clustered_norms_converge_from_below(device):
    basis = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64)).Q.to(device)
    values = torch.tensor([1 - 1e-9 * n for n in range(20)] + [0.1] * 30, dtype=torch.float64, device=device)
    sigma = spectral_norm_estimate(basis * values @ basis.T, iterations=5)[0]
    assert 1 - 1e-7 < sigma <= 1 + TOLERANCE[torch.float64]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("iterations", [0, 3])
def test_nan_and_inf_in_a_weight_stay_visible(bad, iterations, device):
    weight = torch.randn(3, 4, 5, device=device)
    weight[1, 2, 3] = bad
    rows = torch.ones(4, dtype=torch.bool, device=device)
    rows[2] = False
    for sigma in (spectral_norm_estimate(weight, None, m, iterations=iterations)[0] for m in (None, rows)):
        assert not sigma[1].isfinite()
        assert sigma[[0, 2]].isfinite().all()


def test_compiles_without_graph_break(device):
    weight, columns, rows, start = inputs((), (3,), (3,), (3,), 5, 4, device, torch.float32)
    weight.requires_grad_()
    loss = lambda weight: spectral_norm_estimate(weight, columns, rows, start, iterations=2)[0].square().sum()
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(weight), weight)
    torch.testing.assert_close(got, torch.autograd.grad(loss(weight), weight))


@pytest.mark.parametrize(("index", "word"), [(1, "input_mask"), (2, "output_mask"), (3, "start")])
@pytest.mark.parametrize("spoil", [lambda t: t[..., :-1], lambda t: t.char(), lambda t: t.to("meta"), lambda t: t[:2]])
def test_names_the_wrong_argument(index, word, spoil):
    args = list(inputs((3,), (3,), (3,), (3,), 5, 4, "cpu", torch.float32))
    args[index] = spoil(args[index])
    with pytest.raises(ValueError, match=f"spectral_norm_estimate: {word} must"):
        spectral_norm_estimate(*args)


def test_names_a_weight_that_is_no_matrix_and_negative_iterations():
    with pytest.raises(ValueError, match="spectral_norm_estimate: weight must be"):
        spectral_norm_estimate(torch.randn(3))
    with pytest.raises(ValueError, match="spectral_norm_estimate: iterations must be 0 or more, got -1"):
        spectral_norm_estimate(torch.randn(3, 3), iterations=-1)
