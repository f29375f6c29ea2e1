import copy
import math

import pytest
import torch
from torch import nn

import lipfast.nn
from lipfast import models
from lipfast.bounds import liplt, lipschitz, local, norms
from lipfast.bounds._liplt import _distance
from tests.checks import assert_near
from tests.test_lipschitz import small_networks, steepest

SLOPES = {
    nn.ReLU: (0, 1),
    nn.LeakyReLU: (0.2, 1),
    nn.Tanh: (0, 1),
    nn.Sigmoid: (0, 0.25),
    nn.GELU: (-0.1292, 1.1292),
    nn.SiLU: (-0.09985, 1.09985),
    lipfast.nn.ClippedReLU: (0, 1),
}
ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "clipped": lambda: lipfast.nn.ClippedReLU(0.5),
}
POOLS = (nn.MaxPool2d, nn.LPPool2d)


def networks():
    """float64, small enough for matrices of all maps."""
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(4).eval()
    nn.init.normal_(bn.weight), nn.init.uniform_(bn.running_var, 0.5, 2.0)
    grid = (2, 5, 6)
    first = nn.Conv2d(2, 4, 3, 1, 1)
    with torch.no_grad():
        first.weight[0] *= 4  # so that the largest singular values stand apart, and power iterations converge
    conv = lambda *after: nn.Sequential(copy.deepcopy(first), *after)
    head = lambda n: (nn.Flatten(), nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, 3))
    found = {
        "deep": (models.mlp((5, 9, 8, 7, 6, 3)), (5,)),
        "linear": (nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), (5,)),
        "negative": (
            nn.Sequential(nn.Linear(5, 9), nn.LeakyReLU(-3.0), nn.Linear(9, 8), nn.LeakyReLU(-3.0), nn.Linear(8, 3)),
            (5,),
        ),
        "level max_min": (models.mlp((8, 8, 8, 8, 3), "max_min"), (8,)),
        "max_min": (models.mlp((5, 8, 8, 8, 3), "max_min"), (5,)),
        "stride": (conv(nn.ReLU(), nn.Conv2d(4, 4, 3, (3, 2), (1, 0)), nn.ReLU(), *head(16)), grid),
        "dilation": (conv(nn.ReLU(), nn.Conv2d(4, 4, 2, 2, 1, 2, groups=2), nn.ReLU(), *head(36)), grid),
        "line": (nn.Sequential(nn.Conv1d(2, 4, 3, 2), nn.ReLU(), nn.Conv1d(4, 2, 2), nn.Tanh(), *head(6)), (2, 10)),
        "circular": (nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(), *head(120)), grid),
        "average pool": (conv(nn.ReLU(), nn.AvgPool2d(3, 2, 1), *head(36)), grid),
        "max pool": (conv(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.ReLU(), *head(8)), grid),
        "l2 pool": (conv(nn.LPPool2d(2, 2), *head(24)), grid),
        "batch norm": (conv(bn, nn.ReLU(), *head(120)), grid),
        "image max_min": (
            conv(lipfast.nn.MaxMin(), nn.Conv2d(4, 4, 3, 2), lipfast.nn.MaxMin(), nn.Flatten(), nn.Linear(16, 3)),
            grid,
        ),
        "residual": (models.resnet2b((2, 8, 8), 3), (2, 8, 8)),
        "no last layer": (conv(nn.ReLU(), nn.Flatten(), nn.Linear(120, 3), nn.SiLU()), grid),
        "difference": (nn.Sequential(Block(nn.ReLU(), -1), Block(nn.ReLU(), -1), nn.Linear(6, 3)), (6,)),
        "blocks": (nn.Sequential(*(Block(nn.GELU()) for _ in range(3)), nn.Linear(6, 3)), (6,)),
    }
    for at in (1, 3, 5):
        weight = nn.init.orthogonal_(found["level max_min"][0][at].weight)  # whose product is below loop transformation
        weight.data *= torch.linspace(1.0, 0.8, 8)
    for name, activation in ACTIVATIONS.items():
        found[name] = (nn.Sequential(nn.Linear(5, 9), activation(), nn.Linear(9, 8), activation(), nn.Linear(8, 3)), (5,))
    return {name: (model.double(), shape) for name, (model, shape) in found.items()}


