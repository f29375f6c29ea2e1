import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipfast.nn
from lipfast import beta_abs, l2_pool, spatial_shift
from lipfast.bounds import lipschitz, local_lipschitz, read
from lipfast.bounds.interval import interval
from lipfast.bounds.layers import Conv, Elementwise, L2Pool, Linear, Rearrange, Scale, Sum


def kinds(network):
    return [type(n.layer).__name__ for n in network.nodes]


def test_reads_a_sequential_with_names_and_shapes():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    network = read(model, (1, 8, 8))
    assert kinds(network) == ["Input", "Conv", "Elementwise", "Rearrange", "Linear"]
    assert [n.shape for n in network.nodes] == [(1, 8, 8), (4, 3, 3), (4, 3, 3), (36,), (5,)]
    assert [n.name for n in network.nodes[1:]] == ["0", "1", "2", "3"]
    assert network.nodes[1].layer.weight is model[0].weight


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x):
        x = (x.view(x.size(0), -1) - self.shift) / 2
        y = F.relu(self.first(x)) * self.scale
        y = torch.tanh(x + self.second(y))
        return self.head(1 - y).reshape(-1, 3)


def test_reads_functions_constants_and_residual_sums():
    network = read(Residual(), (2, 3))
    assert kinds(network) == [
        "Input", "Rearrange", "Scale", "Scale", "Linear", "Elementwise", "Scale", "Linear", "Sum", "Elementwise", "Scale",
        "Linear", "Rearrange",
    ]  # fmt: skip
    add = next(n for n in network.nodes if isinstance(n.layer, Sum))
    assert [network.nodes[i].name for i in add.inputs] == ["truediv", "second"]


@pytest.mark.parametrize("model", [Residual(), nn.Sequential(nn.Flatten(), nn.Linear(6, 2, bias=False), nn.GELU())])
def test_a_box_of_no_width_is_the_forward_pass(model):
    x = torch.randn(4, 2, 3)
    boxes = interval(model, x, 0.0, kind="estimate")
    torch.testing.assert_close(boxes.lower, model(x))
    torch.testing.assert_close(boxes.upper, model(x))


def test_follows_the_parameters_and_the_modules():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3).eval())
    read(model, (3,))
    with torch.no_grad():
        model[0].weight.zero_()
    assert read(model, (3,)).nodes[1].layer.weight.count_nonzero() == 0
    model[1] = nn.Tanh()
    assert read(model, (3,)).nodes[2].layer.name == "tanh"
    model.train()
    with pytest.raises(ValueError, match=r"layer '2': batch norm has bounds in eval mode"):
        read(model, (3,))


def test_reads_a_bare_layer_and_a_parametrized_one():
    assert kinds(read(nn.Linear(3, 2), (3,))) == ["Input", "Linear"]
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))
    torch.testing.assert_close(read(nn.Sequential(layer), (3,)).nodes[1].layer.weight, layer.weight)


def test_a_padded_convolution_with_another_mode_is_two_maps():
    network = read(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")), (1, 4, 5))
    assert kinds(network) == ["Input", "Pad", "Conv"]
    assert network.nodes[1].shape == (1, 6, 7)
    assert network.nodes[2].layer.padding == (0, 0)


@pytest.mark.parametrize("length", [2, 5])
def test_batch_norm_scales_the_channels_of_lines_too(length):
    """Also where there are as many channels as places, and the wrong one would fit."""
    bn = nn.BatchNorm1d(2).eval()
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([100.0, 0.01])), bn.bias.copy_(torch.tensor([3.0, 4.0]))
    model = nn.Sequential(nn.Conv1d(1, 2, 1), bn, nn.Flatten())
    x = torch.randn(3, 1, length)
    box = interval(model, x, 1e-9)
    torch.testing.assert_close(box.lower, model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(box.upper, model(x), rtol=1e-4, atol=1e-4)
    head = nn.Sequential(*model, nn.Linear(2 * length, 2)).double()
    (J,) = torch.autograd.functional.jacobian(head, (torch.zeros(1, 1, length, dtype=torch.float64),))
    for p, dual in ((2, 2), (math.inf, 1)):
        true = torch.linalg.vector_norm((J[0, 0] - J[0, 1]).flatten(), ord=dual)
        assert all(lipschitz(head, (1, length), p=p, method=m)[0, 1] >= true * (1 - 1e-9) for m in ("liplt", "product"))


def test_normalisation_becomes_a_scale():
    network = read(nn.Sequential(lipfast.nn.Normalize([0.5], [0.2]), nn.Flatten()), (1, 2, 2))
    assert isinstance(network.nodes[1].layer, Scale)
    assert isinstance(network.nodes[2].layer, Rearrange)


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Squares(nn.Module):
    def forward(self, x):
        return x * x


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (4,), "layer '1': LayerNorm is not supported; supported are Linear"),
        (nn.Sequential(nn.ConvTranspose2d(1, 1, 2)), (1, 4, 4), "layer '0': ConvTranspose2d is not supported"),
        (nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)), (2, 4), "layer '1': LSTM, which returns several tensors, is not"),
        (nn.Sequential(nn.Dropout(0.5)), (4,), "layer '0': dropout has bounds in eval mode only"),
        (nn.Sequential(nn.LPPool2d(3, 2)), (1, 4, 4), "layer '0': L3 pooling"),
        (nn.Sequential(nn.Linear(4, 2)), (5,), "layer '0': does not accept samples of shape"),
        (Branches(), (4,), "forward cannot be traced"),
        (Squares(), (4,), "layer 'mul': a product"),
    ],
)
def test_names_the_layer_that_has_no_bound(model, shape, message, caplog):
    with pytest.raises(ValueError, match=message) as error:
        read(model, shape)
    assert "\n" not in str(error.value)
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR", "CRITICAL")]


