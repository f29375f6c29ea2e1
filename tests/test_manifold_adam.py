import copy
import math

import pytest
import torch
from torch import nn

from lipfast.optim import ManifoldAdam, fast_exponential, parameter_groups
from lipfast.optim.fast_exponential import less_identity


def orthogonal(*shape, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(*shape, dtype=torch.float64, generator=generator)).Q
    return Q.to(device, dtype)


def matrices(*shape, device, dtype=torch.float32, seed=0):
    return nn.Parameter(orthogonal(*shape, device=device, dtype=dtype, seed=seed))


def on_manifold(*params, **settings):
    return ManifoldAdam([{"params": list(params), "orthogonal": True}], **settings)


def noise(p, step, seed=1):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    return torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device, p.dtype)


def off(X):
    """|X^T X - I|_2 of the worst matrix."""
    X = X.detach().double()
    return torch.linalg.matrix_norm(X.mT @ X - torch.eye(X.shape[-1], device=X.device), 2).max().item()


def walk(optimizer, steps, first=0, factor=1.0):
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                p.grad = factor * noise(p, step, i + 1)
        optimizer.step()


class Definition:
    """The paper's step in float64, matrix by matrix, with the whole exponential and the singular value decomposition."""

    def __init__(self, X, lr, betas=(0.9, 0.999), eps=1e-8, lookahead=0, alpha=0.5, retraction=0):
        self.X = self.slow = X.detach().double().cpu().clone()
        self.m = self.v = self.path = torch.zeros_like(self.X)
        self.lr, self.betas, self.eps = lr, betas, eps
        self.lookahead, self.alpha, self.retraction, self.t = lookahead, alpha, retraction, 0

    def step(self, gradient):
        self.t += 1
        (b1, b2), inner = self.betas, self.X.T @ gradient.double().cpu()
        g = (inner - inner.T) / 2
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g * g
        D = -self.lr * (self.m / (1 - b1**self.t)) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)
        self.X, self.path = self.X @ torch.linalg.matrix_exp(D), self.path + D
        if self.lookahead and self.t % self.lookahead == 0:
            self.X = self.slow = self.slow @ torch.linalg.matrix_exp(self.alpha * self.path)
            self.path = torch.zeros_like(self.path)
        if self.retraction and self.t % self.retraction == 0:
            project = lambda X: (lambda U, S, V: U @ V)(*torch.linalg.svd(X))
            self.X, self.slow = project(self.X), project(self.slow)


@pytest.mark.parametrize("lookahead", [0, 6])
@pytest.mark.parametrize("retraction", [0, 10])
@pytest.mark.parametrize("lr", [1e-4, 1e-3, 0.05])
def test_follows_the_definition(lr, retraction, lookahead, device):
    p = matrices(24, 24, device=device)
    definition = Definition(p, lr, lookahead=lookahead, retraction=retraction)
    optimizer = on_manifold(p, lr=lr, lookahead=lookahead, retraction=retraction)
    for step in range(100):
        p.grad = noise(p, step)
        definition.step(p.grad)
        optimizer.step()
    assert (p.detach().cpu() - definition.X).abs().max() < 1e-3
    if lookahead:
        assert (optimizer.state[p]["slow"].cpu() - definition.slow).abs().max() < 1e-3


def test_options_reach_the_step(device):
    settings = {"lr": 0.02, "betas": (0.5, 0.9), "eps": 0.1, "lookahead": 4, "alpha": 0.8}
    p = matrices(9, 9, device=device, dtype=torch.float64)
    definition, optimizer = Definition(p, **settings), on_manifold(p, retraction=0, **settings)
    for step in range(20):
        p.grad = noise(p, step)
        definition.step(p.grad)
        optimizer.step()
    torch.testing.assert_close(p.detach().cpu(), definition.X, rtol=0, atol=1e-4)  # the series of the exponential


@pytest.mark.parametrize(("lookahead", "steps"), [(6, 10_000), (0, 2000)])
def test_stays_orthogonal_for_thousands_of_steps_and_keeps_its_determinant(lookahead, steps, device):
    p = matrices(2, 32, 32, device=device)
    sign = torch.linalg.det(p.detach()).sign()
    optimizer = on_manifold(p, lr=1e-3, lookahead=lookahead)
    worst = 0.0
    for first in range(0, steps, 250):
        walk(optimizer, 250, first)
        worst = max(worst, off(p))
    assert worst <= 1e-5
    assert torch.equal(torch.linalg.det(p.detach()).sign(), sign)


