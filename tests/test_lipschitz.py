import math

import pytest
import torch
from torch import nn

import lipfast.nn
from lipfast import models
from lipfast.bounds import lipschitz, norms
from tests.networks import jacobian


def small_networks():
    """One for every activation and connection, with the shape of a sample."""
    torch.manual_seed(0)
    grid = (2, 6, 6)
    conv = lambda *after: nn.Sequential(nn.Conv2d(2, 4, 3, 1, 1), *after)
    head = lambda n: (nn.Flatten(), nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, 3))
    bn = nn.BatchNorm2d(4).eval()
    nn.init.normal_(bn.weight), nn.init.normal_(bn.running_mean)
    smaller, larger = nn.BatchNorm1d(16).eval(), nn.BatchNorm1d(5).eval()  # a bound that forgets or repeats them is wrong
    nn.init.constant_(smaller.weight, 0.1), nn.init.constant_(larger.weight, 10.0)
    return {
        "shared scaling": (nn.Sequential(nn.Linear(5, 16), smaller, *models.mlp((16, 16, 3))[1:]), (5,)),
        "scaled input": (nn.Sequential(larger, *models.mlp((5, 16, 3))[1:]), (5,)),
        "mlp": (models.mlp((5, 16, 16, 3)), (5,)),
        "clipped": (models.mlp((5, 16, 16, 3), "clipped_relu"), (5,)),
        "max_min": (models.mlp((5, 16, 16, 3), "max_min"), (5,)),
        "clipped_max_min": (conv(lipfast.nn.ClippedMaxMin(0.2, shape=(4, 6, 6)), *head(144)), grid),
        "leaky": (nn.Sequential(nn.Linear(5, 16), nn.LeakyReLU(0.2), nn.Linear(16, 3)), (5,)),
        "silu": (nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 3)), (5,)),
        "abs": (_Abs(), (5,)),
        "conv": (conv(nn.ReLU(), nn.Conv2d(4, 4, 4, 2, 1), nn.ReLU(), *head(36)), grid),
        "normalised": (nn.Sequential(lipfast.nn.Normalize([0.1, 0.2], [0.3, 2.0]), conv(nn.ReLU(), *head(144))), grid),
        "batch norm": (conv(bn, nn.ReLU(), *head(144)), grid),
        "average pool": (conv(nn.ReLU(), nn.AvgPool2d(3, 2, 1), *head(36)), grid),
        "max pool": (conv(nn.MaxPool2d(2), *head(36)), grid),
        "l2 pool": (conv(nn.LPPool2d(2, 2), *head(36)), grid),
        "circular": (nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(), *head(144)), grid),
        "residual": (models.resnet2b((2, 8, 8), 3), (2, 8, 8)),
        "no last layer": (conv(nn.ReLU(), nn.Flatten(), nn.Linear(144, 3), nn.ReLU()), grid),
    }


class _Abs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(torch.abs(self.first(x)))


def steepest(model, x, radius):
    """The largest change of each difference of two logits, per length, between points within ``radius`` of x: (B, K, K)."""
    best = torch.zeros(())
    for scale in (1e-4, 0.1, 1.0):
        a, b = (x + _inside(x, scale * radius) for _ in range(2))
        apart = (a - b).flatten(1).norm(dim=1)[:, None, None]
        z = model(a) - model(b)
        best = torch.maximum(best, (z[:, :, None] - z[:, None, :]).abs() / apart)
    gradients = torch.autograd.functional.jacobian(lambda v: model(v).sum(0), x).flatten(2).transpose(0, 1)  # (B, K, I)
    return torch.maximum(best, (gradients[:, :, None] - gradients[:, None, :]).norm(dim=-1))


def _inside(x, radius):
    d = torch.randn_like(x).flatten(1)
    return (radius * d / d.norm(dim=1, keepdim=True) * torch.rand(len(x), 1, dtype=x.dtype)).reshape(x.shape)


