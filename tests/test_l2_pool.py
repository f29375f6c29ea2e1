import math

import pytest
import torch

import lipfast.ops.l2_pool as module
from lipfast import l2_pool
from tests.checks import DTYPES, TOLERANCE, check_op

CASES = [((2, 3, 3, 5),), ((1, 1, 1, 1),), ((0, 4, 2, 2),), ((2, 0, 2, 2),), ((3, 5, 16, 16),), ((2, 2, 1, 7),)]
LARGE = {"256x1024x16x16": ((256, 1024, 16, 16),)}


def inputs(shape, device, dtype):
    return torch.randn(shape, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, device):
    check_op(module, (inputs(*case, device, dtype),))


def test_takes_a_batch_in_parts(device, monkeypatch):
    monkeypatch.setattr("lipfast.ops._matrices._PART", 2 * 3 * 5 * 7)  # two images in each
    check_op(module, (inputs((5, 3, 5, 7), device, torch.float64),))


def test_keeps_the_norm_of_every_image(device):
    x = torch.randn(5, 8, 3, 4, device=device, dtype=torch.float64)
    torch.testing.assert_close(l2_pool(x).norm(dim=1), x.flatten(1).norm(dim=1))


def test_is_1_lipschitz(device):
    x, y = torch.randn(2, 500, 2, 2, 3, device=device, dtype=torch.float64)
    y = torch.where(torch.arange(500, device=device)[:, None, None, None] % 2 == 0, 1e-3 * y, x + 1e-3 * y)
    x[::7] = 0
    assert ((l2_pool(x) - l2_pool(y)).norm(dim=1) <= (x - y).flatten(1).norm(dim=1) * (1 + 1e-12)).all()


def test_the_gradient_keeps_norms_too(device):
    x = torch.randn(5, 8, 3, 4, device=device, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(5, 8, device=device, dtype=torch.float64)
    (grad,) = torch.autograd.grad(l2_pool(x), x, seed)
    torch.testing.assert_close(grad.flatten(2).norm(dim=2), seed.abs())


def test_has_no_gradient_at_zero(device):
    x = torch.randn(2, 3, 2, 2, device=device, dtype=torch.float64)
    x[0, 1] = 0
    x.requires_grad_()
    (grad,) = torch.autograd.grad(l2_pool(x).sum(), x, create_graph=True)
    assert not grad[0, 1].any()
    (second,) = torch.autograd.grad((grad * torch.randn_like(x)).sum(), x)
    assert not second[0, 1].any()
    assert second.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_square_overflows_or_vanishes(dtype, device):
    """Over every power of two whose multiples by 5 are numbers of the dtype."""
    limits = torch.finfo(dtype)
    image = torch.tensor([[3.0, 0.0], [-4.0, 0.0]], device=device, dtype=dtype)
    for power in range(math.ceil(math.log2(limits.smallest_normal)), math.floor(math.log2(limits.max)) - 2, 3):
        x = (image * 2.0**power).expand(1, 1, 2, 2).requires_grad_()
        out = l2_pool(x)
        assert out.item() == pytest.approx(5 * 2.0**power, rel=TOLERANCE[dtype])
        (grad,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(grad[0, 0], image / 5, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_half_types_in_float32(dtype, device):
    x = torch.ones(1, 1, 256, 256, device=device, dtype=dtype)
    assert l2_pool(x).item() == 256
    x[0, 0, 0, 0] = 64  # 64^2 are 1/16 of the sum of the ones
    assert l2_pool(x).item() == pytest.approx(math.sqrt(256**2 - 1 + 64**2), rel=torch.finfo(dtype).eps)


def test_differentiates_twice(device):
    x = torch.randn(2, 3, 2, 2, device=device, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(l2_pool, x)
    torch.autograd.gradgradcheck(l2_pool, x)


def test_compiles_without_graph_break(device):
    x = torch.randn(3, 4, 2, 5, device=device, requires_grad=True)
    loss = lambda t: (l2_pool(t) * torch.arange(4, device=device)).sum()
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, torch.autograd.grad(loss(x), x)[0])


def test_gradients_per_sample_are_those_of_the_batch(device):
    x = torch.randn(5, 4, 2, 3, device=device)
    single = torch.func.grad(lambda t: (l2_pool(t[None]) ** 3).sum())
    torch.testing.assert_close(torch.func.vmap(single)(x), torch.func.grad(lambda t: (l2_pool(t) ** 3).sum())(x))


@pytest.mark.parametrize("dim", [0, 2, -1])
def test_vmap_is_a_loop(dim, device):
    x = torch.randn(2, 3, 5, 4, 6, device=device)
    torch.testing.assert_close(torch.vmap(l2_pool, dim)(x), torch.stack([l2_pool(t) for t in x.unbind(dim)]))


def test_channels_last_and_strided_images_give_the_same(device):
    x = torch.randn(2, 8, 4, 6, device=device)
    torch.testing.assert_close(l2_pool(x.to(memory_format=torch.channels_last)), l2_pool(x))
    torch.testing.assert_close(l2_pool(x[:, 1:, ::2, 1:]), l2_pool(x[:, 1:, ::2, 1:].contiguous()))


def test_nan_and_inf_never_become_a_number(device):
    x = torch.ones(1, 4, 2, 2, device=device)
    x[0, 0, 0, 1], x[0, 1, 1, 1], x[0, 2, 0, 0], x[0, 2, 1, 0] = math.nan, -math.inf, math.inf, math.nan
    out = l2_pool(x)[0].tolist()
    assert math.isnan(out[0])
    assert out[1] == math.inf
    assert math.isnan(out[2])
    assert out[3] == 2
    assert l2_pool(torch.full((1, 1, 2, 2), torch.finfo(torch.float32).max, device=device)).item() == math.inf


@pytest.mark.parametrize("shape", [(8, 3, 3), (2, 8), (1, 2, 8, 3, 3), (2, 3, 0, 4)])
def test_names_the_wrong_argument(shape):
    with pytest.raises(ValueError, match=r"l2_pool: x must be \(B, C, H, W\)"):
        l2_pool(torch.zeros(shape))
    with pytest.raises(ValueError, match="l2_pool: x must be a float64"):
        l2_pool(torch.zeros(2, 8, 3, 3, dtype=torch.int64))
