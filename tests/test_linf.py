import math
from fractions import Fraction

import pytest
import torch
from torch import nn

import lipfast.nn
from lipfast import models
from lipfast.bounds import _linf
from lipfast.bounds._linf import lipschitz_inf
from lipfast.bounds.network import read
from tests.checks import TOLERANCE
from tests.test_lipschitz import small_networks

RTOL = TOLERANCE[torch.float64]


def constants(model, shape, method="liplt", kind="bound"):
    with torch.set_grad_enabled(kind == "estimate"):
        return lipschitz_inf(read(model, shape), method, kind)


class Net(nn.Module):
    """Its activations are exchanged for what :func:`explicit` and :func:`steepest` do with them."""

    def __init__(self, body, activation=None, **parts):
        super().__init__()
        self.body, self.activation = body, activation or nn.ReLU()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.body(self, x, self.activation)


def _chain(*layers):
    """A chain with an activation after each None."""

    def body(net, x, activation):
        for layer in net.layers:
            x = activation(x) if isinstance(layer, nn.Identity) else layer(x)
        return x

    parts = [nn.Identity() if layer is None else layer for layer in layers]
    return lambda activation=None: Net(body, activation, layers=nn.ModuleList(parts)).double()


def _residual(net, x, activation):
    first = activation(net.first(x))
    block = activation(net.second(activation(net.inner(first))) + net.shortcut(first))
    block = activation(block - net.third(block))
    return net.last(activation(net.hidden(block.flatten(1))))


def networks():
    """Name to (a function from an activation to a network, shape of a sample, shape of one whose center sees no border)."""
    torch.manual_seed(0)
    head = lambda: (nn.Flatten(), nn.LazyLinear(5), None, nn.Linear(5, 3))
    conv = nn.Conv2d
    residual = {
        "first": conv(2, 3, 3, 1, 1),
        "inner": conv(3, 4, 3, 2, 1),
        "second": conv(4, 4, 3, 1, 1),
        "shortcut": conv(3, 4, 1, 2),
        "third": conv(4, 4, 3, 1, 1),
        "hidden": nn.Linear(36, 5),
        "last": nn.Linear(5, 3),
    }
    found = {
        "feed-forward": (_chain(nn.Linear(4, 7), None, nn.Linear(7, 6), None, nn.Linear(6, 3)), (4,), (4,)),
        "residual": (lambda a=None: Net(_residual, a, **residual).double(), (2, 6, 6), (2, 33, 33)),
        "strided": (_chain(conv(2, 3, 4, 2, 1), None, conv(3, 4, 3, 3, 2), None, *head()), (2, 8, 7), (2, 45, 45)),
        "dilated": (_chain(conv(2, 3, 3, 1, 2, 2), None, conv(3, 2, (2, 3), 1, (0, 1)), None, *head()), (2, 6, 6), (2, 17, 17)),
        "grouped": (_chain(conv(2, 4, 3, 1, 1), None, conv(4, 6, 3, 1, 1, groups=2), None, *head()), (2, 5, 5), (2, 15, 15)),
        "1d": (_chain(nn.Conv1d(2, 3, 3, 1, 1), None, nn.Conv1d(3, 4, 4, 2, 1), None, *head()), (2, 9), (2, 31)),
        "average": (
            _chain(conv(2, 3, 3, 1, 1), None, nn.AvgPool2d(3, 2, 1), conv(3, 3, 2), None, nn.AvgPool2d(2), *head()),
            (2, 8, 8),
            (2, 37, 37),
        ),
        "padded": (
            _chain(nn.ZeroPad2d((1, 2, 0, 1)), conv(2, 3, 3), None, conv(3, 3, 3, 1, 1), None, *head()),
            (2, 5, 5),
            (2, 21, 21),
        ),
        "even": (_chain(nn.Conv2d(1, 3, 2, padding="same"), None, conv(3, 3, 3, 1, 1), None, *head()), (1, 4, 4), (1, 15, 15)),
    }
    for make, shape, _ in found.values():
        make()(torch.zeros(1, *shape, dtype=torch.float64))
    return found


