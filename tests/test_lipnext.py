import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lipfast import bounds, certify, models, spatial_shift
from lipfast.nn import L2Pool, LipNeXtBlocks, Patches
from lipfast.optim import ManifoldAdam, parameter_groups
from tests.attacked import broken
from tests.checks import assert_near

SHAPE = (1, 8, 8)


def blocks(device, depth=3, width=16, size=(4, 5), dtype=torch.float64, **settings):
    torch.manual_seed(0)
    made = LipNeXtBlocks(depth, width, size, **settings).to(device, torch.float64)
    with torch.no_grad():
        made.position.normal_(std=0.3)
        made.bias.normal_(std=0.3)
        for X in (made.rotation, made.mixing):  # orthogonal in float64 too
            U, _, V = torch.linalg.svd(X)
            X.copy_(U @ V)
    return made.to(dtype)


def network(device, dtype=torch.float32, **arguments):
    torch.manual_seed(0)
    model = models.lipnext(SHAPE, 10, **{"depth": 3, "width": 16, **arguments}).to(device, dtype)
    with torch.no_grad():
        model[2].position.normal_(std=0.1)
        model[2].bias.normal_(std=0.1)
    return model.eval()


def defined(made, x):
    """The blocks' formula, image by image and pixel by pixel."""
    for R, M, b, p in zip(made.rotation, made.mixing, made.bias, made.position, strict=True):
        x = torch.einsum("dc,bchw->bdhw", R, x + p)
        x = spatial_shift(x, made.ratio)
        x = torch.einsum("de,fe,bfhw->bdhw", M, R, x)
        x = x + b[:, None, None]
        folded = int(made.beta * made.width)
        x = torch.cat([x[:, :folded].abs(), x[:, folded:]], 1)
    return x


@pytest.mark.parametrize("settings", [{}, {"ratio": 0.25, "beta": 0.25}, {"ratio": 0.0, "beta": 1.0}, {"checkpointing": True}])
@pytest.mark.parametrize("count", [0, 1, 5], ids=lambda n: f"{n} images")  # 16 channels: fewer pixels than that, and more
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_blocks_are_their_formula(dtype, count, settings, device):
    made = blocks(device, size=(2, 3) if count == 1 else (4, 5), dtype=dtype, **settings)
    x = torch.randn(count, 16, *made.position.shape[1:], device=device, dtype=dtype, requires_grad=True)
    wide = copy.deepcopy(made).double()
    want = defined(wide, x.detach().double())
    got = made(x)
    assert_near(got, want, dtype)
    assert got.is_contiguous(memory_format=torch.channels_last)
    if count:
        seed = torch.randn_like(got)
        grads = torch.autograd.grad(got, list(made.parameters()), seed)
        wants = torch.autograd.grad(want, list(wide.parameters()), seed.double())
        for g, w in zip(grads, wants, strict=True):
            assert_near(g, w, dtype, slack=2)


