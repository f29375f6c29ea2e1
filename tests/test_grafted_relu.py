import math

import pytest
import torch

import lipfast.nn
import lipfast.ops.grafted_relu as module
from lipfast import grafted_relu
from tests.checks import DTYPES, check_op

#        shape of x, of the mask, of slope and intercept
CASES = [
    ((3, 5), (5,), (5,)),
    ((2, 3, 4, 5), (3, 4, 5), (3, 4, 5)),
    ((2, 3, 4, 5), (3, 1, 1), (3, 4, 5)),
    ((2, 3, 4, 5), (1, 3, 4, 5), ()),
    ((7,), (), ()),
    ((0, 3), (3,), (3,)),
    ((1, 1), (1, 1), (1,)),
]
LARGE = {"256x64x32x32": ((256, 64, 32, 32), (64, 32, 32), (64, 32, 32))}


def inputs(shape, mask_shape, line_shape, device, dtype):
    x = torch.randn(shape, device=device, dtype=dtype)
    mask = torch.rand(mask_shape, device=device) < 0.5
    slope, intercept = (torch.randn(line_shape, device=device, dtype=dtype) for _ in range(2))
    return x, mask, slope, intercept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, device):
    check_op(module, inputs(*case, device, dtype))


@pytest.mark.parametrize(
    ("mask_shape", "line_shape"), [((3, 4), (3, 4)), ((1, 3, 1), (4,)), ((5, 3, 4), (3, 4)), ((3, 4), (5, 1, 1)), ((), ())]
)
def test_takes_a_batch_in_parts(mask_shape, line_shape, device, monkeypatch):
    monkeypatch.setattr("lipfast.ops._matrices._PART", 2 * 3 * 4)  # two samples in each
    check_op(module, inputs((5, 3, 4), mask_shape, line_shape, device, torch.float64))


def test_is_relu_to_the_bit_where_nothing_is_grafted(device):
    x, mask, slope, intercept = inputs((64, 9), (9,), (9,), device, torch.float32)
    x[0, 0], x[1, 1] = math.inf, -math.inf
    out = grafted_relu(x, mask, slope, intercept)
    assert torch.equal(out[:, ~mask], x[:, ~mask].relu())
    assert torch.equal(grafted_relu(x, torch.zeros_like(mask), slope, intercept), x.relu())


def test_slope_and_intercept_0_prune_the_unit(device):
    x, mask, slope, _ = inputs((64, 9), (9,), (9,), device, torch.float32)
    none = torch.zeros_like(slope)
    assert torch.equal(grafted_relu(x, mask, none, none), x.relu() * ~mask)


def test_gradients_are_as_documented(device):
    x = torch.tensor([-1.0, 0.0, 2.0, -1.0, 0.0, 2.0], device=device, requires_grad=True)
    mask = torch.arange(6, device=device) >= 3
    slope, intercept = (torch.full((6,), v, device=device, requires_grad=True) for v in (0.4, 0.1))
    grads = torch.autograd.grad(grafted_relu(x, mask, slope, intercept).sum(), (x, slope, intercept))
    wanted = [[0, 0, 1, 0.4, 0.4, 0.4], [0, 0, 0, -1, 0, 2], [0, 0, 0, 1, 1, 1]]
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, torch.tensor(want, device=device, dtype=torch.float32))


def test_differentiates_twice(device):
    x, mask, slope, intercept = inputs((4, 3), (3,), (3,), device, torch.float64)
    leaves = [t.requires_grad_() for t in (x, slope, intercept)]
    function = lambda x, slope, intercept: grafted_relu(x, mask, slope, intercept)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_compiles_without_graph_break(device):
    x, mask, slope, intercept = inputs((4, 3), (3,), (3,), device, torch.float32)
    leaves = [t.requires_grad_() for t in (x, slope, intercept)]
    loss = lambda x, slope, intercept: (grafted_relu(x, mask, slope, intercept) ** 2).sum()
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*leaves), leaves))


def test_gradients_per_sample_are_those_of_the_batch(device):
    x, mask, slope, intercept = inputs((5, 4), (4,), (4,), device, torch.float32)
    loss = lambda t: (grafted_relu(t, mask, slope, intercept) ** 2).sum()
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), torch.func.grad(loss)(x))


def test_nan_stays_visible(device):
    x, mask, slope, intercept = inputs((4, 3), (3,), (3,), device, torch.float32)
    mask[:] = torch.tensor([True, False, True])
    slope[0], x[1, 1] = math.nan, math.nan
    out = grafted_relu(x, mask, slope, intercept)
    assert out[:, 0].isnan().all()
    assert out[1, 1].isnan()
    assert out.isnan().sum() == 5
    slope[1] = math.nan  # of a unit that is not grafted: nobody reads it
    assert grafted_relu(x, mask, slope, intercept).isnan().sum() == 5


SPOILS = [lambda t: t[:-1], lambda t: t[None, None], lambda t: t.to("meta")]


@pytest.mark.parametrize(("index", "word"), [(1, "mask"), (2, "slope"), (3, "intercept")])
@pytest.mark.parametrize("spoil", [*SPOILS, lambda t: t.double()])
def test_names_the_wrong_argument(index, word, spoil):
    args = list(inputs((4, 3), (3,), (3,), "cpu", torch.float32))
    args[index] = spoil(args[index])
    with pytest.raises(ValueError, match=f"grafted_relu: {word} must"):
        grafted_relu(*args)


def test_layer_is_a_relu_until_units_are_grafted(device):
    layer = lipfast.nn.GraftedReLU((3, 4)).to(device)
    x = torch.randn(5, 3, 4, device=device)
    assert torch.equal(layer(x), x.relu())
    layer.mask[0] = True
    assert torch.equal(layer(x)[:, 0], layer.slope[0] * x[:, 0])
    assert "grafted=4" in repr(layer)
    assert set(layer.state_dict()) == {"mask", "slope", "intercept"}
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("word", "arguments"),
    [
        ("mask", {"mask": torch.zeros(4, dtype=torch.bool)}),
        ("mask", {"mask": torch.zeros(3)}),
        ("slope", {"slope": torch.zeros(2)}),
        ("intercept", {"intercept": torch.zeros(3, 3)}),
    ],
)
def test_layer_names_the_wrong_argument(word, arguments):
    with pytest.raises(ValueError, match=f"GraftedReLU: {word} must"):
        lipfast.nn.GraftedReLU((3,), **arguments)
