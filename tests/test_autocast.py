"""A proof counts the roundings of its own dtype: autocast must not put others there."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lipfast
from lipfast import bounds
from tests.checks import DTYPES


def square(device):
    return torch.randn(24, 24, device=device)


def image(device):
    return torch.rand(2, 3, 8, 8, device=device)


def kernel(device):
    return torch.randn(4, 3, 3, 3, device=device)


WITH_PRODUCTS = {
    "ball_conv2d": lambda op, d: op(image(d), 0.1, kernel(d), outward=True),
    "ball_linear": lambda op, d: op(square(d), 0.1, square(d), outward=True),
    "cayley": lambda op, d: op(square(d)),
    "cholesky_orthogonal": lambda op, d: op(square(d)),
    "conv2d_norm_bound": lambda op, d: op(kernel(d), 8),
    "conv2d_norm_confidence": lambda op, d: op(kernel(d), 8),
    "conv2d_norm_estimate": lambda op, d: op(kernel(d), 8),
    "interval_conv2d": lambda op, d: op(image(d), image(d) + 1, kernel(d), outward=True),
    "interval_linear": lambda op, d: op(square(d), square(d) + 9, square(d), outward=True),
    "pairwise_distance": lambda op, d: op(square(d)),
    "polar": lambda op, d: op(square(d)),
    "skew_exponential": lambda op, d: op(square(d)),
    "spectral_norm_bound": lambda op, d: op(square(d)),
    "spectral_norm_estimate": lambda op, d: op(square(d)),
}


def both(function, device):
    plain = function()
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        shielded = function()
    as_tuple = lambda out: (out,) if isinstance(out, torch.Tensor) else tuple(out)
    return zip(as_tuple(plain), as_tuple(shielded), strict=True)


@pytest.mark.parametrize("name", WITH_PRODUCTS)
def test_an_op_gives_the_same_numbers_under_autocast(name, device):
    def call():
        torch.manual_seed(0)
        return WITH_PRODUCTS[name](getattr(lipfast, name), device)

    for plain, shielded in both(call, device):
        assert torch.equal(plain, shielded)


def test_every_op_is_among_them_or_has_no_product():
    without = {"beta_abs", "certified_radius", "clipped_relu", "grafted_relu", "l2_pool", "max_min", "skew", "spatial_shift"}
    ops = {n for n in lipfast.__all__ if getattr(lipfast, n, None).__class__.__name__ == "function"} - {"certify", "train"}
    assert ops == WITH_PRODUCTS.keys() | without


@pytest.mark.parametrize("name", ["beta_abs", "clipped_relu", "max_min", "spatial_shift"])
def test_an_op_without_products_keeps_a_half_type_under_autocast(name, device):
    x = torch.randn(2, 8, 4, 4, device=device, dtype=torch.bfloat16)
    more = {"clipped_relu": (torch.tensor(1.0, device=device, dtype=torch.bfloat16),)}.get(name, ())
    for plain, inside in both(lambda: getattr(lipfast, name)(x, *more), device):
        assert inside.dtype == torch.bfloat16
        assert torch.equal(plain, inside)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize > 2], ids=str)
def test_an_outward_product_contains_the_exact_one_under_autocast(dtype, device):
    x, w = torch.rand(4, 64, device=device, dtype=dtype), torch.randn(8, 64, device=device, dtype=dtype)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        lower, upper = lipfast.ball_linear(x, 0.0, w, outward=True)
    exact = x.double() @ w.double().T
    assert lower.dtype == dtype
    assert ((lower.double() <= exact) & (exact <= upper.double())).all()


def network(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), parametrizations.weight_norm(nn.Linear(144, 3)))
    return model.to(device).eval()


def test_bounds_and_certificates_are_the_same_under_autocast(device):
    model, x = network(device), torch.rand(6, 1, 8, 8, device=device)
    for plain, shielded in both(lambda: bounds.lipschitz(model, (1, 8, 8)), device):
        assert torch.equal(plain, shielded)
    with torch.no_grad():
        for plain, shielded in both(lambda: bounds.interval(model, x, 0.01).lower, device):
            assert torch.equal(plain, shielded)
    label = torch.zeros(6, dtype=torch.int64)
    radius = lambda: lipfast.certify(model, (x, label), 0.1, method="product", progress=False).radius
    for plain, shielded in both(radius, device):
        assert torch.equal(plain, shielded)


def test_a_certificate_reads_the_weights_that_parametrizations_compute_once(device, monkeypatch):
    model, x = network(device), torch.rand(6, 1, 8, 8, device=device)
    calls, parametrization = [], type(model[3].parametrizations.weight[0])
    compute = parametrization.forward
    monkeypatch.setattr(parametrization, "forward", lambda *args: calls.append(1) or compute(*args))
    lipfast.certify(model, (x, torch.zeros(6, dtype=torch.int64)), 0.1, method="product", batch_size=1, progress=False)
    assert len(calls) <= 3  # not for every batch
    before = {key: value.clone() for key, value in model.state_dict().items()}
    certificate = lipfast.certify(model, (x, torch.zeros(6, dtype=torch.int64)), 0.1, method="liplt", progress=False)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).to(device)
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(plain[0], name).copy_(getattr(model[0], name))
            getattr(plain[3], name).copy_(getattr(model[3], name))
    same = lipfast.certify(plain, (x, torch.zeros(6, dtype=torch.int64)), 0.1, method="liplt", progress=False)
    assert torch.equal(certificate.radius, same.radius)
    assert certificate.radius.any()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
