"""The Triton kernels on CPU tensors, in Triton's interpreter. On a GPU the tests of the ops run them as they are."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lipfast.ops.beta_abs as folding
import lipfast.ops.conv2d_norm_estimate as norm
import lipfast.ops.interval_conv2d as conv2d
import lipfast.ops.interval_linear as linear
import lipfast.ops.spatial_shift as shift
from lipfast import rounding
from lipfast.ops.spectral_norm_estimate import _random
from tests import test_conv2d_norm_estimate, test_interval_conv2d, test_interval_linear
from tests.checks import DTYPES, assert_near

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, started below")

# Sizes around the interpreter's tile of 32 x 16 x 16.
LINEAR = [((3,), 5, 4), ((1,), 1, 1), ((0,), 5, 4), ((2, 9), 33, 35), ((7,), 16, 0), ((), 6, 3), ((4,), 0, 3)]
CONV2D = [
    (2, 4, 9, 8, 6, (3, 2), (2, 3), (2, 1), (1, 2), 2),
    (1, 3, 5, 4, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (0, 3, 5, 5, 4, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (1, 3, 3, 4, 3, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    (1, 17, 5, 6, 33, (2, 2), (2, 2), (1, 1), (1, 1), 1),
    (1, 3, 9, 8, 2, (3, 3), (2, 3), (0, 2), (2, 2), 1),
    (2, 16, 4, 4, 16, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    (1, 1, 2, 40, 1, (1, 2), (1, 5), (0, 0), (1, 1), 1),
]
# As in tests/test_conv2d_norm_estimate.py.
NORM = [
    (None, 1, None, 1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (None, 0, None, None, 3, 5, 5, 4, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (3, 1, None, 3, 2, 3, 3, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (None, None, None, None, 3, 3, 4, 2, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (None, 2, 2, 1, 4, 5, 4, 6, (3, 2), (2, 3), (2, 1), (1, 2), 2),
]
# B, C, H, W
IMAGES = [(2, 10, 3, 5), (1, 5, 1, 1), (0, 10, 2, 2), (3, 5, 4, 1), (1, 20, 1, 2)]
LAYOUTS = {
    "channels first": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.mT.contiguous().mT,
    "channels in the middle": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
}


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter():
    if version(triton) < (3, 7) and version(np) >= (2, 4):
        pytest.skip("the interpreter of triton < 3.7 needs numpy < 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]


def version(module):
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def linear_args(case, dtype):
    torch.manual_seed(0)
    return test_interval_linear.inputs(*case, "cpu", dtype) if case[1] else empty_rows(*case, dtype)


def empty_rows(shape, n_in, n_out, dtype):
    x = torch.empty(*shape, n_in, dtype=dtype)
    return x, x, torch.empty(n_out, n_in, dtype=dtype), torch.randn(n_out, dtype=dtype)


def conv2d_args(case, dtype):
    torch.manual_seed(0)
    return test_interval_conv2d.inputs(*case, "cpu", dtype)


@triton.jit
def ends_kernel(value_ptr, low_ptr, high_ptr, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(value_ptr + at, mask=at < count, other=0.0)
    low, high = launch.round_down(value, low_ptr.dtype.element_ty), launch.round_up(value, low_ptr.dtype.element_ty)
    tl.store(low_ptr + at, low, mask=at < count)
    tl.store(high_ptr + at, high, mask=at < count)


kernels = SimpleNamespace(
    linear=pytest.importorskip("lipfast.kernels.interval_linear"),
    conv2d=pytest.importorskip("lipfast.kernels.interval_conv2d"),
    norm=pytest.importorskip("lipfast.kernels.conv2d_norm_estimate"),
    folding=pytest.importorskip("lipfast.kernels.beta_abs"),
    shift=pytest.importorskip("lipfast.kernels.spatial_shift"),
)
launch = pytest.importorskip("lipfast.kernels.launch")
if INTERPRETED:  # the op itself then runs on the kernel
    torch.library.register_kernel("lipfast::conv2d_norm_estimate", "cpu")(kernels.norm.conv2d_norm_estimate)


def agree(kernel, reference, args, *options):
    dtype = args[0].dtype
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    for got, want in zip(kernel(*args, *options), reference(*wide, *options), strict=True):
        assert got.shape == want.shape
        assert got.dtype == dtype
        assert_near(got, want, dtype, slack=2)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear_forward_and_backward(case, dtype):
    lower, upper, weight, bias = linear_args(case, dtype)
    agree(kernels.linear.interval_linear, linear.reference, (lower, upper, weight, bias))
    agree(kernels.linear.interval_linear, linear.reference, (lower, upper, weight, None))
    grads = torch.randn(2, *lower.shape[:-1], weight.shape[0]).to(dtype)
    for need in ((True, True), (True, False), (False, True), (False, False)):
        args = (*grads, lower, upper, weight)
        agree(kernels.linear.interval_linear_backward, linear.backward_reference, args, *need)


@interpreted
@pytest.mark.parametrize(("case", "dtype"), [(c, torch.float32) for c in CONV2D] + [(CONV2D[0], d) for d in DTYPES], ids=str)
def test_conv2d_forward_and_backward(case, dtype):
    (lower, upper, weight, bias), options = conv2d_args(case, dtype)
    where = tuple(options.values())
    agree(kernels.conv2d.interval_conv2d, conv2d.reference, (lower, upper, weight, bias), *where)
    size = conv2d._output_size(lower, weight, *where[:3])
    grads = torch.randn(2, lower.shape[0], weight.shape[0], *size).to(dtype)
    for need in ((True, True), (True, False), (False, True), (False, False)):
        args = (*grads, lower, upper, weight)
        agree(kernels.conv2d.interval_conv2d_backward, conv2d.backward_reference, args, *where, *need)


@interpreted
def test_layout_and_long_sums_change_nothing():
    (lower, upper, weight, bias), options = conv2d_args((4, 2, 9, 9, 3, (2, 2), (1, 1), (0, 0), (1, 1), 1), torch.float32)
    where = tuple(options.values())
    want = kernels.conv2d.interval_conv2d(lower, upper, weight, bias, *where)
    last = [t.to(memory_format=torch.channels_last) for t in (lower, upper, weight)]
    for g, w in zip(kernels.conv2d.interval_conv2d(*last, bias, *where), want, strict=True):
        assert torch.equal(g, w)
    grads = torch.randn(2, *want[0].shape)  # 256 pixels: the sum of the weight gradient is cut in two
    agree(kernels.conv2d.interval_conv2d_backward, conv2d.backward_reference, (*grads, *last), *where, False, True)
    args = (*torch.randn(2, 300, 3), *torch.randn(2, 300, 5), torch.randn(3, 5))
    assert kernels.linear.sections(300, 16, 1)[0] == 2
    agree(kernels.linear.interval_linear_backward, linear.backward_reference, args, False, True)


@interpreted
@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_either_precision_setting_gives_the_gradient(setting):
    lower, upper, weight, _ = linear_args(((5,), 18, 7), torch.float32)
    args = (*torch.randn(2, 5, 7), lower, upper, weight)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        agree(kernels.linear.interval_linear_backward, linear.backward_reference, args, True, True)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@interpreted
@pytest.mark.parametrize("width", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outward_contains_the_exact_box(dtype, width, monkeypatch):
    monkeypatch.setattr(test_interval_linear, "interval_linear", kernels.linear.interval_linear)
    torch.manual_seed(0)
    test_interval_linear.test_outward_contains_the_exact_box(dtype, width, "cpu")


@interpreted
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_outward_survives_extreme_scales(scale, monkeypatch):
    monkeypatch.setattr(test_interval_linear, "interval_linear", kernels.linear.interval_linear)
    torch.manual_seed(0)
    test_interval_linear.test_outward_survives_extreme_scales(scale, "cpu")


@interpreted
def test_nan_and_inf_stay_visible(monkeypatch):
    monkeypatch.setattr(test_interval_linear, "interval_linear", kernels.linear.interval_linear)
    test_interval_linear.test_nan_and_inf_stay_visible("cpu")


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONV2D[:3], ids=str)
def test_outward_conv2d_contains_the_float64_box(case, dtype, monkeypatch):
    call = lambda lower, upper, weight, bias, *, outward, **options: kernels.conv2d.interval_conv2d(
        lower, upper, weight, bias, *options.values(), outward
    )
    monkeypatch.setattr(test_interval_conv2d, "interval_conv2d", call)
    torch.manual_seed(0)
    test_interval_conv2d.test_outward_contains_the_float64_box(case, dtype, "cpu")


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_steps_outward_to_the_next_number(dtype):
    value = torch.tensor([1.0, 1.001, -1.001, 0.0, -0.0, 1e-30, -1e-30, 65519.0, -65519.0, 3e38, -3e38, torch.inf, -torch.inf])
    if dtype == torch.bfloat16:
        value = value[~((value.abs() > 1e38) & value.isfinite())]  # the interpreter's cast knows no overflow there
    low, high = value.to(dtype), value.to(dtype)
    ends_kernel[(1,)](value, low, high, len(value), BLOCK=16)
    assert torch.equal(low, rounding.down(value, dtype))
    assert torch.equal(high, rounding.up(value, dtype))


@interpreted
@pytest.mark.parametrize("chunk", [16, 128])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, torch.float32) for c in NORM] + [(NORM[-1], d) for d in DTYPES if d != torch.float64],
    ids=str,
)
def test_norm_estimate_of_a_convolution(case, dtype, chunk, monkeypatch):
    monkeypatch.setattr(kernels.norm, "CHUNK", chunk)
    args, options = test_conv2d_norm_estimate.inputs(*case, "cpu", dtype)
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    for iterations in (0, 2):
        got = kernels.norm.conv2d_norm_estimate(*args, **options, iterations=iterations)
        want = norm.reference(*wide, **options, iterations=iterations)
        for g, w, kind in zip(got, want, (dtype, torch.float32, torch.float32), strict=True):
            assert g.shape == w.shape
            assert g.dtype == kind
            assert_near(g, w, dtype)


@interpreted
@pytest.mark.parametrize("chunk", [4, 16])
def test_norm_estimate_of_a_convolution_divides_as_its_reference_does(chunk, monkeypatch):
    monkeypatch.setattr(kernels.norm, "CHUNK", chunk)
    rows = torch.randn(8, 11) * torch.tensor([1.0, 1e-44, 1e-30, 1e37, 0.0, 1.0, 1.0, 1.0])[:, None]
    rows[5, 7], rows[6, 2], rows[7, 9] = torch.nan, torch.inf, -torch.inf
    rows[0, 3] = 1e-30  # under the mask of the next line, the rest is hidden
    mask = torch.rand(8, 11) < 0.6
    mask[0] = torch.arange(11) == 3
    mask[6:] = True  # leaves the Inf
    x, spare = (rows * mask)[..., None, None], (_random(11, rows) * mask)[..., None, None]
    got, length, sigma = torch.empty_like(rows), torch.empty_like(rows), torch.empty(8)
    kernels.norm._scale(rows, mask, got)
    torch.testing.assert_close(got, norm._direction(x, spare)[..., 0, 0])
    kernels.norm._scale(rows, mask, length, unit=True, sigma=sigma)
    torch.testing.assert_close(length, norm._unit(x)[..., 0, 0], equal_nan=True)
    want = torch.linalg.vector_norm(x.double(), dim=(1, 2, 3))
    want[~want.isfinite()] = torch.nan
    torch.testing.assert_close(sigma.double(), want, rtol=1e-6, atol=1e-45, equal_nan=True)


@interpreted
def test_norm_estimate_of_a_convolution_keeps_what_the_op_promises(monkeypatch):
    monkeypatch.setattr(kernels.norm, "CHUNK", 128)  # some of the samples below are longer, some are not
    test_conv2d_norm_estimate.test_op(NORM[2], torch.float32, "cpu")
    test_conv2d_norm_estimate.test_a_useless_start_is_replaced_for_its_sample_alone(torch.nan, "cpu")
    test_conv2d_norm_estimate.test_a_weight_that_is_not_finite_gives_nan(torch.inf, "cpu")
    test_conv2d_norm_estimate.test_nothing_gives_zero_and_finite_vectors("cpu")
    test_conv2d_norm_estimate.test_leaves_a_start_that_the_operator_maps_to_zero("cpu")


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_shift_in_any_layout(image, layout, monkeypatch):
    for name, value in {"NUMBERS": 16, "CHANNELS": 4, "PLANES": 2, "PIXELS": 8}.items():
        monkeypatch.setattr(kernels.shift, name, value)
    x = LAYOUTS[layout](torch.randn(image))
    for ratio, back in ((0.2, False), (0.2, True), (0.0, False)):
        got = kernels.shift.spatial_shift(x, ratio, back)
        assert torch.equal(got, shift.one_pass(x, ratio, back))
        assert got.stride() == torch.empty_like(x).stride()


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shift_copies_every_number_of_any_dtype(dtype):
    x = torch.randn(2, 12, 3, 4).to(dtype)
    x[0, :, 1, 1] = torch.nan
    x[1, 3, 1, 1] = torch.inf
    assert torch.equal(kernels.shift.spatial_shift(x, 0.25).view(torch.uint8), shift.reference(x, 0.25).view(torch.uint8))


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_beta_abs_in_any_layout(image, layout, monkeypatch):
    for name, value in {"FORWARD": 64, "BACKWARD": 64, "CHANNELS": 4, "PLANES": 2}.items():
        monkeypatch.setattr(kernels.folding, name, value)
    x, bias, position, grad = (torch.randn(s) for s in (image, image[1:2], image[2:], image))
    assert_folds(LAYOUTS[layout](x), 0.9, bias, position, LAYOUTS[layout](grad))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "beta"), [((3, 7), 0.5), ((2, 0), 0.5), ((2, 3, 5), 0.0), ((2, 300), 0.7), ((1, 4, 2, 3), 1.0)], ids=str
)
def test_beta_abs_with_and_without_bias_and_position(shape, beta, dtype):
    new = lambda size: torch.randn(size).to(dtype)
    assert_folds(new(shape), beta, new(shape[1:2]), None, new(shape))
    assert_folds(new(shape), beta, None, new(shape[2:]) if len(shape) == 4 else None, new(()).expand(shape))


def assert_folds(x, beta, bias, position, grad):
    dtype, n = x.dtype, folding.folded(beta, x.shape[1])
    wide = [None if t is None else t.double() for t in (x, bias, position)]
    out, signs = kernels.folding.beta_abs(x, beta, bias, position)
    assert_near(out, folding.reference(wide[0], beta, *wide[1:]), dtype)
    assert torch.equal(signs, folding.one_pass(wide[0], beta, *wide[1:])[1])
    assert (out.dtype, out.stride()) == (dtype, torch.empty_like(x).stride())
    bare, empty = kernels.folding.beta_abs(x, beta, bias, position, False)
    assert torch.equal(bare, out)
    assert not empty.numel()
    for need in ((True, bias is not None, position is not None), (False, False, x.ndim == 4), (False, True, False)):
        agree(kernels.folding.beta_abs_backward, folding.backward_reference, (grad, signs, n), *need)


@interpreted
def test_beta_abs_keeps_nan_and_turns_the_gradient_below_zero_alone():
    x = torch.tensor([[-1.0, -0.0, 0.0, 1.0, torch.nan, -torch.inf, 2.0, -torch.nan]])
    out, signs = kernels.folding.beta_abs(x, 1.0)
    torch.testing.assert_close(out, x.abs(), equal_nan=True)
    turned, _, _ = kernels.folding.beta_abs_backward(torch.ones_like(x), signs, 8, True, False, False)
    assert turned.tolist() == [[-1, 1, 1, 1, 1, -1, 1, 1]]
