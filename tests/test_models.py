import pytest
import torch
from torch import nn

from lipfast import models
from lipfast.nn import ClippedMaxMin, ClippedReLU, LiResConv2d, MaxMin

# Millions of parameters in the papers' tables and released code; inputs and classes that they use.
PUBLISHED = {
    "mnist_4c3f": (1.975, (1, 28, 28), 10),
    "cifar_4c3f": (2.467, (3, 32, 32), 10),
    "cifar_6c2f": (2.250, (3, 32, 32), 10),
    "crm_6c2f": (0.734, (3, 32, 32), 10),
    "tiny_8c2f": (4.343, (3, 64, 64), 200),
    "cnn_b": (2.119, (3, 32, 32), 10),
    "conv_big": (2.467, (3, 32, 32), 10),
    "conv_huge": (17.19, (3, 32, 32), 10),
    "cnn7": (17.19, (3, 32, 32), 10),
    "cnn_small": (0.166, (1, 28, 28), 10),
    "lipnext": (67.16, (3, 32, 32), 10),
    "liresnet": (83.0, (3, 32, 32), 10),
    "mlp": (0.400, (1, 28, 28), 10),
    "resnet2b": (0.112, (3, 32, 32), 10),
    "resnet4b": (0.124, (3, 32, 32), 10),
}
# Arguments of those that take long at their size, to see what they return.
SMALL: dict[str, dict[str, int]] = {
    "lipnext": {"depth": 2, "width": 16, "patch": 1},
    "liresnet": {"depth": 2, "width": 8, "dense": 2, "dense_width": 16},
}
WITH_ACTIVATIONS = sorted(set(PUBLISHED) - {"lipnext", "liresnet", "resnet2b", "resnet4b"})


def count(model):
    return sum(p.numel() for p in model.parameters())


def units(model, x, kind):
    """How many numbers per sample the activations of that kind see."""
    return sum(out[0].numel() for out in outputs(model, x, kind))


def outputs(model, x, kind):
    """What the modules of that kind return."""
    seen = []
    for m in model.modules():
        if isinstance(m, kind):
            m.register_forward_hook(lambda _m, _i, out: seen.append(out))
    model(x)
    return seen


def test_every_model_is_listed():
    assert set(models.BY_NAME) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_size(name):
    millions, shape, classes = PUBLISHED[name]
    model = models.build(name).eval()
    assert count(model) / 1e6 == pytest.approx(millions, rel=5e-3)
    model = models.build(name, **SMALL[name]).eval() if name in SMALL else model
    assert model(torch.rand(2, *shape)).shape == (2, classes)


# ReLU neurons as counted in the table of the grafted networks.
@pytest.mark.parametrize(
    ("name", "neurons"), [("cnn_b", 16634), ("conv_big", 62464), ("conv_huge", 229888), ("resnet4b", 14436)]
)
def test_has_the_published_number_of_neurons(name, neurons):
    assert units(models.build(name), torch.rand(1, 3, 32, 32), nn.ReLU) == neurons


@pytest.mark.parametrize("name", WITH_ACTIVATIONS)
@pytest.mark.parametrize(
    ("activation", "kind"), [("max_min", MaxMin), ("clipped_relu", ClippedReLU), ("clipped_max_min", ClippedMaxMin)]
)
def test_takes_other_activations(name, activation, kind):
    x = torch.rand(1, *PUBLISHED[name][1])
    model = models.build(name, activation=activation)
    assert units(model, x, kind) == units(models.build(name), x, nn.ReLU)
    if kind is not MaxMin:  # one threshold per unit
        assert count(model) == count(models.build(name)) + units(model, x, kind)


