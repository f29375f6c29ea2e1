import math
from fractions import Fraction

import pytest
import torch

import lipfast.ops.ball_linear as module
from lipfast import ball_linear
from tests.checks import DTYPES, check_op

NORMS = [1.0, 2.0, math.inf]
F64, F32, BF16, F16 = DTYPES
MIX = [(F64, 1.0), (F32, 1.0), (F32, 2.0), (F32, math.inf), (BF16, 2.0), (F16, math.inf)]
#        leading sizes, I, O
CASES = [((3,), 5, 4), ((1,), 1, 1), ((0,), 5, 4), ((2, 3), 129, 33), ((7,), 64, 0), ((), 6, 3)]
LARGE = {"3072 to 512, batch 256": ((256,), 3072, 512), "4096 to 4096, batch 1024": ((1024,), 4096, 4096)}


def inputs(shape, n_in, n_out, device, dtype):
    center = torch.randn(*shape, n_in, device=device, dtype=dtype)
    radius = torch.rand(shape, device=device, dtype=dtype)
    weight = torch.randn(n_out, n_in, device=device, dtype=dtype) / n_in**0.5
    return center, radius, weight, torch.randn(n_out, device=device, dtype=dtype)


def assert_contains_the_exact_box(box, center, radius, weight, bias, p):
    """In rational arithmetic, for center (B, I), radius (B,) and weight (O, I); ||w||_2 by squaring both sides."""
    exact = lambda t: [[Fraction(v) for v in row] for row in t.double().tolist()]
    low, high, c, w = (exact(t) for t in (*box, center, weight))
    ((*r,), (*b,)) = exact(torch.atleast_2d(radius)) + exact(torch.atleast_2d(bias))
    for o, row in enumerate(w):
        taps = [(i, v) for i, v in enumerate(row) if v]
        size = {1: max, 2: lambda s: sum(v * v for v in s), math.inf: sum}[p]([abs(v) for _, v in taps] or [Fraction(0)])
        for n in range(len(c)):
            mid = b[o] + sum(v * c[n][i] for i, v in taps)
            for gap in (high[n][o] - mid, mid - low[n][o]):
                assert gap >= 0
                assert (gap**2 >= r[n] ** 2 * size) if p == 2 else (gap >= r[n] * size)


@pytest.mark.parametrize(("dtype", "p"), MIX, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, p, device):
    check_op(module, inputs(*case, device, dtype), p=p)


@pytest.mark.parametrize("p", NORMS)
def test_without_bias_and_with_one_radius(p, device):
    center, _, weight, _ = inputs((3,), 17, 5, device, torch.float32)
    check_op(module, (center, torch.tensor(0.3, device=device), weight, None), p=p)


@pytest.mark.parametrize("p", NORMS)
def test_gradient_of_one_input_only(p, device):
    args = inputs((3,), 5, 4, device, torch.float64)
    for leaf in args:
        leaf.requires_grad_()
        (grad,) = torch.autograd.grad(ball_linear(*args, p=p)[1].sum(), leaf)
        (want,) = torch.autograd.grad(module.reference(*args, p)[1].sum(), leaf)
        torch.testing.assert_close(grad, want)
        leaf.requires_grad_(False)


@pytest.mark.parametrize("p", NORMS)
def test_differentiates_twice(p, device):
    args = [t.requires_grad_() for t in inputs((2,), 3, 2, device, torch.float64)]
    torch.autograd.gradgradcheck(lambda *t: ball_linear(*t, p=p), args)


@pytest.mark.parametrize("outward", [False, True])
def test_compiles_without_graph_break(outward, device):
    center, _, weight, bias = (t.requires_grad_() for t in inputs((3,), 5, 4, device, torch.float32))
    loss = lambda r, *t: sum((o * o).sum() for o in ball_linear(t[0], r, *t[1:], outward=outward))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for radius in (0.25, 0.5, 0.75):  # a schedule hands over another number in every step
        got = torch.autograd.grad(compiled(radius, center, weight, bias), (center, weight, bias))
        torch.testing.assert_close(got, torch.autograd.grad(loss(radius, center, weight, bias), (center, weight, bias)))


