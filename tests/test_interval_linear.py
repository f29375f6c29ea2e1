from fractions import Fraction

import pytest
import torch

import lipfast.ops.interval_linear as module
from lipfast import interval_linear
from tests.checks import DTYPES, check_op

#        leading sizes, I, O
CASES = [((3,), 5, 4), ((1,), 1, 1), ((0,), 5, 4), ((2, 3), 129, 33), ((7,), 64, 0), ((), 6, 3)]
LARGE = {"3072 to 512, batch 256": ((256,), 3072, 512), "4096 to 4096, batch 1024": ((1024,), 4096, 4096)}


def inputs(shape, n_in, n_out, device, dtype):
    lower = torch.randn(*shape, n_in, device=device, dtype=dtype)
    upper = lower + torch.rand(*shape, n_in, device=device, dtype=dtype)
    weight = torch.randn(n_out, n_in, device=device, dtype=dtype) / n_in**0.5
    return lower, upper, weight, torch.randn(n_out, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, device):
    check_op(module, inputs(*case, device, dtype))


def test_without_bias(device):
    check_op(module, (*inputs((3,), 17, 5, device, torch.float32)[:3], None))


def test_gradient_of_one_input_only(device):
    lower, upper, weight, bias = inputs((3,), 5, 4, device, torch.float64)
    for leaf in (lower, upper, weight, bias):
        leaf.requires_grad_()
        (grad,) = torch.autograd.grad(interval_linear(lower, upper, weight, bias)[1].sum(), leaf)
        (want,) = torch.autograd.grad(module.reference(lower, upper, weight, bias)[1].sum(), leaf)
        torch.testing.assert_close(grad, want)
        leaf.requires_grad_(False)


def test_differentiates_twice(device):
    args = [t.requires_grad_() for t in inputs((2,), 3, 2, device, torch.float64)]
    torch.autograd.gradgradcheck(interval_linear, args)


@pytest.mark.parametrize("outward", [False, True])
def test_compiles_without_graph_break(outward, device):
    args = [t.requires_grad_() for t in inputs((3,), 5, 4, device, torch.float32)]
    loss = lambda *t: sum((o * o).sum() for o in interval_linear(*t, outward=outward))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*args), args)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*args), args))


def test_is_tight(device):
    lower, upper, weight, bias = inputs((4,), 6, 3, device, torch.float64)
    high = interval_linear(lower, upper, weight, bias)[1]
    corner = torch.where(weight > 0, upper[:, None], lower[:, None])  # the x that attains each upper bound
    torch.testing.assert_close((corner * weight).sum(-1) + bias, high)


@pytest.mark.parametrize("width", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outward_contains_the_exact_box(dtype, width, device):
    lower, upper, weight, bias = inputs((4,), 70, 12, device, dtype)
    upper = lower + (upper - lower) * width
    low, high = interval_linear(lower, upper, weight, bias, outward=True)
    l, u, w, b = ([[Fraction(v) for v in row] for row in t.double().tolist()] for t in (lower, upper, weight, bias[None]))
    for n in range(4):
        for o in range(12):
            exact_low = b[0][o] + sum(v * (l[n][i] if v > 0 else u[n][i]) for i, v in enumerate(w[o]))
            exact_high = b[0][o] + sum(v * (u[n][i] if v > 0 else l[n][i]) for i, v in enumerate(w[o]))
            assert Fraction(low[n, o].item()) <= exact_low
            assert exact_high <= Fraction(high[n, o].item())


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_outward_survives_extreme_scales(scale, device):
    lower, upper, weight, bias = inputs((4,), 70, 12, device, torch.float32)
    lower, upper, bias = lower * scale, upper * scale, bias * 0
    low, high = interval_linear(lower, upper, weight, bias, outward=True)
    want = module.reference(*(t.double() for t in (lower, upper, weight, bias)))
    assert (low.double() <= want[0]).all()
    assert (want[1] <= high.double()).all()


def test_outward_is_nearly_tight(device):
    lower, upper, weight, bias = inputs((64,), 512, 256, device, torch.float32)
    low, high = interval_linear(lower, upper, weight, bias, outward=True)
    want = module.reference(*(t.double() for t in (lower, upper, weight, bias)))
    assert ((high - low).sum() / (want[1] - want[0]).sum()).item() < 1.001


def test_nan_and_inf_stay_visible(device):
    lower, upper, weight, bias = inputs((4,), 6, 3, device, torch.float32)
    for outward in (False, True):
        for bad in (float("nan"), float("inf")):
            spoiled = upper.clone()
            spoiled[1, 2] = bad
            low, high = interval_linear(lower, spoiled, weight, bias, outward=outward)
            assert not low[1].isfinite().any()
            assert not high[1].isfinite().any()
            assert low[0].isfinite().all()


@pytest.mark.parametrize(("index", "word"), [(1, "upper"), (2, "weight"), (3, "bias")])
@pytest.mark.parametrize("spoil", [lambda t: t[..., :-1], lambda t: t.double(), lambda t: t.to("meta")])
def test_names_the_wrong_argument(index, word, spoil):
    args = list(inputs((3,), 5, 4, "cpu", torch.float32))
    args[index] = spoil(args[index])
    with pytest.raises(ValueError, match=f"interval_linear: {word} must be"):
        interval_linear(*args)
