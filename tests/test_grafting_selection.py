import functools
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import lipfast.nn
from lipfast import models
from lipfast.bounds import read
from lipfast.bounds.jacobian import jacobian as jacobian_bound
from lipfast.grafting import graft, outgoing, select
from lipfast.models import ResidualBlock
from tests.checks import assert_near
from tests.networks import jacobian
from tests.test_grafting_scores import IMAGES, scored, small

GRID = (4, 8, 6)
CHAINS = {  # affine layers between two activations, and the shape of a sample
    "linear": ([nn.Linear(5, 3)], (5,)),
    "two linear": ([nn.Linear(5, 3), nn.Linear(3, 4)], (5,)),
    "flatten": ([nn.Flatten(), nn.Linear(192, 3)], GRID),
    "strided": ([nn.Conv2d(4, 3, 3, 2, 1)], GRID),
    "unread rest": ([nn.Conv2d(4, 3, (2, 4), 3)], GRID),
    "dilated groups": ([nn.Conv2d(4, 6, 3, 1, 2, dilation=2, groups=2)], GRID),
    "line": ([nn.Conv1d(4, 3, 3, 2, 1)], (4, 9)),
    "same": ([nn.Conv2d(4, 3, (2, 4), padding="same", padding_mode="circular")], GRID),
    "normalised": ([nn.Conv2d(4, 3, 3), lipfast.nn.Normalize([1.0] * 3, [0.5, 2.0, 4.0]), nn.BatchNorm2d(3)], GRID),
    "pools": ([nn.AvgPool2d(3, 2, 1), nn.Conv2d(4, 3, 2), nn.ZeroPad2d((1, 0, 2, 0))], GRID),
}


@pytest.mark.parametrize("name", CHAINS)
def test_outgoing_weights_are_columns_of_the_absolute_matrices(name):
    layers, shape = CHAINS[name]
    model = nn.Sequential(nn.ReLU(), *layers, nn.ReLU()).eval()
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight)  # of either sign
    total, at = torch.eye(math.prod(shape)).double(), shape
    for layer in layers:
        total = jacobian(layer, at).abs() @ total
        at = layer(torch.zeros(1, *at).double()).shape[1:]
    model.float()
    found = outgoing(read(model, shape), "0")
    assert_near(found, total.sum(0).reshape(shape), torch.float64)
    rows = torch.rand(at) < 0.5
    some = outgoing(read(model, shape), "0", {str(len(layers) + 1): rows})
    assert_near(some, total[rows.flatten()].sum(0).reshape(shape), torch.float64)