def explicit(make, shape, large, low, high):
    """LipLT by Jacobians: images' units at the center of a sample so large that it sees no border, vectors' on the sample."""
    wide = (min(low, 0.0), max(high, 0.0))
    moved: list[torch.Tensor] = []
    for image, size, (a, b) in ((True, large, wide), (False, shape, (low, high)))[len(shape) == 1 :]:
        sources, inputs = [torch.zeros(1, *size, dtype=torch.float64, requires_grad=True)], []

        def activation(s, a=a, b=b, sources=sources, inputs=inputs):
            inputs.append(s)
            sources.append(torch.zeros_like(s, requires_grad=True))
            return (a + b) / 2 * s + (b - a) / 2 * sources[-1]

        try:
            logits = make(activation)(sources[0])
        except RuntimeError:  # the large sample ends before the head
            logits = None
        rows = lambda z, upto, sources=sources: [
            [
                g if g is not None else torch.zeros_like(s)
                for s, g in zip(sources[:upto], _grads(v, sources[:upto]), strict=True)
            ]
            for v in z
        ]
        reach = [torch.ones(1, dtype=torch.float64), *moved]
        for k, s in enumerate(inputs):
            if (s.ndim > 2) != image or k < len(moved):
                continue
            center = s[0][(slice(None), *(n // 2 for n in s.shape[2:]))]
            m = torch.stack([sum((_along(reach[j], g) * g.abs()).sum() for j, g in enumerate(r)) for r in rows(center, k + 1)])
            moved.append(m)
            reach.append(m)
    parts = list(zip(*rows(logits[0], len(sources)), strict=True))
    return sum(torch.cdist(_flat(p, reach[j]), _flat(p, reach[j]), p=1) for j, p in enumerate(parts))


def _grads(value, sources):
    return torch.autograd.grad(value, sources, retain_graph=True, allow_unused=True)


def _along(m, g):
    return m.reshape(1, -1, *[1] * (g.ndim - 2))


def _flat(gradients, m):
    return torch.stack([(g * _along(m, g)).flatten() for g in gradients])


NAMES = list(networks())
SLOPES = {
    "relu": (nn.ReLU(), 0.0, 1.0),
    "tanh": (nn.Tanh(), 0.0, 1.0),
    "leaky": (nn.LeakyReLU(0.3), 0.3, 1.0),
    "sigmoid": (nn.Sigmoid(), 0.0, 0.25),
    "softplus": (nn.Softplus(), 0.0, 1.0),
    "falling": (nn.LeakyReLU(-0.5), -0.5, 1.0),
}


@pytest.mark.parametrize("activation", SLOPES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_explicit_matrices(name, activation):
    make, shape, large = networks()[name]
    function, low, high = SLOPES[activation]
    want = explicit(make, shape, large, low, high)
    got = constants(make(function), shape)
    if activation == "relu":
        torch.testing.assert_close(got, want, rtol=RTOL, atol=0)
        torch.testing.assert_close(constants(make(function), shape, kind="estimate"), want, rtol=RTOL, atol=0)
    assert (got <= want * (1 + RTOL)).all()  # the product of a unit's own layers may be less
    assert (got >= 0.5 * want).all()


def steepest(make, shape, low, high):
    """The largest l1 norm of a difference of two logits' gradients that single steps from random slopes find: (K, K)."""
    best = torch.zeros((), dtype=torch.float64)
    for _ in range(20):
        slopes: list[torch.Tensor] = []

        def activation(s, slopes=slopes):
            slopes.append((low + (high - low) * torch.randint(0, 2, s.shape)).double())
            return s * slopes[-1]

        J = torch.autograd.functional.jacobian(make(activation), torch.zeros(1, *shape, dtype=torch.float64))[0].flatten(1)
        best = torch.maximum(best, torch.cdist(J, J, p=1))
    return best


@pytest.mark.parametrize("activation", ["relu", "leaky", "falling"])
@pytest.mark.parametrize("name", NAMES)
def test_no_choice_of_slopes_exceeds_the_bound(name, activation):
    make, shape, _ = networks()[name]
    function, low, high = SLOPES[activation]
    bound = constants(make(function), shape)
    assert (steepest(make, shape, low, high) <= bound).all()
    assert (bound <= constants(make(function), shape, "product")).all()


@pytest.mark.parametrize("name", list(small_networks()))
def test_no_sampled_slope_exceeds_the_bound(name):
    model, shape = small_networks()[name]
    bound, product = constants(model, shape), constants(model, shape, "product")
    estimate = constants(model, shape, kind="estimate")
    assert torch.equal(bound, bound.mT)
    assert not bound.diagonal().any()
    assert bound.dtype == torch.float64
    assert (bound <= product).all()
    torch.testing.assert_close(estimate.double(), bound, rtol=1e-4, atol=0)
    model = model.double()
    for scale in (0.1, 1.0, 10.0):
        x = scale * torch.randn(8, *shape, dtype=torch.float64)
        J = torch.autograd.functional.jacobian(lambda v: model(v).sum(0), x).flatten(2).transpose(0, 1)
        assert (torch.cdist(J, J, p=1) <= bound).all()
        y = x + scale * (2 * torch.rand_like(x) - 1)
        z = model(x) - model(y)
        assert ((z[:, :, None] - z[:, None]).abs() <= bound * (x - y).abs().flatten(1).amax(1)[:, None, None]).all()


def test_ends_in_a_nonlinearity():
    torch.manual_seed(0)
    first, second = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()
    A, B = first.weight, second.weight
    m = (B @ A).abs().sum(1) / 2 + B.abs() @ A.abs().sum(1) / 2
    rows = torch.cat([B @ A / 4, B * A.abs().sum(1) / 4, torch.diag(m) / 2], 1)
    got = constants(nn.Sequential(first, nn.ReLU(), second, nn.ReLU()), (3,))
    torch.testing.assert_close(got, torch.cdist(rows, rows, p=1).detach(), rtol=RTOL, atol=0)
    pooled = nn.Sequential(nn.Conv1d(1, 2, 3), nn.MaxPool1d(3, 1, 1), nn.Flatten(), nn.Linear(8, 3), nn.Unflatten(1, (1, 3)))
    pooled = nn.Sequential(*pooled, nn.MaxPool1d(1), nn.Flatten())
    assert (constants(pooled, (1, 6)) <= constants(pooled, (1, 6), "product")).all()


def _shifts(between, padding="zeros"):
    """x, shifted to the left and back: within the image the difference to x vanishes, at its edge it does not."""
    first = nn.Conv1d(1, 4, 3, 1, 1, bias=False)
    second = nn.Conv1d(4, 1, 3, 1, 1, bias=False, padding_mode=padding)
    last = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[0.0, 0, 1], [0, 1, 0], [0, 0, 1], [0, 1, 0]])[:, None])
        second.weight.copy_(torch.tensor([[1.0, 0, 0], [0, -1, 0], [1, 0, 0], [0, -1, 0]]))
        last.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]))
    return nn.Sequential(first, between, second, nn.LeakyReLU(0.95), nn.Flatten(), last)


