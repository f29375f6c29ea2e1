import math

import pytest
import torch
import torch.nn.functional as F

import lipfast.ops.spatial_shift as module
from lipfast import spatial_shift
from tests.checks import DTYPES, check_op

CASES = [
    ((2, 8, 3, 5), {"ratio": 0.125}),
    ((1, 4, 1, 1), {"ratio": 0.25}),
    ((0, 8, 2, 2), {"ratio": 0.125}),
    ((3, 6, 4, 1), {"ratio": 1 / 6}),
    ((2, 3, 2, 2), {"ratio": 0.0}),
]
LARGE = {"256x1024x16x16": ((256, 1024, 16, 16), {"ratio": 0.125})}


def inputs(shape, device, dtype):
    return torch.randn(shape, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_op(shape, options, dtype, device):
    check_op(module, (inputs(shape, device, dtype),), **options)


def test_moves_each_group_by_one_pixel_around_the_torus(device):
    x = torch.randn(2, 8, 3, 4, device=device)
    out = spatial_shift(x)
    steps = [(1, 0), (-1, 0), (0, 1), (0, -1), (0, 0), (0, 0), (0, 0), (0, 0)]  # where each channel reads: down, right
    for c, (down, right) in enumerate(steps):
        for h in range(3):
            for w in range(4):
                assert torch.equal(out[:, c, h, w], x[:, c, (h + down) % 3, (w + right) % 4])


def test_is_the_depthwise_circular_convolution_with_one_tap(device):
    x = torch.randn(2, 5, 4, 6, device=device)
    taps = torch.zeros(5, 1, 3, 3, device=device)
    for c, (row, column) in enumerate([(2, 1), (0, 1), (1, 2), (1, 0), (1, 1)]):
        taps[c, 0, row, column] = 1
    want = F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), taps, groups=5)
    torch.testing.assert_close(spatial_shift(x, 0.2), want)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_keeps_norms_of_values_and_gradients(p, device):
    x = torch.randn(3, 16, 5, 3, device=device, dtype=torch.float64, requires_grad=True)
    seed = torch.randn_like(x)
    (grad,) = torch.autograd.grad(spatial_shift(x), x, seed)
    norms = lambda t: t.flatten(1).norm(p, 1)
    torch.testing.assert_close(norms(spatial_shift(x)), norms(x))
    torch.testing.assert_close(norms(grad), norms(seed))
    assert torch.equal(spatial_shift(x).flatten(1).sort().values, x.flatten(1).sort().values)


def test_the_gradient_moves_back(device):
    x = torch.randn(2, 8, 3, 5, device=device, requires_grad=True)
    (back,) = torch.autograd.grad(spatial_shift(x), x, spatial_shift(x.detach()))
    assert torch.equal(back, x)
    turned = x.detach()[:, [1, 0, 3, 2, 4, 5, 6, 7]]  # up and down, left and right exchange their channels
    (grad,) = torch.autograd.grad(spatial_shift(x), x, turned)
    assert torch.equal(grad[:, [1, 0, 3, 2, 4, 5, 6, 7]], spatial_shift(x.detach()))


def test_differentiates_twice(device):
    x = torch.randn(2, 4, 2, 3, device=device, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda t: spatial_shift(t, 0.25), x)


def test_channels_last_and_strided_images_give_the_same(device):
    x = torch.randn(2, 8, 4, 6, device=device)
    last = x.to(memory_format=torch.channels_last)
    assert spatial_shift(last).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(spatial_shift(last), spatial_shift(x))
    part = torch.randn(2, 9, 9, 7, device=device)[:, 1:, ::2, 1:]
    assert torch.equal(spatial_shift(part), spatial_shift(part.contiguous()))
    assert torch.equal(spatial_shift(x.mT), spatial_shift(x.mT.contiguous()))


