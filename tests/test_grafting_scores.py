import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lipfast import models
from lipfast.bounds import crown, interval
from lipfast.data import Dataset
from lipfast.grafting import graft, score
from lipfast.nn import GraftedReLU
from tests.checks import assert_near

EPS = 0.25
IMAGES = torch.tensor([[0.5, 0.5], [1.0, 0.0]])


def small(make=nn.ReLU) -> nn.Sequential:
    """At the images of IMAGES with EPS, not clipped: before "1" [-1/2, 1/2] and [-1/4, 5/4], then [1/2, 3/2] and [1/4, 7/4];
    before "3" [-1, 3/4] and [-2, 5/4], then [-1/4, 9/4] and [-23/4, -1/4]."""
    weights = [[[1, -1], [2, 1]], [[1, 1], [-4, 1]], [[1, -2], [0, 3]]]
    biases = [[0, -1], [-1, 0], [0, 0]]
    layers = [nn.Linear(2, 2) for _ in weights]
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        layer.weight.data, layer.bias.data = torch.tensor(weight).float(), torch.tensor(bias).float()
    return nn.Sequential(layers[0], make(), layers[1], make(), layers[2])


def images_net() -> nn.Sequential:
    layers = [nn.Conv2d(2, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def scored(model, data, eps=EPS, **options):
    return score(model, data, eps, **{"progress": False, "pixel_range": None} | options)


def test_scores_of_a_network_done_by_hand(device):
    found = scored(small().to(device), IMAGES)
    want = {
        "interval": {"1": [1.0, 1.5], "3": [2.5, 3.25]},
        "count": {"1": [1, 1], "3": [2, 1]},
        "chord_slope": {"1": [1 / 2, 5 / 6], "3": [(3 / 7 + 9 / 10) / 2, 5 / 13]},
        "chord_intercept": {"1": [1 / 4, 5 / 24], "3": [(3 / 7 + 9 / 40) / 2, 10 / 13]},
        "grafted": {"1": [False, False], "3": [False, False]},
    }
    for field, layers in want.items():
        assert list(getattr(found, field)) == list(layers)
        for name, values in layers.items():
            torch.testing.assert_close(getattr(found, field)[name].cpu().double(), torch.tensor(values).double())
    assert (found.images, found.input_shape) == (2, (2,))
    assert found.unstable_ratio() == found.unstable_ratio("plain") == 5 / 8


@pytest.mark.parametrize(("measure", "want"), [("error", [1 / 4, 5 / 24]), ("upper", [1 / 2, 5 / 4])])
def test_measures_the_gap_of_the_relaxation_and_the_width_of_the_image(measure, want):
    torch.testing.assert_close(scored(small(), IMAGES, measure=measure).interval["1"], torch.tensor(want))


def test_the_chord_of_a_unit_that_is_never_unstable_is_relu_itself():
    found = scored(small(), torch.tensor([[3.0, 0.0], [-3.0, 0.0], [4.0, 0.0], [5.0, 0.0]]))
    assert found.count["1"].tolist() == [0, 0]
    assert found.chord_slope["1"].tolist() == [0.75, 0.75]
    assert not any(found.chord_intercept["1"])


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_streaming_gives_the_statistics_of_all_boxes_at_once(batch_size):
    model = images_net().eval()
    nn.init.uniform_(model[1].running_mean, -0.5, 0.5)
    x = torch.rand(20, 2, 5, 5, dtype=torch.float64)
    found = score(model, x, 0.1, batch_size=batch_size, progress=False)
    boxes = interval(model, x, 0.1, kind="estimate", pixel_range=(0.0, 1.0)).layers
    assert 0.1 < found.unstable_ratio() < 0.9
    for name, (lower, upper) in boxes.items():
        unstable = (lower < 0) & (upper > 0)
        mean = lambda t, on=unstable: torch.where(on, t, 0.0).sum(0) / on.sum(0)
        assert torch.equal(found.count[name], unstable.sum(0))
        assert_near(found.interval[name], ((upper - lower) * unstable).amax(0), torch.float64)
        ever, slope = unstable.any(0), upper / (upper - lower)
        assert_near(found.chord_slope[name][ever], mean(slope)[ever], torch.float64)
        assert_near(found.chord_intercept[name][ever], mean(-slope * lower)[ever], torch.float64)


def test_crown_finds_fewer_unstable_units_and_narrower_boxes():
    model, x = models.mlp((20, 30, 30, 3)).double(), torch.rand(5, 20, dtype=torch.float64)
    loose, tight = (score(model, x, 0.1, bounds, progress=False) for bounds in ("interval", "crown"))
    for name, (lower, upper) in crown(model, x, 0.1, pixel_range=(0.0, 1.0)).layers.items():
        unstable = (lower < 0) & (upper > 0)
        assert torch.equal(tight.count[name], unstable.sum(0))
        assert torch.equal(tight.interval[name], ((upper - lower) * unstable).amax(0))
    assert tight.unstable_ratio() < 0.9 * loose.unstable_ratio()
    assert tight.interval["4"].sum() < 0.9 * loose.interval["4"].sum()


def test_takes_data_in_every_form_and_no_more_than_asked_for():
    pixels, labels = torch.randint(0, 256, (30, 2, 5, 5), dtype=torch.uint8), torch.arange(30) % 3
    x = pixels.double() / 255

    def stream():
        yield x[:10], labels[:10]
        yield x[10:21], labels[10:21]
        raise AssertionError("nobody asked for this batch")

    model, halves = images_net(), [x[:15], x[15:]]
    pairs = list(zip(halves, labels.split(15), strict=True))
    want = score(model, x[:20], 0.05, progress=False).count
    for data in (Dataset(pixels, labels, "noise"), x, (pixels, labels), halves, pairs, stream()):
        found = score(model, data, 0.05, limit=20, progress=False)
        assert found.images == 20
        assert all(torch.equal(t, want[name]) for name, t in found.count.items())


def test_leaves_the_model_as_it_was_and_shows_a_bar(capfd):
    model = images_net()
    model[3].eval()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    scored(model, torch.rand(4, 2, 5, 5), batch_size=1, progress=True)
    assert "0/4" in capfd.readouterr().err
    assert model.training and not model[3].training  # noqa: PT018
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_grafted_units_are_never_unstable():
    plain, model = scored(small(), IMAGES), small(lambda: GraftedReLU((2,)))
    assert torch.equal(scored(model, IMAGES).interval["3"], plain.interval["3"])
    graft(model, {"1": torch.tensor([True, False])}, 5.0)
    found = scored(model, IMAGES)
    assert found.count["1"].tolist() == [0, 1]
    assert found.interval["1"].tolist() == [0.0, 1.5]
    assert (found.interval["3"] > plain.interval["3"]).any()
    assert found.grafted["1"].tolist() == [True, False]
    unstable = sum(int(t.sum()) for t in found.count.values())
    assert found.unstable_ratio("all") == unstable / 8
    assert found.unstable_ratio("plain") == unstable / 6


class Forward(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.linear, self.relu, self.act = nn.Linear(2, 2), nn.ReLU(), nn.ReLU()
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "no layer to graft; supported are nn.ReLU"),
        (Forward(lambda m, x: F.relu(m.linear(x))), "layer 'relu': a ReLU function in forward"),  # as m.relu is called
        (Forward(lambda m, x: m.act(m.linear(F.relu(x)))), "layer 'relu': a ReLU function in forward"),
        (Forward(lambda m, x: m.relu(m.linear(F.relu(x)))), "layer 'relu': a ReLU function in forward"),
        (Forward(lambda m, x: m.act(m.linear(m.act(x)))), "layer 'act': a ReLU that is used at several places"),
    ],
)
def test_names_what_cannot_be_grafted(model, message):
    with pytest.raises(ValueError, match=message):
        scored(model, IMAGES)