class Block(nn.Module):
    """x -> H x + G phi(W x), or their difference"""

    def __init__(self, phi, sign=1):
        super().__init__()
        self.sign = sign
        self.H, self.G, self.W, self.phi = nn.Linear(6, 6), nn.Linear(7, 6), nn.Linear(6, 7), phi

    def forward(self, x):
        left, right = self.H(x), self.G(self.phi(self.W(x)))
        return left + right if self.sign > 0 else left - right


class Cut(nn.Module):
    """In place of a nonlinearity: its linear part, and an input of its own for what is cut off."""

    def __init__(self, phi):
        super().__init__()
        self.phi = phi
        least, greatest = SLOPES.get(type(phi), (0, 0))
        if isinstance(phi, nn.LeakyReLU):
            least, greatest = sorted((phi.negative_slope, 1))
        self.c, self.r = (least + greatest) / 2, (greatest - least) / 2
        self.pairs, self.pool = isinstance(phi, lipfast.nn.MaxMin), isinstance(phi, POOLS)

    def forward(self, x):
        self.seen = x
        kept = self.means(x) if self.pairs else 0 * self.phi(x.detach()) if self.pool else self.c * x
        self.extra = torch.zeros_like(kept, requires_grad=True)
        cut = self.extra - self.means(self.extra) if self.pairs else self.extra if self.pool else self.r * self.extra
        return kept + cut

    def means(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat([a + b, a + b], 1) / 2

    def read(self, matrix):  # (n, m): the rows of what psi reads
        if not self.pairs:
            return matrix
        image = matrix.reshape(*self.seen.shape[1:], -1)[None]
        return (image - self.means(image)).reshape(matrix.shape)


def explicit(model, shape):
    """LipLT by singular value decompositions of the matrices of all maps: pairwise, m and right singular vectors by name.

    The maps are the Jacobians of the model itself, its nonlinearities exchanged.
    """
    cut = copy.deepcopy(model)
    for own, other in zip(model.modules(), cut.modules(), strict=True):  # the same parameters, for gradients
        for name, p in own._parameters.items():
            other._parameters[name] = p
    cuts = {}
    for name, module in list(cut.named_modules()):
        if type(module) in SLOPES or isinstance(module, (lipfast.nn.MaxMin, *POOLS)):
            cuts[name] = Cut(module)
            path, _, last = name.rpartition(".")
            setattr(cut.get_submodule(path), last, cuts[name])
    x = torch.zeros(1, *shape, dtype=torch.float64, requires_grad=True)
    logits = cut(x)
    sources = {"input": x, **{name: c.extra for name, c in cuts.items()}}

    def matrices(value):
        units = torch.eye(value.numel(), dtype=torch.float64)
        flow = lambda s: torch.autograd.grad(
            value.flatten(), s, units, is_grads_batched=True, allow_unused=True, create_graph=True, retain_graph=True
        )[0]
        if not value.requires_grad:
            return {}
        flows = {name: flow(s) for name, s in sources.items()}
        return {name: f.flatten(1) for name, f in flows.items() if f is not None}

    slopes, vectors = {}, {}
    weight = {"input": torch.ones((), dtype=torch.float64)}
    for name, c in cuts.items():
        total = 0.0
        for j, A in matrices(c.seen).items():
            if j not in weight:
                continue
            _, norm, right = torch.linalg.svd(c.read(A), full_matrices=False)
            total = total + norm[0] * weight[j]
            vectors[f"{j}>{name}"] = right[0].detach().reshape(sources[j].shape)
        if any(m.pairs for m in cuts.values()):
            total = torch.minimum(total, _product(model, shape, name))
        slopes[name] = weight[name] = total
    rows = matrices(logits)
    apart = lambda A: torch.linalg.vector_norm(A[:, None] - A[None] + 1e-300, dim=-1)
    pairwise = sum(apart(A) * weight[j] for j, A in rows.items())
    if any(m.pairs for m in cuts.values()):
        last = list(model.modules())[-1].weight
        pairwise = torch.minimum(pairwise, _product(model, shape, None) * apart(last))
    return pairwise, slopes, vectors


def _product(model, shape, until):
    """Of a Sequential of affine layers and MaxMin."""
    total, x = torch.ones((), dtype=torch.float64), torch.zeros(1, *shape, dtype=torch.float64)
    for name, module in list(model.named_children())[: None if until else -1]:
        if name == until:
            break
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            J = torch.autograd.functional.jacobian(module, x, create_graph=True).reshape(-1, x.numel())
            total = total * torch.linalg.matrix_norm(J, 2)
        x = module(x).detach()
    return total


@pytest.mark.parametrize("name", list(networks()))
def test_is_the_formula_with_the_norms_of_explicit_matrices(name):
    model, shape = networks()[name]
    pairwise, slopes, vectors = explicit(model, shape)
    given = {**norms(model, shape, "estimate", 2000).vectors, **vectors} if "max_min" in name else vectors
    got = liplt(model, shape, 0, given)
    assert_near(got.pairwise, pairwise, torch.float64)
    assert got.slopes.keys() == slopes.keys()
    for key, value in slopes.items():
        assert_near(got.slopes[key], value, torch.float64)
    assert vectors.keys() <= got.vectors.keys()
    assert torch.equal(got.pairwise, got.pairwise.mT)
    assert not got.pairwise.diagonal().any()


def test_a_chain_is_the_recursion_of_the_paper():
    model, shape = networks()["leaky"]
    W = [layer.weight.detach() for layer in model if isinstance(layer, nn.Linear)]
    c, r = 0.6, 0.4
    norm = lambda *factors: torch.linalg.matrix_norm(torch.linalg.multi_dot(factors) if factors[1:] else factors[0], 2)
    m_0 = norm(W[0])
    m_1 = c * norm(W[1], W[0]) + r * norm(W[1]) * m_0
    difference = W[2][0] - W[2][1]
    want = c**2 * (difference @ W[1] @ W[0]).norm() + r * c * (difference @ W[1]).norm() * m_0 + r * difference.norm() * m_1
    found = liplt(model, shape, 300)
    assert_near(found.slopes["1"], m_0, torch.float32)
    assert_near(found.slopes["3"], m_1, torch.float32)
    assert_near(found.pairwise[0, 1], want, torch.float32)


def test_residual_blocks_are_the_recursion_of_the_paper():
    torch.manual_seed(1)
    model = nn.Sequential(Block(nn.ReLU()), Block(nn.ReLU()), nn.Linear(6, 3)).double()
    (H_0, G_0, W_0), (H_1, G_1, W_1) = ([block.H.weight, block.G.weight, block.W.weight] for block in model[:2])
    norm = lambda A: torch.linalg.matrix_norm(A, 2)
    A_0, A_1 = H_0 + G_0 @ W_0 / 2, H_1 + G_1 @ W_1 / 2
    m_0 = norm(W_0)
    m_1 = norm(W_1 @ A_0) + norm(W_1 @ G_0) * m_0 / 2
    difference = model[2].weight[0] - model[2].weight[2]
    want = (difference @ A_1 @ A_0).norm() + (difference @ A_1 @ G_0).norm() * m_0 / 2 + (difference @ G_1).norm() * m_1 / 2
    found = liplt(model, (6,), 300)
    assert_near(found.slopes["1.phi"], m_1, torch.float32)
    assert_near(found.pairwise[0, 2], want, torch.float32)


@pytest.mark.parametrize("name", list(networks()))
def test_power_iteration_reaches_the_formula_from_below(name):
    model, shape = networks()[name]
    want = explicit(model, shape)[0]
    for iterations in (0, 1, 3):
        assert (liplt(model, shape, iterations).pairwise <= want * (1 + 1e-12)).all()
    assert_near(liplt(model, shape, 300).pairwise, want, torch.float32)


@pytest.mark.parametrize("name", list(networks()))
def test_the_gradient_is_that_of_singular_value_decompositions(name):
    model, shape = networks()[name]
    want, _, vectors = explicit(model, shape)
    given = {**norms(model, shape, "estimate", 2000).vectors, **vectors} if "max_min" in name else vectors
    share = torch.rand_like(want)
    weights = [p for key, p in model.named_parameters() if key.endswith("weight")]
    got, want = (torch.autograd.grad((t * share).sum(), weights) for t in (liplt(model, shape, 0, given).pairwise, want))
    for g, w in zip(got, want, strict=True):
        assert w.any()
        assert_near(g, w, torch.float64, slack=10)


@pytest.mark.parametrize("name", list(small_networks()))
def test_no_sampled_slope_exceeds_a_converged_estimate_and_that_no_product(name):
    model, shape = small_networks()[name]
    model = model.double()
    found = liplt(model, shape, 300).pairwise
    product = lipschitz(model, shape, method="product", kind="estimate", norms=norms(model, shape, "estimate", 300))
    assert (found <= product * (1 + 1e-5)).all()
    for scale in (0.1, 1.0, 10.0):
        assert (steepest(model, scale * torch.randn(8, *shape, dtype=torch.float64), scale) <= found * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("name", ["residual", "image max_min", "line"])
def test_vectors_save_iterations(name):
    model, shape = networks()[name]
    model = model.float()
    converged = liplt(model, shape, 300)
    assert not any(v.requires_grad for v in converged.vectors.values())
    assert all(v.shape == (1, *shape) for key, v in converged.vectors.items() if key.startswith("input>"))
    assert_near(liplt(model, shape, 1, converged.vectors).pairwise, converged.pairwise, torch.float32)
    assert (liplt(model, shape, 1).pairwise < 0.99 * converged.pairwise + torch.eye(3)).all()


def test_vectors_that_do_not_fit_are_replaced():
    model, shape = networks()["image max_min"]
    fresh = liplt(model, shape, 2)
    for spoil in (lambda v: 0 * v, lambda v: v * math.nan, lambda v: v[..., :-1], lambda v: v[None]):
        again = liplt(model, shape, 2, {key: spoil(v) for key, v in fresh.vectors.items()})
        assert_near(again.pairwise, fresh.pairwise, torch.float64)
    model, shape = networks()["deep"]
    partly = {key: v for key, v in liplt(model, shape, 2).vectors.items() if key.startswith("2>")}
    assert liplt(model, shape, 0, partly).slopes["4"] > liplt(model, shape, 0).slopes["4"]


@pytest.mark.parametrize("width", ["Linear", "Conv2d"])
def test_fifty_layers_neither_overflow_nor_underflow(width):
    torch.manual_seed(0)
    layer = lambda: nn.Linear(6, 6) if width == "Linear" else nn.Conv2d(2, 2, 3, 1, 1)
    shape, n = ((6,), 6) if width == "Linear" else ((2, 4, 4), 32)
    layers = [module for _ in range(50) for module in (layer(), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(n, 3))
    weights = [module.weight for module in layers[::2]]
    want = liplt(model, shape, 3).pairwise
    grads = torch.autograd.grad(want.sum(), weights)
    assert (want[0, 1:] > 0).all()
    for powers in ([10] * 25 + [-10] * 25, [-10] * 25 + [10] * 25):  # 2^250 is far beyond float32
        with torch.no_grad():
            for weight, power in zip(weights, powers, strict=True):
                weight *= 2.0**power
        got = liplt(model, shape, 3).pairwise
        assert_near(got / want.amax(), want / want.amax(), torch.float32)
        for g, w, power in zip(torch.autograd.grad(got.sum(), weights), grads, powers, strict=True):
            assert_near(g * 2.0**power / w.abs().amax(), w / w.abs().amax(), torch.float32)
        with torch.no_grad():
            for weight, power in zip(weights, powers, strict=True):
                weight /= 2.0**power


def test_two_hundred_classes_have_the_constants_of_any_two_of_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 200))
    found = liplt(model, (1, 8, 8), 20)
    assert found.pairwise.shape == (200, 200)
    for pair in ([0, 1], [17, 199]):
        two = copy.deepcopy(model)
        two[5] = nn.Linear(20, 2)
        two[5].weight.data = model[5].weight.data[pair]
        want = liplt(two, (1, 8, 8), 20).pairwise[0, 1]
        assert_near(found.pairwise[pair[0], pair[1]], want, torch.float32)


def test_distances_of_float32_rows_keep_what_the_rows_tell():
    torch.manual_seed(0)
    rows = 100 + torch.randn(2, 1, 300) + torch.tensor([0, 1, 3, 0])[:, None] * torch.randn(2, 4, 300)
    rows.requires_grad_()
    wide = rows.detach().double().requires_grad_()
    got, want = _distance(rows), _distance(wide)
    assert_near(got, want, torch.float32)
    assert (got[:, 0, 3] == 0).all()
    assert torch.equal(got, got.mT)
    share = torch.rand_like(got)
    (slope,), (exact,) = torch.autograd.grad((got * share).sum(), rows), torch.autograd.grad((want * share).sum(), wide)
    assert_near(slope, exact, torch.float32)


@pytest.mark.parametrize("name", ["deep", "stride", "residual", "max pool", "max_min"])
def test_where_every_unit_can_vary_the_local_constants_are_the_global_ones(name):
    model, shape = networks()[name]
    if name == "max_min":
        model = nn.Sequential(*model[:-1], nn.ReLU(), model[-1])
    x = torch.randn(2, *shape, dtype=torch.float64)
    found = local(model, x, 1e4, "liplt", "estimate", norms(model, shape, "estimate", 300), 300).pairwise()
    assert_near(found, liplt(model, shape, 300).pairwise.expand(2, -1, -1), torch.float32)


def test_names_are_unique():
    model = nn.Sequential(nn.Linear(4, 4), lipfast.nn.ClippedMaxMin(0.5, shape=(4,)), nn.Linear(4, 3))
    assert liplt(model, (4,)).slopes.keys() == {"1", "1:1"}


def test_nothing_is_differentiated_where_no_gradient_is_wanted():
    model, shape = networks()["residual"]
    with torch.no_grad():
        assert not liplt(model, shape, 1).pairwise.requires_grad
    assert liplt(model, shape, 1).pairwise.requires_grad


def test_names_what_is_wrong():
    model = models.mlp((6, 8, 3))
    with pytest.raises(ValueError, match="iterations: 0 or more expected, got -1"):
        liplt(model, (6,), -1)
    with pytest.raises(ValueError, match=r"model: logits \(B, K\) of two classes or more expected, got \(B, 1"):
        liplt(models.mlp((6, 8, 1)), (6,))
    pool = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(3, 1), nn.Flatten(), nn.Linear(32, 3))
    with pytest.raises(ValueError, match="layer '1': pooling over overlapping or cut windows"):
        liplt(pool, (1, 8, 8))
    with pytest.raises(ValueError, match="layer '1': batch norm has bounds in eval mode"):
        liplt(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)), (6,))
    for broken in (math.nan, math.inf):
        for at in (1, 3):
            model = models.mlp((6, 8, 3))
            with torch.no_grad():
                model[at].weight[1, 1] = broken
            with pytest.raises(ValueError, match=f"layer '{at}': finite weights expected, got NaN or Inf"):
                liplt(model, (6,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_whole_bound_is_one_cuda_graph():
    model = models.resnet2b((3, 16, 16)).cuda()
    vectors = liplt(model, (3, 16, 16), 5).vectors
    weights = list(model.parameters())
    step = lambda: torch.autograd.grad(liplt(model, (3, 16, 16), 3, vectors).pairwise.sum(), weights, allow_unused=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
