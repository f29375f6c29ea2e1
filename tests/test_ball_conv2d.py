import math

import pytest
import torch
import torch.nn.functional as F

import lipfast.ops.ball_conv2d as module
from lipfast import ball_conv2d, ball_linear
from tests.checks import DTYPES, check_op
from tests.test_ball_linear import MIX, NORMS, assert_contains_the_exact_box

#        B, C, H, W, O, kernel, stride, padding, dilation, groups
CASES = [
    (2, 3, 7, 6, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (0, 3, 5, 5, 4, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (2, 4, 9, 8, 6, (3, 2), (2, 3), (2, 1), (1, 2), 2),
    (3, 5, 6, 7, 5, (3, 3), (1, 1), (1, 1), (1, 1), 5),
    (2, 4, 5, 6, 6, (4, 4), (2, 2), (1, 1), (1, 1), 1),
    (2, 2, 3, 4, 3, (2, 3), (1, 2), (4, 3), (2, 1), 1),  # pixels that see padding only
]
# Every mix of dtype and norm with one case, every case with one mix; values of all cases and norms are asked for below.
MIXED_CASES = [(CASES[3], *mix) for mix in MIX] + [(case, *MIX[i % len(MIX)]) for i, case in enumerate(CASES) if i != 3]
LARGE = {"3x3, 64 to 64, 16x16, batch 256": (256, 64, 16, 16, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1)}


def inputs(B, C, H, W, O, kernel, stride, padding, dilation, groups, device, dtype):
    center = torch.randn(B, C, H, W, device=device, dtype=dtype)
    radius = torch.rand(B, device=device, dtype=dtype)
    fan_in = C // groups * kernel[0] * kernel[1]
    weight = torch.randn(O, C // groups, *kernel, device=device, dtype=dtype) / fan_in**0.5
    options = {"stride": list(stride), "padding": list(padding), "dilation": list(dilation), "groups": groups}
    return (center, radius, weight, torch.randn(O, device=device, dtype=dtype)), options


def as_matrix(center, weight, options):
    """The convolution as a matrix (O H' W', C H W), and the bias's place in it (O,) -> (O H' W',)."""
    pixels = center[0].numel() if len(center) else 0
    basis = torch.eye(pixels, dtype=torch.float64, device=center.device).reshape(-1, *center.shape[1:])
    columns = F.conv2d(basis, weight.double(), **options)
    return columns.flatten(1).T, lambda b: b[:, None].expand(-1, columns[0, 0].numel()).flatten()


@pytest.mark.parametrize(("case", "dtype", "p"), MIXED_CASES, ids=str)
def test_op(case, dtype, p, device):
    args, options = inputs(*case, device, dtype)
    check_op(module, args, **options, p=p)


@pytest.mark.parametrize("p", NORMS)
def test_without_bias_and_with_one_radius(p, device):
    (center, _, weight, _), options = inputs(*CASES[0], device, torch.float32)
    check_op(module, (center, torch.tensor(0.3, device=device), weight, None), **options, p=p)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("case", [c for c in CASES if c[0]], ids=str)
def test_is_the_box_of_the_convolution_as_a_matrix(case, p, device):
    (center, radius, weight, bias), options = inputs(*case, device, torch.float64)
    matrix, spread = as_matrix(center, weight, options)
    want = ball_linear(center.flatten(1), radius, matrix, spread(bias), p=p)
    for g, w in zip(ball_conv2d(center, radius, weight, bias, **options, p=p), want, strict=True):
        torch.testing.assert_close(g.flatten(1), w)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c[0]], ids=str)
def test_outward_contains_the_exact_box(case, dtype, p, device):
    (center, radius, weight, bias), options = inputs(*case, device, dtype)
    center, radius = center[:1], radius[:1] * 1e-4
    matrix, spread = as_matrix(center, weight, options)
    box = [t.flatten(1) for t in ball_conv2d(center, radius, weight, bias, **options, p=p, outward=True)]
    assert_contains_the_exact_box(box, center.flatten(1), radius, matrix, spread(bias), p)


@pytest.mark.parametrize("p", NORMS)
def test_outward_is_nearly_tight(p, device):
    (center, _, weight, bias), options = inputs(*CASES[3], device, torch.float32)
    low, high = ball_conv2d(center, 0.5, weight, bias, **options, p=p, outward=True)
    wide = [t.double() for t in (center, center.new_tensor([0.5]), weight, bias)]
    want = module.reference(*wide, **options, p=p)
    assert ((high - low).sum() / (want[1] - want[0]).sum()).item() < 1.001


@pytest.mark.parametrize("p", NORMS)
def test_gradient_of_one_input_only(p, device):
    args, options = inputs(*CASES[3], device, torch.float64)
    for leaf in args:
        leaf.requires_grad_()
        (grad,) = torch.autograd.grad(ball_conv2d(*args, **options, p=p)[1].sum(), leaf)
        (want,) = torch.autograd.grad(module.reference(*args, **options, p=p)[1].sum(), leaf)
        torch.testing.assert_close(grad, want)
        leaf.requires_grad_(False)


@pytest.mark.parametrize("p", NORMS)
def test_differentiates_twice(p, device):
    args, options = inputs(1, 2, 4, 3, 2, (2, 2), (1, 1), (1, 0), (1, 1), 1, device, torch.float64)
    args = [t.requires_grad_() for t in args]
    torch.autograd.gradgradcheck(lambda *t: ball_conv2d(*t, **options, p=p), args)


@pytest.mark.parametrize("outward", [False, True])
def test_compiles_without_graph_break(outward, device):
    args, options = inputs(*CASES[0], device, torch.float32)
    args = [t.requires_grad_() for t in args]
    loss = lambda *t: sum((o * o).sum() for o in ball_conv2d(*t, **options, outward=outward))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*args), args)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*args), args))