@pytest.mark.parametrize("padding", ["zeros", "circular", "replicate"])
@pytest.mark.parametrize(
    "between", [nn.Identity(), nn.LeakyReLU(0.9), nn.ReLU(), nn.LeakyReLU(1.0), lipfast.nn.MaxMin(), nn.MaxPool1d(1)], ids=str
)
def test_what_lies_beyond_the_image_is_not_forgotten(between, padding):
    model = _shifts(between, padding)
    x = torch.tensor([[0.0, 0, 0, 0], [-1, 0, 0, 0], [1, 0, 0, 0], [-1, 1, 0, 0], [1, -1, 0, 0]])
    value = model(x[:, None])[:, 0]
    slope = (value - value[0]).abs().max()
    assert slope >= 1.7
    assert constants(model, (1, 4))[0, 1] >= slope


def test_rounding_is_paid_where_layers_cancel():
    """Nothing between two layers, whose product nearly vanishes: rounding is all that a computed product shows."""
    torch.manual_seed(0)
    for _ in range(20):
        first, row = torch.randn(300, 1).double() / 3, torch.randn(300).double() / 3
        row[-1] = -(row[:-1] @ first[:-1, 0]) / first[-1, 0]
        exact = abs(sum(Fraction(a) * Fraction(b) for a, b in zip(first[:, 0].tolist(), row.tolist(), strict=True)))
        for after in ([nn.Linear(1, 2, bias=False)], [nn.ReLU(), nn.Linear(1, 2, bias=False)]):
            model = nn.Sequential(nn.Linear(1, 300, bias=False), nn.Linear(300, 1, bias=False), *after).double()
            with torch.no_grad():
                model[0].weight.copy_(first)
                model[1].weight.copy_(row[None])
                model[-1].weight.copy_(torch.tensor([[1.0], [0.0]]))
            got = constants(model, (1,))[0, 1].item()
            assert exact <= Fraction(got) <= exact + Fraction(1, 10**11)


