import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import cached, remove_parametrizations

from lipfast import bounds, cayley, skew_exponential
from lipfast.nn import orthogonal
from tests.checks import DTYPES, TOLERANCE, assert_near

MAPS = ["cayley", "exponential", "polar"]


class Stack(nn.Module):
    """Matrices in a batch, as no layer of torch has them."""

    def __init__(self, *shape):
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(shape))


LAYERS = {
    "square": lambda: (nn.Linear(6, 6), "weight"),
    "tall": lambda: (nn.Linear(3, 8), "weight"),
    "wide": lambda: (nn.Linear(9, 4), "weight"),
    "one": lambda: (nn.Linear(1, 1), "weight"),
    "conv1d": lambda: (nn.Conv1d(3, 5, 2), "weight"),
    "conv2d": lambda: (nn.Conv2d(2, 5, 3), "weight"),
    "tall_conv2d": lambda: (nn.Conv2d(1, 7, 2), "weight"),
    "batch": lambda: (Stack(2, 3, 5, 5), "matrices"),
    "wide_batch": lambda: (Stack(3, 4, 5), "matrices"),
}


def make(kind, map, device, dtype=torch.float32):
    layer, name = LAYERS[kind]()
    layer = layer.to(device, dtype)
    before = getattr(layer, name).detach().clone()
    assert orthogonal(layer, map, name) is layer
    return layer, name, before


def matrix(weight, name):
    """Tall, float64."""
    flat = weight.double() if name == "matrices" else weight.double().flatten(1)
    return flat if flat.shape[-2] >= flat.shape[-1] else flat.mT


def defect(weight, name):
    Q = matrix(weight, name)
    return torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(Q.shape[-1], device=Q.device), 2).max()


def moved(layer, name, scale=1.0):
    """Away from the start, where a wrong term may not show."""
    raw = layer.parametrizations[name].original
    with torch.no_grad():
        raw.add_(scale * torch.randn_like(raw))
    return raw


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("kind", LAYERS)
def test_starts_from_the_nearest_orthonormal_weight(kind, map, dtype, device):
    layer, name, before = make(kind, map, device, dtype)
    weight = getattr(layer, name)
    U, _, Vh = torch.linalg.svd(matrix(before, name), full_matrices=False)
    assert weight.shape == before.shape
    assert weight.dtype == dtype
    slack = 4 if dtype in (torch.bfloat16, torch.float16) else 1  # whose base is rounded, too
    assert_near(matrix(weight, name), U @ Vh, dtype, slack)
    assert defect(weight, name) <= slack * TOLERANCE[dtype]
    assert map == "polar" or not layer.parametrizations[name].original.any()


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("kind", LAYERS)
def test_is_orthonormal_wherever_the_parameter_goes(kind, map, dtype, scale, device):
    layer, name, _ = make(kind, map, device, dtype)
    start = getattr(layer, name).detach()
    moved(layer, name, scale)
    assert defect(getattr(layer, name), name) <= 100 * torch.finfo(dtype).eps
    assert kind == "one" or not torch.allclose(getattr(layer, name), start, atol=1e-3)


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_is_orthonormal_in_a_batch_of_large_matrices(dtype, map, device):
    layer = orthogonal(Stack(3, 220, 180).to(device, dtype), map, "matrices")
    moved(layer, "matrices")
    assert defect(layer.matrices, "matrices") <= 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("map", ["cayley", "exponential"])
@pytest.mark.parametrize("kind", LAYERS)
def test_is_base_times_the_map_of_an_embedded_skew_matrix(kind, map, device):
    layer, name, _ = make(kind, map, device, torch.float64)
    parametrization = layer.parametrizations[name][0]
    raw = matrix(moved(layer, name), name)
    N, K = raw.shape[-2:]
    full = torch.cat([torch.cat([raw, torch.zeros(*raw.shape[:-1], N - K).to(raw)], -1)], -2)
    S = full - full.mT
    S[..., :K, :K] /= 2  # of which the op takes the skew part again, so S is passed whole
    base = parametrization._around_base(torch.eye(N, dtype=raw.dtype, device=device).expand(*raw.shape[:-2], N, N))
    eye = torch.eye(N, dtype=raw.dtype, device=device)
    torch.testing.assert_close(base.mT @ base, eye.expand_as(base), rtol=0, atol=1e-12)
    want = base @ (cayley if map == "cayley" else skew_exponential)(S)[..., :K]
    assert_near(matrix(getattr(layer, name), name), want, torch.float64)