@pytest.mark.parametrize("p", NORMS)
def test_is_tight(p, device):
    center, radius, weight, bias = inputs((4,), 6, 3, device, torch.float64)
    low, high = ball_linear(center, radius, weight, bias, p=p)
    if p == 1:
        unit = torch.where(weight.abs() == weight.abs().amax(1, keepdim=True), weight.sign(), 0)
    else:
        unit = weight.sign() if p == math.inf else weight / weight.norm(dim=1, keepdim=True)
    for sign, bound in ((1, high), (-1, low)):  # the x of the ball that attains each bound
        x = center[:, None] + sign * radius[:, None, None] * unit
        torch.testing.assert_close((x - center[:, None]).norm(p, -1), radius[:, None].expand(4, 3))
        torch.testing.assert_close((x * weight).sum(-1) + bias, bound)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outward_contains_the_exact_box(dtype, size, p, device):
    center, radius, weight, bias = inputs((4,), 70, 12, device, dtype)
    box = ball_linear(center, radius * size, weight, bias, p=p, outward=True)
    assert_contains_the_exact_box(box, center, radius * size, weight, bias, p)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
@pytest.mark.parametrize("what", ["ball", "weight"])
def test_outward_survives_extreme_scales(what, scale, p, device):
    center, radius, weight, bias = inputs((4,), 70, 12, device, torch.float32)
    if what == "ball":
        center, radius = center * scale, radius * scale
    else:
        weight = weight * scale
    box = ball_linear(center, radius, weight, bias * 0, p=p, outward=True)
    assert_contains_the_exact_box(box, center, radius, weight, bias * 0, p)


def test_outward_survives_squares_that_underflow(device):
    center, radius, weight, bias = inputs((4,), 7, 3, device, torch.float64)
    weight = weight * 1e-170
    box = ball_linear(center * 0, radius, weight, bias * 0, outward=True)
    assert_contains_the_exact_box(box, center * 0, radius, weight, bias * 0, 2)


@pytest.mark.parametrize("p", NORMS)
def test_outward_is_nearly_tight(p, device):
    center, _, weight, bias = inputs((64,), 512, 256, device, torch.float32)
    low, high = ball_linear(center, 0.5, weight, bias, p=p, outward=True)
    want = module.reference(*(t.double() for t in (center, center.new_tensor(0.5), weight, bias)), p)
    assert ((high - low).sum() / (want[1] - want[0]).sum()).item() < 1.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_number_as_radius_is_never_rounded_down(dtype, device):
    zero, one = torch.zeros(1, device=device, dtype=dtype), torch.ones(1, 1, device=device, dtype=dtype)
    for eps in (0.1, 8 / 255, 36 / 255, 1.58):
        assert ball_linear(zero, eps, one)[1].double().item() >= eps


@pytest.mark.parametrize("p", NORMS)
def test_gradient_at_a_kink_is_a_subgradient(p, device):
    weight = torch.tensor([[0.0, 0.0, 0.0], [-2.0, 2.0, 1.0]], device=device, requires_grad=True)
    upper = ball_linear(torch.zeros(3, device=device), 1.0, weight, p=p)[1]
    (grad,) = torch.autograd.grad(upper.sum(), weight)
    want = {1: [-1.0, 0.0, 0.0], 2: [-2 / 3, 2 / 3, 1 / 3], math.inf: [-1.0, 1.0, 1.0]}[p]
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.0, 0.0], want], device=device))


@pytest.mark.parametrize("p", NORMS)
def test_nan_and_inf_stay_visible(p, device):
    for outward in (False, True):
        for bad in (math.nan, math.inf):
            for which in (0, 1):
                args = list(inputs((4,), 6, 3, device, torch.float32))
                args[which].view(4, -1)[1, 0] = bad
                low, high = ball_linear(*args, p=p, outward=outward)
                assert not (low[1].isfinite() & high[1].isfinite()).any()
                assert low[0].isfinite().all()
        args = list(inputs((4,), 6, 3, device, torch.float32))
        args[2][1, 2] = math.nan
        low, high = ball_linear(*args, p=p, outward=outward)
        assert low[:, 1].isnan().all()
        assert high[:, 1].isnan().all()


@pytest.mark.parametrize(("index", "word"), [(1, "radius"), (2, "weight"), (3, "bias")])
@pytest.mark.parametrize("spoil", [lambda t: t[..., :-1], lambda t: t.double(), lambda t: t.to("meta")])
def test_names_the_wrong_argument(index, word, spoil):
    args = list(inputs((3,), 5, 4, "cpu", torch.float32))
    args[index] = spoil(args[index])
    with pytest.raises(ValueError, match=f"ball_linear: {word} must be"):
        ball_linear(*args)


@pytest.mark.parametrize(
    ("change", "word"), [({"p": 3}, "p must be"), ({"radius": -0.1}, "radius"), ({"radius": math.nan}, "radius")]
)
def test_names_the_wrong_number(change, word):
    center, radius, weight, bias = inputs((3,), 5, 4, "cpu", torch.float32)
    with pytest.raises(ValueError, match=f"ball_linear: {word}"):
        ball_linear(**{"center": center, "radius": radius, "weight": weight, "bias": bias, **change})