def test_slopes_stay_where_nothing_reads_beyond_the_image():
    make = _chain(nn.Conv2d(2, 3, 3), None, nn.Conv2d(3, 3, 2), None, nn.Flatten(), nn.Linear(27, 3))
    want = explicit(make, (2, 6, 6), (2, 6, 6), 0.3, 1.0)  # any unit is like the center
    torch.testing.assert_close(constants(make(nn.LeakyReLU(0.3)), (2, 6, 6)), want, rtol=0.2, atol=0)
    off = ~torch.eye(3, dtype=torch.bool)
    assert (constants(make(nn.LeakyReLU(0.3)), (2, 6, 6)) < want)[off].all()  # which takes slopes with 0


def test_max_min_keeps_the_mean_of_pairs():
    torch.manual_seed(0)
    first, last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
    P = torch.eye(2).repeat(2, 2).double() / 2
    m = first.weight.abs().sum(1)
    row = last.weight[0] - last.weight[1]
    want = (row @ P @ first.weight).abs().sum() + ((row - row @ P).abs() * (P @ m)).sum()
    near = (row.abs() * torch.maximum(*m.chunk(2)).repeat(2)).sum()
    got = constants(nn.Sequential(first, lipfast.nn.MaxMin(), last), (3,))[0, 1]
    torch.testing.assert_close(got, torch.minimum(want, near).detach(), rtol=RTOL, atol=0)


@pytest.mark.parametrize("activation", [lipfast.nn.MaxMin(), nn.MaxPool2d(3, 1, 1), nn.LPPool2d(2, 3, 1)], ids=str)
@pytest.mark.parametrize("padding", ["zeros", "circular", "reflect", "replicate"])
def test_other_layers_hold_against_sampled_slopes(activation, padding):
    torch.manual_seed(0)
    conv = lambda c: nn.Conv2d(c, 4, 3, 1, 1, padding_mode=padding)
    bend = [conv(2), activation, conv(4), nn.ReLU(), conv(4), conv(4), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(2)]
    model = nn.Sequential(*bend, nn.Flatten(), nn.Linear(16, 3)).double().eval()
    bound = constants(model, (2, 6, 6))
    assert (bound <= constants(model, (2, 6, 6), "product")).all()
    x = torch.randn(32, 2, 6, 6, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda v: model(v).sum(0), x).flatten(2).transpose(0, 1)
    assert (torch.cdist(J, J, p=1) <= bound).all()


