import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import lipfast.nn
from lipfast.bounds import interval, interval_margin
from tests.networks import NAMES, images, third_party

INF = math.inf
EPS = 0.02


def layers():
    """One model for every rule, with the shape of a sample."""
    torch.manual_seed(0)
    grid = (4, 8, 6)
    bn = nn.BatchNorm2d(4).eval()
    nn.init.normal_(bn.weight), nn.init.normal_(bn.bias), nn.init.normal_(bn.running_mean)
    modules = {
        "linear": (nn.Linear(12, 7), (12,)),
        "conv1d": (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (4, 9)),
        "conv2d": (nn.Conv2d(4, 6, 3, 2, 1), grid),
        "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), grid),
        "same": (nn.Conv2d(4, 6, (2, 4), padding="same"), grid),
        "zero pad": (nn.ZeroPad2d((1, 2, 0, 1)), grid),
        "circular pad": (nn.CircularPad2d((1, 2, 0, 1)), grid),
        "reflection pad": (nn.ReflectionPad2d((1, 2, 0, 1)), grid),
        "normalize": (lipfast.nn.Normalize([0.1, -0.2, 0.3, 0.4], [0.2, 0.5, 1.0, 3.0]), grid),
        "batch norm": (bn, grid),
        "average": (nn.AvgPool2d(3, 2, 1), grid),
        "adaptive": (nn.AdaptiveAvgPool2d((1, 1)), grid),
        "max": (nn.MaxPool2d(3, 2, 1), grid),
        "l2": (nn.LPPool2d(2, 2), grid),
        "flatten": (nn.Flatten(), grid),
        "max_min": (lipfast.nn.MaxMin(), grid),
        "clipped": (lipfast.nn.ClippedReLU(0.7), grid),
        "leaky": (nn.LeakyReLU(0.1), grid),
        "tanh": (nn.Tanh(), grid),
        "softplus": (nn.Softplus(), grid),
        "gelu": (nn.GELU(), grid),
        "silu": (nn.SiLU(), grid),
    }
    return modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("name", list(layers()))
def test_every_layer_contains_its_values(name, eps, dtype):
    module, shape = layers()[name]
    model = nn.Sequential(module).to(dtype)
    x = torch.randn(3, *shape, dtype=dtype)
    boxes = interval(model, x, eps)
    exact = nn.Sequential(module).double()  # the same parameters, now in float64: exact next to the others
    for t in [torch.zeros(1), torch.ones(1), -torch.ones(1), *(torch.rand(3, *shape) * 2 - 1 for _ in range(20))]:
        y = exact(x.double() + eps * t.double())
        slack = 1e-13 * (1 + y.abs()) if dtype != torch.float64 else 1e-15 * y.abs()
        assert (boxes.lower.double() <= y + slack).all()
        assert (y - slack <= boxes.upper.double()).all()
    nn.Sequential(module).float()


@pytest.mark.parametrize("name", [n for n in layers() if n not in ("l2", "gelu", "silu", "max_min")])
def test_every_monotone_rule_is_tight(name):
    module, shape = layers()[name]
    model = nn.Sequential(module).double()
    x = torch.randn(1, *shape, dtype=torch.float64, requires_grad=True)
    boxes = interval(model, x.detach(), 0.1, kind="estimate")
    y = model(x).flatten()
    for k in range(0, y.numel(), 5):  # the corner that the gradient's signs point to attains the bound
        (direction,) = torch.autograd.grad(y[k], x, retain_graph=True)
        if name in ("max", "leaky", "clipped", "tanh", "softplus"):
            direction = torch.ones_like(x)
        corner = model(x + 0.1 * direction.sign()).flatten()[k]
        torch.testing.assert_close(corner, boxes.upper.flatten()[k])


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("kind", ["bound", "estimate"])
def test_the_first_layer_sees_the_ball_and_not_its_box(p, kind):
    torch.manual_seed(0)
    model = nn.Sequential(lipfast.nn.Normalize([0.5], [0.25]), nn.Flatten(), nn.Linear(16, 5)).double()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    boxes = interval(model, x, 0.3, p=p, kind=kind)
    norms = model[2].weight.abs().amax(1) if p == 1 else model[2].weight.norm(dim=1)
    torch.testing.assert_close(boxes.upper, model(x) + 0.3 * 4 * norms)
    torch.testing.assert_close(boxes.lower, model(x) - 0.3 * 4 * norms)