def test_knows_every_slope():
    x = torch.linspace(-30, 30, 200001, dtype=torch.float64)
    models = [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-2, 3), nn.LeakyReLU(0.1), nn.LeakyReLU(-0.2), nn.ELU(1.5), nn.CELU(2.0)]
    models += [nn.SELU(), nn.Tanh(), nn.Sigmoid(), nn.Softsign(), nn.Softplus(2.0), nn.GELU(), nn.GELU("tanh"), nn.SiLU()]
    for model in models:
        layer = read(nn.Sequential(model), (3,)).nodes[1].layer
        assert isinstance(layer, Elementwise)
        y = layer.function(x)
        torch.testing.assert_close(y, model(x))
        slopes = y.diff() / x.diff()
        least, greatest = layer.slopes
        assert least <= slopes.min() + 1e-6, model
        assert slopes.max() <= greatest + 1e-6, model
        assert slopes.min() <= least + 0.02, model  # the range is not generous
        assert slopes.max() >= greatest - 0.02, model
        assert (slopes.min() < -1e-9) == (layer.least is not None), model


def test_functions_read_like_their_modules():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 1, 3, 3)), nn.Parameter(torch.randn(4))
            self.head = nn.Parameter(torch.randn(2, 16))

        def forward(self, x):
            x = F.max_pool2d(F.leaky_relu(F.conv2d(x, self.weight, self.bias, padding=1), 0.2), 2)
            x = F.avg_pool2d(abs(-x), 2)
            return F.linear(torch.flatten(x, 1), self.head)

    network = read(Functional(), (1, 8, 8))
    assert kinds(network)[1:] == [
        "Conv",
        "Elementwise",
        "MaxPool",
        "Scale",
        "Elementwise",
        "AveragePool",
        "Rearrange",
        "Linear",
    ]
    assert isinstance(network.nodes[1].layer, Conv)
    assert isinstance(network.nodes[-1].layer, Linear)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(interval(Functional := Functional(), x, 0.0, kind="estimate").lower, Functional(x))