def test_vectors_become_images_and_back():
    torch.manual_seed(0)
    bend = [nn.Linear(5, 12), nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 2, 3, 1, 1), nn.ReLU(), nn.Conv2d(2, 3, 3, 1, 1)]
    model = nn.Sequential(*bend, nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()
    bound = constants(model, (5,))
    x = torch.randn(64, 5, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda v: model(v).sum(0), x).transpose(0, 1)
    assert (torch.cdist(J, J, p=1) <= bound).all()
    assert (bound <= constants(model, (5,), "product") / 2).all()


def test_is_not_below_exact_arithmetic():
    """Integers far apart in size, whose products float64 cannot hold."""
    torch.manual_seed(0)
    weights = [torch.randint(-(2**50), 2**50, size).double() for size in ((3, 4), (4, 3), (2, 4))]
    model = models.mlp((4, 3, 4, 2)).double()
    linear = [m for m in model if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for layer, weight in zip(linear, weights, strict=True):
            layer.weight.copy_(weight)
    A, B, C = ([[Fraction(int(v)) for v in row] for row in w.tolist()] for w in weights)
    times = lambda P, Q: [
        [sum(p * q for p, q in zip(row, column, strict=True)) for column in zip(*Q, strict=True)] for row in P
    ]
    part = lambda P, Q, m: [sum(abs(v) * n for v, n in zip(row, m, strict=True)) for row in times(P, Q)]
    one = [[Fraction(i == j) for j in range(4)] for i in range(4)]
    first = part(A, one, [1] * 4)
    second = [(a + b) / 2 for a, b in zip(part(B, A, [1] * 4), part(B, [r[:3] for r in one[:3]], first), strict=True)]
    row = [[a - b for a, b in zip(*C, strict=True)]]
    (want,) = (
        a / 4 + b / 4 + c / 2
        for a, b, c in zip(part(row, times(B, A), [1] * 4), part(row, B, first), part(row, one, second), strict=True)
    )
    got = constants(model, (4,))[0, 1].item()
    assert want <= Fraction(got) <= want * (1 + Fraction(1, 10**11))


class _Estimate(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self):
        return lipschitz_inf(read(self.model, (1, 2, 2)), "liplt", "estimate")[0, 1]


def test_gradient_of_the_estimate_is_that_of_its_value():
    torch.manual_seed(0)
    convs = [nn.Conv2d(1, 2, 2, 1, 1), nn.ReLU(), nn.Conv2d(2, 2, 2)]
    estimate = _Estimate(nn.Sequential(*convs, nn.Flatten(), nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 2)).double())
    weights = {name: p for name, p in estimate.named_parameters() if name.endswith("weight")}
    value = lambda *given: torch.func.functional_call(estimate, dict(zip(weights, given, strict=True)), ())
    torch.autograd.gradcheck(value, tuple(weights.values()))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("layer", ["body.0", "body.2", "last"])
@pytest.mark.parametrize("method", ["product", "liplt"])
def test_a_broken_weight_gives_no_number(broken, layer, method):
    body = nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, 1, 1), nn.ReLU(), nn.Flatten())
    model = nn.Sequential()
    model.body, model.last = body, nn.Linear(75, 3)
    with torch.no_grad():
        model.get_submodule(layer).weight[0, 0] = broken
    for kind in ("bound", "estimate"):
        assert not constants(model, (2, 5, 5), method, kind)[0, 1].isfinite()


@pytest.mark.parametrize("work", [0, 1000, 30000])
@pytest.mark.parametrize("name", ["residual", "average", "feed-forward"])
def test_rows_that_stop_early_give_a_looser_bound(name, work, monkeypatch):
    make, shape, _ = networks()[name]
    full, product = constants(make(), shape), constants(make(), shape, "product")
    monkeypatch.setattr(_linf, "_WORK", work)
    stopped = constants(make(), shape)
    assert (full <= stopped * (1 + RTOL)).all()
    assert (stopped <= product).all()
    if work == 0:
        assert (full < stopped)[0, 1]


def test_parts_of_the_rows_change_nothing(monkeypatch):
    make, shape, _ = networks()["residual"]
    want = constants(make(), shape)
    monkeypatch.setattr(_linf, "_PART", 1)
    torch.testing.assert_close(constants(make(), shape), want, rtol=RTOL, atol=0)
