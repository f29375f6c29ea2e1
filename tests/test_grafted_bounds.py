"""Every analysis on networks with grafted units: what each bounds, and that a line costs it nothing."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from lipfast import certify, grafted_relu, models
from lipfast.bounds import interval, interval_margin, liplt, lipschitz, local, local_lipschitz
from lipfast.bounds._interval_rules import image
from lipfast.bounds.layers import Grafted
from lipfast.nn import GraftedReLU
from tests.networks import jacobian


def grafted(model: nn.Module, share: float = 0.4, slopes: tuple[float, float] = (-0.5, 1.5)) -> nn.Module:
    """Random units grafted, with lines of any slope."""
    for module in model.modules():
        if isinstance(module, GraftedReLU):
            module.mask.bernoulli_(share)
            module.slope.data.uniform_(*slopes)
            module.intercept.data.uniform_(-0.2, 0.2)
    return model.eval()


def chain() -> nn.Sequential:
    return models.mlp((6, 9, 8, 5, 3), activation="grafted_relu")


def images() -> nn.Sequential:
    conv = lambda i, o, stride: nn.Conv2d(i, o, 3, stride, 1)
    hidden = [conv(2, 4, 1), GraftedReLU((4, 6, 5)), conv(4, 4, 2), GraftedReLU((4, 3, 3)), nn.Flatten()]
    return nn.Sequential(*hidden, nn.Linear(36, 7), GraftedReLU((7,)), nn.Linear(7, 3))


NETWORKS = {"chain": (chain, (6,)), "images": (images, (2, 6, 5))}
EVERY = pytest.mark.parametrize("name", NETWORKS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@EVERY
def test_boxes_contain_what_the_network_computes(name, dtype):
    build, shape = NETWORKS[name]
    model = grafted(build()).to(dtype)
    x = torch.rand(4, *shape, dtype=dtype)
    boxes, exact = interval(model, x, 0.05), grafted(build()).double()
    exact.load_state_dict({key: t.double() if t.is_floating_point() else t for key, t in model.state_dict().items()})
    for _ in range(200):
        y = exact(x.double() + 0.05 * (2 * torch.rand(4, *shape, dtype=torch.float64) - 1).sign())
        assert (boxes.lower.double() <= y).all()
        assert (y <= boxes.upper.double()).all()


def test_a_line_is_bounded_exactly_and_rounded_outwards():
    layer = Grafted(
        *(torch.tensor(t)[None] for t in ([True, True, False, False], [1 / 3, -0.7, 5.0, 5.0], [0.1, 1e-8, 9.0, 9.0]))
    )
    lower, upper = torch.tensor([[0.1, -0.3, -1.0, 0.5]]), torch.tensor([[0.7, 0.9, -0.5, 0.75]])
    low, high = image(layer, (lower, upper), kind="bound")
    for i in range(2):
        ends = [
            Fraction(layer.slope[0, i].item()) * Fraction(t[0, i].item()) + Fraction(layer.intercept[0, i].item())
            for t in (lower, upper)
        ]
        assert Fraction(low[0, i].item()) <= min(ends)
        assert max(ends) <= Fraction(high[0, i].item())
        assert high[0, i] - low[0, i] <= float(max(ends) - min(ends)) * (1 + 1e-5)
    assert low[0, 2:].tolist() == [0, 0.5]
    assert high[0, 2:].tolist() == [0, 0.75]


@EVERY
def test_constants_are_above_every_gradient(name):
    build, shape = NETWORKS[name]
    for seed in range(5):
        torch.manual_seed(seed)
        model = grafted(build()).double()
        x = 3 * torch.randn(60, *shape, dtype=torch.float64)
        gradient = torch.autograd.functional.jacobian(lambda v, model=model: model(v).sum(0), x).flatten(2).transpose(0, 1)
        apart = gradient[:, :, None] - gradient[:, None]
        for p, sizes in ((2, apart.norm(dim=-1)), (math.inf, apart.abs().sum(-1))):
            product, sums = (lipschitz(model, shape, p, method) for method in ("product", "liplt"))
            assert (sizes.amax(0) <= sums * (1 + 1e-12)).all()
            assert (sums <= product).all()
        assert (apart.norm(dim=-1).amax(0) <= lipschitz(model, shape, explicit=1000) * (1 + 1e-12)).all()
        around = local_lipschitz(model, x, 1e-6)
        assert (apart.norm(dim=-1) <= around * (1 + 1e-12)).all()


@EVERY
def test_all_units_grafted_leave_an_affine_network(name):
    """W ... A W A W, A the diagonal of the slopes, is what the analyses read that know units one by one."""
    build, shape = NETWORKS[name]
    for slopes in ((0.4, 0.4), (0.1, 0.9)):
        model = grafted(build(), 1.0, slopes).double()
        matrix = jacobian(model, shape)
        rows = matrix[:, None] - matrix
        exact, sums = rows.norm(dim=-1), rows.abs().sum(-1)
        assert torch.allclose(liplt(model, shape, 200).pairwise.detach(), exact)
        assert torch.allclose(lipschitz(model, shape, explicit=1000), exact, rtol=1e-9)
        assert torch.allclose(
            local(model, torch.rand(2, *shape).double(), 0.1, "liplt", "estimate", iterations=200).pairwise(), exact
        )
        assert (lipschitz(model, shape) >= exact * (1 - 1e-12)).all()
        if name == "chain":
            assert torch.allclose(lipschitz(model, shape, math.inf), sums)


def test_grafting_with_slopes_up_to_1_never_raises_a_constant():
    """A set of slopes within [0, 1] in place of [0, 1]."""
    for seed in range(10):
        torch.manual_seed(seed)
        model = grafted(chain(), 0.0, (0.0, 1.0)).double()
        before = lipschitz(model, (6,), explicit=1000), lipschitz(model, (6,), math.inf)
        grafted(model, 0.5, (0.0, 1.0))
        after = lipschitz(model, (6,), explicit=1000), lipschitz(model, (6,), math.inf)
        for old, new in zip(before, after, strict=True):
            assert (new <= old * (1 + 1e-9)).all()


def test_a_slope_of_0_is_constant_and_drops_out():
    model = grafted(chain(), 1.0, (0.0, 0.0))
    assert (local_lipschitz(model, torch.rand(3, 6), 0.1) <= 1e-12).all()
    assert (lipschitz(model, (6,)) <= 1e-12).all()


@EVERY
def test_estimates_in_float32_are_near_the_bounds_and_differentiable(name):
    build, shape = NETWORKS[name]
    model = grafted(build(), slopes=(0.1, 0.9))
    for method in ("product", "liplt"):
        found = lipschitz(model, shape, math.inf, method, "estimate")
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.detach().double(), lipschitz(model, shape, math.inf, method), rtol=1e-5, atol=1e-6)
        model.zero_grad()
        found.sum().backward()
        assert all(m.weight.grad.isfinite().all() for m in model.modules() if hasattr(m, "weight"))


def test_certifies_and_nan_slopes_certify_nothing():
    model = grafted(chain(), 0.5, (0.2, 0.8))
    x, label = torch.rand(20, 6), torch.zeros(20, dtype=torch.long)
    for method in ("interval", "product", "liplt"):
        assert (certify(model, (x, label), 1e-4, method=method, progress=False).radius > 0).any()
    model[2].mask[0], model[2].slope.data[0] = True, math.nan
    for method in ("interval", "product", "liplt"):
        assert (certify(model, (x, label), 1e-4, method=method, progress=False).radius == 0).all()


def test_bounds_are_differentiable_in_slope_and_intercept():
    model = grafted(chain(), 0.5, (0.2, 0.8))
    x, label = torch.rand(4, 6), torch.zeros(4, dtype=torch.long)
    interval_margin(model, x, label, 0.1, kind="estimate").sum().backward()
    for module in model.modules():
        if isinstance(module, GraftedReLU):
            assert (module.slope.grad[module.mask] != 0).any()
            assert (module.slope.grad[~module.mask] == 0).all()
            assert (module.intercept.grad[~module.mask] == 0).all()


def test_reads_the_function_too():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)
            self.mask = nn.Buffer(torch.tensor([True, False, True, False]))
            self.line = nn.Parameter(torch.tensor([0.3, 0.3, 0.6, 0.6]))

        def forward(self, x):
            return grafted_relu(self.linear(x), self.mask, self.line, self.line)

    model, x = Plain(), torch.rand(3, 6)
    boxes = interval(model, x, 0.0, kind="estimate")
    torch.testing.assert_close(boxes.lower, model(x))

    class Computed(Plain):
        def forward(self, x):
            return grafted_relu(self.linear(x), self.mask, 2 * self.line, self.line)

    with pytest.raises(ValueError, match="grafted_relu with a mask, slope or intercept that is computed"):
        interval(Computed(), x, 0.1)
