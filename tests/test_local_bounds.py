import math

import pytest
import torch
from torch import nn

import lipfast.nn
from lipfast import models
from lipfast.bounds import interval, lipschitz, local, local_lipschitz, norms
from lipfast.bounds.norms import Operator
from tests.test_lipschitz import _inside, small_networks, steepest

EPS = 0.3


def converged(model, x, eps=EPS, method="product"):
    return local(model, x, eps, method, "estimate", norms(model, x.shape[1:], "estimate", 300), 300)


@pytest.mark.parametrize("method", ["liplt", "product"])
@pytest.mark.parametrize("name", list(small_networks()))
def test_no_slope_within_the_ball_exceeds_the_bound(name, method):
    """sampled slopes <= local LipLT <= local product <= global product"""
    model, shape = small_networks()[name]
    x = torch.randn(6, *shape)
    bound, estimate = local_lipschitz(model, x, EPS, 2, method), converged(model, x, EPS, method).pairwise()
    assert (bound <= local_lipschitz(model, x, EPS, 2, "product")).all()
    assert (bound <= lipschitz(model, shape, method="product") * (1 + 1e-12)).all()
    if method == "product":  # LipLT begins at the input in an estimate, after the last convolution in a bound
        assert (estimate <= bound * (1 + 1e-5) + 1e-12).all()
    assert torch.equal(bound, bound.mT)
    model = model.double()
    for _ in range(20):
        inside = x.double() + _inside(x.double(), 0.9 * EPS)
        found = steepest(model, inside, 0.1 * EPS)
        assert (found <= bound + 1e-12).all()
        assert (found <= estimate.double() * 1.001 + 1e-6).all()


@pytest.mark.parametrize("method", ["liplt", "product"])
@pytest.mark.parametrize("kind", ["bound", "estimate"])
@pytest.mark.parametrize("name", [n for n in small_networks() if n != "no last layer"])
def test_no_point_of_the_ball_has_a_smaller_margin(name, kind, method):
    model, shape = small_networks()[name]
    x, label = torch.randn(4, *shape), torch.tensor([0, 1, 2, 0])
    margin = (local(model, x, EPS, method) if kind == "bound" else converged(model, x, EPS, method)).margin(label).double()
    assert not margin.gather(1, label[:, None]).any()
    slack = 0.0 if kind == "bound" else 1e-4
    model, x = model.double(), x.double()
    for j in range(3):
        z = x + _inside(x, EPS)
        for _ in range(30):  # downhill, on the sphere
            z = z.detach().requires_grad_()
            reached = model(z)
            difference = reached.gather(1, label[:, None])[:, 0] - reached[:, j]
            assert (difference >= margin[:, j] - slack).all()
            (slope,) = torch.autograd.grad(difference.sum(), z)
            step = (z - x).flatten(1) - 0.3 * EPS * nn.functional.normalize(slope.flatten(1))
            z = x + (EPS * (1 - 1e-9) * nn.functional.normalize(step)).reshape(z.shape)


@pytest.mark.parametrize("activation", ["relu", "clipped_relu"])
def test_drops_the_rows_and_columns_of_constant_units(activation):
    """Against the singular values of the masked matrices, the masks taken from the boxes."""
    torch.manual_seed(0)
    model = models.mlp((6, 20, 20, 3), activation).double()
    if activation == "clipped_relu":
        for layer in (model[2], model[4]):
            layer.threshold.data.fill_(0.3)
    x = 2 * torch.randn(5, 6, dtype=torch.float64)
    found = local(model, x, 0.2)
    ceiling = math.inf if activation == "relu" else 0.3
    masks = [((upper > 0) & (lower < ceiling)).double() for lower, upper in found.layers.values()]
    assert all(0.1 < mask.mean() < 0.9 for mask in masks)
    first, second = model[1].weight, model[3].weight
    for b in range(5):
        want = torch.linalg.matrix_norm(masks[0][b][:, None] * first, 2)
        want = want * torch.linalg.matrix_norm(masks[1][b][:, None] * second * masks[0][b], 2)
        assert want * (1 - 1e-12) <= found.lipschitz[b] <= want * 1.001
        torch.testing.assert_close(converged(model, x, 0.2).lipschitz[b], want, rtol=1e-5, atol=1e-12)
        rows = (model[5].weight * masks[1][b]).detach()
        torch.testing.assert_close(found.pairwise()[b], found.lipschitz[b] * torch.cdist(rows, rows), rtol=1e-9, atol=1e-12)