@pytest.mark.parametrize("name", list(small_networks()))
def test_no_slope_exceeds_the_bound(name):
    model, shape = small_networks()[name]
    bound = lipschitz(model, shape, method="product")
    estimate = lipschitz(model, shape, method="product", kind="estimate", norms=norms(model, shape, "estimate", 200))
    assert torch.equal(bound, bound.mT)
    assert not bound.diagonal().any()
    assert bound.dtype == torch.float64
    model = model.double()
    for scale in (0.1, 1.0, 10.0):
        assert (steepest(model, scale * torch.randn(8, *shape, dtype=torch.float64), scale) <= bound + 1e-12).all()
    assert (estimate <= bound * (1 + 1e-5)).all()
    if name not in ("circular", "average pool"):
        assert (bound <= 1.3 * estimate + 1e-12).all()


@pytest.mark.parametrize("name", list(small_networks()))
def test_no_slope_exceeds_liplt_which_never_exceeds_the_product(name):
    model, shape = small_networks()[name]
    bound, tighter = lipschitz(model, shape), lipschitz(model, shape, explicit=200)
    estimate = lipschitz(model, shape, kind="estimate", iterations=300).detach()
    assert torch.equal(bound, bound.mT)
    assert not bound.diagonal().any()
    assert bound.dtype == torch.float64
    assert not bound.requires_grad
    assert (bound <= lipschitz(model, shape, method="product")).all()
    assert (tighter <= bound).all()
    assert (estimate <= bound * (1 + 1e-5)).all()
    model = model.double()
    for scale in (0.1, 1.0, 10.0):
        assert (steepest(model, scale * torch.randn(8, *shape, dtype=torch.float64), scale) <= tighter + 1e-12).all()