@pytest.mark.parametrize("p", [1, 2])
def test_a_scaled_ball_of_lines_reaches_a_linear_layer(p):
    """Each line has a scale of its own, so the layer sees the box around the ball."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(5, 4)).eval()
    model[0].running_var.uniform_(0.1, 4)
    x, eps = torch.randn(2, 3, 5), 0.3
    boxes, exact = interval(model, x, eps, p=p), model.double()
    for entry in range(15):
        d = torch.zeros(15, dtype=torch.float64)
        d[entry] = eps
        y = exact(x.double() + d.reshape(3, 5))
        assert (boxes.lower.double() <= y).all()
        assert (y <= boxes.upper.double()).all()


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "circular", "same", "average", "tanh", "linear"])
def test_contains_the_image_of_the_ball(name, p):
    module, shape = layers()[name]
    scale = lipfast.nn.Normalize([0.1, -0.2, 0.3, 0.4], [0.2, 0.5, 1.0, 3.0])
    model = nn.Sequential(scale, module) if len(shape) == 3 else nn.Sequential(module)
    x, eps = torch.randn(2, *shape), torch.tensor([0.1, 0.7])
    boxes = interval(model, x, eps, p=p)
    exact = model.double()
    per_sample = eps.reshape(-1, *[1] * len(shape)).double()
    for _ in range(50):
        d = torch.randn(2, *shape, dtype=torch.float64)
        d = d * (torch.rand_like(d) < torch.rand(1)).double() + 1e-9
        d = d / torch.linalg.vector_norm(d.flatten(1), ord=p, dim=1).reshape(-1, *[1] * len(shape))
        y = exact(x.double() + per_sample * d)
        assert (boxes.lower.double() <= y + 1e-12).all()
        assert (y - 1e-12 <= boxes.upper.double()).all()


@pytest.mark.parametrize("name", NAMES)
def test_equals_auto_lirpa(name):
    """Its interval bounds, kept with the version that gave them by tests/golden/auto_lirpa.py."""
    model, x = third_party(name), images(name, 2)
    golden = json.loads((Path(__file__).parent / "golden" / "auto_lirpa.json").read_text())[name]
    boxes = interval(model, x, EPS, kind="estimate")
    torch.testing.assert_close(boxes.lower, torch.tensor(golden["lower"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(boxes.upper, torch.tensor(golden["upper"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bounds_contain_the_float64_bounds_samples_and_attacks(name):
    from lipfast.attacks import pgd

    model, x = third_party(name), images(name, 1)
    label = model(x).argmax(1)
    boxes = interval(model, x, EPS)
    margin = interval_margin(model, x, label, EPS)
    wide = interval(model.double(), x.double(), EPS, kind="estimate")
    assert (boxes.lower.double() <= wide.lower).all()
    assert (wide.upper <= boxes.upper.double()).all()
    extra = (boxes.upper - boxes.lower).double().sum() / (wide.upper - wide.lower).sum() - 1
    assert 0 <= extra < 0.02

    attacked = pgd(model, x.double(), label, EPS, p=INF, steps=20, restarts=2, pixel_range=None)
    noise = torch.rand(5000, *x.shape[1:], dtype=torch.float64) * 2 - 1
    noise = torch.cat([noise, noise.sign()]) * EPS
    for i in range(len(x)):
        points = torch.cat([x[i] + noise, attacked[i : i + 1]])
        y = torch.cat([model(chunk) for chunk in points.split(1000)])
        assert (boxes.lower[i] <= y).all()
        assert (y <= boxes.upper[i]).all()
        assert (margin[i] <= y[:, label[i], None] - y).all()


@pytest.mark.parametrize("kind", ["bound", "estimate"])
def test_margins_are_never_looser_than_the_boxes(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 10))
    x, label = torch.randn(16, 8), torch.randint(0, 10, (16,))
    boxes = interval(model, x, 0.1, kind=kind)
    margin = interval_margin(model, x, label, 0.1, kind=kind)
    apart = boxes.lower.gather(1, label[:, None]) - boxes.upper
    other = torch.nn.functional.one_hot(label, 10) == 0
    assert (margin >= apart - 1e-5)[other].all()
    assert (margin > apart + 0.1)[other].any()
    assert (margin[~other] == 0).all()


def test_margins_of_an_affine_model_are_exact():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4)).double()
    x, label = torch.randn(5, 2, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    rows = model[1].weight[label][:, None] - model[1].weight
    z = model(x)
    want = z.gather(1, label[:, None]) - z - 0.2 * rows.abs().sum(-1)
    torch.testing.assert_close(interval_margin(model, x, label, 0.2, kind="estimate"), want)
    torch.testing.assert_close(interval_margin(model, x, label, 0.2), want)


@pytest.mark.parametrize("kind", ["bound", "estimate"])
@pytest.mark.parametrize("p", [1, 2])
def test_margins_of_an_affine_model_see_the_ball(p, kind):
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4))
    x, label = torch.randn(5, 2, 3), torch.tensor([0, 1, 2, 3, 0])
    rows = model[1].weight[label][:, None] - model[1].weight
    z = model(x)
    norms = rows.abs().amax(-1) if p == 1 else rows.norm(dim=-1)
    want = z.gather(1, label[:, None]) - z - 0.2 * norms
    torch.testing.assert_close(interval_margin(model, x, label, 0.2, p=p, kind=kind), want)


def test_margins_without_a_final_linear_layer_are_box_differences():
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    x, label = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    boxes = interval(model, x, 0.1, kind="estimate")
    margin = interval_margin(model, x, label, 0.1, kind="estimate")
    want = (boxes.lower.gather(1, label[:, None]) - boxes.upper).scatter(1, label[:, None], 0.0)
    torch.testing.assert_close(margin, want)


def test_a_thousand_classes_in_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 512), nn.ReLU(), nn.Linear(512, 1000)).double()
    x, label = torch.randn(100, 4, dtype=torch.float64), torch.randint(0, 1000, (100,))
    margin = interval_margin(model, x, label, 0.01, kind="estimate")
    torch.testing.assert_close(interval_margin(model, x[70:71], label[70:71], 0.01, kind="estimate"), margin[70:71])


def test_estimates_carry_gradients_to_parameters_and_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    margin = lambda x, w: torch.func.functional_call(Margin(model), {"model.0.weight": w}, (x, torch.tensor([0, 1])))
    torch.autograd.gradcheck(margin, (x, model[0].weight.detach().requires_grad_()))
    assert not interval(model, x, 0.1).lower.requires_grad


class Margin(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, label):
        return interval_margin(self.model, x, label, 0.05, kind="estimate")


def test_margins_reuse_memory_without_changing_a_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).double()
    x, label = torch.rand(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 4])
    margins = interval_margin(model, x, label, 0.05, kind="estimate")
    got = torch.autograd.grad(margins.sum(), list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(margins.sum(), list(model.parameters()), create_graph=True)
    torch.testing.assert_close(got, again)
    assert all(g.requires_grad for g in again[:3])
    low, high = (x - 0.05), (x + 0.05)
    for layer in list(model)[:4]:
        if isinstance(layer, nn.Conv2d):
            mid = nn.functional.conv2d((low + high) / 2, layer.weight, layer.bias)
            reach = nn.functional.conv2d((high - low) / 2, layer.weight.abs())
            low, high = mid - reach, mid + reach
        else:
            low, high = low.relu(), high.relu()
    center, radius = ((high + low) / 2).flatten(1), ((high - low) / 2).flatten(1)
    rows = model[5].weight[label][:, None] - model[5].weight
    shift = model[5].bias[label][:, None] - model[5].bias
    margin = (rows * center[:, None] - rows.abs() * radius[:, None]).sum(-1) + shift
    torch.testing.assert_close(got, torch.autograd.grad(margin.sum(), list(model.parameters())))


@pytest.mark.parametrize("kind", ["bound", "estimate"])
@pytest.mark.parametrize("model", [nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 4), nn.Tanh())], ids=["elided", "boxes"])
def test_boxes_give_the_same_margins(model, kind):
    x, label = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    torch.testing.assert_close(
        interval(model, x, 0.1, kind=kind).margin(label), interval_margin(model, x, label, 0.1, kind=kind), rtol=0, atol=0
    )


def test_memory_is_not_reused_while_a_view_of_it_is_alive():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x):
            y = self.conv(x)
            z = y.flatten(1)
            return z - y.relu().flatten(1)

    model, x, label = Both(), torch.randn(2, 1, 4, 4), torch.tensor([0, 1])
    want = interval(model, x, 0.0, kind="estimate").margin(label)
    torch.testing.assert_close(interval_margin(model, x, label, 0.0, kind="estimate"), want)
    logits = model(x)
    torch.testing.assert_close(want, logits.gather(1, label[:, None]) - logits)


def test_gradients_are_not_overwritten_where_two_branches_share_them():
    class TwoBranches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.c(torch.relu(self.a(x)) + torch.relu(self.b(x))).relu().flatten(1)

    model, x, label = TwoBranches().double(), torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    grads = lambda margin: torch.autograd.grad(margin.square().sum(), list(model.parameters()))
    got = grads(interval_margin(model, x, label, 0.1, kind="estimate"))
    torch.testing.assert_close(got, grads(interval(model, x, 0.1, kind="estimate").margin(label)))


def test_margins_of_convolutions_over_a_line_have_gradients():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Conv1d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    margin = interval_margin(model, torch.randn(2, 1, 8), torch.tensor([0, 1]), 0.1, kind="estimate")
    assert all(g.isfinite().all() for g in torch.autograd.grad(margin.sum(), list(model.parameters())))


def test_layers_are_kept_only_if_wanted():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
    lean, full = interval(model, x, 0.1, keep_layers=False), interval(model, x, 0.1)
    assert lean.layers == {}
    assert torch.equal(lean.lower, full.lower)
    assert torch.equal(lean.upper, full.upper)


def test_a_clipped_ball_is_no_looser_than_the_ball_or_the_box():
    model = nn.Sequential(lipfast.nn.Normalize([0.5], [0.5]), nn.Flatten(), nn.Linear(9, 4)).double()
    x = torch.rand(3, 1, 3, 3, dtype=torch.float64).round()
    clipped = interval(model, x, 0.4, p=2, pixel_range=(0, 1))
    ball, box = interval(model, x, 0.4, p=2), interval(model, x, 0.4, pixel_range=(0, 1))
    assert (clipped.upper <= torch.minimum(ball.upper, box.upper) + 1e-12).all()
    assert (clipped.upper < ball.upper - 1e-3).any()
    assert (clipped.upper < box.upper - 1e-3).any()
    for _ in range(100):
        d = torch.randn_like(x)
        point = (x + 0.4 * d / d.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)).clamp(0, 1)
        assert (model(point) <= clipped.upper + 1e-12).all()


def test_eps_per_sample_and_per_pixel():
    model, x = nn.Linear(3, 2), torch.randn(2, 3)
    both = interval(model, x, torch.tensor([0.1, 0.4]), kind="estimate")
    torch.testing.assert_close(both.lower[1:], interval(model, x[1:], 0.4, kind="estimate").lower)
    only_first = interval(model, x, torch.tensor([[0.1, 0.0, 0.0]]), kind="estimate")
    torch.testing.assert_close(only_first.upper - only_first.lower, 0.2 * model.weight[:, 0].abs().expand(2, 2))


def test_the_pixel_range_clips_the_first_box():
    model, x = nn.Identity(), torch.tensor([[0.05, 0.5, 1.0]])
    boxes = interval(nn.Sequential(model), x, 0.1, pixel_range=(0, 1))
    assert boxes.lower[0, 0] == 0
    assert boxes.upper[0, 2] == 1
    assert boxes.lower[0, 1] <= 0.4


def test_lists_the_boxes_before_each_activation():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
    boxes = interval(model, torch.randn(2, 3), 0.1)
    assert list(boxes.layers) == ["1", "3"]
    torch.testing.assert_close(boxes.layers["3"][0].tanh(), boxes.lower, atol=1e-4, rtol=1e-4)


def test_nothing_is_lost_of_nan_weights():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1, 1] = math.nan
    boxes = interval(model, torch.randn(2, 3), 0.1)
    assert boxes.lower.isnan().all()
    assert boxes.upper.isnan().all()
    assert not (interval_margin(model, torch.randn(2, 3), torch.tensor([0, 1]), 0.1)[:, 1:] > 0).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -0.1}, "eps: finite and not negative"),
        ({"eps": math.nan}, "eps: finite and not negative"),
        ({"eps": torch.tensor([0.1, -0.1])}, "eps: finite and not negative"),
        ({"p": 3}, "p: 1, 2 or inf"),
        ({"kind": "exact"}, "kind: 'bound' or 'estimate'"),
        ({"x": torch.tensor([[0.0, math.nan, 0.0]])}, "x: finite values expected"),
        ({"x": torch.zeros(1, 3, dtype=torch.int64)}, "x: floating-point"),
        ({"x": torch.zeros(1, 4)}, "layer '0': does not accept"),
        ({"x": torch.zeros(2, 3), "eps": torch.zeros(2, 3), "p": 2}, "eps: a number or one per sample"),
    ],
)
def test_names_the_wrong_argument(change, message):
    arguments = {"x": torch.zeros(1, 3), "eps": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        interval(nn.Sequential(nn.Linear(3, 2)), **arguments)