def test_masks_a_convolution_in_the_estimate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU(), nn.Conv2d(3, 2, 4, 2, 1), nn.ReLU(), nn.Flatten()).double()
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    found = converged(model, x, 0.1)
    masks = [(upper > 0).double() for _, upper in found.layers.values()]
    matrix = lambda module, shape: torch.autograd.functional.jacobian(module, torch.zeros(1, *shape, dtype=torch.float64))
    first = matrix(model[0], (2, 6, 6)).reshape(108, 72)
    second = matrix(model[2], (3, 6, 6)).reshape(18, 108)
    for b in range(3):
        into, out = masks[0][b].flatten(), masks[1][b].flatten()
        want = torch.linalg.matrix_norm(into[:, None] * first, 2)
        want = want * torch.linalg.matrix_norm(out[:, None] * second * into, 2)
        torch.testing.assert_close(found.lipschitz[b], want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["bound", "estimate"])
def test_boxes_hold_the_hidden_values_and_are_never_wider_than_interval_propagation(kind):
    torch.manual_seed(0)
    model = small_networks()["residual"][0]
    x = torch.randn(4, 2, 8, 8)
    found = local(model, x, EPS) if kind == "bound" else converged(model, x)
    boxes, slack = interval(model, x, EPS, p=2, kind=kind).layers, 0.0 if kind == "bound" else 1e-4
    assert list(found.layers) == list(boxes)
    for name, (lower, upper) in boxes.items():
        assert (found.layers[name][0] >= lower - 1e-5).all()
        assert (found.layers[name][1] <= upper + 1e-5).all()
    seen = {}
    for name in boxes:
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0]))
    model, x = model.double(), x.double()
    for _ in range(50):
        model(x + _inside(x, EPS))
        for name, value in seen.items():
            lower, upper = found.layers[name]
            assert ((lower.double() - slack <= value) & (value <= upper.double() + slack)).all()


@pytest.mark.parametrize("kind", ["bound", "estimate"])
def test_the_translation_is_never_looser_than_ball_or_box_alone(kind):
    torch.manual_seed(0)
    model = models.mlp((6, 20, 20, 4), "clipped_relu").double()
    x, label = torch.randn(5, 6, dtype=torch.float64), torch.arange(5) % 4
    found = local(model, x, 0.5) if kind == "bound" else converged(model, x, 0.5)
    logits = model(x)
    difference = logits.gather(1, label[:, None]) - logits
    last = model[5].weight
    ball = difference - 0.5 * found.lipschitz[:, None] * torch.cdist(last, last)[label]
    low, high = (model[4](t) - model[4](model[:4](x)) for t in list(found.layers.values())[-1])
    rows = last - last[label][:, None]
    box = difference - torch.maximum(rows * low[:, None], rows * high[:, None]).sum(-1)
    margin = found.margin(label)
    assert (margin >= ball - 1e-9).all()
    assert (margin >= box - 1e-9).all()
    assert (margin > torch.maximum(ball, box) + 1e-3).any()


@pytest.mark.parametrize("kind", ["bound", "estimate"])
def test_the_global_method_knows_no_masks(kind):
    torch.manual_seed(0)
    model, x = models.mlp((6, 20, 20, 3), "clipped_relu"), torch.randn(5, 6)
    start = norms(model, (6,), kind, 300) if kind == "estimate" else norms(model, (6,))
    found = local(model, x, 0.2, "global", kind, start)
    want = lipschitz(model, (6,), method="product", kind=kind, norms=start)
    torch.testing.assert_close(found.pairwise(), want.expand(5, 3, 3))
    assert (
        found.margin(torch.zeros(5, dtype=torch.long))
        <= local(model, x, 0.2, "product", kind, start, 300).margin(torch.zeros(5, dtype=torch.long)) + 1e-5
    ).all()


