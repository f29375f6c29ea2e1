import math

import pytest
import torch
from torch import nn

from lipfast import bounds, certify, models
from lipfast.bounds._margins import Margins
from lipfast.certify import _plain
from lipfast.nn import ClippedReLU, L2Pool, MaxMin, Normalize


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(64, 5)
        self.max_min = MaxMin()

    def forward(self, x):
        x = self.first(x)
        x = self.max_min(x) - self.second(torch.relu(x)) * 0.3
        return self.last(x.flatten(1))


OWN = {
    "residual": (Residual, (2, 4, 4)),
    "normalised": (lambda: nn.Sequential(Normalize([0.3, 0.4], [0.2, 0.3]), nn.Flatten(), nn.Linear(32, 5)), (2, 4, 4)),
    "pools": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1, padding_mode="circular"),
            nn.MaxPool2d(3, 1),
            nn.AvgPool2d(2, 1),
            nn.LPPool2d(2, 2, 1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(24, 5),
        ),
        (2, 6, 6),
    ),
    "no last layer": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.Tanh(), nn.Linear(6, 6), MaxMin()), (2, 4, 4)),
    "lines": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3, 2), nn.ELU(), nn.Flatten(), nn.Linear(12, 5)), (2, 8)),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)),
        (2, 4, 4),
    ),
    "clipped": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 8), ClippedReLU(0.5), nn.Linear(8, 5)), (2, 4, 4)),
    "pixels": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Flatten(), nn.Linear(24, 5)), (2, 4, 4)),
    "lipnext": (lambda: models.lipnext((2, 4, 4), 5, depth=6, width=16), (2, 4, 4)),
    "smooth alone": (lambda: nn.Sequential(nn.SiLU(), nn.Flatten()), (2, 2, 2)),
    "pooled": (lambda: nn.Sequential(nn.Conv2d(2, 6, 1), L2Pool()), (2, 4, 4)),
}


def made(name):
    torch.manual_seed(0)
    build, shape = OWN[name]
    model = _plain(build().eval())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    return model, shape


def exact(model, x, label):
    logits = model.double()(x.double()).detach()
    return logits.gather(1, label[:, None]) - logits


@pytest.mark.parametrize("name", OWN)
def test_contains_what_float32_rounds(name, device):
    """In float32 the errors are there to be seen, float64 tells the exact margins, and the slack is not much more than them."""
    model, shape = made(name)
    model = model.to(device)
    x = torch.randn(64, *shape, device=device)
    count = model(x).shape[1]
    label = torch.arange(64, device=device) % count
    lower = Margins(model, shape, dtype=torch.float32)(x, label)
    norms = bounds.norms(model, shape)
    sharper = Margins(model, shape, norms, dtype=torch.float32)(x, label)
    tight = Margins(model, shape)(x, label)
    want = exact(model, x, label)
    others = ~nn.functional.one_hot(label, count).bool()
    assert (lower <= want)[others].all()
    assert (sharper <= want)[others].all()
    assert (tight <= want + 1e-14)[others].all()
    assert (want - sharper)[others].max() < 0.02
    assert (want - tight)[others].max() < 1e-9
    assert not lower[~others].any()


class Twice(nn.Module):
    def forward(self, x):
        return x + torch.relu(x) * 300


LATER = {
    "convolution": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "average": lambda: nn.AvgPool2d(2),
    "l2 pooling": lambda: nn.LPPool2d(2, 2),
    "maximum": lambda: nn.MaxPool2d(3, 1),
    "max min": MaxMin,
    "elementwise": nn.SiLU,
    "scale": lambda: Normalize([0.0] * 4, [1e-3] * 4),
    "sum": Twice,
    "rearranged": lambda: nn.Unflatten(1, (2, 2)),
    "nothing": nn.Identity,
}


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("later", LATER)
def test_an_early_error_goes_through_what_follows(later, last, device):
    """The first layer cancels: what it errs by is large beside its values, and all later roundings are small beside that."""
    torch.manual_seed(0)
    first = nn.Conv2d(2, 4, 1, bias=False)
    with torch.no_grad():
        first.weight[:, 0] = torch.rand(4, 1, 1) * 1e4
        first.weight[:, 1] = -first.weight[:, 0]
    layers = [first, LATER[later](), nn.Flatten()]
    x = torch.rand(512, 1, 4, 4, device=device)
    x = torch.cat([x, x * (1 + 3e-7 * torch.randn_like(x))], 1)
    width = nn.Sequential(*layers).to(device)(x[:1]).shape[1]
    model = _plain(nn.Sequential(*layers, *([nn.Linear(width, 5)] if last else [])).to(device).eval())
    count = 5 if last else width
    label = torch.arange(512, device=device) % count
    lower = Margins(model, (2, 4, 4), dtype=torch.float32)(x, label)
    want = exact(model, x, label)
    others = ~nn.functional.one_hot(label, count).bool()
    assert (lower <= want)[others].all()
    sharper = Margins(model.float(), (2, 4, 4), bounds.norms(model, (2, 4, 4)), dtype=torch.float32)(x, label)
    assert (sharper <= want)[others].all()


def test_a_deep_network_of_isometries_keeps_its_margins(device):
    """Boxes would grow past any number here."""
    torch.manual_seed(0)
    model = _plain(models.lipnext((3, 8, 8), 10, depth=24, width=128).to(device).eval())
    x = torch.rand(4, 3, 8, 8, device=device)
    label = model(x).argmax(1)
    boxes = bounds.interval_margin(model.double(), x.double(), label, 0.0)
    margins = Margins(model.float(), (3, 8, 8))(x, label)
    want = exact(model, x, label)
    assert (boxes < -1e3).any()
    assert (want - margins).max() < 1e-9
    certificate = certify(model.float(), (x, label), 10.0, method="product", progress=False)
    assert (certificate.radius > 0).all()


def test_weights_that_overflow_certify_nothing(device):
    model, shape = made("residual")
    with torch.no_grad():
        model.first.weight.fill_(1e38)
        model.second.weight.fill_(1e38)
    model = model.to(device)
    x, label = torch.rand(3, *shape, device=device), torch.tensor([0, 1, 2], device=device)
    lower = Margins(model.double(), shape)(1e250 * x.double(), label)
    assert not ((lower > 0) & (lower < math.inf)).any()
