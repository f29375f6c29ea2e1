"""Certificates from Lipschitz constants: methods "product", "liplt" and "local"."""

import copy
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lipfast import bounds, checkpoint
from lipfast.bounds import interval_margin
from lipfast.certify import Certificate, certify
from lipfast.data import load, unit
from lipfast.nn import ClippedReLU, MaxMin
from lipfast.train import train
from tests.attacked import broken

METHODS = ["product", "liplt", "local"]
WHOLE = [("product", 2.0), ("product", math.inf), ("liplt", 2.0), ("liplt", math.inf), ("local", 2.0)]  # every norm they know
KINDS = ["bound", "estimate"]
EPS = (0.02, 0.05, 0.1, 0.3)
FAR = {2.0: 50.0, math.inf: 5000.0}  # times a certified radius, where attacks succeed
WIDTH = 16


def _mlp(seed: int = 0, inputs: int = 2, activation=nn.ReLU) -> nn.Sequential:
    torch.manual_seed(seed)
    hidden = [nn.Linear(inputs, WIDTH), activation(), nn.Linear(WIDTH, WIDTH), activation()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(WIDTH, 3))


def _convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [nn.Conv2d(1, 4, 3, 1, 1), ClippedReLU(0.4, (4, 8, 8), learnable=True), nn.Conv2d(4, 8, 4, 2, 1), MaxMin()]
    return nn.Sequential(*hidden, nn.Flatten(), nn.Linear(128, 16), ClippedReLU(0.3), nn.Linear(16, 3))


NETWORKS = {
    "relu": (lambda: _mlp(inputs=12), (12,)),
    "clipped relu": (lambda: _mlp(inputs=12, activation=lambda: ClippedReLU(0.2)), (12,)),
    "max min": (lambda: _mlp(inputs=12, activation=MaxMin), (12,)),
    "convolutional": (_convolutional, (1, 8, 8)),
}


