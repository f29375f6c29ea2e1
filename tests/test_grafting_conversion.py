import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lipfast import models
from lipfast.bounds import interval
from lipfast.grafting import graft, score, select, ungraft
from lipfast.nn import GraftedReLU
from tests.checks import assert_near
from tests.test_grafting_scores import IMAGES, Forward, small

SHAPE = (3, 8, 8)


def network(activation: str = "relu") -> nn.Module:
    return models.resnet2b(SHAPE, activation=activation)


def masked(model: nn.Module) -> dict[str, torch.Tensor]:
    shapes = {name: m.mask.shape for name, m in network("grafted_relu").named_modules() if isinstance(m, GraftedReLU)}
    return {name: torch.rand(shape) < 0.3 for name, shape in shapes.items()}


@pytest.mark.parametrize("activation", ["relu", "grafted_relu"])
def test_grafts_the_units_that_were_chosen(activation, device):
    model = network(activation).to(device).double().eval()
    masks, seen = masked(model), {}
    assert graft(model, masks, 0.7, -0.1, input_shape=SHAPE) is model
    for name in masks:
        layer = model.get_submodule(name)
        assert isinstance(layer, GraftedReLU)
        assert not layer.training
        layer.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, (args[0], out)))
    model(torch.rand(5, *SHAPE, dtype=torch.float64, device=device))
    assert seen.keys() == masks.keys()
    for name, (x, out) in seen.items():
        assert out.dtype == torch.float64
        assert_near(out, torch.where(masks[name].to(device), 0.7 * x - 0.1, x.relu()), torch.float64)


def test_fills_what_is_there_so_that_an_optimiser_keeps_its_parameters():
    model = network("grafted_relu")
    before = dict(model.named_parameters())
    graft(model, masked(model), 0.3, 0.2)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert (model[1].slope == 0.3).all()
    assert (model[1].intercept == 0.2).all()


def test_a_round_trip_gives_the_same_network():
    model = network().double()
    x, want = torch.rand(3, *SHAPE, dtype=torch.float64), copy.deepcopy(model)
    back = ungraft(graft(model, masked(model), input_shape=SHAPE))
    assert str(back) == str(want)
    assert torch.equal(back(x), want(x))
    assert back.state_dict().keys() == want.state_dict().keys()
    assert not torch.equal(graft(back, masked(back), input_shape=SHAPE)(x), want(x))


def test_replaces_a_module_under_each_of_its_names():
    model = Forward(lambda m, x: m.body(x))
    model.body = nn.Sequential(model.linear, model.relu)
    graft(model, {"relu": torch.tensor([True, True])}, -1.0, input_shape=(2,))
    assert torch.equal(model(IMAGES), -model.linear(IMAGES))
    assert torch.equal(ungraft(model)(IMAGES), model.linear(IMAGES).relu())


def test_chords_of_one_image_widen_no_box_behind_them():
    torch.manual_seed(1)
    model, x = network().double(), torch.rand(1, *SHAPE, dtype=torch.float64)
    scores = score(model, x, 0.02, progress=False)
    before = interval(model, x, 0.02, kind="estimate", pixel_range=(0.0, 1.0))
    masks = select(model, scores, 0.3)
    assert sum(mask.sum() for mask in masks.values()) > 100
    graft(model, masks, scores.chord_slope, scores.chord_intercept, SHAPE)
    after = interval(model, x, 0.02, kind="estimate", pixel_range=(0.0, 1.0))
    for (low, high), (lower, upper) in zip(before.layers.values(), after.layers.values(), strict=True):
        slack = 1e-12 * (high - low)
        assert ((low <= lower + slack) & (upper <= high + slack)).all()
    ungraft(model)  # against lines that hold for no unit in particular
    shifted = {name: t + 0.5 for name, t in scores.chord_intercept.items()}
    after = interval(graft(model, masks, scores.chord_slope, shifted, SHAPE), x, 0.02, kind="estimate", pixel_range=(0.0, 1.0))
    assert not ((before.lower <= after.lower) & (after.upper <= before.upper)).all()


def mask(*units: bool) -> torch.Tensor:
    return torch.tensor(units)


GOOD = {"1": mask(True, False)}


@pytest.mark.parametrize(
    ("model", "masks", "options", "message"),
    [
        (small(), {**GOOD, "2": mask(True, False)}, {}, "masks must name activations of the model, 1, 3, got '2'"),
        (small(), {**GOOD, "3": mask(True)}, {}, r"mask of '3' must be bool \(2,\), got torch.bool \(1,\)"),
        (small(), {**GOOD, "3": torch.ones(2)}, {}, r"mask of '3' must be bool \(2,\), got torch.float32 \(2,\)"),
        (small(), GOOD, {"input_shape": None}, "input_shape must be given for layer '1'"),
        (small(), GOOD, {"slope": {"3": torch.ones(2)}}, r"slope of '1' must be a tensor of shape \(2,\), got none"),
        (small(), GOOD, {"intercept": {"1": torch.ones(1)}}, r"intercept of '1' must be a tensor of shape \(2,\), got \(1,\)"),
        (graft(small(), GOOD, input_shape=(2,)), {"3": mask(True, True), **GOOD}, {}, "layer '1' is grafted already"),
        (
            small(lambda: GraftedReLU((2,))),
            {"2": mask(True, True)},
            {"input_shape": None},
            "input_shape must be given for layer",
        ),
        (nn.Sequential(nn.Linear(2, 2), nn.Tanh()), GOOD, {}, "no layer to graft; supported are nn.ReLU"),
        (
            Forward(lambda m, x: m.act(m.relu(x) + m.relu(-x))),
            {"act": mask(True, True)},
            {},
            "layer 'relu': a ReLU that is used at",
        ),
        (Forward(lambda m, x: m.act(F.relu(x))), {"act": mask(True, True)}, {}, "layer 'relu': a ReLU function in forward"),
        (nn.ReLU(), {"0": mask(True, True)}, {}, "no layer to graft in a bare ReLU"),
    ],
)
def test_refuses_before_it_changes_anything(model, masks, options, message):
    before, state = str(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        graft(model, masks, **{"input_shape": (2,)} | options)
    assert str(model) == before
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())


def test_a_bare_layer_cannot_be_ungrafted():
    with pytest.raises(ValueError, match="ungraft: model must be a network"):
        ungraft(GraftedReLU((2,)))
