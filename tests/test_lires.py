import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import remove_parametrizations

from lipfast import bounds, models
from lipfast.nn import LiResConv2d, cholesky_rows, lires_linear
from tests.checks import TOLERANCE, assert_near


def moved(layer):
    """Away from the start, where gamma is 1 and a bias 0."""
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            t.add_(torch.randn_like(t))
    return layer


def singular_values(layer):
    return torch.linalg.svdvals(layer.weight.detach().double().flatten(1))


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("training", [True, False])
def test_is_a_residual_convolution_that_is_centered(training, kernel_size, device):
    layer = moved(LiResConv2d(4, 9, kernel_size)).double().to(device).train(training)
    x = torch.randn(5, 4, 6, 7, dtype=torch.float64, device=device)
    before = layer.running_mean.clone()
    branch = F.conv2d(x, layer.raw * layer.gamma[:, None, None, None], padding=kernel_size // 2) / 3
    mean = branch.mean((0, 2, 3)) if training else before
    want = x + branch - mean[:, None, None] + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), want)
    moved_mean = 0.9 * before + 0.1 * mean if training else before
    torch.testing.assert_close(layer.running_mean, moved_mean)


def test_starts_near_the_identity(device):
    layer = LiResConv2d(16, 4).to(device)
    x = torch.randn(8, 16, 9, 9, device=device)
    assert 1e-4 < (layer(x) - x).abs().max() < 0.5
    assert layer.raw.std().item() == pytest.approx(1 / (9 * 16), rel=0.1)
    dense = lires_linear(32, 4).to(device)
    assert dense.parametrizations.weight.original.std().item() == pytest.approx(1 / 32, rel=0.1)
    assert not dense.bias.any()


@pytest.mark.parametrize("training", [True, False])
def test_gradient_agrees_with_differences(training, device):
    layer = moved(LiResConv2d(2, 3)).double().to(device).train(training)
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    mean = {"running_mean": layer.running_mean.clone()}
    of = lambda x, *values: torch.func.functional_call(
        layer, dict(zip(names, values, strict=True)) | {k: v.clone() for k, v in mean.items()}, (x,)
    )
    assert torch.autograd.gradcheck(of, (x, *values))


def test_autocast_and_half_keep_the_running_mean(device):
    layer = LiResConv2d(4).to(device)
    x = torch.randn(3, 4, 8, 8, device=device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32
    assert_near(out, copy.deepcopy(layer)(x), torch.bfloat16)
    half = LiResConv2d(4).to(device, torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("depth", [1, 8])
def test_dense_layer_is_the_factor_of_a_residual(depth, device):
    layer = moved(lires_linear(6, depth)).double().to(device)
    raw, gamma = layer.parametrizations.weight.original, layer.parametrizations.weight[0].gamma
    X = torch.eye(6, dtype=torch.float64, device=device) + raw * gamma[:, None] / depth**0.5
    gram = X @ X.T
    L = torch.linalg.cholesky(gram + 1e-3 * gram.diagonal().mean() * torch.eye(6).to(gram))
    assert_near(layer.weight, torch.linalg.solve(L, X), torch.float64)
    assert (singular_values(layer) < 1).all()
    loss = layer(torch.randn(3, 6, dtype=torch.float64, device=device)).square().sum()
    assert all(g.any() for g in torch.autograd.grad(loss, list(layer.parameters())))


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(8, 3), lambda: nn.Linear(3, 8), lambda: nn.Conv2d(2, 5, 2, 2), lambda: nn.Conv1d(1, 6, 3, 3)],
)
def test_cholesky_rows_are_nearly_orthonormal_and_contract(make, device):
    layer = make().to(device)
    assert cholesky_rows(layer) is layer
    for _ in range(3):
        s = singular_values(layer)
        assert ((s < 1 + 1e-6) & (s > 0.9)).all()
        moved(layer)
    weight = layer.weight.detach()
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        assert torch.equal(layer.weight, weight)
    assert torch.equal(copy.deepcopy(layer).weight, weight)
    remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight.data, weight)


