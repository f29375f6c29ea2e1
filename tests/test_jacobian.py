import importlib
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import lipfast.nn
from bench.jacobian import peer
from lipfast.bounds import crown, interval, jacobian
from tests import networks
from tests.networks import NAMES, images, third_party
from tests.test_random_networks import RandomNetwork

INF = math.inf
EPS = 2 / 255


def steepest(model, x, eps, p=INF, count=24, pixel_range=(-INF, INF)):  # (B,)
    """The largest of sampled secants and gradients within the balls, in float64."""
    x, B = x.double(), len(x)
    away = torch.randn(count, *x.shape, dtype=x.dtype, device=x.device)
    away = torch.cat([away, away.sign()])
    z = x + eps * away / torch.linalg.vector_norm(away.flatten(2), p, dim=2).reshape(-1, B, *[1] * (x.ndim - 1))
    z = z.clamp(*pixel_range).flatten(0, 1)
    rows = torch.autograd.functional.jacobian(lambda v: model(v).flatten(1).sum(0), z).flatten(2)  # (K, count B, I)
    slope = torch.linalg.vector_norm(rows, {1: INF, 2: 2, INF: 1}[p], dim=2).amax(0).reshape(-1, B)
    apart = lambda t: (t[None] - t[:, None]).flatten(3)
    change, moved = apart(model(z).detach().unflatten(0, (-1, B))).abs().amax(3), apart(z.unflatten(0, (-1, B)))
    secant = (change / torch.linalg.vector_norm(moved, p, dim=3)).nan_to_num(0)
    return torch.maximum(secant.amax((0, 1)), slope.amax(0))


@pytest.mark.parametrize("seed", range(36))
def test_no_slope_exceeds_the_bound(seed, device):
    p, eps = (INF, 2, 1)[seed % 3], (0.01, 0.3, 3.0)[seed // 3 % 3]
    model = RandomNetwork(seed).to(device)
    x = torch.randn(4, *model.shape, dtype=torch.float64, device=device)
    bound, estimate = jacobian(model, x, eps, p), jacobian(model, x, eps, p, kind="estimate")
    assert (steepest(model, x, eps, p) <= bound * (1 + 1e-9) + 1e-12).all()  # a secant is a difference of rounded values
    assert (estimate <= bound).all()
    assert (bound <= jacobian(model, x, 1.1 * eps, p) * (1 + 1e-12)).all()


@pytest.mark.parametrize("name", NAMES)
def test_holds_for_networks_of_others(name):
    model, x = third_party(name), images(name, 2)
    bound = jacobian(model, x, EPS, pixel_range=(0, 1))
    assert (bound <= jacobian(model, x, EPS)).all()
    if name != "resnet2b":
        weights = [m.weight for m in model if isinstance(m, (nn.Linear, nn.Conv2d))]
        assert (bound < math.prod(w.double().abs().flatten(1).sum(1).max().item() for w in weights)).all()
    relaxed = jacobian(model, x, EPS, pixel_range=(0, 1), layers=crown(model, x, EPS, pixel_range=(0, 1)).layers)
    low = steepest(model.double(), x, EPS, count=4, pixel_range=(0, 1))
    assert ((low <= relaxed) & (relaxed < bound)).all()


@pytest.mark.parametrize("name", ["mnist_fc_3layer", "kw_mnist"])
def test_encloses_what_auto_lirpa_encloses(name):
    pytest.importorskip("auto_LiRPA", reason="auto_LiRPA is not installed")
    model, x = third_party(name), images(name, 1)
    theirs = peer(model, x, EPS)(0)
    z = (x + EPS * (2 * torch.rand(200, *x.shape[1:]) - 1)).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(model(z)[:, 0].sum(), z)
    sampled = gradient.abs().flatten(1).sum(1).max()
    assert sampled <= theirs.item() * (1 + 1e-5)
    assert sampled <= jacobian(nn.Sequential(model, First()), x, EPS, pixel_range=(0, 1)).item()


class First(nn.Linear):
    def __init__(self):
        super().__init__(10, 1, bias=False)
        self.weight.data = torch.eye(10)[:1]


def grafted(widths, masked=1.0):
    """Linear layers with grafted units between them, in float64."""
    layers = [nn.Linear(widths[0], widths[1])]
    for i, o in pairwise(widths[1:]):
        layers += [lipfast.nn.GraftedReLU((i,), torch.rand(i) < masked), nn.Linear(i, o)]
        nn.init.uniform_(layers[-2].slope, -0.2, 1.2), nn.init.normal_(layers[-2].intercept)
    return nn.Sequential(*layers).double()


def test_of_a_network_of_grafted_units_is_its_matrix_norm():
    model = grafted((5, 8, 7, 4))
    exact = torch.linalg.matrix_norm(networks.jacobian(model, (5,)), INF)
    bound = jacobian(model, torch.randn(3, 5).double(), 10.0)
    assert (exact * (1 - 1e-14) <= bound).all()
    assert (bound <= exact * (1 + 1e-9)).all()


@pytest.mark.parametrize("seed", range(10))
def test_no_chord_that_replaces_a_relu_raises_it(seed):
    """Dossier 1.3-2: slope u/(u - l), intercept -slope l maps a box onto its image, so that all later boxes stay."""
    torch.manual_seed(seed)
    model, x = grafted((3, 6, 6, 2), masked=0.0), torch.randn(1, 3).double()
    units = []
    for name, (lower, upper) in interval(model, x, 0.5, kind="estimate").layers.items():
        layer = model.get_submodule(name)
        layer.slope.data = (upper / (upper - lower))[0]
        layer.intercept.data = -layer.slope.data * lower[0]
        units += [(layer.mask, i) for i in range(6) if lower[0, i] < 0 < upper[0, i]]
    found = [jacobian(model, x, 0.5).item()]
    for i in torch.randperm(len(units)):
        mask, unit = units[i]
        mask[unit] = True
        found.append(jacobian(model, x, 0.5).item())
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(found))
    assert found[-1] < found[0]