def _data(model: nn.Module, B: int = 24, shape: tuple[int, ...] = (2,)) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and their predictions; the last bias is moved so that all classes occur."""
    x = torch.rand(B, *shape)
    with torch.no_grad():
        model[-1].bias -= model(x).mean(0)
        return x, model(x).argmax(1)


def _certify(model, data, method, **options):
    return certify(model, data, **{"eps": EPS, "method": method, "progress": False, **options})


def _module():
    return sys.modules["lipfast._methods"]


@pytest.mark.parametrize(("method", "p"), WHOLE)
def test_no_point_of_a_certified_ball_has_another_class(method, p):
    model = _mlp()
    data = _data(model)
    certificate = _certify(model, data, method, p=p)
    assert certificate.p == p
    assert (certificate.radius > 0).any()
    angle = torch.linspace(0, 2 * math.pi, 100, dtype=torch.float64)
    rim = torch.stack([angle.cos(), angle.sin()], 1)
    rim = rim / torch.linalg.vector_norm(rim, p, 1, keepdim=True) * (1 - 1e-12)
    disc = torch.cat([rim * share for share in (0.3, 0.7, 1.0)])
    exact = copy.deepcopy(model).double()
    for x, radius, y in zip(data[0].double(), certificate.radius, certificate.prediction, strict=True):
        assert (exact(x + radius * disc).argmax(1) == y).all()


@pytest.mark.parametrize(("method", "p"), WHOLE)
@pytest.mark.parametrize("network", NETWORKS)
def test_an_attack_breaks_no_certificate_and_finds_something_farther_out(network, method, p):
    build, shape = NETWORKS[network]
    model = build()
    data = _data(model, 48, shape)
    certificate = _certify(model, data, method, p=p)
    assert (certificate.radius > 0).any()
    assert not broken(certificate, model, data[0]).any()
    assert broken(certificate, model, data[0], times=FAR[p], steps=20).any()


@pytest.fixture(scope="module", params=["local", "crm"])
def trained(request, tmp_path_factory):
    """A small network after some epochs of a recipe."""
    folder = tmp_path_factory.mktemp("run") / request.param
    return checkpoint.load(train(request.param, "digits", folder, epochs=4, progress=False))


@pytest.mark.parametrize(("method", "p"), WHOLE)
def test_an_attack_breaks_no_certificate_of_a_trained_network(trained, method, p):
    data = load("digits", split="test", limit=150)
    certificate = _certify(trained, data, method, eps=(0.1, 0.2, 0.4), p=p)
    assert certificate.certified_accuracy(0.1 if p == 2 else 1e-5) > 0.5
    assert not broken(certificate, trained, unit(data.images)).any()
    assert broken(certificate, trained, unit(data.images), times=FAR[p], steps=20, restarts=1).float().mean() > 0.5


@pytest.mark.parametrize(("method", "p"), WHOLE)
def test_radius_is_that_of_a_linear_network(method, p):
    layer = nn.Linear(5, 4)
    x = torch.rand(40, 5)
    certificate = _certify(layer, (x, torch.zeros(40).long()), method, p=p, resolution=20)
    w, z = layer.weight.double(), x.double() @ layer.weight.double().T + layer.bias.double()
    y = z.argmax(1)
    dual = 2 if p == 2 else 1
    margins = (z.gather(1, y[:, None]) - z) / torch.linalg.vector_norm(w[y][:, None] - w, dual, 2)
    exact = margins.scatter(1, y[:, None], math.inf).amin(1).clamp(max=EPS[-1])
    assert (certificate.radius <= exact).all()
    assert (certificate.radius >= exact - 1e-5).all()
    assert (certificate.radius == EPS[-1]).any()


def test_product_is_the_margin_over_the_norms_of_the_layers():
    model = _mlp()
    x, y = _data(model)
    norms = [torch.linalg.matrix_norm(m.weight.double(), 2) for m in model if isinstance(m, nn.Linear)]
    w, z = model[-1].weight.double(), copy.deepcopy(model).double()(x.double())
    margins = (z.gather(1, y[:, None]) - z) / ((w[y][:, None] - w).norm(dim=2) * norms[0] * norms[1])
    exact = margins.scatter(1, y[:, None], math.inf).amin(1).clamp(max=EPS[-1])
    bound, estimate = (_certify(model, (x, y), "product", kind=kind).radius for kind in KINDS)
    assert (bound < exact).all()
    assert (bound > 0.99 * exact - 1e-5).all()
    assert (estimate - exact).abs().max() < 1e-3
    assert (bound <= estimate + 1e-6).all()  # whose margins are rounded to float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [2.0, math.inf])
@pytest.mark.parametrize("network", NETWORKS)
def test_liplt_is_the_margin_over_its_constants_and_never_less_than_product(network, p, kind):
    build, shape = NETWORKS[network]
    model = build()
    x, y = _data(model, 24, shape)
    product, liplt = (_certify(model, (x, y), method, p=p, kind=kind) for method in ("product", "liplt"))
    assert (liplt.radius >= product.radius * (1 - 1e-6 * (kind == "estimate"))).all()
    assert (liplt.method, liplt.kind, liplt.p) == ("liplt", kind, p)
    if network != "max min":  # where loop transformation may not pay
        assert (liplt.radius > product.radius).any()
    constants = bounds.lipschitz(model, shape, p, "liplt", kind, iterations=100, explicit=512).double()
    z = copy.deepcopy(model).double()(x.double())
    margins = (z.gather(1, y[:, None]) - z) / constants[y]
    want = margins.scatter(1, y[:, None], math.inf).amin(1).clamp(max=EPS[-1])
    torch.testing.assert_close(liplt.radius, want, rtol=1e-4, atol=1e-6)
    assert kind == "estimate" or (liplt.radius < want).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_local_is_never_less_than_product(network, kind):
    build, shape = NETWORKS[network]
    model = build()
    data = _data(model, 24, shape)
    product, local = (_certify(model, data, method, kind=kind) for method in ("product", "local"))
    assert (local.radius >= product.radius).all()
    assert (local.radius > product.radius).any()
    assert (local.method, local.kind, local.p) == ("local", kind, 2)


def test_listed_eps_are_tried_with_liplt_where_the_product_fails(monkeypatch):
    model, asked = _mlp(1), []
    data = _data(model)
    local = bounds.local
    monkeypatch.setattr(
        _module().bounds, "local", lambda m, x, r, how, *a, **o: asked.append((how, r)) or local(m, x, r, how, *a, **o)
    )
    certificate = _certify(model, data, "local", resolution=2)
    tried = torch.cat([r for how, r in asked if how == "liplt"])
    assert set(tried.tolist()) <= set(EPS)
    asked.clear()
    monkeypatch.setattr(_module().bounds, "local", lambda m, x, r, how, *a, **o: local(m, x, r, "product", *a, **o))
    product = _certify(model, data, "local", resolution=2)
    assert (certificate.radius >= product.radius).all()
    assert (certificate.radius > product.radius).any()


def test_accuracy_at_a_listed_eps_is_that_of_one_test_there():
    model = _mlp(1)
    x, y = _data(model)
    certificate, product = _certify(model, (x, y), "local", batch_size=7), _certify(model, (x, y), "product")
    shares = []
    for eps in EPS:
        margin = bounds.local(model, x, eps, "liplt").margin(y).scatter(1, y[:, None], math.inf)
        shares.append(((margin > 0).all(1) | (product.radius >= eps)).double().mean().item())
        assert certificate.certified_accuracy(eps) == shares[-1]
    assert len(set(shares)) > 2


@pytest.mark.parametrize("method", METHODS)
def test_what_all_images_share_is_computed_once(monkeypatch, method):
    model, calls = _mlp(), []
    for name in ("norms", "lipschitz"):
        real = getattr(bounds, name)
        count = lambda *a, name=name, real=real, **o: calls.append(name) or real(*a, **o)
        monkeypatch.setattr(_module().bounds, name, count)
    _certify(model, _data(model), method, batch_size=5)
    assert calls == ["norms", "lipschitz"]


def test_what_the_product_proves_asks_for_no_local_bound(monkeypatch):
    model, asked = _mlp(), []
    data = _data(model)
    product = _certify(model, data, "product").radius
    local = bounds.local
    monkeypatch.setattr(_module().bounds, "local", lambda m, x, r, *a, **o: asked.append((x, r)) or local(m, x, r, *a, **o))
    _certify(model, data, "local")
    assert asked
    for x, radius in asked:
        for image, r in zip(x, radius, strict=True):
            assert r > product[(data[0] == image).all(1)].item()
    asked.clear()
    _certify(model, data, "local", eps=product.min().item() / 2)
    assert not asked


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_certifies_nothing(method, kind):
    data = _data(_mlp())
    for value in (math.nan, math.inf):
        model = _mlp()
        with torch.no_grad():
            model[1].weight[0, 0] = value
        if method in ("liplt", "local"):
            with pytest.raises(ValueError, match="layer '1': finite weights expected, got NaN or Inf"):
                _certify(model, data, method, kind=kind)
        else:
            assert (_certify(model, data, method, kind=kind).radius == 0).all()
    huge = _mlp()
    with torch.no_grad():
        huge[1].weight.mul_(1e30)
        huge[3].weight.mul_(1e30)
    assert (_certify(huge, data, method, kind=kind).radius == 0).all()


def test_one_constant_that_is_not_finite_overrules_the_rest(monkeypatch):
    matrix = torch.ones(3, 3, dtype=torch.float64)
    monkeypatch.setattr(_module().bounds, "lipschitz", lambda *_, **__: matrix)
    model = _mlp()
    data = _data(model)
    assert (_certify(model, data, "product").radius > 0).all()
    for value in (math.nan, math.inf):
        matrix[1, 1] = value
        assert (_certify(model, data, "product").radius == 0).all()


def test_classes_that_never_gain_set_no_limit():
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        layer.weight[1:] = layer.weight[0]
        layer.bias.copy_(torch.tensor([1.0, 0.0, 0.5]))
    certificate = _certify(layer, (torch.rand(4, 2), torch.zeros(4).long()), "product")
    assert (certificate.radius == EPS[-1]).all()


@pytest.mark.parametrize("method", METHODS)
def test_equal_logits_certify_nothing(method):
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        layer.weight[1] = layer.weight[0] = layer.weight[0].abs()
        layer.bias.copy_(torch.tensor([2.0, 2.0, -9.0]))
    assert (_certify(layer, (torch.rand(4, 2), torch.zeros(4).long()), method).radius == 0).all()


def test_only_the_bound_knows_of_rounding():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
    values = ([[1.0], [1.0]], [2.0**50, 2.0**50], [[1.0, -1.0], [0.0, 0.0]], [0.02, 0.0])
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(torch.tensor(value))
    x, y = torch.full((1, 1), 0.51), torch.zeros(1).long()
    wide = copy.deepcopy(model).double()
    assert (interval_margin(wide, x.double(), y, 0.0, 2) <= 0)[0, 1]  # 0.51 + 2^50 is no float64
    radius = {kind: _certify(model, (x, y), "product", kind=kind).radius.item() for kind in KINDS}
    assert radius["estimate"] > 0
    assert radius["bound"] == 0


def _dead_units() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)
    )
    with torch.no_grad():
        model[0].bias.uniform_(-0.6, 0.1)
        model[2].bias.uniform_(-0.6, 0.1)
    return model


def test_a_failure_probability_certifies_more_and_no_attack_breaks_it(tmp_path):
    model = _dead_units()
    data = _data(model, 24, (1, 8, 8))
    levels = {"eps": (0.01, 0.02, 0.05, 0.1)}
    proven, found = (_certify(model, data, "local", failure_probability=p, **levels) for p in (0.0, 1e-6))
    assert (found.radius > proven.radius).double().mean() > 0.3
    assert (found.radius >= proven.radius - 0.05 * 0.5**6).all()
    assert not broken(found, model, data[0]).any()
    assert (proven.failure_probability, found.failure_probability) == (0.0, 1e-6)
    assert "local, bound with probability 1 - 1e-06, l_2" in repr(found)
    assert "probability" not in repr(proven)
    found.save(tmp_path / "c.npz")
    assert Certificate.load(tmp_path / "c.npz").failure_probability == 1e-6


@pytest.mark.parametrize("levels", [(0.01,), (0.01, 0.02), (0.01, 0.02, 0.03), (0.01, 0.02, 0.05, 0.1)])
def test_all_tests_of_an_image_share_the_failure_probability(monkeypatch, levels):
    """Whatever the outcomes: they are made up here, and the worst of many comes near the count that the share assumes."""
    model, spent = _dead_units(), {}
    data = _data(model, 24, (1, 8, 8))

    def local(m, x, radius, *_, failure_probability, **__):
        for image in x:
            key = image.sum().item()
            spent[key] = spent.get(key, 0.0) + failure_probability
        return SimpleNamespace(margin=lambda y: torch.randn(len(y), 1).expand(-1, 3))

    monkeypatch.setattr(_module().bounds, "local", local)
    for _ in range(5):
        spent.clear()
        _certify(model, data, "local", eps=levels, resolution=3, failure_probability=1e-6)
        assert len(spent) == 24
        assert max(spent.values()) <= 1e-6 * (1 + 1e-12)
        worst = max(spent.values())
    assert worst > 0.7e-6


def test_a_certificate_from_before_has_no_failure_probability(tmp_path):
    model = _mlp()
    _certify(model, _data(model), "product").save(tmp_path / "c.npz")
    stored = dict(np.load(tmp_path / "c.npz"))
    about = json.loads(str(stored["about"]))
    assert about.pop("failure_probability") == 0
    np.savez(tmp_path / "old.npz", **{**stored, "about": json.dumps(about)})
    assert Certificate.load(tmp_path / "old.npz").failure_probability == 0
    for wrong in (-0.1, 1.0, "none"):
        np.savez(tmp_path / "wrong.npz", **{**stored, "about": json.dumps({**about, "failure_probability": wrong})})
        with pytest.raises(ValueError, match="damaged or no certificate"):
            Certificate.load(tmp_path / "wrong.npz")


@pytest.mark.parametrize(
    ("method", "kind", "chance", "message"),
    [
        ("local", "bound", 1.0, "failure_probability must be from 0 to below 1, got 1.0"),
        ("local", "bound", -1e-9, "failure_probability must be from 0 to below 1, got -1e-09"),
        ("local", "bound", math.nan, "failure_probability must be from 0 to below 1, got nan"),
        ("product", "bound", 1e-9, "failure_probability must be 0 for method 'product', got 1e-09"),
        ("interval", "bound", 1e-9, "failure_probability must be 0 for method 'interval', got 1e-09"),
        ("local", "estimate", 1e-9, "failure_probability must be 0 for kind 'estimate', got 1e-09"),
    ],
)
def test_a_failure_probability_belongs_to_local_bounds(method, kind, chance, message):
    with pytest.raises(ValueError, match=message):
        _certify(_mlp(), _data(_mlp()), method, kind=kind, failure_probability=chance)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("local", {"p": math.inf}, "p must be 2 for method 'local', got inf"),
        ("local", {"p": 1}, "p must be 2 for method 'local', got 1"),
        ("product", {"p": 1}, "p must be 2 or inf for method 'product', got 1"),
        ("liplt", {"p": 1}, "p must be 2 or inf for method 'liplt', got 1"),
        *(
            (m, {"pixel_range": (0, 1)}, f"pixel_range must be None for method '{m}', which knows only whole balls")
            for m in METHODS
        ),
    ],
)
def test_names_the_wrong_argument(method, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        _certify(_mlp(), _data(_mlp()), method, **changes)
    assert "\n" not in str(error.value)


def test_a_method_has_a_norm_of_its_own():
    data = _data(_mlp())
    norms = {method: _certify(_mlp(), data, method).p for method in ("interval", *METHODS)}
    assert norms == {"interval": math.inf, "product": 2, "liplt": 2, "local": 2}
