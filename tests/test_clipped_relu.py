import math

import pytest
import torch

import lipfast.ops.clipped_relu as module
from lipfast import clipped_relu
from tests.checks import DTYPES, check_op

#        shape of x, shape of the threshold
CASES = [((3, 5), (5,)), ((2, 3, 4, 5), (3, 4, 5)), ((2, 3, 4, 5), (3, 1, 1)), ((7,), ()), ((0, 3), (3,)), ((1, 1), (1, 1))]
LARGE = {"256x64x32x32": ((256, 64, 32, 32), (64, 32, 32))}


def inputs(shape, threshold_shape, device, dtype):
    return torch.randn(shape, device=device, dtype=dtype), torch.rand(threshold_shape, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, device):
    check_op(module, inputs(*case, device, dtype))


def test_is_the_clamp(device):
    x, threshold = inputs((64, 9), (9,), device, torch.float32)
    assert torch.equal(clipped_relu(x, threshold), torch.minimum(x.clamp(min=0), threshold))


def test_gradient_at_the_kinks_is_as_documented(device):
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0], device=device, requires_grad=True)
    threshold = torch.ones(5, device=device, requires_grad=True)
    to_x, to_threshold = torch.autograd.grad(clipped_relu(x, threshold).sum(), (x, threshold))
    assert to_x.tolist() == [0, 0, 1, 0, 0]
    assert to_threshold.tolist() == [0, 0, 0, 1, 1]


def test_differentiates_twice(device):
    x, threshold = (t.requires_grad_() for t in inputs((4, 3), (3,), device, torch.float64))
    torch.autograd.gradgradcheck(clipped_relu, (x, threshold))
    # gradient alignment: the gradient of a loss of a gradient
    (grad,) = torch.autograd.grad((clipped_relu(x, threshold) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.equal(second, 2.0 * ((x > 0) & (x < threshold)))


def test_compiles_without_graph_break(device):
    args = [t.requires_grad_() for t in inputs((4, 3), (3,), device, torch.float32)]
    loss = lambda *t: (clipped_relu(*t) ** 2).sum()
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*args), args)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*args), args))


def test_gradients_per_sample_are_those_of_the_batch(device):
    x, threshold = inputs((5, 4), (4,), device, torch.float32)
    single = torch.func.grad(lambda t: (clipped_relu(t, threshold) ** 2).sum())
    torch.testing.assert_close(
        torch.func.vmap(single)(x), torch.func.grad(lambda t: (clipped_relu(t, threshold) ** 2).sum())(x)
    )


def test_nan_stays_visible_and_an_infinite_threshold_is_relu(device):
    x, threshold = inputs((4, 3), (3,), device, torch.float32)
    x[1, 2] = math.nan
    threshold[0] = math.nan
    out = clipped_relu(x, threshold)
    assert out[:, 0].isnan().all()
    assert out[1, 2].isnan()
    assert out.isnan().sum() == 5
    assert torch.equal(clipped_relu(x[:1], x.new_tensor(math.inf)), x[:1].relu())


@pytest.mark.parametrize("spoil", [lambda t: t[:-1], lambda t: t[None, None], lambda t: t.double(), lambda t: t.to("meta")])
def test_names_the_wrong_argument(spoil):
    x, threshold = inputs((4, 3), (3,), "cpu", torch.float32)
    with pytest.raises(ValueError, match="clipped_relu: threshold must"):
        clipped_relu(x, spoil(threshold))