@pytest.mark.parametrize("kind", ["bound", "estimate"])
def test_liplt_of_a_network_with_one_hidden_layer_is_the_formula(kind):
    torch.manual_seed(0)
    model, x = models.mlp((6, 20, 3), "clipped_relu").double(), torch.randn(4, 6, dtype=torch.float64)
    model[2].threshold.data.fill_(0.5)
    got = (local(model, x, 0.2, "liplt") if kind == "bound" else converged(model, x, 0.2, "liplt")).pairwise()
    lower, upper = local(model, x, 0.2).layers["2"]
    linear, unstable = (lower >= 0) & (upper <= 0.5), ~((upper <= 0) | (lower >= 0.5))
    unstable = unstable & ~linear
    first, last = model[1].weight.detach(), model[3].weight.detach()
    assert linear.any()
    assert unstable.any()
    for b in range(4):
        c, r = linear[b] + unstable[b] / 2, unstable[b] / 2
        m = torch.linalg.matrix_norm(unstable[b][:, None] * first, 2)
        want = torch.cdist(last @ (c[:, None] * first), last @ (c[:, None] * first)) + m * torch.cdist(last * r, last * r)
        varying = unstable[b] | linear[b]
        product = torch.linalg.matrix_norm(varying[:, None] * first, 2) * torch.cdist(last * varying, last * varying)
        torch.testing.assert_close(got[b], torch.minimum(want, product), rtol=1.1e-3, atol=1e-9)
        assert (want < 0.9 * product).any()


def test_liplt_sees_through_the_last_linear_layers_of_a_convolutional_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), *models.mlp((36, 30, 30, 3))).double()
    x = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    assert (local(model, x, 0.1, "liplt").pairwise()[:, 0, 1] < 0.8 * local(model, x, 0.1).pairwise()[:, 0, 1]).all()


