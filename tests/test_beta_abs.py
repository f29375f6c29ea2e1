import math

import pytest
import torch

import lipfast.ops.beta_abs as module
from lipfast import beta_abs, max_min
from lipfast.nn import BetaAbs
from tests.checks import DTYPES, check_op

CASES = [
    ((3, 6), {"beta": 0.5}),
    ((2, 5, 3, 5), {"beta": 0.5}),
    ((1, 1), {"beta": 1.0}),
    ((0, 4), {"beta": 0.5}),
    ((2, 0), {"beta": 0.5}),
    ((2, 7, 3), {"beta": 0.0}),
    ((2, 1, 1, 1), {"beta": 0.5}),
]
LARGE = {"256x1024x16x16": ((256, 1024, 16, 16), {"beta": 0.5})}


def inputs(shape, device, dtype):
    return torch.randn(shape, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "options"), CASES, ids=str)
def test_op(shape, options, dtype, device):
    check_op(module, (inputs(shape, device, dtype),), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "bias", "position"), [((2, 5, 3, 5), 1, 1), ((0, 3, 2, 1), 1, 1), ((3, 300), 1, 0), ((1, 9, 1, 1), 0, 1)]
)
def test_op_with_bias_and_position(shape, bias, position, dtype, device):
    new = lambda size, given: inputs(size, device, dtype) if given else None
    check_op(module, (inputs(shape, device, dtype), 0.5, new(shape[1:2], bias), new(shape[2:], position)))


def test_the_bias_comes_before_the_fold_and_the_position_after(device):
    x, bias, position = (torch.randn(s, device=device, dtype=torch.float64) for s in ((2, 4, 3, 5), (4,), (3, 5)))
    out = beta_abs(x, 0.5, bias, position)
    for c in range(4):
        y = x[:, c] + bias[c]
        assert torch.equal(out[:, c], (y.abs() if c < 2 else y) + position)
    assert torch.equal(beta_abs(x[:, :, 0, 0], 1.0, bias), (x[:, :, 0, 0] + bias).abs())


@pytest.mark.parametrize(
    ("C", "beta", "n"), [(7, 0.5, 3), (4, 0.0, 0), (4, 1.0, 4), (100, 0.29, 29), (8, 1 / 3, 2), (3, 1 / 3, 1)]
)
def test_folds_the_first_floor_of_beta_c_channels(C, beta, n, device):
    x = -1 - torch.rand(2, C, 3, device=device)
    assert torch.equal(beta_abs(x, beta), torch.cat((-x[:, :n], x[:, n:]), 1))


def test_max_min_is_it_between_orthogonal_matrices(device):
    """Theorem 2 of the paper."""
    eye = torch.eye(3, dtype=torch.float64, device=device)
    R = torch.cat((torch.cat((eye, -eye), 1), torch.cat((eye, eye), 1))) / math.sqrt(2)
    torch.testing.assert_close(R.mT @ R, torch.eye(6, dtype=torch.float64, device=device))
    x = torch.randn(50, 6, dtype=torch.float64, device=device)
    x[:10, 3:] = x[:10, :3]  # ties
    torch.testing.assert_close(beta_abs(x @ R.mT) @ R, max_min(x))


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_keeps_norms_of_values_and_gradients(p, device):
    x = torch.randn(5, 8, 3, 3, device=device, dtype=torch.float64).round(decimals=0).requires_grad_()  # zeros among them
    seed = torch.randn_like(x)
    (grad,) = torch.autograd.grad(beta_abs(x), x, seed)
    norms = lambda t: t.flatten(1).norm(p, 1)
    torch.testing.assert_close(norms(beta_abs(x)), norms(x))
    torch.testing.assert_close(norms(grad), norms(seed))