def test_another_intercept_can_raise_it():
    """Dossier 1.3-3: the line is no wider than the ReLU's image, but it wakes a unit that was off."""
    model = grafted((1, 1, 1, 1), masked=0.0)
    for p in model.parameters():
        p.data.fill_(1.0 if p.ndim == 2 else 0.0)
    model[2].bias.data.fill_(-1.1)
    x = torch.zeros(1, 1).double()
    assert jacobian(model, x, 1.0) < 1e-30
    model[1].mask.fill_(True), model[1].slope.data.fill_(0.5), model[1].intercept.data.fill_(0.7)
    assert jacobian(model, x, 1.0) >= 0.5


def test_parts_make_no_difference(monkeypatch):
    """1000 classes, and an output that is an image."""
    module = importlib.import_module("lipfast.bounds.jacobian")
    trunk = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()]
    for model in (nn.Sequential(*trunk, nn.Flatten(), nn.Linear(512, 1000)), nn.Sequential(*trunk)):
        x = torch.rand(3, 3, 16, 16)
        whole = jacobian(model, x, EPS)
        with monkeypatch.context() as patched:
            patched.setattr(module, "_PART", 77 * 768)  # 77 rows at a time
            parts = jacobian(model, x, EPS)
            patched.setattr(module, "_PART", 2 * 1024 * 768)
            assert torch.equal(jacobian(model, x, EPS), parts)
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=0)


def test_uses_tighter_boxes():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 9), shared, nn.Linear(9, 9), shared, nn.Linear(9, 3))
    x = torch.randn(5, 4)
    small, large = jacobian(model, x, 0.1), jacobian(model, x, 1.0)
    layers = interval(model, x, 0.1).layers
    assert sorted(layers) == ["1", "1:1"]
    assert torch.equal(jacobian(model, x, 1.0, layers={k: (l.double(), u.double()) for k, (l, u) in layers.items()}), small)
    assert torch.equal(jacobian(model, x, 0.1, layers=interval(model, x, 1.0).layers), small)
    one = jacobian(model, x, 1.0, layers={"1:1": layers["1:1"]})
    assert ((small < one) & (one < large)).any()
    with pytest.raises(ValueError, match=r"layers: the name of an activation expected, got '2'"):
        jacobian(model, x, 1.0, layers={"2": layers["1"]})
    with pytest.raises(ValueError, match=r"layers: \(5, 9\) expected, got '1' with \[\(4, 9\)"):
        jacobian(model, x, 1.0, layers={"1": (layers["1"][0][:4], layers["1"][1][:4])})


@pytest.mark.parametrize("value", [math.nan, INF, 1e38])
@pytest.mark.parametrize("at", [(0, "weight"), (0, "bias"), (2, "weight"), (2, "bias")], ids=str)
def test_says_nothing_where_values_are_not_finite(value, at):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        getattr(model[at[0]], at[1]).flatten()[:2].fill_(value)
    found = jacobian(model, torch.tensor([[1.0, 2.0, 3.0]]), 0.1)
    assert found.isinf().all() or (value == 1e38 and found > 0)


def test_says_nothing_where_slopes_overflow():
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(4)]).double()
    for layer in model:
        layer.weight.data.fill_(1e150)
    assert jacobian(model, torch.zeros(1, 2).double(), 0.0).isinf().all()


def test_names_the_wrong_argument():
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.zeros(2, 3)
    for match, change in {
        "kind: 'bound' or 'estimate' expected": {"kind": "both"},
        "eps: finite and not negative": {"eps": -1.0},
        "p: 1, 2 or inf": {"p": 3},
        "x: finite values": {"x": x + math.nan},
        "layer 'model.0'|layer '0': Softmax": {"model": nn.Sequential(nn.Softmax(1))},
    }.items():
        with pytest.raises(ValueError, match=match):
            jacobian(**{"model": model, "x": x, "eps": 0.1, **change})
