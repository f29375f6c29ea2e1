"""The proof of LipLT against explicit matrices, on the tori that it uses and on the images themselves."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import lipfast.nn
from lipfast import models
from lipfast.bounds import _torus, lipschitz
from lipfast.bounds._liplt_bound import liplt_bound, split
from lipfast.bounds.layers import AveragePool, Conv, Elementwise, Linear, MaxMin, Pad, Rearrange, Scale, Sum
from lipfast.bounds.network import read


def with_head(*layers, shape=(2, 7, 6)):
    body = nn.Sequential(*layers, nn.Flatten()).eval()
    return nn.Sequential(*body, nn.Linear(body(torch.zeros(1, *shape)).numel(), 6), nn.ReLU(), nn.Linear(6, 3)), shape


class Residual(nn.Module):
    """A strided branch beside a 1 x 1 shortcut, or one with the same shape beside nothing."""

    def __init__(self, stride=1):
        super().__init__()
        self.first = nn.Conv2d(3, 4 if stride > 1 else 3, 3, stride, 1)
        self.act, self.after = nn.ReLU(), nn.LeakyReLU(0.1)
        self.second = nn.Conv2d(self.first.out_channels, self.first.out_channels, 3, 1, 1)
        self.shortcut = nn.Conv2d(3, 4, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return self.after(self.second(self.act(self.first(x))) - self.shortcut(x))


def network_cases():
    torch.manual_seed(0)
    image = (2, 7, 6)
    conv = lambda *a, **k: nn.Conv2d(*a, **k)
    bn = nn.BatchNorm2d(3).eval()
    nn.init.normal_(bn.weight), nn.init.uniform_(bn.running_var, 0.5, 2), nn.init.normal_(bn.bias)
    start = conv(2, 3, 3, 1, 1), nn.ReLU()
    around = lambda *a: nn.Conv2d(*a, padding_mode="circular")
    pair = lipfast.nn.MaxMin
    return {
        "dense": (nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)), (5,)),
        "dense max_min": (models.mlp((5, 8, 6, 3), "max_min")[1:], (5,)),
        "dense residual": (DenseResidual(), (5,)),
        "image to vector": (models.mlp((12, 7, 3)), (1, 3, 4)),
        "same size": with_head(*start, conv(3, 4, 3, 1, 1), nn.ReLU()),
        "strided": with_head(*start, conv(3, 4, 4, 2, 1), nn.ReLU(), conv(4, 2, 3, 1, 1), nn.ReLU()),
        "stride that does not divide": with_head(*start, conv(3, 4, 3, 3, 2), nn.ELU()),
        "unpadded": with_head(conv(2, 3, 3), nn.ReLU(), conv(3, 4, 2, 2), nn.Sigmoid()),
        "dilated, grouped": with_head(conv(2, 4, 3, 1, 2, 2), nn.GELU(), conv(4, 4, 3, 1, 1, groups=2), nn.ReLU()),
        "uneven": with_head(*start, conv(3, 2, (1, 3), (1, 2), (0, 1)), nn.ReLU()),
        "residual": with_head(*start, Residual()),
        "strided residual": with_head(*start, Residual(2)),
        "max_min": with_head(conv(2, 4, 3, 1, 1), pair(), conv(4, 4, 3, 2, 1), pair()),
        "batch norm": with_head(conv(2, 3, 3, 1, 1), bn, nn.ReLU()),
        "average pool": with_head(*start, nn.AvgPool2d(3, 2, 1), nn.ReLU(), conv(3, 3, 3, 1, 1), nn.ReLU()),
        "global pool": (nn.Sequential(*start, conv(3, 3, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), image),
        "padding apart": with_head(nn.ZeroPad2d((1, 2, 0, 1)), *start, nn.ZeroPad2d((0, 1, 2, 0)), conv(3, 2, 3), nn.ReLU()),
        "line": with_head(nn.Conv1d(2, 3, 3, 1, 1), nn.ReLU(), nn.Conv1d(3, 2, 4, 2, 1), nn.ReLU(), shape=(2, 8)),
        "circular": with_head(around(2, 3, 3, 1, 1), nn.LeakyReLU(0.5), around(3, 3, 4, 2, 1), nn.ReLU(), shape=(2, 8, 6)),
        "circular max_min": with_head(around(2, 4, 3, 1, 1), pair(), shape=(2, 4, 6)),
        "relu of a vector": (nn.Sequential(conv(2, 3, 3, 1, 1), nn.Flatten(), nn.ReLU(), nn.Linear(126, 3)), image),
    }


class DenseResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(x + torch.tanh(self.inner(x)))


CASES = network_cases()


class TwoReaders(nn.Module):
    """Two Linear layers read one image and their values are added."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.other = nn.Conv2d(2, 3, 3, 1, 1), nn.Linear(48, 5), nn.Linear(48, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.relu(self.first(x)).flatten(1)
        return self.last(torch.relu(self.one(x) + self.other(x)))