def test_keeps_the_gradient_at_zero(device):
    x = torch.tensor([[0.0, -0.0, 0.0, 0.0]], device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(beta_abs(x), x, torch.tensor([[3.0, -2.0, 1.0, 5.0]], device=device))
    assert grad.tolist() == [[3.0, -2.0, 1.0, 5.0]]


def test_is_1_lipschitz_across_zero(device):
    x, y = torch.randn(2, 1000, 4, device=device, dtype=torch.float64)
    assert ((beta_abs(x) - beta_abs(y)).norm(dim=1) <= (x - y).norm(dim=1) * (1 + 1e-12)).all()


def test_differentiates_twice(device):
    x = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(beta_abs, x)
    torch.autograd.gradgradcheck(beta_abs, x)
    x, bias, position = (torch.randn(s, device=device, dtype=torch.float64) for s in ((2, 3, 2, 2), (3,), (2, 2)))
    for needed in ((1, 1, 1), (0, 1, 1), (0, 0, 1), (1, 0, 1)):
        args = [t.clone().requires_grad_(bool(one)) for t, one in zip((x, bias, position), needed, strict=True)]
        call = lambda x, bias, position: beta_abs(x, 0.7, bias, position)
        torch.autograd.gradcheck(call, args)
        torch.autograd.gradgradcheck(call, args)


def test_a_compiler_sees_torchs_own_operations(device):
    seen = []

    def backend(graph, _):
        inner = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        seen.extend(str(node.target) for m in inner for node in m.graph.nodes)
        return graph

    args = [torch.randn(s, device=device, requires_grad=True) for s in ((3, 4, 2, 2), (4,), (2, 2))]
    loss = lambda x, bias, position: (beta_abs(x, 0.5, bias, position) * torch.arange(4, device=device).view(4, 1, 1)).sum()
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*args), args)
    assert len(seen) > 4
    assert not any("lipfast" in name for name in seen)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*args), args))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*args), args)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*args), args))


def test_gradients_per_sample_are_those_of_the_batch(device):
    x = torch.randn(5, 4, 2, device=device)
    single = torch.func.grad(lambda t: (beta_abs(t[None]) ** 3).sum())
    torch.testing.assert_close(torch.func.vmap(single)(x), torch.func.grad(lambda t: (beta_abs(t) ** 3).sum())(x))


@pytest.mark.parametrize("dims", [(0, 0, 0), (None, 0, None), (None, None, 0), (1, None, 0)], ids=str)
def test_vmap_is_a_loop(dims, device):
    sizes = ((3, 4, 2, 5), (4,), (2, 5))
    args = [torch.randn(s if d is None else (*s[:d], 6, *s[d:]), device=device) for s, d in zip(sizes, dims, strict=True)]
    call = lambda x, bias, position: beta_abs(x, 0.5, bias, position) ** 3
    loop = lambda f, *t: [f(*(u if d is None else u.select(d, i) for u, d in zip(t, dims, strict=True))) for i in range(6)]
    derive = lambda f: torch.func.grad(f, argnums=(0, 1, 2))
    inner = derive(lambda *t: call(*t).sum())
    torch.testing.assert_close(torch.vmap(call, dims)(*args), torch.stack(loop(call, *args)))
    for got, want in zip(torch.vmap(inner, dims)(*args), zip(*loop(inner, *args), strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))
    got = derive(lambda *t: torch.vmap(call, dims)(*t).sum())(*args)
    torch.testing.assert_close(got, derive(lambda *t: torch.stack(loop(call, *t)).sum())(*args))


def test_jacobians_of_a_batch_are_diagonal_matrices_of_signs(device):
    x = torch.randn(5, 7, device=device)
    J = torch.vmap(torch.func.jacrev(lambda t: beta_abs(t[None])[0]))(x)
    assert torch.equal(J, torch.diag_embed(torch.where((x < 0) & (torch.arange(7, device=device) < 3), -1.0, 1.0)))