@pytest.mark.parametrize("map", MAPS)
def test_reaches_a_determinant_of_minus_one_exactly(map, device):
    layer = orthogonal(nn.Linear(5, 5).double().to(device), map)
    for sign in (1, -1):
        Q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, device=device)).Q
        Q[0] *= sign * torch.linalg.det(Q).sign()
        layer.weight = Q
        assert_near(layer.weight, Q, torch.float64)
        moved(layer, "weight", 0.1)
        assert round(torch.linalg.det(layer.weight).item()) == sign


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("side", ["identity", "minus", "zero"])
def test_takes_a_weight_on_the_edge(map, side, device):
    """Where a reflector may be divided by 0."""
    weight = (
        {"identity": torch.eye(6, 3), "minus": -torch.eye(6, 3), "zero": torch.eye(6, 3).roll(3, 0)}[side].double().to(device)
    )
    layer = orthogonal(nn.Linear(3, 6).double().to(device), map)
    layer.weight = weight
    assert_near(layer.weight, weight, torch.float64)


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("kind", ["square", "tall", "wide", "conv2d", "batch"])
def test_gradient_agrees_with_differences(kind, map, device):
    layer, name, _ = make(kind, map, device, torch.float64)
    raw = moved(layer, name, 0.3)
    function = lambda raw: layer.parametrizations[name][0](raw)
    assert torch.autograd.gradcheck(function, raw)
    assert torch.autograd.gradgradcheck(function, raw)


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("kind", ["square", "tall", "wide", "conv2d"])
def test_stays_orthonormal_and_learns_by_sgd(kind, map, device):
    layer, _, before = make(kind, map, device)
    target = torch.linalg.qr(torch.randn_like(matrix(before, "weight"))).Q
    if kind == "square":  # of the same component
        target[:, 0] *= torch.linalg.det(target).sign() * torch.linalg.det(layer.weight.detach()).sign()
    loss = lambda: (matrix(layer.weight, "weight") - target).square().sum()
    optimizer, start = torch.optim.SGD(layer.parameters(), lr=0.05), loss().item()
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert defect(layer.weight, "weight") <= 20 * torch.finfo(torch.float32).eps
    assert loss() < start / 10


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("kind", ["square", "tall", "wide"])
def test_is_saved_copied_and_compiled(kind, map, device):
    first, _, _ = make(kind, map, device)
    second, _, _ = make(kind, map, device)
    moved(first, "weight")
    second.load_state_dict(first.state_dict())
    x = torch.randn(4, first.in_features, device=device)
    torch._dynamo.reset()  # each case is a class of its own, and it stops at the eighth
    compiled = torch.compile(first, fullgraph=True, backend="aot_eager")
    for other in (second, copy.deepcopy(first), compiled):
        assert torch.equal(other(x), first(x))
    raw = first.parametrizations.weight.original
    got, want = (torch.autograd.grad(layer(x).square().sum() + layer(x).sum(), raw)[0] for layer in (compiled, first))
    torch.testing.assert_close(got, want)
    with cached():
        assert first.weight is first.weight


@pytest.mark.parametrize("map", MAPS)
def test_becomes_plain_again(map, device):
    layer, _, _ = make("conv2d", map, device)
    moved(layer, "weight")
    weight, x = layer.weight.detach(), torch.randn(1, 2, 4, 4, device=device)
    before = layer(x)
    remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Conv2d
    assert torch.equal(layer.weight.data, weight)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("map", MAPS)
def test_bounds_read_the_orthonormal_weight(map, device):
    model = nn.Sequential(
        orthogonal(nn.Conv2d(1, 4, 2, stride=2), map),
        nn.ReLU(),
        nn.Flatten(),
        orthogonal(nn.Linear(16, 8), map),
        nn.ReLU(),
        orthogonal(nn.Linear(8, 3), map),
    ).to(device)
    for layer in (model[0], model[3], model[5]):
        moved(layer, "weight")
    for sigma in bounds.norms(model, (1, 4, 4)).sigma.values():
        assert 1 - 1e-5 <= sigma <= 1 + 1e-2
    constants = bounds.lipschitz(model, (1, 4, 4), method="product")
    off = ~torch.eye(3, dtype=torch.bool, device=device)
    torch.testing.assert_close(constants[off].double(), torch.full_like(constants[off], 2**0.5).double(), rtol=2e-2, atol=0)


@pytest.mark.parametrize("map", MAPS)
@pytest.mark.parametrize("kind", ["square", "tall"])
def test_autocast_does_not_reach_the_weight(kind, map, device):
    layer, _, _ = make(kind, map, device)
    moved(layer, "weight")
    want = layer.weight
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        assert torch.equal(layer.weight, want)


def test_names_what_is_wrong():
    with pytest.raises(ValueError, match="orthogonal: map must be one of cayley, exponential, polar, got 'householder'"):
        orthogonal(nn.Linear(2, 2), "householder")
    with pytest.raises(ValueError, match="orthogonal: name must be that of a plain parameter of Linear, got 'wheel'"):
        orthogonal(nn.Linear(2, 2), name="wheel")
    with pytest.raises(ValueError, match=r"orthogonal: bias must be \(O, I\) or \(O, C, ...\), got \(2,\)"):
        orthogonal(nn.Linear(2, 2), name="bias")
    with pytest.raises(ValueError, match="name must be that of a plain parameter of ParametrizedLinear, got 'weight'"):
        orthogonal(orthogonal(nn.Linear(2, 2)))
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int32), requires_grad=False)
    with pytest.raises(ValueError, match="orthogonal: weight must be a float64"):
        orthogonal(layer)
    layer = orthogonal(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"orthogonal: weight must be \(3, 2\), got \(2, 3\)"):
        layer.weight = torch.zeros(2, 3)