def test_retraction_takes_the_drift_away(device):
    drifts = []
    for retraction in (0, 20):
        p = matrices(16, 16, device=device)
        walk(on_manifold(p, lr=0.06, lookahead=0, retraction=retraction), 200)
        drifts.append(off(p))
    assert drifts[0] > 1e-5 > 2e-6 > drifts[1]
    p = matrices(16, 16, device=device)
    optimizer = on_manifold(p, lr=0.06, retraction=0)
    walk(optimizer, 203)
    assert max(off(p), off(optimizer.state[p]["slow"])) > 1e-5
    optimizer.retract()
    assert max(off(p), off(optimizer.state[p]["slow"])) < 2e-6
    walk(optimizer, 1)  # its own writing is no stranger's


def test_finds_a_rotation(device):
    target = orthogonal(12, 12, device=device, seed=3)
    p = matrices(12, 12, device=device, seed=4)
    if torch.linalg.det(target) * torch.linalg.det(p.detach()) < 0:
        target[:, 0] *= -1
    optimizer = on_manifold(p, lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        optimizer.zero_grad()
        (p - target).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert (p.detach() - target).abs().max() < 1e-3


def test_a_stack_its_matrices_alone_and_both_cut_into_parts_are_one(device, monkeypatch):
    stack = matrices(5, 8, 8, device=device)
    alone = [nn.Parameter(X.clone()) for X in stack.detach()]
    cut = nn.Parameter(stack.detach().clone())
    walk(on_manifold(stack, lr=0.01), 15)
    optimizers = on_manifold(*alone, lr=0.01), on_manifold(cut, lr=0.01)
    for step in range(15):
        gradient = noise(stack, step)
        for p, g in zip(alone, gradient, strict=True):
            p.grad = g.clone()
        optimizers[0].step()
        cut.grad = gradient
        monkeypatch.setattr("lipfast.optim._matrices._AT_ONCE", {"cpu": 2 * 64, "cuda": 2 * 64})
        optimizers[1].step()
        monkeypatch.undo()
    torch.testing.assert_close(torch.stack(alone).detach(), stack.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(cut.detach(), stack.detach(), rtol=0, atol=1e-6)


def test_parameters_with_other_numbers_of_steps_keep_their_own(device):
    late, both = matrices(6, 6, device=device), matrices(6, 6, device=device, seed=1)
    optimizer, definition = on_manifold(late, both, lr=0.01, lookahead=0), Definition(late, 0.01)
    for step in range(12):
        late.grad = noise(late, step) if step >= 5 else None
        both.grad = noise(both, step, 2)
        optimizer.step()
        if step >= 5:
            definition.step(late.grad)
    assert (late.detach().cpu() - definition.X).abs().max() < 1e-4
    assert [int(optimizer.state[p]["step"]) for p in (late, both)] == [7, 12]


def test_ordinary_parameters_take_the_step_of_adamw(device):
    X, w = matrices(4, 4, device=device), nn.Parameter(torch.randn(5, 3, device=device))
    twin = nn.Parameter(w.detach().clone())
    groups = [{"params": [X], "orthogonal": True}, {"params": [w], "lr": 0.02, "weight_decay": 0.1}]
    ours, theirs = ManifoldAdam(groups, lookahead=0), torch.optim.AdamW([twin], lr=0.02, weight_decay=0.1)
    for step in range(10):
        X.grad, w.grad, twin.grad = noise(X, step), noise(w, step), noise(w, step)
        ours.step()
        theirs.step()
    assert torch.equal(w, twin)
    averaged = nn.Parameter(torch.randn(5, 3, device=device))
    twin = nn.Parameter(averaged.detach().clone())
    slow = twin.detach().clone()
    ours = ManifoldAdam([groups[0], {"params": [averaged]}], lr=0.02, lookahead=3, alpha=0.25)
    theirs = torch.optim.AdamW([twin], lr=0.02, weight_decay=0)
    for step in range(10):
        X.grad, averaged.grad, twin.grad = noise(X, step), noise(w, step), noise(w, step)
        ours.step()
        theirs.step()
        if step % 3 == 2:
            slow += 0.25 * (twin.detach() - slow)
            with torch.no_grad():
                twin.copy_(slow)
    torch.testing.assert_close(averaged, twin)


def model_with_matrices(device):
    torch.manual_seed(0)
    from lipfast.models import lipnext

    return lipnext((1, 4, 4), 3, depth=2, width=8, patch=2).to(device)


def train(model, optimizer, steps, first=0, device="cpu", **autocast):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.rand(8, 1, 4, 4, generator=generator).to(device)
        y = torch.randint(0, 3, (8,), generator=generator).to(device)
        with torch.autocast(torch.device(device).type, **autocast) if autocast else torch.enable_grad():
            loss = nn.functional.cross_entropy(model(x) * 10, y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


def test_groups_of_a_model(device):
    model = model_with_matrices(device)
    manifold, ordinary = parameter_groups(model, lr=0.1)
    assert [name for name, _ in manifold["params"]] == ["2.rotation", "2.mixing"]
    assert (manifold["orthogonal"], ordinary["orthogonal"], manifold["lr"]) == (True, False, 0.1)
    assert len(ordinary["params"]) + 2 == len(list(model.parameters()))
    assert [group["orthogonal"] for group in parameter_groups(nn.Linear(2, 2))] == [False]


@pytest.mark.parametrize("half", [False, True])
def test_trains_a_network(half, device):
    model = model_with_matrices(device)
    optimizer = ManifoldAdam(parameter_groups(model), lr=0.02, retraction=10)
    autocast = {"dtype": torch.bfloat16} if half else {}
    before = train(model, optimizer, 1, device=device, **autocast)
    for _ in range(12):
        after = train(model, optimizer, 5, device=device, **autocast)  # the same five batches
    assert after < 0.7 * before
    assert model[2].rotation.dtype == torch.float32
    assert max(off(model[2].rotation), off(model[2].mixing)) < 1e-5


def test_a_run_goes_on_from_its_state_to_the_bit(device):
    whole = model_with_matrices(device)
    optimizer = ManifoldAdam(parameter_groups(whole), lr=0.02, lookahead=4, retraction=5)
    train(whole, optimizer, 7, device=device)
    half = copy.deepcopy(whole)
    again = ManifoldAdam(parameter_groups(half), lr=0.5, lookahead=4, retraction=5)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied = copy.deepcopy(optimizer)
    assert copied.param_groups[0]["lr"] == again.param_groups[0]["lr"] == 0.02
    for model, adam in ((whole, optimizer), (half, again)):
        train(model, adam, 8, 7, device=device)
    for p, q in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_compiled_step_is_the_step(device):
    twins = matrices(3, 6, 6, device=device), matrices(3, 6, 6, device=device)
    plain, compiled = (on_manifold(p, lr=0.01, retraction=4) for p in twins)
    step = torch.compile(compiled.step, backend="aot_eager")
    for n in range(6):
        for p in twins:
            p.grad = noise(p, n)
        plain.step()
        step()
    torch.testing.assert_close(*(p.detach() for p in twins), rtol=0, atol=1e-6)


def test_a_grad_scaler_skips_what_overflowed(device):
    p = matrices(4, 4, device=device)
    optimizer = on_manifold(p, lr=0.01)
    scaler = torch.amp.GradScaler(torch.device(device).type, init_scale=4.0)
    start = p.detach().clone()
    for factor in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((p * noise(p, 0)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(p, start) == (factor == math.inf)
    twin = nn.Parameter(start)
    twin.grad = noise(p, 0)
    on_manifold(twin, lr=0.01).step()
    torch.testing.assert_close(p, twin)


def test_a_closure_gives_the_loss(device):
    p = matrices(3, 3, device=device)
    optimizer = on_manifold(p, lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = p.square().mean() + p.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(1 / 3 + orthogonal(3, 3, device="cpu").sum().item(), rel=1e-5)


def test_products_are_float32_whatever_the_caller_allows(device, monkeypatch):
    p = matrices(64, 64, device=device)
    optimizer, seen = on_manifold(p, lr=1e-3), set()

    def spied(A):
        seen.update(s.fp32_precision for s in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul))
        return less_identity(A)

    monkeypatch.setattr("lipfast.optim.manifold_adam.less_identity", spied)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        walk(optimizer, 30)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {"ieee"}
    assert off(p) < 3e-6


def snapshot(optimizer):
    tensors = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return tensors, copy.deepcopy(optimizer.state_dict())


def assert_unchanged(optimizer, before):
    tensors, state = snapshot(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before[0], strict=True))
    assert state["param_groups"] == before[1]["param_groups"]
    assert state["state"].keys() == before[1]["state"].keys()
    for key, entries in state["state"].items():
        assert all(torch.equal(v, before[1]["state"][key][name]) for name, v in entries.items())


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("which", ["2.mixing", "2.bias", "4.parametrizations.weight.original"])
def test_a_gradient_that_is_not_finite_names_its_parameter_and_changes_nothing(which, value, steps, device):
    model = model_with_matrices(device)
    optimizer = ManifoldAdam(parameter_groups(model), lr=0.02)
    train(model, optimizer, steps, device=device) if steps else None
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    dict(model.named_parameters())[which].grad.view(-1)[3] = value
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"ManifoldAdam: the gradient of {which} must be finite, got NaN, Inf or overflow"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("fault", ["drifted", "nan", "zero"])
def test_a_matrix_that_is_not_orthogonal_is_named_and_nothing_changes(fault, steps, device):
    model = model_with_matrices(device)
    optimizer = ManifoldAdam(parameter_groups(model), lr=0.02)
    train(model, optimizer, steps, device=device) if steps else None
    with torch.no_grad():
        if fault == "drifted":
            model[2].mixing[1] *= 1.02
        else:
            model[2].mixing[1] = math.nan if fault == "nan" else 0.0
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=r"ManifoldAdam: matrix 1 of 2.mixing must be orthogonal: .* at most 0.01, got"
    ) as caught:
        optimizer.step()
    assert "\n" not in str(caught.value)
    if fault != "nan":
        assert_unchanged(optimizer, before)
    with torch.no_grad():
        model[2].mixing.copy_(orthogonal(2, 8, 8, device=device))
    optimizer.step()


def test_slow_weights_from_a_corrupt_checkpoint_are_named(device):
    p = matrices(4, 4, device=device)
    optimizer = on_manifold(p, lr=0.01)
    walk(optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["slow"][0, 0] += 1
    optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(4, 4\) \(state slow\) must be orthogonal"):
        walk(optimizer, 1)


def test_a_checkpoint_loaded_between_steps_is_looked_at(device):
    model = model_with_matrices(device)
    optimizer = ManifoldAdam(parameter_groups(model), lr=0.02)
    good = copy.deepcopy(model.state_dict())
    train(model, optimizer, 2, device=device)
    bad = {key: t + 2 if "rotation" in key else t for key, t in good.items()}
    model.load_state_dict(bad)
    with pytest.raises(ValueError, match=r"matrix . of 2.rotation must be orthogonal"):
        train(model, optimizer, 1, device=device)
    model.load_state_dict(good)
    train(model, optimizer, 1, device=device)


def test_names_the_wrong_argument(device):
    square = matrices(3, 3, device=device)
    group = lambda p, **more: [{"params": [("w", p)], "orthogonal": True, **more}]
    empty = lambda *shape, dtype=torch.float32: nn.Parameter(torch.zeros(*shape, device=device, dtype=dtype))
    for params, settings, message in [
        ([square], {}, "params must have a group with 'orthogonal': True, got none"),
        (group(empty(3, 4)), {}, r"w must be orthogonal matrices \(d, d\) or \(N, d, d\), got \(3, 4\)"),
        (group(empty(2, 2, 3, 3)), {}, r"w must be orthogonal matrices .* got \(2, 2, 3, 3\)"),
        (group(empty(3)), {}, r"w must be orthogonal matrices .* got \(3,\)"),
        (group(empty(3, 3, dtype=torch.bfloat16)), {}, "w must be float32 or float64 .* got torch.bfloat16"),
        (group(square), {"lr": -1.0}, "lr must be at least 0 and finite, got -1.0"),
        (group(square), {"lr": math.nan}, "lr must be at least 0 and finite, got nan"),
        (group(square, betas=(0.9, 1.0)), {}, "betas must be two numbers from 0 to below 1"),
        (group(square), {"eps": math.inf}, "eps must be at least 0 and finite"),
        (group(square), {"eps": 0.0}, "eps must be at least 1e-30 for orthogonal matrices, got 0.0"),
        (group(square), {"weight_decay": -1}, "weight_decay must be at least 0 and finite"),
        (group(square), {"lookahead": -1}, "lookahead must be a number of steps, 0 for none, got -1"),
        (group(square), {"retraction": 2.5}, "retraction must be a number of steps, 0 for none, got 2.5"),
        (group(square), {"alpha": 0}, "alpha must be above 0 and at most 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=f"ManifoldAdam: {message}"):
            ManifoldAdam(params, **settings)
    optimizer = ManifoldAdam(group(square))
    with pytest.raises(ValueError, match="ManifoldAdam: v must be orthogonal matrices"):
        optimizer.add_param_group({"params": [("v", empty(2, 3))], "orthogonal": True})
    assert len(optimizer.param_groups) == 1


def test_entries_without_a_gradient_stay_where_they_are(device):
    p = matrices(4, 4, device=device)
    start = p.detach().clone()
    optimizer = on_manifold(p, lr=0.1, eps=1e-30)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(p, start)


def test_one_step_is_the_formula(device):
    p = matrices(5, 5, device=device, dtype=torch.float64)
    start, gradient = p.detach().clone(), noise(p, 0)
    inner = start.T @ gradient
    g = (inner - inner.T) / 2
    p.grad = gradient
    on_manifold(p, lr=1e-3, eps=0.5, lookahead=0).step()
    want = start @ fast_exponential(-1e-3 * g / (g.abs() + 0.5))
    torch.testing.assert_close(p.detach(), want, rtol=0, atol=1e-14)
