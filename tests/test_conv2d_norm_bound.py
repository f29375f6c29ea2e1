from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import lipfast.ops.conv2d_norm_bound as module
from lipfast import conv2d_norm_bound
from tests.checks import DTYPES, check_op

#     C, H, W, O, kernel, stride, padding, dilation, groups
CASES = [
    (3, 7, 6, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (4, 1, 1, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),  # one pixel, one tap of use
    (4, 1, 2, 3, (1, 1), (1, 1), (3, 2), (1, 1), 1),  # more padding than image
    (3, 2, 3, 3, (5, 5), (1, 1), (2, 2), (1, 1), 1),  # a kernel larger than the image
    (4, 5, 6, 5, (1, 1), (2, 1), (0, 0), (1, 1), 1),
    (4, 9, 8, 6, (3, 2), (2, 3), (2, 1), (1, 2), 2),
    (4, 7, 9, 5, (3, 3), (2, 2), (0, 0), (1, 1), 1),  # a stride that does not divide
    (5, 8, 7, 4, (4, 4), (3, 2), (1, 2), (1, 1), 1),
    (6, 6, 7, 6, (3, 3), (1, 1), (1, 1), (1, 1), 6),
    (4, 9, 9, 4, (2, 3), (1, 2), (0, 2), (3, 2), 2),
    (3, 7, 8, 2, (2, 2), (5, 4), (1, 0), (1, 1), 1),  # pixels that nothing reads
    (1, 5, 6, 1, (3, 3), (3, 3), (0, 4), (2, 3), 1),  # outputs that stop short of the last zeros
]
CIRCULAR = [
    (4, 8, 8, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (4, 8, 6, 5, (4, 4), (2, 2), (1, 1), (1, 1), 1),
    (4, 6, 9, 6, (3, 3), (2, 3), (1, 1), (1, 1), 2),
    (3, 4, 5, 4, (5, 5), (1, 1), (2, 2), (1, 1), 1),  # taps that meet
    (3, 5, 4, 4, (3, 2), (1, 1), (4, 1), (4, 2), 1),
    (5, 6, 6, 4, (1, 1), (3, 2), (0, 0), (1, 1), 1),
]
UNEVEN = [  # circular too, but not a whole torus of outputs
    (4, 7, 9, 4, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (4, 6, 6, 4, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (4, 6, 5, 4, (3, 3), (1, 1), (2, 5), (1, 1), 1),
    (4, 3, 5, 4, (2, 2), (2, 3), (3, 2), (1, 1), 2),
]
LARGE = {
    "3x3, 64 to 64, 16x16": (64, 16, 16, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "4x4 stride 2, 64 to 64, 16x16": (64, 16, 16, 64, (4, 4), (2, 2), (1, 1), (1, 1), 1),
}

# The op also returns the deciding frequency.
op = torch.ops.lipfast.conv2d_norm_bound
SIGMA = SimpleNamespace(
    __name__=module.__name__,
    reference=lambda *args, circular=False, **options: module.reference(*args, circular=circular, **options)[0],
    conv2d_norm_bound=lambda *args, circular=False, **options: op(*args, circular=circular, **options)[0],
)


def inputs(C, H, W, O, kernel, stride, padding, dilation, groups, device, dtype):
    where = {"stride": list(stride), "padding": list(padding), "dilation": list(dilation), "groups": groups}
    return torch.randn(O, C // groups, *kernel, device=device, dtype=dtype), {"input_size": [H, W], **where}


def norm(weight, input_size, padding, padding_mode="zeros", **where):
    """By the SVD of the operator, from the identity pushed through conv2d; differentiable."""
    C = weight.shape[1] * where["groups"]
    pixels = torch.eye(C * input_size[0] * input_size[1], dtype=torch.float64, device=weight.device)
    images = pixels.view(-1, C, *input_size)
    if padding_mode == "circular":
        (up, left), padding = padding, 0
        images = F.pad(images, (left, left, up, up), mode="circular")
    return torch.linalg.svdvals(F.conv2d(images, weight.double(), padding=padding, **where).flatten(1))[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, device):
    weight, options = inputs(*case, device, dtype)
    check_op(SIGMA, (weight,), gradient=False, **options, circular=False, explicit=1024, iterations=8)


@pytest.mark.parametrize("explicit", [0, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_never_below_the_norm(case, dtype, explicit, device):
    for _ in range(3):
        weight, options = inputs(*case, device, dtype)
        bound = conv2d_norm_bound(weight, **options, explicit=explicit)
        assert bound.dtype == dtype
        exact = norm(weight, **options)
        assert bound.double() >= exact * (1 - 1e-14)
        if explicit:
            assert bound.double() <= exact * (1.001 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CIRCULAR + UNEVEN, ids=str)
def test_is_never_below_the_circular_norm(case, dtype, device):
    for _ in range(3):
        weight, options = inputs(*case, device, dtype)
        exact = norm(weight, **options, padding_mode="circular")
        torus = conv2d_norm_bound(weight, **options, padding_mode="circular", explicit=0).double()
        refined = conv2d_norm_bound(weight, **options, padding_mode="circular").double()
        assert exact * (1 - 1e-14) <= refined <= torus
        nearly = 1.001 + torch.finfo(dtype).eps
        assert refined <= exact * nearly
        if case in CIRCULAR:
            assert torus <= exact * nearly


@pytest.mark.parametrize(
    "case",
    [
        (8, 8, 8, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
        (16, 8, 8, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1),
        (3, 12, 12, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1),
        (8, 12, 12, 8, (4, 4), (2, 2), (1, 1), (1, 1), 1),
        (16, 8, 8, 16, (4, 4), (2, 2), (1, 1), (1, 1), 1),
    ],
    ids=str,
)
def test_torus_is_nearly_tight_for_zero_padding(case, device):
    for _ in range(5):
        weight, options = inputs(*case, device, torch.float32)
        assert conv2d_norm_bound(weight, **options, explicit=0) <= 1.15 * norm(weight, **options)


def test_one_by_one_kernel_has_the_norm_of_its_matrix(device):
    weight = torch.randn(40, 30, 1, 1, device=device, dtype=torch.float64)
    exact = torch.linalg.svdvals(weight[..., 0, 0])[0]
    assert exact * (1 - 1e-14) <= conv2d_norm_bound(weight, 500, stride=3, padding=2, iterations=20) <= exact * 1.00001


def test_more_iterations_tighten(device):
    weight, options = inputs(*next(iter(LARGE.values())), device, torch.float32)
    few, some, many = (conv2d_norm_bound(weight, **options, explicit=0, iterations=t) for t in (0, 2, 12))
    assert many < some < few


def test_frequencies_in_parts_give_the_same(device, monkeypatch):
    weight, options = inputs(*CASES[6], device, torch.float64)
    whole = conv2d_norm_bound(weight, **options, explicit=0)
    monkeypatch.setattr(module, "_PART", dict.fromkeys(module._PART, 1))
    torch.testing.assert_close(conv2d_norm_bound(weight, **options, explicit=0), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_gradient_is_that_of_the_norm_on_the_torus(padding_mode, device):
    C, H, W, *rest = CIRCULAR[2]
    weight, options = inputs(C, H, W, *rest, device, torch.float64)
    weight.requires_grad_()
    bound = conv2d_norm_bound(weight, **options, padding_mode=padding_mode, explicit=0, iterations=25)
    (got,) = torch.autograd.grad(bound, weight)
    if padding_mode == "zeros":  # the torus of this case: image and one more period
        options = {**options, "input_size": [8, 12]}
    (want,) = torch.autograd.grad(norm(weight, **options, padding_mode="circular"), weight)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-30, 1e30, 1e300])
def test_survives_extreme_scales(scale, device):
    weight, options = inputs(*CASES[6], device, torch.float64)
    bound = conv2d_norm_bound(weight * scale, **options)
    exact = norm(weight, **options) * scale
    assert exact * (1 - 1e-14) <= bound <= exact * 1.001 + 1e-322


def test_zero_gives_zero_and_nan_and_inf_stay_visible(device):
    weight, options = inputs(*CASES[6], device, torch.float32)
    assert conv2d_norm_bound(torch.zeros_like(weight), **options) == 0
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight[3, 1, 0, 1] = bad
        for explicit in (0, 1024):
            assert not conv2d_norm_bound(weight, **options, explicit=explicit).isfinite()


def test_rounds_up_beyond_the_range_of_the_dtype(device):
    weight = torch.full((4, 4, 3, 3), 60000.0, device=device, dtype=torch.float16)
    assert conv2d_norm_bound(weight, 8, padding=1) == torch.inf


def test_compiles_without_graph_break(device):
    weight, options = inputs(*CASES[6], device, torch.float32)
    weight.requires_grad_()
    loss = lambda w: conv2d_norm_bound(w, **options).square()
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(weight), weight)
    torch.testing.assert_close(got, torch.autograd.grad(loss(weight), weight))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weight": torch.ones(2, 4, 3, 3, 3)}, "weight"),
        ({"weight": torch.ones(4, 0, 3, 3)}, "weight"),
        ({"input_size": (0, 4)}, "input_size"),
        ({"stride": 0}, "stride"),
        ({"groups": 3}, "groups"),
        ({"padding_mode": "reflect"}, "padding_mode"),
        ({"padding_mode": "circular", "padding": 9}, "padding"),
        ({"explicit": -1}, "explicit"),
        ({"iterations": -1}, "iterations"),
    ],
)
def test_names_the_wrong_argument(change, word):
    with pytest.raises(ValueError, match=f"conv2d_norm_bound: {word} must"):
        conv2d_norm_bound(**{"weight": torch.ones(4, 3, 3, 3), "input_size": (7, 6), "padding": 1, **change})