class Extended:
    """A network on its tori, written with index arithmetic: its own function, and the linear maps between its activations."""

    def __init__(self, network, on_torus=True):
        self.network, self.plan = network, _torus.plan(network)
        self.on_torus = on_torus
        assert self.plan.cuts == {0}

    def size(self, position):
        place = self.plan.places[position]
        return place.shape[1:] if place.torus is None or not self.on_torus else place.N

    def linear(self, position, inputs):  # (B, C, N, N) or (B, n)
        node, layer = self.network.nodes[position], self.network.nodes[position].layer
        before = self.plan.places[node.inputs[0]]
        v = inputs[0]
        if isinstance(layer, Linear):
            if before.torus is not None:
                v = v[:, :, : before.shape[1], : before.shape[2]].flatten(1)[:, before.order]
            return v @ layer.weight.double().T
        if isinstance(layer, Sum):
            return layer.signs[0] * inputs[0] + layer.signs[1] * inputs[1]
        if isinstance(layer, Scale):
            return v if layer.factor is None else v * layer.factor.double().reshape(1, -1, *[1] * (v.ndim - 2))
        if isinstance(layer, Rearrange):
            return v
        if isinstance(layer, Pad):
            return v.roll((layer.amounts[2], layer.amounts[0]), (2, 3))
        if isinstance(layer, Conv):
            two = lambda t: t if len(t) == 2 else (1, *t)
            weight = layer.weight.double()
            weight = weight if weight.ndim == 4 else weight.unsqueeze(-2)
            padding = layer.padding if len(layer.padding) == 2 else (0, *layer.padding)
            return self.conv(v, position, weight, self.plan.steps[position].stride, padding, two(layer.dilation), layer.groups)
        assert isinstance(layer, AveragePool)
        if layer.window is not None:
            kernel, stride, padding = layer.window[0], self.plan.steps[position].stride, layer.window[2]
        else:
            kernel, stride, padding = before.shape[1:], (1, 1), (0, 0)
        weight = torch.full((before.shape[0], 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64)
        return self.conv(v, position, weight, stride, padding, (1, 1), before.shape[0])

    def conv(self, v, position, weight, stride, padding, dilation, groups):
        N, out = v.shape[2:], self.size(position)
        total = 0
        for a in range(weight.shape[2]):
            for b in range(weight.shape[3]):
                rows = torch.arange(out[0]) * stride[0] + a * dilation[0] - padding[0]
                columns = torch.arange(out[1]) * stride[1] + b * dilation[1] - padding[1]
                part = v[:, :, rows % N[0]][..., columns % N[1]]
                if not self.on_torus:
                    inside = ((rows >= 0) & (rows < N[0]))[:, None] & ((columns >= 0) & (columns < N[1]))
                    part = part * inside
                total = total + nn.functional.conv2d(part, weight[:, :, a : a + 1, b : b + 1], groups=groups)
        return total

    def masked(self, position, value):
        place = self.plan.places[position]
        if place.torus is None:
            return value
        mask = torch.zeros(self.size(position), dtype=torch.float64)
        mask[: place.shape[1], : place.shape[2]] = 1
        return value * mask

    def __call__(self, x, offsets):
        values = []
        for position, node in enumerate(self.network.nodes):
            if position == 0:
                place = self.plan.places[0]
                value = x if place.torus is None else torch.zeros(len(x), place.shape[0], *self.size(0), dtype=torch.float64)
                if place.torus is not None:
                    value[:, :, : place.shape[1], : place.shape[2]] = x.reshape(len(x), *place.shape)
            elif isinstance(node.layer, (Elementwise, MaxMin)):
                value = values[node.inputs[0]]
                if isinstance(node.layer, MaxMin):
                    a, b = value.chunk(2, 1)
                    value = self.masked(position, torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1))
                else:
                    value = self.masked(position, node.layer.function(value))
            else:
                value = self.linear(position, [values[i] for i in node.inputs])
                bias = getattr(node.layer, "bias", None) if isinstance(node.layer, (Conv, Linear)) else offsets.get(position)
                if bias is not None:
                    value = value + bias.double().reshape(1, -1, *[1] * (value.ndim - 2))
            values.append(value)
        value, place = values[-1], self.plan.places[-1]
        return value if place.torus is None else value[:, :, : place.shape[1], : place.shape[2]].flatten(1)

    def constants(self):
        """The recursion with the norms of explicit matrices."""
        nonlinear = [0, *(i for i, n in enumerate(self.network.nodes) if isinstance(n.layer, (Elementwise, MaxMin)))]
        slope, reached = {0: 1.0}, {}
        for j in nonlinear:
            if j:
                target = self.network.nodes[j].inputs[0]
                slope[j] = sum(torch.linalg.matrix_norm(A[target], 2) * slope[i] for i, A in reached.items() if target in A)
                if any(isinstance(n.layer, MaxMin) for n in self.network.nodes):  # a chain: the product may be less
                    before = max(i for i in reached)
                    slope[j] = min(slope[j], torch.linalg.matrix_norm(self.push(before, 1.0)[target], 2) * slope[before])
            reached[j] = self.push(j)
        rows = {j: A[len(self.network.nodes) - 1] for j, A in reached.items() if len(self.network.nodes) - 1 in A}
        return sum((A[:, None] - A).norm(dim=-1) * slope[j] for j, A in rows.items())

    def push(self, source, turn=None):
        """The matrices of all linear maps that start at a nonlinearity, by the position they lead to."""
        place = self.plan.places[source]
        shape = (place.shape[0],) if place.torus is None else (place.shape[0], *self.size(source))
        basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
        values = {source: basis if source == 0 or turn else self.times(source, "turn", basis)}
        for position, node in enumerate(self.network.nodes[source + 1 :], source + 1):
            inputs = [values.get(i) for i in node.inputs]
            if all(v is None for v in inputs):
                continue
            if isinstance(node.layer, (Elementwise, MaxMin)):
                values[position] = self.times(position, "keep", inputs[0])
            elif isinstance(node.layer, Sum):
                zero = torch.zeros_like(next(v for v in inputs if v is not None))
                values[position] = self.linear(position, [zero if v is None else v for v in inputs])
            else:
                values[position] = self.linear(position, inputs)
        if self.plan.places[-1].torus is not None and len(self.network.nodes) - 1 in values:
            last = self.plan.places[-1]
            end = values[len(self.network.nodes) - 1]
            values[len(self.network.nodes) - 1] = end[:, :, : last.shape[1], : last.shape[2]]
        return {position: v.flatten(1).T for position, v in values.items()}

    def times(self, position, name, value):
        place = self.plan.places[position]
        place = place if self.on_torus else replace(place, torus=None)  # without masks to absorb
        factor = getattr(split(self.network.nodes[position].layer, place), name)
        return factor * value if isinstance(factor, float) else torch.einsum("ij,bj...->bi...", factor, value)