def test_vmap_keeps_the_gradient_at_zero(device):
    x = torch.zeros(3, 1, 4, device=device)
    assert (torch.func.grad(lambda t: torch.vmap(beta_abs)(t).sum())(x) == 1).all()
    assert (torch.vmap(torch.func.grad(lambda t: beta_abs(t).sum()))(x) == 1).all()


def test_keeps_one_bit_per_folded_channel_for_the_backward(device):
    kept = []
    x, bias, position = (torch.randn(s, device=device) for s in ((2, 400, 4, 3), (400,), (4, 3)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        beta_abs(x.requires_grad_(), 0.64, bias.requires_grad_(), position.requires_grad_())
    assert sum(t.nbytes for t in kept) == 2 * 256 / 8 * 4 * 3
    assert [module.plane(n) for n in (0, 1, 8, 9, 127, 128, 129, 1448)] == [0, 1, 1, 2, 16, 16, 32, 192]
    with torch.no_grad():
        assert torch.ops.lipfast.beta_abs_pass(x, 0.64, bias, position, False)[1].numel() == 0


def test_channels_last_stays(device):
    x = torch.randn(2, 6, 3, 5, device=device).to(memory_format=torch.channels_last)
    assert beta_abs(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(beta_abs(x), beta_abs(x.contiguous()))
    bias, position = torch.randn(6, device=device), torch.randn(3, 5, device=device)
    assert beta_abs(x, 0.5, bias, position).is_contiguous(memory_format=torch.channels_last)
    part = torch.randn(2, 9, 7, 10, device=device)[:, 1:7, 1::2, ::2]
    for t in (x, part, x[:, :, :1, :1].expand(-1, -1, 3, 5), torch.randn(5, 3, 6, 2, device=device).permute(3, 2, 1, 0)):
        assert torch.equal(beta_abs(t, 0.5, bias, position), beta_abs(t.contiguous(), 0.5, bias, position))


def test_nan_stays(device):
    x = torch.randn(2, 4, device=device)
    x[0, 1], x[1, 3] = math.nan, math.nan
    assert torch.equal(beta_abs(x).isnan(), x.isnan())


def test_the_layer_is_the_op(device):
    x = torch.randn(2, 8, 3, device=device)
    for beta in (0.25, 0.5):
        assert torch.equal(BetaAbs(beta)(x), beta_abs(x, beta))
    assert not BetaAbs().state_dict()
    with pytest.raises(ValueError, match="BetaAbs: beta must be from 0 to 1, got 2"):
        BetaAbs(2)


def test_names_the_wrong_argument():
    for shape in ((4,), ()):
        with pytest.raises(ValueError, match=r"beta_abs: x must be \(B, C, \.\.\.\), got"):
            beta_abs(torch.zeros(shape))
    with pytest.raises(ValueError, match="beta_abs: x must be a float64"):
        beta_abs(torch.zeros(2, 4, dtype=torch.int64))
    for wrong in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="beta_abs: beta must be from 0 to 1, got"):
            beta_abs(torch.zeros(2, 4), wrong)
    for wrong in (torch.zeros(3), torch.zeros(4, 1), torch.zeros(1)):
        with pytest.raises(ValueError, match=r"beta_abs: bias must be \(4\), got"):
            beta_abs(torch.zeros(2, 4), bias=wrong)
    with pytest.raises(ValueError, match=r"beta_abs: position must be \(3, 5\), got \(5, 3\)"):
        beta_abs(torch.zeros(2, 4, 3, 5), position=torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"beta_abs: x must be \(B, C, H, W\) where there is a position, got \(2, 4, 3\)"):
        beta_abs(torch.zeros(2, 4, 3), position=torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"beta_abs: bias must be a torch\.float32 tensor as x is, got torch\.float64"):
        beta_abs(torch.zeros(2, 4), bias=torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"beta_abs: position must be a torch\.float32 tensor as x is, got float"):
        beta_abs(torch.zeros(2, 4, 3, 3), position=1.0)