def _dead_units() -> tuple[nn.Module, torch.Tensor]:
    """Two convolutions of whose units most are constant, one with a scaling beside it that is merged into its weight."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8).eval()
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    convolutions = [nn.Conv2d(2, 8, 3, 1, 1), norm, nn.ReLU(), nn.Conv2d(8, 8, 4, 2, 1), nn.ReLU()]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(200, 3))
    with torch.no_grad():
        model[0].bias.uniform_(-2.0, 0.5)
        model[3].bias.uniform_(-1.0, 0.2)
    return model, torch.randn(4, 2, 10, 10)


@pytest.mark.parametrize("method", ["product", "liplt"])
def test_a_failure_probability_masks_convolutions(method):
    """sampled slopes <= with masks, by a margin less than without"""
    model, x = _dead_units()
    proven, found = (local(model, x, 0.1, method, failure_probability=p) for p in (0.0, 1e-6))
    assert (found.lipschitz < 0.9 * proven.lipschitz).all()
    assert (found.pairwise() <= proven.pairwise()).all()
    assert (found.margin(torch.arange(4) % 3) >= proven.margin(torch.arange(4) % 3)).all()
    exact, wide = model.double(), x.double()
    for _ in range(10):
        inside = wide + _inside(wide, 0.09)
        assert (steepest(exact, inside, 0.01) <= found.pairwise() + 1e-12).all()


def test_masked_convolutions_have_the_norm_of_their_matrices():
    model, x = _dead_units()
    model, x = model.double(), x.double()
    found = local(model, x, 0.1, failure_probability=1e-6)
    masks = [(upper > 0).double().flatten(1) for _, upper in found.layers.values()]
    matrix = lambda module, shape: torch.autograd.functional.jacobian(module, torch.zeros(1, *shape, dtype=torch.float64))
    first = matrix(model[:2], (2, 10, 10)).reshape(800, 200)
    second = matrix(model[3], (8, 10, 10)).reshape(200, 800)
    for b in range(4):
        want = torch.linalg.matrix_norm(masks[0][b][:, None] * first, 2)
        want = want * torch.linalg.matrix_norm(masks[1][b][:, None] * second * masks[0][b], 2)
        assert want <= found.lipschitz[b] <= want * 1.05


class _ReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 3, 1, 1), nn.Linear(32, 3)

    def forward(self, x):
        hidden = self.inner(torch.relu(self.first(x)))
        return self.last((torch.relu(hidden) + hidden).flatten(1))


def test_convolutions_share_the_failure_probability_and_draw_once(monkeypatch):
    shares = []
    confidence = Operator.confidence
    record = lambda self, i, o, p, bound: shares.append((self.name, p)) or confidence(self, i, o, p, bound)
    monkeypatch.setattr(Operator, "confidence", record)
    model, x = _dead_units()
    local(model, x, 0.1, failure_probability=1e-6)
    assert shares == [("0", 5e-7), ("3", 5e-7)]
    shares.clear()
    model, shape = small_networks()["residual"]
    local(model, torch.randn(2, *shape), 0.1, failure_probability=1e-6)
    names = [name for name, _ in shares]
    assert len(names) == len(set(names)) > 1
    assert sum(p for _, p in shares) <= 1e-6 * (1 + 1e-12)
    shares.clear()
    local(_ReadTwice(), torch.randn(2, 1, 4, 4), 0.1, failure_probability=1e-6)
    assert shares == [("first", 5e-7), ("inner", 5e-7)]  # the sum of its two readers takes the bound over all inputs
    shares.clear()
    local(model, torch.randn(2, *shape), 0.1)
    local(model, torch.randn(2, *shape), 0.1, "global", failure_probability=1e-6)
    assert not shares


@pytest.mark.parametrize("name", [n for n, (_, shape) in small_networks().items() if len(shape) == 3])
def test_a_failure_probability_is_never_looser(name):
    model, shape = small_networks()[name]
    x = torch.randn(4, *shape)
    proven, found = (local(model, x, EPS, failure_probability=p).pairwise() for p in (0.0, 1e-6))
    assert (found <= proven).all()
    exact, wide = model.double(), x.double()
    for _ in range(5):
        inside = wide + _inside(wide, 0.9 * EPS)
        assert (steepest(exact, inside, 0.1 * EPS) <= found + 1e-12).all()


def test_a_convolution_over_a_line_is_masked_too():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 6, 3, 1, 1), nn.ReLU(), nn.Conv1d(6, 6, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)
    )
    with torch.no_grad():
        model[0].bias.fill_(-0.8)
    x = torch.randn(3, 2, 12)
    proven, found = (local(model, x, 0.05, failure_probability=p).lipschitz for p in (0.0, 1e-6))
    assert (found < 0.95 * proven).all()


def test_constant_networks_have_constant_zero():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    found = local(model, torch.rand(2, 3), 0.1)
    assert not found.lipschitz.any()
    assert not found.pairwise().any()
    want = (model[2].bias[0] - model[2].bias[1]).detach().double()
    torch.testing.assert_close(found.margin(torch.tensor([0, 1]))[0, 1], want)


def test_gradients_reach_weights_thresholds_and_eps_free_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, 1, 1), lipfast.nn.ClippedReLU(0.5, (4, 6, 6), learnable=True), nn.Flatten(), nn.Linear(144, 3)
    ).double()
    x, label = torch.rand(4, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    start = norms(model, (1, 6, 6), "estimate", 100)

    def value():
        return local(model, x, EPS, kind="estimate", norms=norms(model, (1, 6, 6), "estimate", 0, start.vectors), iterations=60)

    loss = lambda: (value().margin(label) ** 2).sum() + value().pairwise().sum()
    grads = torch.autograd.grad(loss(), list(model.parameters()))
    for p, g in zip(model.parameters(), grads, strict=True):
        flat, at = p.data.view(-1), g.abs().argmax().item()
        before = flat[at].item()
        ends = []
        for step in (1e-6, -1e-6):
            flat[at] = before + step
            ends.append(loss().item())
        flat[at] = before
        assert g.view(-1)[at].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=2e-3)


def test_boxes_without_gradient_change_no_value_and_no_gradient_of_the_constants():
    torch.manual_seed(0)
    model, x, label = small_networks()["clipped"][0], torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    start = norms(model, (5,), "estimate", 30)
    full, lean = (local(model, x, EPS, "product", "estimate", start, 10, box, box) for box in (True, False))
    assert not lean.layers
    assert torch.equal(full.margin(label), lean.margin(label))
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    slopes = lambda value: torch.autograd.grad(value.sum(), weights, retain_graph=True)
    for a, b in zip(slopes(full.pairwise()), slopes(lean.pairwise()), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(slopes(full.margin(label))[0], slopes(lean.margin(label))[0])


def test_rounding_costs_a_bound_next_to_nothing():
    """In a float32 network whose boxes, one-point ones too, grow a hundredfold from layer to layer."""
    torch.manual_seed(0)
    model, x, label = models.mlp((200, 300, 300, 300, 3)), torch.rand(4, 200), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        for at in (1, 3, 5):
            model[at].weight.mul_(10)
    found = local(model, x, 1e-12)
    logits = model.double()(x.double())
    torch.testing.assert_close(found.margin(label), logits.gather(1, label[:, None]) - logits, rtol=1e-6, atol=1e-6)


def test_a_bound_has_no_gradient():
    model = models.mlp((6, 8, 3))
    found = local(model, torch.rand(2, 6), EPS)
    assert not found.lipschitz.requires_grad
    assert not found.margin(torch.tensor([0, 1])).requires_grad


@pytest.mark.parametrize("kind", ["bound", "estimate"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_weight_never_gives_a_margin(broken, kind):
    for at in (1, 3, 5):
        model = models.mlp((6, 8, 8, 3))
        with torch.no_grad():
            model[at].weight[0, 0] = broken
        start = norms(model, (6,), kind) if kind == "bound" else norms(model, (6,), kind, 3)
        label = torch.tensor([0, 1])
        margin = local(model, torch.rand(2, 6), EPS, kind=kind, norms=start).margin(label)
        assert not ((margin > 0) & margin.isfinite()).scatter(1, label[:, None], True).all(1).any()


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e300])
def test_a_broken_convolution_gives_no_margin_whatever_the_failure_probability(broken):
    for at in (0, 3):
        model, x = _dead_units()
        model, x = model.double(), x.double()
        with torch.no_grad():
            model[at].weight[0, 0, 1, 1] = broken
        label = torch.arange(4) % 3
        margin = local(model, x, 0.1, failure_probability=1e-6).margin(label)
        assert not ((margin > 0) & margin.isfinite()).scatter(1, label[:, None], True).all(1).any()


def test_names_what_is_wrong():
    model, x = models.mlp((6, 8, 3)), torch.rand(2, 6)
    for chance in (-1e-9, 1.0, math.nan):
        with pytest.raises(ValueError, match="failure_probability: from 0 to below 1 expected, got"):
            local(model, x, 0.1, failure_probability=chance)
    with pytest.raises(ValueError, match="failure_probability: 0 for an estimate expected, got 1e-09"):
        local(model, x, 0.1, kind="estimate", failure_probability=1e-9)
    for eps in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="eps: positive and finite expected, got"):
            local(model, x, eps)
    with pytest.raises(ValueError, match="eps: positive and finite expected"):
        local(model, x, torch.tensor([0.1, 0.0]))
    with pytest.raises(ValueError, match=r"eps: a number or one per sample expected, got \(3,\)"):
        local(model, x, torch.ones(3))
    with pytest.raises(ValueError, match="x: finite values expected"):
        local(model, torch.full((2, 6), math.nan), 0.1)
    with pytest.raises(ValueError, match="p: 2 expected, got inf"):
        local_lipschitz(model, x, 0.1, p=math.inf)
    with pytest.raises(ValueError, match="norms: of kind 'bound' expected, got 'estimate'"):
        local(model, x, 0.1, norms=norms(model, (6,), "estimate"))
    with pytest.raises(ValueError, match="label: 2 int64 class indices expected"):
        local(model, x, 0.1).margin(torch.tensor([0]))
    with pytest.raises(ValueError, match="model: local margins need a Linear layer as the last"):
        local(nn.Sequential(*model, nn.ReLU()), x, 0.1).margin(torch.tensor([0, 1]))
