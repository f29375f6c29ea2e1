from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import lipfast.ops.conv2d_norm_estimate as module
from lipfast import conv2d_norm_estimate
from tests.checks import DTYPES, TOLERANCE, check_op

# how many weights, input masks, output masks and starts (None: absent); C, H, W, O, kernel, stride, padding, dilation, groups
CASES = [
    (None, None, None, None, 3, 7, 6, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (None, 1, None, 1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (None, 0, None, None, 3, 5, 5, 4, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (None, 3, 3, 1, 4, 9, 8, 6, (3, 2), (2, 3), (2, 1), (1, 2), 2),
    (None, 2, 1, 2, 5, 6, 7, 5, (3, 3), (1, 1), (1, 1), (1, 1), 5),
    (2, None, 2, None, 4, 6, 5, 6, (4, 4), (2, 2), (1, 1), (1, 1), 2),
    (3, 1, None, 3, 2, 3, 3, 4, (5, 5), (1, 1), (2, 2), (1, 1), 1),
]
_SAME = ((3, 3), (1, 1), (1, 1), (1, 1), 1, {"iterations": 2})
LARGE = {
    "3x3, 64 to 64, 16x16, 256 masks": (None, 256, 256, 1, 64, 16, 16, 64, *_SAME),
    "3x3, 32 to 32, 32x32, 256 masks": (None, 256, 256, 1, 32, 32, 32, 32, *_SAME),
}

# The op also returns its left vectors, and only sigma has a gradient.
op = torch.ops.lipfast.conv2d_norm_estimate
VECTORS = SimpleNamespace(__name__=module.__name__, reference=module.reference, conv2d_norm_estimate=op)
SIGMA = SimpleNamespace(
    __name__=module.__name__,
    reference=lambda *args, **options: module.reference(*args, **options)[0],
    conv2d_norm_estimate=lambda *args, **options: op(*args, **options)[0],
)


def inputs(own, input_own, output_own, start_own, C, H, W, O, kernel, stride, padding, dilation, groups, device, dtype):
    lead = lambda n: () if n is None else (n,)
    weight = torch.randn(*lead(own), O, C // groups, *kernel, device=device, dtype=dtype)
    options = {
        "input_size": [H, W],
        "stride": list(stride),
        "padding": list(padding),
        "dilation": list(dilation),
        "groups": groups,
    }
    output = F.conv2d(torch.zeros(1, C, H, W), torch.zeros(O, C // groups, *kernel), None, stride, padding, dilation, groups)[0]
    mask = lambda n, *size: None if n is None else torch.rand(n, *size, device=device) < 0.7
    start = None if start_own is None else torch.randn(start_own, C, H, W, device=device, dtype=dtype)
    return (weight, mask(input_own, C, H, W), mask(output_own, *output.shape), start), options


def call(weight, input_mask=None, output_mask=None, start=None, iterations=10, **options):
    masks = {"input_mask": input_mask, "output_mask": output_mask, "start": start}
    return conv2d_norm_estimate(weight, **options, **masks, iterations=iterations)


def matrices(weight, input_mask, output_mask, start, input_size, stride, padding, dilation, groups):
    """The masked operators in float64, one for each sample: the identity pushed through conv2d."""
    C = weight.shape[-3] * groups
    pixels = torch.eye(C * input_size[0] * input_size[1], dtype=torch.float64, device=weight.device)
    images = pixels.view(-1, C, *input_size)
    each = weight.double().reshape(-1, *weight.shape[-4:])
    A = torch.stack([F.conv2d(images, w, None, stride, padding, dilation, groups).flatten(1).mT for w in each])
    A = A if output_mask is None else A * output_mask.flatten(1)[..., None]
    A = A if input_mask is None else A * input_mask.flatten(1)[:, None]
    return A if start is None else A.expand(max(len(A), len(start)), -1, -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, device):
    args, options = inputs(*case, device, dtype)
    check_op(VECTORS, args, gradient=False, **options, iterations=3)
    check_op(SIGMA, args, **options, iterations=3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_takes_a_batch_in_parts(case, device, monkeypatch):
    monkeypatch.setattr(module, "_PART", 1)  # one sample in each
    args, options = inputs(*case, device, torch.float64)
    check_op(VECTORS, args, gradient=False, **options, iterations=3)
    check_op(SIGMA, args, **options, iterations=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("iterations", [0, 1, 5, 40])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_never_above_the_norm_of_the_masked_operator(case, iterations, dtype, device):
    args, options = inputs(*case, device, dtype)
    sigma, right = call(*args, iterations=iterations, **options)
    exact = torch.linalg.svdvals(matrices(*args, **options))[..., 0]
    assert sigma.numel() == exact.numel()
    assert (sigma.double() <= exact * (1 + TOLERANCE[dtype])).all()
    assert right.shape == (*sigma.shape, case[4], *options["input_size"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_converges_to_the_norm_of_the_masked_operator(case, device):
    args, options = inputs(*case, device, torch.float64)
    sigma, right = call(*args, iterations=3000, **options)
    A = matrices(*args, **options)
    torch.testing.assert_close(sigma.flatten(), torch.linalg.svdvals(A)[..., 0], rtol=1e-6, atol=1e-9)
    attained = torch.linalg.vector_norm(A @ right.flatten(-3)[..., None].expand(len(A), -1, 1), dim=(1, 2))
    torch.testing.assert_close(attained, sigma.flatten())


def test_continues_where_the_last_call_stopped(device):
    args, options = inputs(None, 3, 3, None, 4, 8, 8, 6, (3, 3), (1, 1), (1, 1), (1, 1), 1, device, torch.float64)
    _, right = call(*args, iterations=4, **options)
    twice = call(*args[:3], right, iterations=5, **options)[0]
    torch.testing.assert_close(twice, call(*args, iterations=9, **options)[0])


def test_gradient_is_that_of_the_norm_once_converged(device):
    args, options = inputs(*CASES[3], device, torch.float64)
    weight = args[0].requires_grad_()
    (got,) = torch.autograd.grad(call(weight, *args[1:], iterations=3000, **options)[0].sum(), weight)
    (want,) = torch.autograd.grad(torch.linalg.svdvals(matrices(*args, **options))[:, 0].sum(), weight)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_survives_extreme_scales(scale, device):
    args, options = inputs(*CASES[3], device, torch.float32)
    small = args[0] * scale
    sigma, right = call(small, *args[1:], **options)
    want = torch.linalg.svdvals(matrices(small, *args[1:], **options))[:, 0]
    assert ((0.5 * want < sigma.double()) & (sigma.double() < want * (1 + 2e-5) + 2e-45)).all()
    torch.testing.assert_close(torch.linalg.vector_norm(right, dim=(1, 2, 3)), torch.ones(3, device=device))


def test_hidden_weights_do_not_drown_the_visible(device):
    weight = torch.full((1, 2, 1, 1), 1e-30, device=device)
    weight[0, 0] = 1
    mask = torch.tensor([False, True], device=device).view(2, 1, 1).expand(2, 3, 3)
    sigma = conv2d_norm_estimate(weight, 3, input_mask=mask)[0]
    torch.testing.assert_close(sigma, weight[0, 1, 0, 0], rtol=1e-6, atol=0)


def test_nothing_gives_zero_and_finite_vectors(device):
    args, options = inputs(*CASES[3], device, torch.float32)
    nothing = torch.zeros_like(args[0])
    off = torch.zeros_like(args[1]), torch.zeros_like(args[2])
    for spoiled in ((nothing, *args[1:]), (args[0], off[0], *args[2:]), (args[0], args[1], off[1], args[3])):
        weight = spoiled[0].clone().requires_grad_()
        sigma, right = call(weight, *spoiled[1:], **options)
        assert (sigma == 0).all()
        assert right.isfinite().all()
        assert torch.autograd.grad(sigma.sum(), weight)[0].isfinite().all()


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_useless_start_is_replaced_for_its_sample_alone(bad, device):
    args, options = inputs(None, 3, None, 3, 4, 8, 8, 6, (3, 3), (1, 1), (1, 1), (1, 1), 1, device, torch.float32)
    start = args[3].clone()
    start[1] = bad
    sigma, right = call(*args[:3], start, **options)
    none, good = call(*args[:3], None, **options), call(*args, **options)
    for got, default, kept in zip((sigma, right), none, good, strict=True):
        torch.testing.assert_close(got[1], default[1])
        torch.testing.assert_close(got[[0, 2]], kept[[0, 2]])


def test_leaves_a_start_that_the_operator_maps_to_zero(device):
    weight = torch.tensor([1.0, 0.0], device=device).view(1, 2, 1, 1)  # rank one in the channels
    start = torch.tensor([0.0, 1.0], device=device).view(2, 1, 1).expand(2, 4, 4)
    assert conv2d_norm_estimate(weight, 4, start=start, iterations=0)[0] == 0
    torch.testing.assert_close(conv2d_norm_estimate(weight, 4, start=start, iterations=2)[0], torch.tensor(1.0, device=device))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_gives_nan(bad, device):
    args, options = inputs(2, None, 2, None, 4, 6, 5, 6, (4, 4), (2, 2), (1, 1), (1, 1), 2, device, torch.float32)
    args[0][1, 0, 0, 0, 0] = bad
    for mask in (args[2], torch.zeros_like(args[2])):
        sigma = call(args[0], None, mask, **options)[0]
        assert sigma[0].isfinite()
        assert sigma[1].isnan()
    unread = torch.ones(1, 1, 3, 3, device=device)
    unread[..., 0, 0] = bad  # a tap that sees only padding
    assert conv2d_norm_estimate(unread, 1, padding=1)[0].isnan()


def test_compiles_without_graph_break(device):
    (weight, *rest), options = inputs(*CASES[3], device, torch.float32)
    loss = lambda w: call(w, *rest, **options)[0].square().sum()
    weight.requires_grad_()
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(weight), weight)
    torch.testing.assert_close(got, torch.autograd.grad(loss(weight), weight))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [CASES[3], (None, 128, None, 1, 16, 16, 16, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1)], ids=str)
def test_can_be_captured_in_a_cuda_graph(case):
    args, options = inputs(*case, "cuda", torch.float32)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles, and lets cuDNN choose
        call(*args, **options)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*args, **options)
    for bad in (None, 0.0, torch.nan):
        args[0].normal_()
        if bad is not None:
            args[3][0] = bad  # the fallback, too, is decided on the device
        graph.replay()
        torch.testing.assert_close(captured, call(*args, **options))


def test_leading_dimensions_are_broadcast(device):
    args, options = inputs(None, 6, 3, 1, 4, 7, 6, 6, (3, 3), (2, 2), (1, 1), (1, 1), 2, device, torch.float64)
    weight, input_mask, output_mask, start = args
    weights = torch.randn(2, 1, *weight.shape, device=device, dtype=torch.float64)
    sigma, right = call(weights, input_mask.unflatten(0, (2, 3)), output_mask, start[0], **options)
    assert sigma.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            own = call(weights[i, 0], input_mask[3 * i + j], output_mask[j], start[0], **options)
            torch.testing.assert_close((sigma[i, j], right[i, j]), own)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weight": torch.ones(4, 3, 3)}, "weight"),
        ({"weight": torch.ones(0, 3, 3, 3)}, "weight"),
        ({"weight": torch.ones(4, 3, 3, 3, dtype=torch.int64)}, "weight"),
        ({"input_size": 0}, "input_size"),
        ({"input_size": (1, 2, 3)}, "input_size"),
        ({"padding": -1}, "padding"),
        ({"groups": 3}, "groups"),
        ({"dilation": 9}, "weight spans"),
        ({"input_mask": torch.ones(3, 7, 5, dtype=torch.bool)}, "input_mask"),
        ({"input_mask": torch.ones(3, 7, 6)}, "input_mask"),
        ({"output_mask": torch.ones(3, 7, 6, dtype=torch.bool)}, "output_mask"),
        ({"output_mask": torch.ones(5, 4, 7, 6, dtype=torch.bool)}, "output_mask"),
        ({"start": torch.ones(3, 7, 6, dtype=torch.float64)}, "start"),
        ({"start": torch.ones(3, 7, 5)}, "start"),
        ({"iterations": -1}, "iterations"),
    ],
)
def test_names_the_wrong_argument(change, word):
    right = {"weight": torch.ones(4, 3, 3, 3), "input_size": (7, 6), "padding": 1, "input_mask": torch.ones(2, 3, 7, 6) > 0}
    with pytest.raises(ValueError, match=f"conv2d_norm_estimate: {word}"):
        conv2d_norm_estimate(**{**right, **change})