def test_the_jacobian_of_the_blocks_has_singular_values_1(device):
    made = blocks(device, size=(4, 2))
    x = torch.randn(1, 16, 4, 2, device=device, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(made, x).reshape(128, 128)
    assert_near(torch.linalg.svdvals(jacobian), torch.ones(128, device=device), torch.float64)


def test_checkpointing_keeps_the_blocks_inputs_only(device):
    kept = []
    for checkpointing in (False, True):
        made, numbers = blocks(device, depth=4, checkpointing=checkpointing), {}

        def keep(t, numbers=numbers):
            numbers[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            made(torch.randn(64, 16, 4, 5, device=device, dtype=torch.float64))
        kept.append(sum(numbers.values()))
    assert kept[1] < 0.6 * kept[0]


def test_half_precision_beside_float32_parameters(device):
    made = blocks(device, dtype=torch.float32)
    x = torch.randn(6, 16, 4, 5, device=device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        out = made(x)
        out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16
    assert_near(out, made(x).detach(), torch.bfloat16)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in made.parameters())


def test_starts_in_one_component_of_the_orthogonal_matrices(device):
    made = LipNeXtBlocks(8, 7, (2, 2), ratio=0.0).to(device)
    for X in (made.rotation, made.mixing):
        assert_near(X.mT @ X, torch.eye(7, device=device).expand(8, 7, 7), torch.float32)
        assert_near(torch.linalg.det(X.detach().double()), torch.ones(8, device=device), torch.float32)
    assert not made.bias.any()
    assert not made.position.any()


@pytest.mark.parametrize(("depth", "width", "millions"), [(32, 1024, 64), (32, 2048, 256), (32, 4096, 1024), (64, 2896, 1024)])
def test_has_the_published_size_on_the_same_code_path(depth, width, millions):
    with torch.device("meta"):
        model = models.lipnext((3, 32, 32), 10, depth, width)
        numbers = sum(p.numel() for name, p in model[2].named_parameters() if name in model[2].orthogonal_parameters)
        assert numbers / 2**20 == pytest.approx(millions, rel=1e-3)
        logits = model(torch.empty(4, 3, 32, 32))
        assert logits.shape == (4, 10)
        nn.functional.cross_entropy(logits, torch.empty(4, dtype=torch.long)).backward()
    assert model[2].mixing.grad.shape == (depth, width, width)


def test_patches_are_an_isometry(device):
    patches = Patches(3, 2, 20)
    x = torch.randn(4, 3, 6, 8, device=device, dtype=torch.float64)
    y = patches(x)
    assert y.shape == (4, 20, 3, 4)
    assert_near(y.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1), torch.float64)
    assert torch.equal(y[1, :12, 2, 3], x[1, :, 4:6, 6:8].flatten())
    assert not y[:, 12:].any()


def test_logits_differ_by_what_the_certificate_says(device):
    model = network(device, torch.float64)
    constants = bounds.lipschitz(model, SHAPE, method="product")
    head = model[4].weight.detach()
    assert_near(constants, torch.cdist(head, head, compute_mode="donot_use_mm_for_euclid_dist"), torch.float32)
    x, y = (torch.rand(256, *SHAPE, device=device, dtype=torch.float64) for _ in range(2))
    y = x + 1e-3 * y
    moved = model(x) - model(y)
    apart = (moved[:, :, None] - moved[:, None]).abs() / (x - y).flatten(1).norm(dim=1)[:, None, None]
    assert (apart <= constants * (1 + 1e-9)).all()
    assert apart.max() > 0.2 * constants.max()


@pytest.mark.parametrize("method", ["product", "liplt"])
def test_norms_are_measured_not_assumed(method, device):
    model = network(device)
    before = bounds.lipschitz(model, SHAPE, method=method)
    with torch.no_grad():
        model[2].mixing[1] *= 1.25
        model[2].rotation[0] *= 1.1  # stands in a block twice
    after = bounds.lipschitz(model, SHAPE, method=method)
    assert_near(after, before * 1.25 * 1.1**2, torch.float32)


def test_half_precision_weights_are_bounded_by_their_own_norms(device):
    model = network(device)
    rounded = copy.deepcopy(model).bfloat16()
    exact = bounds.lipschitz(model, SHAPE, method="product")
    measured = bounds.lipschitz(rounded, SHAPE, method="product")
    factor = 1.0
    for X in (*rounded[2].rotation.double(), *rounded[2].rotation.double(), *rounded[2].mixing.double()):
        factor *= torch.linalg.matrix_norm(X.detach(), 2).item()
    head = rounded[4].weight.detach().double()
    want = factor * torch.cdist(head, head, compute_mode="donot_use_mm_for_euclid_dist")
    assert (measured >= want * (1 - 1e-9)).all()
    assert (measured <= want * 1.01).all()
    assert (measured[0, 1:] > exact[0, 1:]).all()


def test_interval_bounds_read_the_same_network(device):
    model, x = network(device, torch.float64), torch.rand(3, *SHAPE, device=device, dtype=torch.float64)
    boxes = bounds.interval(model, x, 0.0)
    assert_near(boxes.lower, model(x).detach(), torch.float32)
    wide = bounds.interval(model, x, 0.01)
    near = model(x + 0.01 * (2 * torch.rand_like(x) - 1)).detach()
    assert (wide.lower <= near).all()
    assert (near <= wide.upper).all()


def test_no_certificate_is_broken(device):
    model = network(device)
    torch.manual_seed(0)
    optimizer = ManifoldAdam(parameter_groups(model), lr=0.01)
    x = torch.rand(20, *SHAPE, device=device)
    y = torch.arange(20, device=device) % 10
    for _ in range(60):
        loss = F.cross_entropy(10 * model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    certificate = certify(model, (x, y), [0.05, 0.1, 0.3], method="product", progress=False)
    assert certificate.clean_accuracy > 0.9
    assert (certificate.radius > 0.02).float().mean() > 0.5
    assert not broken(certificate, model, x, times=0.999999, steps=50).any()
    assert broken(certificate, model, x, times=3, steps=20, restarts=1).float().mean() > 0.5  # the attack is one


def test_names_the_wrong_argument(device):
    image = torch.zeros(2, 3, 6, 6, device=device)
    for call, message in [
        (lambda: LipNeXtBlocks(0, 8, (2, 2)), "LipNeXtBlocks: depth and width must be at least 1, got 0 and 8"),
        (lambda: LipNeXtBlocks(2, 12, (2, 2)), "spatial_shift: ratio must make a whole number of the 12 channels"),
        (lambda: LipNeXtBlocks(2, 8, (2, 2), ratio=0.3), "spatial_shift: ratio must be from 0 to 1/4, got 0.3"),
        (lambda: LipNeXtBlocks(2, 8, (2, 2), beta=2), "LipNeXtBlocks: beta must be from 0 to 1, got 2"),
        (lambda: LipNeXtBlocks(2, 8, (2, 2))(image), r"LipNeXtBlocks: x must be \(B, 8, 2, 2\), got \(2, 3, 6, 6\)"),
        (lambda: Patches(3, 0, 4), "Patches: channels and side must be at least 1, got 3 and 0"),
        (lambda: Patches(3, 2, 11), r"Patches: width must be at least 3 x 2\^2 = 12, got 11"),
        (lambda: Patches(3, 4, 48)(image), r"Patches: x must be \(B, 3, H, W\), sides divisible by 4, got \(2, 3, 6, 6\)"),
        (lambda: Patches(1, 2, 8)(image), r"Patches: x must be \(B, 1, H, W\)"),
        (lambda: L2Pool()(image[0]), r"l2_pool: x must be \(B, C, H, W\)"),
        (lambda: models.lipnext((3, 30, 30), 10, 2, 64, patch=4)(torch.zeros(1, 3, 30, 30)), "Patches: x must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