def test_leading_dimensions_and_names_of_padding(device):
    (center, radius, weight, bias), _ = inputs(6, 3, 7, 6, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1, device, torch.float32)
    want = ball_conv2d(center, radius, weight, bias, padding=1)
    split = lambda t: t.unflatten(0, (2, 3))
    got = ball_conv2d(split(center), split(radius), weight, bias, padding="same")
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, split(w))
    assert ball_conv2d(center[0], 0.1, weight, padding="valid")[0].shape == (4, 5, 4)


def test_gradient_of_a_tie_goes_to_the_first_tap(device):
    weight = torch.ones(1, 2, 2, 2, device=device, requires_grad=True)
    upper = ball_conv2d(torch.zeros(2, 2, 2, device=device), 1.0, weight, padding=1, p=1)[1]  # 3 x 3 outputs
    (grad,) = torch.autograd.grad(upper.sum(), weight)
    # The top left output sees only the last tap, its row and column see two taps, all others see tap (0, 0).
    want = [[[4.0, 2.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]
    torch.testing.assert_close(grad, torch.tensor([want], device=device))


@pytest.mark.parametrize("p", NORMS)
def test_a_zero_kernel_has_gradient_zero(p, device):
    weight = torch.zeros(1, 2, 2, 2, device=device, requires_grad=True)
    upper = ball_conv2d(torch.zeros(2, 2, 2, device=device), 1.0, weight, padding=3, p=p)[1]
    (grad,) = torch.autograd.grad(upper.sum(), weight)
    assert torch.equal(grad, torch.zeros_like(weight))


@pytest.mark.parametrize("outward", [False, True])
@pytest.mark.parametrize("p", NORMS)
def test_nan_stays_visible(p, outward, device):
    for index, spoiled in ((0, slice(1, 2)), (1, slice(1, 2)), (2, slice(None))):
        args, options = inputs(*CASES[0], device, torch.float32)
        args[index].view(-1)[-1] = math.nan  # the last sample's last pixel, its radius, the last tap of the last channel
        low, high = ball_conv2d(*args, **options, p=p, outward=outward)
        assert low[spoiled, -1, -2, -2].isnan().all()
        assert high[spoiled, -1, -2, -2].isnan().all()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"stride": 0}, "stride"),
        ({"padding": -1}, "padding"),
        ({"groups": 2}, "groups"),
        ({"dilation": 9}, "weight spans"),
        ({"p": 3}, "p must be"),
        ({"radius": -1.0}, "radius"),
        ({"radius": torch.ones(3)}, "radius"),
        ({"bias": torch.ones(5)}, "bias"),
    ],
)
def test_names_the_wrong_argument(change, word):
    args, options = inputs(*CASES[0], "cpu", torch.float32)
    named = dict(zip(("center", "radius", "weight", "bias"), args, strict=True))
    with pytest.raises(ValueError, match=f"ball_conv2d: {word}"):
        ball_conv2d(**{**named, **options, **change})
