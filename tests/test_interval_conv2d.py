import pytest
import torch
import torch.nn.functional as F

import lipfast.ops.interval_conv2d as module
from lipfast import interval_conv2d
from tests.checks import DTYPES, check_op

#        B, C, H, W, O, kernel, stride, padding, dilation, groups
CASES = [
    (2, 3, 7, 6, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (0, 3, 5, 5, 4, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (2, 4, 9, 8, 6, (3, 2), (2, 3), (2, 1), (1, 2), 2),
    (3, 5, 6, 7, 5, (3, 3), (1, 1), (1, 1), (1, 1), 5),
    (2, 17, 11, 13, 35, (4, 4), (2, 2), (1, 1), (1, 1), 1),
    (1, 33, 10, 10, 40, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 8, 6, 6, 16, (1, 1), (2, 2), (0, 0), (1, 1), 1),
]
LARGE = {
    "3x3, 32 to 32, 32x32, batch 64": (64, 32, 32, 32, 32, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3, 64 to 64, 16x16, batch 256": (256, 64, 16, 16, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
}


def inputs(B, C, H, W, O, kernel, stride, padding, dilation, groups, device, dtype):
    lower = torch.randn(B, C, H, W, device=device, dtype=dtype)
    upper = lower + torch.rand(B, C, H, W, device=device, dtype=dtype)
    fan_in = C // groups * kernel[0] * kernel[1]
    weight = torch.randn(O, C // groups, *kernel, device=device, dtype=dtype) / fan_in**0.5
    options = {"stride": list(stride), "padding": list(padding), "dilation": list(dilation), "groups": groups}
    return (lower, upper, weight, torch.randn(O, device=device, dtype=dtype)), options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, device):
    args, options = inputs(*case, device, dtype)
    check_op(module, args, **options)


def test_without_bias(device):
    args, options = inputs(*CASES[0], device, torch.float32)
    check_op(module, (*args[:3], None), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outward_contains_the_float64_box(case, dtype, device):
    # Products of two float32 numbers are exact in float64; its own sums err by less than `slack`.
    (lower, upper, weight, bias), options = inputs(*case, device, dtype)
    low, high = interval_conv2d(lower, upper, weight, bias, **options, outward=True)
    wide = [t.double() for t in (lower, upper, weight, bias)]
    want = module.reference(*wide, **options)
    size = F.conv2d(torch.maximum(wide[0].abs(), wide[1].abs()), wide[2].abs(), wide[3].abs(), **options)
    slack = 4 * weight[0].numel() * 2.0**-53 * size if dtype != torch.float64 else 0
    assert (low.double() <= want[0] + slack).all()
    assert (want[1] - slack <= high.double()).all()


def test_channels_last_gives_the_same_box(device):
    args, options = inputs(2, 8, 9, 7, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1, device, torch.float32)
    last = [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in args]
    for a, b in zip(interval_conv2d(*args, **options), interval_conv2d(*last, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_leading_dimensions_and_names_of_padding(device):
    (lower, upper, weight, bias), _ = inputs(6, 3, 7, 6, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1, device, torch.float32)
    want = interval_conv2d(lower, upper, weight, bias, padding=1)
    split = lambda t: t.unflatten(0, (2, 3))
    got = interval_conv2d(split(lower), split(upper), weight, bias, padding="same")
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, split(w))
    assert interval_conv2d(lower[0], upper[0], weight, padding="valid")[0].shape == (4, 5, 4)


def test_differentiates_twice(device):
    args, options = inputs(1, 2, 4, 3, 2, (2, 2), (1, 1), (1, 0), (1, 1), 1, device, torch.float64)
    args = [t.requires_grad_() for t in args]
    torch.autograd.gradgradcheck(lambda *t: interval_conv2d(*t, **options), args)


@pytest.mark.parametrize("outward", [False, True])
def test_compiles_without_graph_break(outward, device):
    args, options = inputs(*CASES[0], device, torch.float32)
    args = [t.requires_grad_() for t in args]
    loss = lambda *t: sum((o * o).sum() for o in interval_conv2d(*t, **options, outward=outward))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*args), args)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*args), args))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"stride": 0}, "stride"),
        ({"padding": -1}, "padding"),
        ({"padding": "full"}, "padding"),
        ({"dilation": (1, 2, 3)}, "dilation"),
        ({"groups": 2}, "groups"),
        ({"dilation": 9}, "weight spans"),
    ],
)
def test_names_the_wrong_option(change, word):
    args, options = inputs(*CASES[0], "cpu", torch.float32)
    with pytest.raises(ValueError, match=f"interval_conv2d: {word}"):
        interval_conv2d(*args, **{**options, **change})