def test_layers_are_saved_and_compiled(device):
    make = lambda: nn.Sequential(LiResConv2d(2, 3), nn.Flatten(), cholesky_rows(nn.Linear(18, 5)), lires_linear(5, 2)).to(
        device
    )
    first, second = moved(make()).eval(), make().eval()
    second.load_state_dict(first.state_dict())
    x = torch.randn(4, 2, 3, 3, device=device)
    for other in (second, torch.compile(first, fullgraph=True, backend="aot_eager")):
        assert torch.equal(other(x), first(x))


def test_bounds_are_of_the_convolution_in_eval_mode(device):
    layer = moved(LiResConv2d(3, 5)).to(device).eval()
    plain = nn.Conv2d(3, 3, 3, padding=1).to(device).requires_grad_(False)
    plain.weight.copy_(layer.weight)
    plain.bias.copy_(layer.bias - layer.running_mean)
    model, same = nn.Sequential(layer, nn.ReLU()), nn.Sequential(plain, nn.ReLU())
    x = torch.rand(2, 3, 5, 5, device=device)
    for got, want in zip(*(bounds.norms(m, (3, 5, 5)).sigma.values() for m in (model, same)), strict=True):
        assert got == want
    boxes, others = (bounds.interval(m, x, 0.1) for m in (model, same))
    assert torch.equal(boxes.lower, others.lower)
    assert torch.equal(boxes.upper, others.upper)
    y = x + 0.2 * (torch.rand_like(x) - 0.5)
    assert ((model(y) >= boxes.lower) & (model(y) <= boxes.upper)).all()
    with pytest.raises(ValueError, match=r"layer '0': LiResConv2d has bounds in eval mode .* call model.eval\(\)"):
        bounds.norms(model.train(), (3, 5, 5))


# A digit, MNIST's and CIFAR's images; widths far below the paper's.
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("method", ["product", "liplt"])
def test_constants_of_the_network_are_above_what_it_does(shape, method, device):
    model = models.liresnet(shape, 4, depth=2, width=8, dense=2, dense_width=16).to(device)
    model(torch.rand(64, *shape, device=device))  # moves the running means
    model.eval()
    constants = bounds.lipschitz(model, shape, method=method)
    x = torch.rand(256, *shape, device=device, dtype=torch.float64)
    y = x + 10 ** torch.empty(256, 1, 1, 1).uniform_(-3, 0).to(x) * torch.randn_like(x)
    model.double()
    change = model(x) - model(y)
    ratio = (change[:, :, None] - change[:, None, :]).abs() / (x - y).flatten(1).norm(dim=1)[:, None, None]
    assert (ratio <= constants).all()
    assert constants.max() < 100 * ratio.max()


def test_constants_of_the_network_learn(device):
    model = models.liresnet((1, 8, 8), 3, depth=2, width=4, dense=1, dense_width=8).to(device).eval()
    bounds.lipschitz(model, (1, 8, 8), method="product", kind="estimate").sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None and not name.endswith("bias")]
    assert not missing


def test_dense_part_is_contractive(device):
    model = moved(models.liresnet((1, 8, 8), 3, depth=1, width=6, dense=3, dense_width=12)).to(device).eval()
    sigma = bounds.norms(model, (1, 8, 8)).sigma
    first = next(i for i, m in enumerate(model) if isinstance(m, nn.Flatten)) - 1
    dense = [value for name, value in sigma.items() if first <= int(name) < len(model) - 1]
    assert len(dense) == 5
    assert all(value <= 1 + 100 * TOLERANCE[torch.float32] for value in dense)


def test_names_what_is_wrong():
    with pytest.raises(ValueError, match="LiResConv2d: channels and depth must be at least 1, got 4 and 0"):
        LiResConv2d(4, 0)
    with pytest.raises(ValueError, match="LiResConv2d: kernel_size must be odd, got 4"):
        LiResConv2d(4, 1, 4)
    with pytest.raises(ValueError, match="lires_linear: width and depth must be at least 1, got 0 and 1"):
        lires_linear(0)
    with pytest.raises(ValueError, match="cholesky_rows: name must be that of a plain parameter of Linear, got 'wheel'"):
        cholesky_rows(nn.Linear(2, 2), "wheel")
    with pytest.raises(ValueError, match="liresnet: images must have at least 7 x 7 pixels, got 6 x 8"):
        models.liresnet((1, 6, 8))
    with pytest.raises(ValueError, match="activation must be one of"):
        models.liresnet((1, 8, 8), depth=0, width=2, dense_width=2, activation="tanh")