def test_outgoing_weights_add_up_over_the_paths_of_a_residual_network(device):
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), ResidualBlock(3, 3, 1, (4, 4)), nn.Flatten(), nn.Linear(48, 2))
    network = read(model.to(device), (2, 4, 4))
    first, second = (jacobian(conv.cpu(), (3, 4, 4)).abs() for conv in (model[2].conv1, model[2].conv2))
    model.to(device).float()
    shaped = lambda column: column.reshape(3, 4, 4).to(device)
    assert_near(outgoing(network, "1"), shaped(first.sum(0) + 1), torch.float64)
    assert_near(outgoing(network, "2.relu1"), shaped(second.sum(0)), torch.float64)
    assert_near(outgoing(network, "2.relu2"), shaped(model[4].weight.double().abs().sum(0)), torch.float64)
    assert_near(outgoing(network, "1", {"2.relu1": shaped(torch.zeros(48))}), torch.ones(3, 4, 4, device=device), torch.float64)
    with pytest.raises(ValueError, match="outgoing: name must be that of an activation of the network, got '4'"):
        outgoing(network, "4")


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d((3, 2), 3, ceil_mode=True), nn.MaxPool2d(2, 1, dilation=3)],
    ids=str,
)
def test_max_pooling_passes_on_to_every_window(pool):
    model = nn.Sequential(nn.ReLU(), pool, nn.Conv2d(4, 4, 1, groups=4, bias=False))
    weight = torch.rand(4, 1, 1, 1)
    model[2].weight.data = weight
    ones = torch.eye(8 * 6).reshape(48, 1, 8, 6)
    windows = pool(ones).flatten(1).sum(1).reshape(8, 6)  # of each pixel: where it alone is 1
    assert_near(outgoing(read(model, GRID), "0"), (weight[:, 0] * windows).double(), torch.float64)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, {"1": [True, False], "3": [False, True]}),  # 1.0 * 5 against 1.5 * 2, 2.5 * 1 against 3.25 * 5
        ({"rule": "width"}, {"1": [False, True], "3": [False, True]}),
        ({"rule": "instability"}, {"1": [True, False], "3": [True, False]}),  # a tie of 1 and 1
        ({"pool_fraction": 0.25}, {"1": [False, False], "3": [True, False]}),  # on two images, all others on one
        ({"pool_fraction": 0.75}, {"1": [True, False], "3": [True, False]}),  # without "3"'s second, the last of equals
        ({"pool_fraction": 0.25, "pool": "layer"}, {"1": [True, False], "3": [True, False]}),
        ({"ratio": {"1": 1.0}}, {"1": [True, True], "3": [False, False]}),
        ({"ratio": 0.0}, {"1": [False, False], "3": [False, False]}),
        ({"restrict_rows": "grafted", "pool_fraction": 0.75}, {"1": [False, True], "3": [True, False]}),  # row (1, 1)
        ({"restrict_rows": "top", "pool_fraction": 0.75}, {"1": [True, False], "3": [True, False]}),  # row (-4, 1)
    ],
    ids=str,
)
def test_selects_from_scores_done_by_hand(options, want):
    model = small()
    options = {"ratio": 0.5, "pool_fraction": 1.0} | options
    masks = select(model, scored(model, IMAGES), **options)
    assert {name: mask.tolist() for name, mask in masks.items()} == want


def test_restricted_rows_are_those_that_matter_behind():
    model = small()
    model[2].weight.data[0, 1] = 9.0  # rows (1, 9) and (-4, 1): the second has the larger score, 3.25 * 5 against 11.75 * 1
    scores = scored(model, IMAGES)
    found = lambda **options: select(model, scores, **{"ratio": 0.5, "pool_fraction": 1.0} | options)["1"].tolist()
    assert found() == found(restrict_rows="top", top=1.0) == [False, True]
    assert found(restrict_rows="top") == found(restrict_rows="grafted") == [True, False]
    assert found(restrict_rows="grafted", ratio={"1": 0.5}) == [False, True]  # nothing is grafted behind: all rows


def test_takes_the_share_of_each_layer_rounded_up_from_unstable_units_only():
    model = models.mlp((6, 100, 30, 20, 3))
    scores = scored(model, torch.rand(50, 6), 0.05)
    for ratio in (0.07, 0.15, 1.0):
        masks = select(model, scores, ratio, pool_fraction=1.0)
        for name, mask in masks.items():
            unstable = scores.count[name] > 0
            assert not (mask & ~unstable).any()
            assert mask.sum() == min(unstable.sum(), math.ceil(round(100 * ratio) * mask.numel() / 100))
    pooled = math.ceil(0.8 * sum(int((t > 0).sum()) for t in scores.count.values()))
    assert sum(mask.sum() for mask in select(model, scores, 1.0).values()) == pooled