class Shifted(nn.Module):
    """LipNeXt's pointwise maps between convolutions, those that pad among them."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.wide = nn.Conv2d(2, 6, 2), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.activation, self.head = lipfast.nn.BetaAbs(0.5), nn.Linear(6, 3)
        self.p = nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = self.activation(self.mix(spatial_shift(self.stem(x) + self.p, ratio=1 / 6)))
        return self.head(l2_pool(beta_abs(self.wide(spatial_shift(x, 1 / 6)), beta=0.9)))


def test_reads_shifts_partial_absolute_values_and_pooling_over_all_pixels():
    model = Shifted()
    network = read(model, (2, 4, 5))
    assert kinds(network)[1:4] == ["Conv", "Scale", "Rearrange"]
    shifts = [n for n in network.nodes if n.name.startswith("spatial_shift")]
    indices = torch.arange(72).reshape(1, 6, 3, 4)
    assert all(torch.equal(n.layer.function(indices), spatial_shift(indices.double(), 1 / 6).long()) for n in shifts)
    assert len(shifts) == 2
    pool = next(n for n in network.nodes if isinstance(n.layer, L2Pool))
    assert (pool.layer.terms, pool.layer.disjoint, pool.shape) == (12, True, (6, 1, 1))
    assert network.nodes[-2].shape == (6,)
    first, second = (n for n in network.nodes if isinstance(n.layer, Elementwise))
    assert (first.name, second.name) == ("activation", "beta_abs")
    assert next(n for n in read(model, (2, 9, 5)).nodes if isinstance(n.layer, L2Pool)).layer.terms == 32


def test_a_partial_absolute_value_knows_its_slopes():
    layer = read(lipfast.nn.BetaAbs(0.5), (5, 3)).nodes[1].layer
    lower, upper = torch.tensor([-2.0, -1.0, 1.0]).repeat(2, 5, 1), torch.tensor([-1.0, 1.0, 2.0]).repeat(2, 5, 1)
    least, greatest = layer.slopes_on(lower, upper)
    assert least[0].tolist() == [[-1, -1, 1]] * 2 + [[1, 1, 1]] * 3
    assert greatest[0].tolist() == [[-1, 1, 1]] * 2 + [[1, 1, 1]] * 3
    assert layer.slopes == (-1, 1)
    assert layer.constant_on(lower, upper) is None
    box = interval(nn.Sequential(lipfast.nn.BetaAbs(0.5)), torch.tensor([[-1.5, 0.1, -1.5, 0.1]]), 0.5)
    assert box.lower[0].tolist() == pytest.approx([1, 0, -2, -0.4], abs=1e-6)
    assert box.upper[0].tolist() == pytest.approx([2, 0.6, -1, 0.6], abs=1e-6)


class Folded(nn.Module):
    """beta-Abs with bias and position, as its arguments or as sums around it."""

    def __init__(self, composed: bool):
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(2, 6, 2), nn.Linear(72, 5), nn.Linear(5, 3)
        column = (6, 1, 1) if composed else (6,)
        self.b, self.p, self.c = (nn.Parameter(torch.randn(s)) for s in (column, (3, 4), (5,)))
        self.composed = composed

    def forward(self, x):
        if self.composed:
            x = beta_abs(self.stem(x) + self.b, 0.4) + self.p
            return self.head(beta_abs(self.mix(x.flatten(1)) + self.c))
        x = beta_abs(self.stem(x), 0.4, self.b, position=self.p)
        return self.head(beta_abs(self.mix(x.flatten(1)), bias=self.c))


def test_bias_and_position_of_a_call_are_sums_around_it():
    torch.manual_seed(0)
    one, composed = Folded(False).double(), Folded(True).double()
    composed.load_state_dict({k: v.reshape(composed.get_parameter(k).shape) for k, v in one.state_dict().items()})
    assert kinds(read(one, (2, 4, 5)))[1:5] == ["Conv", "Scale", "PartialAbs", "Scale"]
    assert kinds(read(one, (2, 4, 5))) == kinds(read(composed, (2, 4, 5)))
    x = torch.randn(20, 2, 4, 5, dtype=torch.float64)
    got, want = interval(one, x, 0.1), interval(composed, x, 0.1)
    torch.testing.assert_close((got.lower, got.upper), (want.lower, want.upper))
    torch.testing.assert_close(lipschitz(one, (2, 4, 5)), lipschitz(composed, (2, 4, 5)))
    torch.testing.assert_close(local_lipschitz(one, x, 1e-3), local_lipschitz(composed, x, 1e-3))
    y = one(x + 0.1 * (2 * torch.rand_like(x) - 1))
    assert ((got.lower <= y) & (y <= got.upper)).all()


def test_a_bias_or_position_computed_inside_forward_is_refused():
    class Computed(nn.Module):
        def __init__(self, **functions):
            super().__init__()
            self.b, self.p, self.functions = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3, 3)), functions

        def forward(self, x):
            given = {"bias": self.b, "position": self.p}
            return beta_abs(x, 0.5, **{name: function(given[name]) for name, function in self.functions.items()})

    for functions in ({"bias": lambda b: 2 * b}, {"position": lambda p: -p}):
        with pytest.raises(ValueError, match="layer 'beta_abs': beta_abs with a bias or position that is computed"):
            read(Computed(**functions), (4, 3, 3))


@pytest.mark.parametrize("p", [2, math.inf])
def test_no_bound_of_shifts_and_partial_absolute_values_is_beaten(p):
    model, dual = Shifted().double(), {2: 2, math.inf: 1}[p]
    x = torch.randn(30, 2, 4, 5, dtype=torch.float64)
    J = torch.func.vmap(torch.func.jacrev(lambda v: model(v[None])[0]))(x).flatten(2)  # (B, K, n)
    true = torch.linalg.vector_norm(J[:, :, None] - J[:, None], ord=dual, dim=3)
    for method in ("product", "liplt"):
        found = lipschitz(model, (2, 4, 5), p=p, method=method)
        assert (true <= found * (1 + 1e-12)).all()
        assert (found < 1000 * true.amax(0) + 1e-12).all()  # finite, and no accident
        if p == 2:
            local = local_lipschitz(model, x, 1e-3, method=method)
            assert (true <= local * (1 + 1e-12)).all()
            assert (local <= found * (1 + 1e-9)).all()
    eps = 0.3
    box = interval(model, x, eps, p=p)
    for _ in range(200):
        step = torch.randn_like(x)
        step = eps * (step.sign() if p == math.inf else step / step.flatten(1).norm(dim=1)[:, None, None, None])
        y = model(x + step * torch.rand(30, 1, 1, 1, dtype=x.dtype))
        assert (box.lower <= y).all()
        assert (y <= box.upper).all()


def test_a_call_with_a_beta_or_ratio_that_does_not_fit_is_named():
    class Wrong(nn.Module):
        def forward(self, x):
            return spatial_shift(beta_abs(x))

    with pytest.raises(ValueError, match="spatial_shift: ratio must make a whole number of the 12 channels"):
        read(Wrong(), (12, 3, 3))