def test_what_no_torus_holds_is_cut():
    """Convolutions with nothing between, overlapping means, unusual padding: bounded, if less tightly."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.MaxPool2d(2), nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3)]
    layers += [nn.ReLU(), nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.Flatten(), nn.Linear(36, 8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 2), nn.Flatten()).double()
    bound = lipschitz(model, (2, 10, 10))
    assert bound.isfinite().all()
    for scale in (0.1, 1.0, 10.0):
        assert (steepest(model, scale * torch.randn(8, 2, 10, 10, dtype=torch.float64), scale) <= bound + 1e-12).all()
    linear = nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 1, 1), nn.Flatten(), nn.Linear(48, 2)).double()
    want = jacobian(linear, (2, 4, 4))  # of an affine network the cut is all that is lost
    assert lipschitz(linear, (2, 4, 4))[0, 1] >= (want[0] - want[1]).norm()


def test_a_torus_that_wraps_too_early_would_be_below_the_truth():
    """Reads beyond both edges: the image must not meet itself there."""
    torch.manual_seed(1)
    for padding in (1, 2, 3):
        layers = [nn.Conv2d(1, 2, 4, 1, padding), nn.LeakyReLU(0.999), nn.Conv2d(2, 2, 4, 1, padding), nn.LeakyReLU(0.999)]
        body = nn.Sequential(*layers, nn.Flatten()).double()
        n = body(torch.zeros(1, 1, 4, 4, dtype=torch.float64)).numel()
        model = nn.Sequential(*body, nn.Linear(n, 2, dtype=torch.float64))
        J = torch.autograd.functional.jacobian(model, torch.ones(1, 1, 4, 4, dtype=torch.float64)).reshape(2, -1)
        assert lipschitz(model, (1, 4, 4))[0, 1] >= (J[0] - J[1]).norm()
        assert lipschitz(model, (1, 4, 4), explicit=1000)[0, 1] >= (J[0] - J[1]).norm()


def test_numbers_that_overflow_do_not_spoil_the_product():
    model = models.mlp((4, 6, 6, 3)).double()
    with torch.no_grad():
        model[1].weight.mul_(1e200), model[3].weight.mul_(1e-300)
    bound, other = lipschitz(model, (4,)), lipschitz(model, (4,), method="product")
    assert (bound <= other).all()
    assert bound.isfinite().all()


def test_is_the_product_of_norms_with_the_last_layer_row_by_row():
    torch.manual_seed(0)
    model = models.mlp((4, 6, 3)).double()
    first, last = model[1].weight, model[3].weight
    want = torch.linalg.matrix_norm(first, 2) * torch.cdist(last, last)
    torch.testing.assert_close(lipschitz(model, (4,), method="product"), want.detach(), rtol=1e-3, atol=1e-12)
    got = lipschitz(model, (4,), method="product", kind="estimate", norms=norms(model, (4,), "estimate", 300))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(L.sum(), model.parameters(), allow_unused=True) for L in (got, want)), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_a_sum_adds_what_its_branches_may_change():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(3, 3, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64)

        def forward(self, x):
            return self.last(x - torch.relu(self.inner(x)))

    model = Residual()
    want = (1 + torch.linalg.matrix_norm(model.inner.weight, 2)) * (model.last.weight[0] - model.last.weight[1]).norm()
    torch.testing.assert_close(lipschitz(model, (3,), method="product")[0, 1], want.detach(), rtol=1e-3, atol=0)


def test_a_broken_weight_gives_no_number():
    model = models.mlp((4, 6, 3))
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    assert not lipschitz(model, (4,), method="product")[0, 1].isfinite()


def test_a_pooling_window_that_is_cut_is_scaled_and_not_bounded_in_l2():
    """torch takes the mean of what is left and multiplies by the size of a whole window: on the corner a slope of 2."""
    model = nn.Sequential(nn.LPPool2d(2, 2, ceil_mode=True), nn.Flatten()).double()
    x = torch.rand(1, 1, 3, 3, dtype=torch.float64)
    moved = x.clone()
    moved[..., 2, 2] += 0.125
    slopes = ((model(moved) - model(x)) / 0.125)[0]
    assert slopes[3].item() == pytest.approx(2)
    for method in ("product", "liplt"):
        with pytest.raises(ValueError, match="overlapping or cut windows has no l2 rule"):
            lipschitz(model, (1, 3, 3), method=method)
        apart = lipschitz(model, (1, 3, 3), p=math.inf, method=method)
        assert ((slopes[:, None] - slopes).abs() <= apart).all()


def test_names_what_is_wrong():
    model = models.mlp((4, 6, 3))
    other = models.mlp((4, 6, 3, 3, 3))
    with pytest.raises(ValueError, match="p: 2 or inf expected, got 1"):
        lipschitz(model, (4,), p=1)
    with pytest.raises(ValueError, match=r"method: .liplt. or .product. expected, got .crown."):
        lipschitz(model, (4,), method="crown")
    with pytest.raises(ValueError, match="two classes or more"):
        lipschitz(models.mlp((4, 6, 1)), (4,))
    with pytest.raises(ValueError, match="norms: of kind 'bound' expected, got 'estimate'"):
        lipschitz(model, (4,), method="product", norms=norms(model, (4,), "estimate"))
    with pytest.raises(ValueError, match="norms: of this model expected, without layer '5'"):
        lipschitz(other, (4,), method="product", norms=norms(model, (4,)))
    for name, value in (("iterations", -1), ("explicit", -3)):
        with pytest.raises(ValueError, match=f"{name}: 0 or more expected, got {value}"):
            lipschitz(model, (4,), **{name: value})
    pooled = nn.Sequential(nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(4, 2))
    for method in ("product", "liplt"):
        with pytest.raises(
            ValueError, match="layer '0': pooling over overlapping or cut windows has no l2 rule; make stride equal"
        ):
            lipschitz(pooled, (1, 5, 5), method=method)
    with torch.no_grad():
        other[3].weight[0, 0] = math.inf
    for kind in ("bound", "estimate"):
        with pytest.raises(ValueError, match="layer '3': finite weights expected, got NaN or Inf"):
            lipschitz(other, (4,), kind=kind)
    normalised = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"layer .1.: batch norm has bounds in eval mode .* call model.eval"):
        lipschitz(normalised, (4,))
    with pytest.raises(ValueError, match="layer '1': Softmax is not supported"):
        lipschitz(nn.Sequential(nn.Linear(4, 3), nn.Softmax(1), nn.Linear(3, 2)), (4,))