def test_a_compiler_sees_torchs_own_operations(device):
    seen = []

    def backend(graph, _):
        inner = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        seen.extend(str(node.target) for m in inner for node in m.graph.nodes)
        return graph

    x, seed = torch.randn(2, 2, 8, 3, 5, device=device)
    x.requires_grad_()
    loss = lambda t: (spatial_shift(t) * seed).sum()
    for compiler in (backend, "aot_eager"):
        (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=compiler)(x), x)
        assert torch.equal(got, torch.autograd.grad(loss(x), x)[0])
    assert len(seen) > 4
    assert not any("lipfast" in name for name in seen)


def test_gradients_per_sample_are_those_of_the_batch(device):
    x = torch.randn(5, 8, 2, 3, device=device)
    loss = lambda t: (spatial_shift(t) * torch.arange(3, device=device)).square().sum()
    single = torch.func.grad(lambda t: loss(t[None]))
    torch.testing.assert_close(torch.func.vmap(single)(x), torch.func.grad(loss)(x))
    images = torch.randn(2, 8, 4, 3, 5, device=device)
    want = torch.stack([spatial_shift(images[:, :, i]) for i in range(4)])
    assert torch.equal(torch.vmap(spatial_shift, in_dims=2)(images), want)


def gain_of_frequencies(taps, side):
    """|DFT| of a kernel on a torus: the singular values of its circular convolution."""
    return torch.fft.fft2(taps, (side, side)).abs()


def test_an_isometric_kernel_of_a_large_image_has_one_entry():
    """Theorem 1, over all kernels of side 2 with entries from a grid that holds the counter-examples' own."""
    values = torch.linspace(-1, 1, 9, dtype=torch.float64)
    taps = torch.cartesian_prod(values, values, values, values).reshape(-1, 2, 2)
    isometric = ((gain_of_frequencies(taps, 3) - 1).abs() < 1e-9).flatten(1).all(1)  # side 3 = 2 k - 1
    shift = (taps.flatten(1).abs().sum(1) == 1) & (taps.flatten(1).count_nonzero(1) == 1)
    assert torch.equal(isometric, shift)
    assert shift.sum() == 8


def test_a_kernel_as_large_as_the_image_may_have_more():
    """So the theorem needs its images: (1, 1, 1, -1)/2 keeps norms where kernel and image have side 4, or 2."""
    taps = torch.tensor([[1.0, 1, 1, -1]], dtype=torch.float64) / 2
    torch.testing.assert_close(gain_of_frequencies(taps, 4), torch.ones(4, 4, dtype=torch.float64))
    torch.testing.assert_close(gain_of_frequencies(taps.reshape(2, 2), 2), torch.ones(2, 2, dtype=torch.float64))
    assert (gain_of_frequencies(taps, 7) - 1).abs().amax() > 0.1  # 7 = 2 k - 1
    line = torch.randn(3, 1, 4, dtype=torch.float64)
    image = F.conv1d(F.pad(line, (0, 3), "circular"), taps[None])
    torch.testing.assert_close(image.norm(dim=2), line.norm(dim=2))


@pytest.mark.parametrize("shape", [(8, 3, 3), (2, 8), (1, 2, 8, 3, 3), ()])
def test_names_the_wrong_argument(shape):
    with pytest.raises(ValueError, match=r"spatial_shift: x must be \(B, C, H, W\), got "):
        spatial_shift(torch.zeros(shape))
    with pytest.raises(ValueError, match="spatial_shift: x must be a float64"):
        spatial_shift(torch.zeros(2, 8, 3, 3, dtype=torch.int64))
    for wrong in (-0.125, 0.3, math.nan):
        with pytest.raises(ValueError, match="spatial_shift: ratio must be from 0 to 1/4, got"):
            spatial_shift(torch.zeros(2, 8, 3, 3), wrong)
    with pytest.raises(ValueError, match=r"ratio must make a whole number of the 12 channels of x, got 0\.125"):
        spatial_shift(torch.zeros(2, 12, 3, 3))