def test_thresholds_start_where_the_papers_say():
    starts = lambda name, kind: [
        tuple(round(float(t.unique()), 3) for t in m.state_dict().values())
        for m in models.build(name, activation=kind)
        if isinstance(m, (ClippedReLU, ClippedMaxMin))
    ]
    assert starts("mnist_4c3f", "clipped_relu") == starts("cifar_4c3f", "clipped_relu") == [(1.0,)] * 6
    assert starts("cifar_6c2f", "clipped_relu") == [(2.0,)] * 7
    assert starts("tiny_8c2f", "clipped_relu") == [(1.0,)] * 9
    upper = [0.1, 0.1, 0.15, 0.15, 0.2, 0.3, 1.2]
    assert starts("cifar_6c2f", "clipped_max_min") == [(u, -0.15 if i == 1 else -u) for i, u in enumerate(upper)]
    upper = [0.8, 1.0, 1.4, 1.4, 1.4, 1.6, 2.0, 3.0, 1.6]
    assert starts("tiny_8c2f", "clipped_max_min") == [(u, -u) for u in upper]


@pytest.mark.parametrize("name", sorted(set(PUBLISHED) - {"mlp"}))
def test_takes_another_input_and_number_of_classes(name):
    model = models.build(name, shape=(2, 40, 37), classes=7, **SMALL.get(name, {})).eval()
    assert model(torch.rand(3, 2, 40, 37)).shape == (3, 7)


def test_tiny_8c2f_has_the_second_padding_of_crm():
    x = torch.rand(1, 3, 64, 64)
    sizes = lambda padding: [out.shape[-1] for out in outputs(models.tiny_8c2f(padding=padding), x, nn.Conv2d)]
    assert sizes(0) == [64, 62, 30, 30, 30, 14, 14, 6]
    assert sizes(1) == [64, 64, 31, 31, 31, 14, 14, 6]


def test_cnn_small_takes_digits():
    assert models.cnn_small((1, 8, 8))(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_liresnet_has_the_published_layers():
    model = models.liresnet(width=8, dense_width=16).eval()
    sizes = [out.shape[1:] for out in outputs(model, torch.rand(1, 3, 32, 32), MaxMin)]
    assert sizes == [(8, 16, 16)] * 13 + [(16,)] * 9
    assert [m.depth for m in model if isinstance(m, LiResConv2d)] == [12] * 12


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 7, 7), (1, 28, 28), (3, 64, 64)])
def test_liresnet_takes_small_sizes(shape):
    small = {"depth": 1, "width": 4, "dense": 1, "dense_width": 6}
    assert models.liresnet(shape, 3, **small)(torch.rand(2, *shape)).shape == (2, 3)
    model = models.liresnet(shape, 3, **small, activation="clipped_relu")
    units_of = [m.threshold.numel() for m in model if isinstance(m, ClippedReLU)]
    side = (shape[1] + 1) // 2
    assert units_of == [4 * side**2] * 2 + [6] * 2


def test_cnn7_takes_a_width_and_batch_norm():
    assert sum(isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d)) for m in models.cnn7(width=8, batch_norm=True)) == 6
    assert count(models.cnn7(width=8)) < count(models.cnn7(width=16))


def test_cnn_b_pads_as_the_paper():
    model = models.cnn_b()
    out = model[1](model[0](torch.ones(1, 3, 32, 32)))
    weight, bias = model[1].weight, model[1].bias
    # The first window starts one pixel before the image and the last ends two after it.
    torch.testing.assert_close(out[0, :, 0, 0], weight[:, :, 1:, 1:].sum((1, 2, 3)) + bias)
    torch.testing.assert_close(out[0, :, -1, -1], weight[:, :, :-2, :-2].sum((1, 2, 3)) + bias)


def test_a_checkpoint_fits_the_model_built_again():
    arguments = {"shape": [1, 8, 8], "classes": 3, "activation": "clipped_relu"}
    first, second = models.build("cnn_small", **arguments), models.build("cnn_small", **arguments)
    second.load_state_dict(first.state_dict())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(first(x), second(x))


def test_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"build: name must be one of cifar_4c3f.*got 'cnn8'"):
        models.build("cnn8")
    with pytest.raises(
        ValueError, match="activation must be one of relu, max_min, clipped_relu, clipped_max_min, grafted_relu, got 'tanh'"
    ):
        models.cifar_6c2f(activation="tanh")
    with pytest.raises(ValueError, match="images of 3 x 3 pixels are too small"):
        models.cnn_small((1, 3, 3))
    with pytest.raises(ValueError, match="mlp: sizes"):
        models.mlp([10])