def broken(value):
    model = small()
    model[2].weight.data[0, 0] = value
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_names_the_layer_whose_boxes_are_not_finite(value):
    with pytest.raises(ValueError, match="boxes must be finite, got NaN or Inf before layer '3'"):
        scored(broken(value), IMAGES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": torch.zeros(0, 2)}, "data must have at least one image, got none"),
        ({"data": []}, "data must have at least one image, got none"),
        ({"data": 3}, "data must be a Dataset"),
        ({"data": ["image"]}, "data must give images"),
        ({"data": torch.zeros(2, 2, dtype=torch.int64)}, "images must be floating"),
        ({"data": 2 * IMAGES, "pixel_range": (0.0, 1.0)}, r"pixels must be within pixel_range \(0.0, 1.0\), got 0 to 2"),
        ({"pixel_range": (1.0, 0.0)}, "pixel_range must be"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"eps": math.nan}, "eps must be positive"),
        ({"bounds": "ibp"}, "bounds must be one of interval, crown"),
        ({"measure": "area"}, "measure must be one of width, error, upper"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"model": "mlp"}, "model must be an nn.Module"),
    ],
)
def test_names_the_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=f"score: {message}"):
        scored(**{"model": small(), "data": IMAGES} | arguments)
    with pytest.raises(ValueError, match="of must be 'all' or 'plain'"):
        scored(small(), IMAGES).unstable_ratio("grafted")
