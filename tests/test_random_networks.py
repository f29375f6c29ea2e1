"""Every bound on networks that nobody designed: random graphs of the layers that bounds know, values read by several others."""

import math
import random

import pytest
import torch
from torch import nn

import lipfast.nn
from lipfast.bounds import liplt, lipschitz


class RandomNetwork(nn.Module):
    """Steps (module or function, the values it reads); activations are nearly linear, so that bounds can be nearly attained."""

    def __init__(self, seed: int):
        super().__init__()
        self.random = random.Random(seed)
        self.shape = self.random.choice([(2, 6, 5), (1, 4, 4), (2, 5), (6,), (3, 8)])
        self.steps: list[tuple[str, int, int | float]] = []
        self.layers = nn.ModuleDict()
        values = [torch.zeros(1, *self.shape)]
        for _ in range(self.random.randint(3, 12)):
            self.extend(values)
        if values[-1].ndim > 2:
            self.append(values, nn.Flatten(), len(values) - 1)
        if self.random.random() < 0.8 or not 2 <= values[-1].shape[1] <= 8:
            self.append(values, nn.Linear(values[-1].shape[1], 3), len(values) - 1)
        self.double().eval()

    def extend(self, values: list[torch.Tensor]) -> None:
        at = self.random.randrange(max(0, len(values) - 4), len(values))
        x, draw = values[at], self.random.random()
        others = [i for i, v in enumerate(values) if v.shape == x.shape and i != at]
        if draw < 0.25 and others:
            self.append(values, self.random.choice(["add", "sub"]), at, self.random.choice(others))
        elif draw < 0.3:
            self.append(values, "scale", at, self.random.choice([0.5, -2.0, 3.0]))
        else:
            layer = self.activation(x.shape[1]) if draw < 0.5 else self.linear(tuple(x.shape[1:]))
            try:
                fits = 0 < layer.eval()(x).numel() <= 600
            except (RuntimeError, ValueError):  # a kernel larger than the image
                fits = False
            if fits:
                self.append(values, layer, at)

    def append(self, values: list[torch.Tensor], what: nn.Module | str, at: int, other: float = 0) -> None:
        name = what if isinstance(what, str) else f"layer{len(values)}"
        if isinstance(what, nn.Module):
            self.layers[name] = what
        self.steps.append((name, at, other))
        values.append(self.step(values, *self.steps[-1]))

    def step(self, values, name, at, other):
        if name == "add":
            return values[at] + values[other]
        if name == "sub":
            return values[at] - values[other]
        return values[at] * other if name == "scale" else self.layers[name](values[at])

    def forward(self, x):
        values = [x]
        for name, at, other in self.steps:
            values.append(self.step(values, name, at, other))
        return values[-1]

    def activation(self, channels: int) -> nn.Module:
        kinds = [nn.LeakyReLU(0.99), nn.LeakyReLU(0.9), nn.ReLU(), nn.Tanh(), nn.GELU(), nn.Identity()]
        return self.random.choice([*kinds, lipfast.nn.MaxMin()] if channels % 2 == 0 else kinds)

    def linear(self, shape: tuple[int, ...]) -> nn.Module:
        draw, out = self.random.randint, self.random.choice([2, 4])
        if len(shape) == 3:
            mode = self.random.choice(["zeros", "zeros", "zeros", "circular", "reflect"])
            conv = nn.Conv2d(shape[0], out, draw(1, 3), draw(1, 2), draw(0, 2), draw(1, 2), padding_mode=mode)
            rest = [
                nn.AvgPool2d(2, draw(1, 2)),
                nn.MaxPool2d(2),
                nn.AdaptiveAvgPool2d(1),
                nn.ZeroPad2d((1, 0, 0, 1)),
                nn.Flatten(),
            ]
            return self.random.choice([conv] * 5 + [nn.BatchNorm2d(shape[0]), *rest])
        if len(shape) == 2:
            conv1d = nn.Conv1d(shape[0], out, draw(1, 3), draw(1, 2), draw(0, 1))
            rest = [
                nn.Flatten(),
                nn.AvgPool1d(2),
                nn.BatchNorm1d(shape[0]),
                nn.Linear(shape[1], self.random.choice([2, shape[1]])),
            ]
            return self.random.choice([conv1d, conv1d, *rest])
        layers = [nn.Linear(shape[0], self.random.choice([4, 6, shape[0]])), nn.BatchNorm1d(shape[0])]
        return self.random.choice(layers + [nn.Unflatten(1, (2, shape[0] // 2, 1))] * (shape[0] % 2 == 0))


@pytest.mark.parametrize("seed", range(40))
def test_no_gradient_exceeds_a_bound(seed):
    torch.manual_seed(seed)
    model = RandomNetwork(seed)
    x = 10.0 ** (seed % 3 - 1) * torch.randn(12, *model.shape, dtype=torch.float64)
    gradients = torch.autograd.functional.jacobian(lambda v: model(v).sum(0), x).flatten(2).transpose(0, 1)  # (B, K, I)
    apart = gradients[:, :, None] - gradients[:, None]
    euclidean, absolute = apart.norm(dim=-1).amax(0), apart.abs().sum(-1).amax(0)
    product, tori = (lipschitz(model, model.shape, method=method) for method in ("product", "liplt"))
    images = lipschitz(model, model.shape, explicit=1000)
    for bound in (product, tori, images, lipschitz(model, model.shape, explicit=30)):
        assert (euclidean <= bound * (1 + 1e-12) + 1e-12).all()
    assert (images <= tori * (1 + 1e-12)).all()
    assert (tori <= product).all()
    boxes, sums = (lipschitz(model, model.shape, p=math.inf, method=method) for method in ("product", "liplt"))
    assert (absolute <= sums * (1 + 1e-12) + 1e-12).all()
    assert (sums <= boxes).all()
    if not any(isinstance(layer, lipfast.nn.MaxMin) for layer in model.layers.values()):
        estimate = liplt(model, model.shape, 100).pairwise.detach()
        assert (estimate <= tori * (1 + 1e-6) + 1e-12).all()