@pytest.mark.parametrize("name", CASES)
def test_the_network_on_tori_is_the_network(name):
    model, shape = CASES[name]
    model = model.double()
    x = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    network = read(model, shape)
    offsets = {
        i: n.layer.offset - n.layer.shift * n.layer.factor for i, n in enumerate(network.nodes) if isinstance(n.layer, Scale)
    }
    torch.testing.assert_close(Extended(network)(x, offsets), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_is_the_recursion_on_the_tori(name):
    model, shape = CASES[name]
    network = read(model, shape)
    got, want = liplt_bound(network), Extended(network).constants()
    assert (got >= want * (1 - 1e-12)).all()
    assert (got <= want * 1.005).all()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_explicit_products_give_the_recursion_on_images(name):
    model, shape = CASES[name]
    network = read(model, shape)
    wide = liplt_bound(network)
    got, half = (liplt_bound(network, explicit) for explicit in (1000, 50))
    assert (got <= wide * (1 + 1e-12)).all()
    assert (half <= wide * (1 + 1e-12)).all()
    if any(isinstance(n.layer, Pad) for n in network.nodes):
        return  # that is a turn of the torus here
    want = torch.minimum(wide, Extended(network, on_torus=False).constants())
    assert (got >= want * (1 - 1e-2)).all()  # each slope takes the smaller of two
    assert (got <= want * 1.005).all()


def test_a_padded_convolution_that_reads_no_zeros_is_cut():
    first, act = nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU()
    cuts = lambda *layers: _torus.plan(read(nn.Sequential(first, *layers), (2, 6, 6))).cuts
    assert cuts(nn.Conv2d(3, 3, 3, 1, 1)) == {0, 2}
    assert cuts(act, nn.Conv2d(3, 3, 3, 1, 1)) == {0}
    assert cuts(nn.Conv2d(3, 3, 3)) == cuts(nn.Conv2d(3, 3, 1, 2)) == {0}  # it stays within the image
    assert cuts(nn.ZeroPad2d(1), nn.Conv2d(3, 3, 3)) == {0, 2}
    assert cuts(nn.AvgPool2d(3, 2, 1)) == {0, 2}
    assert cuts(nn.AvgPool2d(3, 2)) == {0}
    assert cuts(act, nn.MaxPool2d(2), nn.Conv2d(3, 3, 3, 1, 1)) == {0, 3}


@pytest.mark.parametrize("act", [nn.ReLU(), nn.LeakyReLU(0.3), nn.GELU(), nn.Softsign(), lipfast.nn.MaxMin()], ids=repr)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_split_activation_is_the_masked_one_and_its_psi_contracts(act, mode):
    conv = lambda i, o: nn.Conv2d(i, o, 3, 1, 1, padding_mode=mode)
    network = read(nn.Sequential(conv(1, 4), act, conv(4, 2)), (1, 5, 5))
    position = 2 if mode == "zeros" else 3  # circular padding is a node of its own
    place = _torus.plan(network).places[position]
    assert place.full == (mode == "circular")
    parts = split(network.nodes[position].layer, place)
    generator = torch.Generator().manual_seed(0)
    for mask in (1.0,) if place.full else (1.0, 0.0):
        x, y = (scale * torch.randn(200, 4, 1, 1, dtype=torch.float64, generator=generator) for scale in (1.0, 0.5))
        change, apart = mask * (act(x) - act(y)).flatten(1), (x - y).flatten(1)
        if isinstance(parts.keep, float):
            psi = (change - parts.keep * apart) / parts.turn
            assert (psi.abs() <= apart.abs() * (1 + 1e-9)).all()
        else:
            rest = change - apart @ parts.keep.T
            psi = rest @ torch.linalg.pinv(parts.turn).T
            torch.testing.assert_close(psi @ parts.turn.T, rest, rtol=0, atol=1e-12)
            assert (psi.norm(dim=1) <= apart.norm(dim=1) * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", CASES)
def test_computes_where_the_model_is(name, device):
    model, shape = CASES[name]
    model = copy.deepcopy(model)
    calls = ({"p": 2}, {"p": 2, "explicit": 50}, {"p": math.inf})
    want = [lipschitz(model, shape, **call) for call in calls]
    for call, there in zip(calls, want, strict=True):
        here = lipschitz(model.to(device), shape, **call)
        assert here.device.type == device
        torch.testing.assert_close(here.cpu(), there, rtol=1e-6, atol=0)


@pytest.mark.parametrize("explicit", [0, 100])
@torch.no_grad()
def test_a_sum_of_two_layers_that_read_one_image_counts_both(explicit):
    model = TwoReaders().double()
    for zero, other in ((model.one, model.other), (model.other, model.one)):
        zero.weight.zero_()
        single = nn.Sequential(model.first, nn.ReLU(), nn.Flatten(), other, nn.ReLU(), model.last)
        bound = lipschitz(model, (2, 4, 4), explicit=explicit)
        assert (bound >= lipschitz(single, (2, 4, 4), explicit=1000) * (1 - 1e-9)).all()
        nn.init.normal_(zero.weight)