@pytest.mark.parametrize("rule", ["weighted", "instability", "random"])
def test_gives_the_same_masks_on_every_run(rule, device):
    model = models.mlp((6, 50, 50, 3), activation="grafted_relu").to(device)
    model[3].weight.data.zero_()  # all weighted scores of the first layer are 0
    scores, plain = scored(model, torch.rand(5, 6)), models.mlp((6, 50, 50, 3))
    plain.load_state_dict(model.state_dict(), strict=False)
    first, *others = (select(m, scores, 0.3, rule) for m in (model, model, plain))
    for masks in others:
        assert all(torch.equal(mask, first[name]) for name, mask in masks.items())
    if rule == "random":
        assert not torch.equal(select(model, scores, 0.3, rule, seed=1)["2"], first["2"])
    if rule == "weighted":  # of equal units those of lower index
        candidates = select(model, scores, 1.0, rule)["2"].nonzero()[:15]
        assert torch.equal(first["2"].nonzero(), candidates)


@pytest.mark.parametrize("pool", ["layer", "global"])
def test_scores_taken_again_after_each_graft_choose_other_units_behind_it(pool):
    model, x = models.mlp((6, 40, 40, 3)).double(), torch.rand(5, 6).double()
    again = functools.partial(scored, data=x, eps=0.2)
    before, choose = again(model), functools.partial(select, ratio=0.3, pool=pool, pool_fraction=0.6)
    plain, found = choose(model, before), choose(model, before, recompute_bounds=again)
    assert isinstance(model[2], nn.ReLU)
    assert torch.equal(plain["2"], found["2"])
    after = again(graft(model, {"2": plain["2"]}, input_shape=(6,)))
    after.count["2"] = before.count["2"]
    assert torch.equal(choose(model, after)["4"], found["4"])
    assert not torch.equal(plain["4"], found["4"])


def test_better_rules_give_smaller_lipschitz_constants():
    """On random networks and images: interval Jacobians with 15 % of each layer grafted, slope 0.4."""
    found = {rule: [] for rule in ("none", "random", "width", "weighted")}
    for seed in range(25):
        torch.manual_seed(seed)
        model, x = models.mlp((20, 60, 60, 10), "grafted_relu").double(), torch.rand(4, 20).double()
        for layer in (model[1], model[3], model[5]):
            nn.init.kaiming_normal_(layer.weight)
        scores = scored(model, x, 0.05)
        for rule, constants in found.items():
            if rule != "none":
                graft(model, select(model, scores, rule=rule))
            constants.append(jacobian_bound(model, x, 0.05, kind="estimate").mean().item())
            model[2].mask.zero_(), model[4].mask.zero_()
    for worse, better in pairwise(torch.tensor(list(found.values()))):
        gain = worse - better
        assert gain.mean() > 2 * gain.std() / math.sqrt(len(gain))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": -0.1}, "ratio must be from 0 to 1, got -0.1"),
        ({"ratio": {"3": math.nan}}, "ratio must be from 0 to 1"),
        ({"ratio": {"2": 0.5}}, "ratio must name layers of the model, 1, 3, got '2'"),
        ({"rule": "best"}, "rule must be one of weighted, width, instability, random, got 'best'"),
        ({"pool": "all"}, "pool must be one of global, layer"),
        ({"pool_fraction": 80}, "pool_fraction must be from 0 to 1"),
        ({"restrict_rows": "all"}, "restrict_rows must be one of none, grafted, top"),
        ({"top": -1}, "top must be from 0 to 1"),
        ({"restrict_rows": "top", "rule": "width"}, "restrict_rows must be 'none' with rule 'width'"),
        ({"restrict_rows": "grafted", "recompute_bounds": scored}, "restrict_rows must be 'none' with recompute_bounds"),
        ({"model": models.mlp((2, 2, 3, 2))}, r"scores must be of this model: layer '2' has \(2,\), got None"),
        (
            {"model": nn.Sequential(nn.Linear(2, 3), nn.ReLU())},
            r"scores must be of this model: layer '1' has \(3,\), got \(2,\)",
        ),
    ],
    ids=str,
)
def test_names_the_wrong_argument(options, message):
    model = small()
    with pytest.raises(ValueError, match=f"select: {message}"):
        select(**{"model": model, "scores": scored(model, IMAGES)} | options)
