import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lipfast.attacks import pgd
from lipfast.bounds import interval_margin
from lipfast.certify import Certificate, certify
from lipfast.data import Dataset
from lipfast.figures import KINDS

NORMS = [1, 2, math.inf]
EPS = (0.02, 0.05, 0.1, 0.3)
X, Y = torch.rand(4, 2), torch.zeros(4).long()


def _net(seed: int = 0, inputs: int = 2, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, classes))


def _data(model: nn.Module, B: int = 24, inputs: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images, and as labels what the model says, but for every fourth."""
    x = torch.rand(B, inputs)
    y = model(x).argmax(1)
    y[::4] = (y[::4] + 1) % 3
    return x, y


def _ball(p: float, N: int = 101) -> torch.Tensor:
    """A grid over the unit ball of the plane, its rim included."""
    side = torch.linspace(-1, 1, N, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    inside = grid[torch.linalg.vector_norm(grid, p, dim=1) <= 1]
    rim = grid / torch.linalg.vector_norm(grid, p, dim=1, keepdim=True).clamp_min(1e-9) * (1 - 1e-12)
    return torch.cat([inside, rim])


@pytest.mark.parametrize("p", NORMS)
def test_no_point_of_a_certified_ball_has_another_class(p):
    model = _net()
    images, labels = _data(model)
    certificate = certify(model, (images, labels), EPS, p=p, progress=False)
    exact = _net().double()
    assert (certificate.radius > 0).any()
    for x, radius, y in zip(images.double(), certificate.radius, certificate.prediction, strict=True):
        assert (exact(x + radius * _ball(p)).argmax(1) == y).all()


@pytest.mark.parametrize("resolution", [0, 6, 20])
def test_radius_is_that_of_a_linear_network_up_to_the_resolution(resolution):
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, bias=False)
    layer.weight.data -= layer.weight.data.mean(1, keepdim=True)  # so that all classes occur
    x = torch.rand(40, 5)
    certificate = certify(layer, (x, torch.zeros(40).long()), [0.05, 0.15], resolution=resolution, progress=False)
    w, z = layer.weight.double(), x.double() @ layer.weight.double().T
    y = z.argmax(1)
    assert len(y.unique()) == 4
    margins = (z.gather(1, y[:, None]) - z) / (w[y][:, None] - w).abs().sum(2)
    exact = margins.scatter(1, y[:, None], math.inf).amin(1)
    step = torch.where(exact < 0.05, 0.05, 0.1) * 0.5**resolution
    assert (certificate.radius <= exact).all()
    assert (certificate.radius >= (exact - step - 1e-6).clamp(max=0.15)).all()
    assert ((0 < certificate.radius) & (certificate.radius < 0.15)).any() or resolution == 0
    assert (certificate.radius == 0.15).any()


@pytest.mark.parametrize("p", NORMS)
def test_accuracy_at_a_listed_eps_is_that_of_one_test_there(p):
    model = _net(1)
    images, labels = _data(model)
    certificate = certify(model, (images, labels), EPS, p=p, batch_size=7, progress=False)
    assert certificate.clean_accuracy == certificate.certified_accuracy(0) == 0.75
    for eps in EPS:
        margin = interval_margin(model, images, labels, eps, p=p)
        others = margin.scatter(1, labels[:, None], math.inf)
        assert certificate.certified_accuracy(eps) == (others > 0).all(1).double().mean().item()


def test_attacks_find_nothing_within_a_certified_radius_and_something_farther_out():
    model = _net(2, inputs=12)
    images, labels = _data(model, B=64, inputs=12)
    certificate = certify(model, (images, labels), EPS, progress=False)
    assert (certificate.radius > 0.02).any()
    for times, safe in ((1, True), (20, False)):
        found = pgd(model, images, certificate.prediction, times * certificate.radius, pixel_range=None, restarts=2)
        assert (model(found).argmax(1) == certificate.prediction).all() == safe


@pytest.mark.parametrize("kind", ["bound", "estimate"])
def test_what_is_not_finite_certifies_nothing(kind):
    for value in (math.nan, math.inf):
        model = _net()
        with torch.no_grad():
            model[1].weight[0, 0] = value
        assert (certify(model, _data(_net()), EPS, kind=kind, progress=False).radius == 0).all()
    huge = nn.Sequential(_net(), nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    with torch.no_grad():
        huge[1].weight.mul_(1e38)
        huge[2].weight.mul_(1e20)
    assert (certify(huge, _data(_net()), EPS, kind=kind, progress=False).radius == 0).all()


def test_only_the_bound_knows_of_rounding():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
    values = ([[1.0], [1.0]], [2.0**20, 2.0**20], [[1.0, -1.0], [0.0, 0.0]], [0.05, 0.0])
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(torch.tensor(value))
    radius = {kind: certify(model, (torch.full((1, 1), 0.5), Y[:1]), 0.04, kind=kind, progress=False).radius for kind in KINDS}
    assert radius["estimate"] == 0.04  # 2^20 + 0.04 is 2^20 in float32; in truth the boxes prove no more than 0.025
    assert radius["bound"] == 0


@pytest.mark.parametrize(("bound", "logit", "certified"), [(1.0, 0.0, True), (math.inf, 0.0, False), (1.0, math.nan, False)])
def test_a_bound_or_logit_that_is_not_finite_overrules_the_rest(monkeypatch, bound, logit, certified):
    fake = lambda model, x, label, *_, **__: torch.full((len(x), 3), bound)
    monkeypatch.setattr(sys.modules["lipfast._methods"], "interval_margin", fake)
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.bias[1] += logit
    assert (certify(model, (torch.rand(4, 2), torch.zeros(4).long()), 0.1, progress=False).radius > 0).all() == certified


def test_equal_logits_certify_nothing():
    model = nn.Linear(2, 3)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    assert (certify(model, (torch.rand(4, 2), torch.zeros(4).long()), EPS, progress=False).radius == 0).all()


def test_data_come_as_a_data_set_a_pair_or_batches():
    model = _net(inputs=4)
    images = torch.randint(0, 256, (10, 1, 2, 2), dtype=torch.uint8)
    labels = torch.arange(10) % 3
    pair = certify(model, (images.float() / 255, labels), EPS, progress=False)
    named = certify(model, Dataset(images, labels, "four", classes=3), EPS, progress=False)
    batches = certify(model, zip(images.split(3), labels.split(3), strict=True), EPS, progress=False)
    for other in (named, batches):
        assert torch.equal(other.radius, pair.radius)
        assert torch.equal(other.label, pair.label)
    assert (pair.data, named.data) == ("", "four")
    assert torch.equal(certify(model, (images, labels), EPS, limit=4, progress=False).radius, pair.radius[:4])


def test_clipping_to_the_pixel_range_keeps_every_certificate():
    model = _net(inputs=6)
    data = (torch.randint(0, 2, (40, 6)).float(), torch.zeros(40).long())
    whole = certify(model, data, EPS, progress=False)
    clipped = certify(model, data, EPS, pixel_range=(0, 1), progress=False)
    assert (clipped.radius >= whole.radius).all()
    assert (clipped.radius > whole.radius).any()
    assert (whole.pixel_range, clipped.pixel_range) == (None, (0.0, 1.0))


def test_the_model_is_handed_back_as_it_came():
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    model[1].eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    first = certify(model, (torch.rand(8, 2), torch.zeros(8).long()), EPS, device="cpu", progress=False)
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model[0].weight.grad is None
    assert first.radius.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_images_take_the_dtype_of_the_model(dtype):
    data = _data(_net())
    certificate = certify(_net().to(dtype), data, EPS, progress=False)
    assert (certificate.radius <= certify(_net().double(), data, EPS, progress=False).radius + 0.02).all()
    assert dtype != torch.float64 or (certificate.radius > 0).any()


def test_the_curve_steps_through_the_listed_accuracies():
    model = _net()
    certificate = certify(model, _data(model), EPS, progress=False)
    eps, accuracy = certificate.curve()
    assert eps[0] == 0
    assert eps[-1] == EPS[-1]
    assert eps == sorted(set(eps))
    assert accuracy == sorted(accuracy, reverse=True)
    assert accuracy == pytest.approx([certificate.certified_accuracy(e) for e in eps], rel=0, abs=0)


def test_a_certificate_is_read_back_as_it_was_saved(tmp_path):
    model = _net()
    certificate = certify(model, _data(model), EPS, p=2, kind="estimate", pixel_range=(0, 1), progress=False)
    certificate.save(tmp_path / "c.npz")
    read = Certificate.load(tmp_path / "c.npz")
    assert vars(read).keys() == vars(certificate).keys()
    for name, value in vars(certificate).items():
        same = torch.equal(value, getattr(read, name)) if isinstance(value, torch.Tensor) else value == getattr(read, name)
        assert same, name
    assert [f.name for f in tmp_path.iterdir()] == ["c.npz"]
    assert set(read.versions) == {"lipfast", "torch"}


def test_the_norm_survives_the_file(tmp_path):
    certify(_net(), _data(_net()), EPS, progress=False).save(tmp_path / "c.npz")
    assert Certificate.load(tmp_path / "c.npz").p == math.inf


def test_a_damaged_certificate_is_refused_in_one_line(tmp_path):
    path = tmp_path / "c.npz"
    certify(_net(), _data(_net()), EPS, progress=False).save(path)
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[80 + 64] ^= 0xFF
    for damaged in (b"", whole[:100], whole[:-30], bytes(middle), b"not a certificate"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or no certificate") as error:
            Certificate.load(path)
        assert "\n" not in str(error.value)
    np.savez(path, radius=np.zeros(3))
    with pytest.raises(ValueError, match="damaged or no certificate"):
        Certificate.load(path)
    with pytest.raises(FileNotFoundError):
        Certificate.load(tmp_path / "absent.npz")


class _Runs:
    def __reduce__(self):
        return print, ("a certificate ran code",)


def test_reading_a_certificate_runs_no_code(tmp_path, capsys):
    np.savez(tmp_path / "c.npz", about=np.array([_Runs()], dtype=object))
    with pytest.raises(ValueError, match="damaged or no certificate"):
        Certificate.load(tmp_path / "c.npz")
    assert capsys.readouterr().out == ""


def test_saving_leaves_nothing_half_written(tmp_path):
    certificate = certify(_net(), _data(_net()), EPS, progress=False)
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        certificate.save(tmp_path / "c.pt")
    with pytest.raises(ValueError, match="cannot be written"):
        certificate.save(tmp_path / "absent" / "c.npz")
    certificate.kind = object()  # type: ignore[assignment]
    with pytest.raises(TypeError):
        certificate.save(tmp_path / "c.npz")
    assert not list(tmp_path.iterdir())


def test_an_estimate_says_that_it_is_no_certificate(tmp_path):
    pytest.importorskip("matplotlib")
    for kind, said in (("estimate", True), ("bound", False)):
        certificate = certify(_net(), _data(_net()), EPS, kind=kind, progress=False)
        certificate.plot(tmp_path / "plot.svg")
        assert ("estimate: not a certificate" in (tmp_path / "plot.svg").read_text()) == said
        assert ("estimate: not a certificate" in repr(certificate)) == said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": -0.1}, "eps must be positive and finite"),
        ({"eps": [0.1, math.nan]}, "eps must be positive and finite"),
        ({"eps": []}, "eps must be positive and finite"),
        ({"eps": math.inf}, "eps must be positive and finite"),
        (
            {"method": "zonotope"},
            "not available in this version; available: interval, product, liplt, local, crown, alpha-crown",
        ),
        ({"kind": "guess"}, "kind must be one of bound, estimate"),
        ({"p": 3}, "p must be 1 or 2 or inf for method 'interval', got 3"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"resolution": -1}, "resolution must be at least 0, got -1"),
        ({"pixel_range": (1, 0)}, "pixel_range must be"),
        ({"pixel_range": (0.0, 0.001)}, "pixels must be within pixel_range"),
        ({"device": "nonsense"}, "device must be one that torch can use, got nonsense"),
        ({"data": (X.clone().index_fill(0, torch.tensor(2), math.nan), Y)}, "NaN or Inf in image 2"),
        ({"data": (X, torch.tensor([0, 1, 3, 0]))}, "labels must be classes 0 to 2 of the model, got 3"),
        ({"data": (X, torch.tensor([0, 1, -1, 0]))}, "labels must be classes 0 to 2 of the model, got -1"),
        ({"data": (X, Y.float())}, "labels must be classes 0 to 2"),
        ({"data": (X, Y[:3])}, r"got \(4, 2\) and \(3,\)"),
        ({"data": (X[:0], Y[:0])}, "at least one image, got none"),
        ({"data": []}, "at least one image, got none"),
        ({"data": [X]}, r"pairs \(images, labels\)"),
        ({"data": 3}, "data must be"),
        ({"data": (X.long(), Y)}, "images must be floating"),
        ({"data": (torch.rand(4, 5), Y)}, "does not accept samples of shape"),
        ({"model": nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))}, "'1'.*LayerNorm"),
        ({"model": nn.Linear(2, 1)}, "two classes or more"),
        ({"model": nn.Conv1d(2, 2, 1), "data": (torch.rand(4, 2, 3), Y)}, r"logits \(B, K\)"),
        ({"model": "net"}, "model must be an nn.Module"),
    ],
)
def test_names_the_wrong_argument(changes, message):
    arguments = {"model": _net(), "data": (X, Y), "eps": 0.1, **changes}
    with pytest.raises(ValueError, match=message) as error:
        certify(**arguments, progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device that is missing")
def test_names_a_device_that_is_missing():
    with pytest.raises(ValueError, match="device must be one that torch can use, got cuda"):
        certify(_net(), (X, Y), 0.1, device="cuda", progress=False)


def test_warns_of_pixels_in_other_units():
    with pytest.warns(UserWarning, match=r"are not in \[0, 1\]; eps is in their units"):
        certify(_net(), (X * 255, Y), 0.1, progress=False)


@pytest.mark.parametrize("eps", [-0.1, math.nan, 0.5])
def test_no_accuracy_where_nothing_was_tried(eps):
    with pytest.raises(ValueError, match=r"eps must be from 0 to 0\.3, the largest tried"):
        certify(_net(), _data(_net()), EPS, progress=False).certified_accuracy(eps)
