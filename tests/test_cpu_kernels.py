"""What only the compiled CPU kernels can get wrong: instruction sets, transforms, threads, and where a NaN ends up."""

import math

import pytest
import torch

import lipfast.ops.certified_radius as radius_module
import lipfast.ops.interval_conv2d as module
import lipfast.ops.interval_linear as interval_linear_module
from lipfast import certified_radius, interval_conv2d, interval_linear, loaded
from tests.checks import DTYPES, assert_near, in_process
from tests.test_interval_conv2d import inputs

pytestmark = pytest.mark.skipif(not loaded["cpu"], reason="the CPU kernels are not built")

#            B, C, H, W, O, kernel, stride, padding, dilation, groups
TRANSFORMED = [
    (2, 16, 6, 6, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (0, 16, 12, 12, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 17, 9, 13, 33, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (2, 32, 15, 12, 48, (3, 3), (1, 1), (2, 2), (1, 1), 1),
    (1, 16, 8, 9, 20, (3, 3), (1, 1), (3, 0), (1, 1), 1),
    (2, 16, 24, 26, 18, (4, 4), (2, 2), (1, 1), (1, 1), 1),
    (1, 19, 27, 25, 16, (4, 4), (2, 2), (0, 2), (1, 1), 1),
    (1, 16, 26, 24, 33, (4, 4), (2, 2), (3, 1), (1, 1), 1),
]
OTHER = [
    (1, 70, 5, 5, 40, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 37, 9, 8, 37, (3, 3), (2, 1), (1, 2), (1, 1), 37),
    (2, 12, 9, 7, 18, (3, 2), (3, 2), (2, 1), (2, 1), 3),
    (1, 3, 40, 5, 34, (5, 1), (2, 1), (0, 0), (1, 1), 1),
]
HANDED_OVER = [  # in float32, to PyTorch's convolutions
    (2, 256, 4, 3, 128, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 16, 9, 8, 4, (3, 3), (1, 1), (1, 1), (1, 1), 4),
]
OTHER += HANDED_OVER


def answers(case, dtype, outward=False):
    """Box and, without outward rounding, gradients."""
    torch.manual_seed(0)
    args, options = inputs(*case, "cpu", dtype)
    leaves = [t.requires_grad_() for t in args]
    out = interval_conv2d(*leaves, **options, outward=outward)
    return [o.detach() for o in out] + list(torch.autograd.grad(out, leaves, [torch.randn_like(o) for o in out]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", TRANSFORMED + OTHER, ids=str)
def test_equals_the_reference_at_every_boundary(case, dtype):
    got = answers(case, dtype)
    torch.manual_seed(0)
    args, options = inputs(*case, "cpu", dtype)
    leaves = [t.double().requires_grad_() for t in args]
    out = module.reference(*leaves, **options)
    seeds = [torch.randn_like(o, dtype=dtype).double() for o in out]
    for g, w in zip(got, [*out, *torch.autograd.grad(out, leaves, seeds)], strict=True):
        assert_near(g, w, dtype, slack=2)


@pytest.mark.parametrize("case", HANDED_OVER, ids=str)
def test_hands_over_what_pytorch_does_faster(case):
    args, options = inputs(*case, "cpu", torch.float32)
    for got, want in zip(interval_conv2d(*args, **options), module.reference(*args, **options), strict=True):
        assert torch.equal(got, want)


def test_hands_over_large_gradients():
    x, seed, weight = torch.randn(2**14, 257), torch.randn(2**14, 257), torch.randn(257, 257)
    args = (seed, seed + 1, x, x + 1, weight, True, True)
    got, want = torch.ops.lipfast.interval_linear_backward(*args), interval_linear_module.backward_reference(*args)
    assert all(map(torch.equal, got, want))


def radii(dtype, function=certified_radius, closest=torch.ops.lipfast.certified_radius_closest):
    """Of logits and constants with every special number, and with ties: radius, prediction and closest class."""
    torch.manual_seed(0)
    answers = []
    for B, K in ((70, 2), (37, 10), (3, 16), (5, 133)):
        logits = torch.randn(B, K, dtype=dtype)
        logits[::3] = logits[::3].round()
        limits = torch.finfo(dtype)
        special = torch.tensor([math.nan, math.inf, -math.inf, limits.max, -limits.max, 0.0, -0.0, limits.tiny], dtype=dtype)
        for constants in (torch.rand((), dtype=dtype), torch.rand(K, K, dtype=dtype), torch.rand(B, K, K, dtype=dtype)):
            for t in (logits, constants):
                some = torch.rand(t.shape) < 0.3 / K
                t[some] = special[torch.randint(len(special), (int(some.sum()),))]
            answers += [*function(logits, constants), closest(logits, constants)]
    return answers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_radii_are_the_references_to_the_bit(dtype):
    for got, want in zip(radii(dtype), radii(dtype, radius_module.reference, radius_module.closest_reference), strict=True):
        assert torch.equal(got, want)


SCRIPT = """
import sys, torch
from tests.test_cpu_kernels import DTYPES, OTHER, TRANSFORMED, answers, radii
from lipfast import interval_linear
torch.manual_seed(0)
out = [answers(case, dtype, outward) for case in TRANSFORMED + OTHER
       for dtype in (torch.float32, torch.float64) for outward in (False, True)]
for B, I, O in ((1, 70, 5), (3, 67, 9), (13, 700, 70)):
    x, w = torch.randn(B, I), torch.randn(O, I, requires_grad=True)
    box = interval_linear(x, x + 1, w)
    out.append([*box, *torch.autograd.grad(sum(b.square().sum() for b in box), w)])
exact = [t for dtype in DTYPES for t in radii(dtype)]
torch.save((torch.ops.lipfast.cpu_capability(), [[t.detach() for t in o] for o in out], exact), sys.stdout.buffer)
"""


@pytest.fixture(scope="module")
def here():
    return in_process(SCRIPT, OMP_NUM_THREADS="1")


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_answers(capability, here):
    name, got, exact = in_process(SCRIPT, LIPFAST_CPU_CAPABILITY=capability)
    if name != capability:
        pytest.skip(f"this machine has no {capability}")
    for g, w in zip(got, here[1], strict=True):
        for a, b in zip(g, w, strict=True):
            assert_near(a, b, a.dtype, slack=2)
    assert all(map(torch.equal, exact, here[2]))


def test_answers_do_not_depend_on_the_number_of_threads(here):
    _, answers, exact = in_process(SCRIPT, OMP_NUM_THREADS="3")
    for got, want in zip(answers, here[1], strict=True):
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)
    assert all(map(torch.equal, exact, here[2]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", TRANSFORMED + OTHER, ids=str)
def test_a_bad_pixel_spoils_what_it_touches_and_no_other_image(case, bad):
    (lower, upper, weight, bias), options = inputs(2, *case[1:], "cpu", torch.float32)
    y, x = case[2] // 2, case[3] // 2
    upper[1, :, y, x] = bad
    touched = torch.zeros_like(lower)
    touched[1, :, y, x] = 1
    touched = torch.nn.functional.conv2d(touched, torch.ones_like(weight), **options) > 0
    for t in interval_conv2d(lower, upper, weight, bias, **options):
        assert not t[touched].isfinite().any()
        assert t[0].isfinite().all()


def test_a_spread_that_cancels_stays_ordered():
    # The last row and column of the kernel are zero, so pixels there add to the transforms and must cancel.
    (lower, _, weight, _), options = inputs(*TRANSFORMED[3], "cpu", torch.float32)
    weight[:, :, 2, :] = weight[:, :, :, 2] = 0
    lower.zero_()
    upper = lower.clone()
    upper[:, :, 2, 3] = torch.rand(upper.shape[:2])
    low, high = interval_conv2d(lower, upper, weight, **options)
    assert (low <= high).all()


def test_one_row_and_many_rows_agree():
    x, w = torch.randn(40, 133), torch.randn(35, 133)
    for whole, single in zip(interval_linear(x, x + 1, w), interval_linear(x[:1], x[:1] + 1, w), strict=True):
        assert_near(whole[:1], single, torch.float32)
