"""The networks of the papers, under the papers' names, for pixels in [0, 1] of shape (B, C, H, W).

"4C3F" is four convolutions and three linear layers. Every layer but the last is followed by the activation:

- "relu";
- "max_min": :class:`lipfast.nn.MaxMin`;
- "clipped_relu": :class:`lipfast.nn.ClippedReLU` with one learnable threshold per unit;
- "clipped_max_min": :class:`lipfast.nn.ClippedMaxMin` with two learnable thresholds per pair of units;
- "grafted_relu": :class:`lipfast.nn.GraftedReLU`, a ReLU until units are grafted.

Thresholds start at 1 (and -1) unless a network says otherwise; where it does, as in Local-Lip's code.

GloRo, Local-Lip, CRM: Leino et al. 2021 (https://arxiv.org/abs/2102.08452), Huang et al. 2021
(https://arxiv.org/abs/2111.01395), Fazlyab et al. 2023 (https://arxiv.org/abs/2310.00116). CNN-B, ConvBig, ConvHuge and
ResNet4B: Chen et al. 2022 (https://arxiv.org/abs/2206.07839), where ConvHuge is the network of 17 million parameters.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, repeat

from torch import Tensor, nn

from lipfast.nn import (
    ClippedMaxMin,
    ClippedReLU,
    GraftedReLU,
    L2Pool,
    LipNeXtBlocks,
    LiResConv2d,
    MaxMin,
    Normalize,
    Patches,
    cholesky_rows,
    lires_linear,
    unit_rows,
)

Shape = tuple[int, int, int]  # C, H, W
Thresholds = tuple[float, float]  # lower, upper: where those of one activation start
_ACTIVATIONS: dict[str, Callable[[Sequence[int], Thresholds], nn.Module]] = {
    "relu": lambda shape, start: nn.ReLU(),
    "max_min": lambda shape, start: MaxMin(),
    "clipped_relu": lambda shape, start: ClippedReLU(start[1], shape, learnable=True),
    "clipped_max_min": lambda shape, start: ClippedMaxMin(start[1], start[0], shape, learnable=True),
    "grafted_relu": lambda shape, start: GraftedReLU(shape),
}
_UNIT: Thresholds = (-1.0, 1.0)
_ONE = repeat(_UNIT)  # an endless iterator that is always the same
_FOUR_CONVOLUTIONS = [(32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1)]


def mnist_4c3f(shape: Shape = (1, 28, 28), classes: int = 10, activation: str = "relu") -> nn.Sequential:
    """4C3F for MNIST (GloRo, Local-Lip, CRM)."""
    return _stack(shape, _FOUR_CONVOLUTIONS, [512, 512, classes], activation)


def cifar_4c3f(shape: Shape = (3, 32, 32), classes: int = 10, activation: str = "relu") -> nn.Sequential:
    """4C3F for CIFAR-10 (Local-Lip)."""
    return _stack(shape, _FOUR_CONVOLUTIONS, [512, 512, classes], activation)


def cifar_6c2f(shape: Shape = (3, 32, 32), classes: int = 10, activation: str = "relu") -> nn.Sequential:
    """6C2F for CIFAR-10 (GloRo, Local-Lip), 2.25 million parameters. CRM's is :func:`crm_6c2f`.

    Thresholds of the clipped ReLU start at 2, those of the clipped MaxMin between 0.1 and 1.2.
    """
    convs = [(32, 3, 1, 1), (32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 3, 1, 1), (64, 4, 2, 1)]
    pairs = [(-0.1, 0.1), (-0.15, 0.1), (-0.15, 0.15), (-0.15, 0.15), (-0.2, 0.2), (-0.3, 0.3), (-1.2, 1.2)]
    return _stack(shape, convs, [512, classes], activation, pairs if activation == "clipped_max_min" else repeat((-2.0, 2.0)))


def crm_6c2f(shape: Shape = (3, 32, 32), classes: int = 10, activation: str = "relu") -> nn.Sequential:
    """What CRM's code calls 6C2F: three strided convolutions and 0.73 million parameters."""
    convs = [(32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1)]
    return _stack(shape, convs, [512, classes], activation, repeat((-2.0, 2.0)))


def tiny_8c2f(shape: Shape = (3, 64, 64), classes: int = 200, activation: str = "relu", padding: int = 1) -> nn.Sequential:
    """8C2F for Tiny-ImageNet (Local-Lip). Thresholds of the clipped MaxMin start between 0.8 and 3.

    ``padding`` is the second convolution's, 0 in CRM's code.
    """
    convs = [(64, 3, 1, 1), (64, 3, 1, padding), (64, 4, 2, 0), (128, 3, 1, 1), (128, 3, 1, 1), (128, 4, 2, 0)]
    convs += [(256, 3, 1, 1), (256, 4, 2, 0)]
    pairs = [(-upper, upper) for upper in (0.8, 1.0, 1.4, 1.4, 1.4, 1.6, 2.0, 3.0, 1.6)]
    return _stack(shape, convs, [256, classes], activation, pairs if activation == "clipped_max_min" else _ONE)


def cnn_b(shape: Shape = (3, 32, 32), classes: int = 10, activation: str = "relu") -> nn.Sequential:
    """CNN-B; its first convolution pads one pixel on the left and top and two on the right and bottom."""
    C, H, W = shape
    layers = _stack((C, H + 3, W + 3), [(32, 5, 2, 0), (128, 4, 2, 1)], [250, classes], activation)
    return nn.Sequential(nn.ZeroPad2d((1, 2, 1, 2)), *layers)


def conv_big(shape: Shape = (3, 32, 32), classes: int = 10, activation: str = "relu") -> nn.Sequential:
    """ConvBig: 4C3F's layers."""
    return _stack(shape, _FOUR_CONVOLUTIONS, [512, 512, classes], activation)


def conv_huge(shape: Shape = (3, 32, 32), classes: int = 10, activation: str = "relu") -> nn.Sequential:
    """ConvHuge, 17 million parameters: :func:`cnn7` of width 64."""
    return cnn7(shape, classes, activation)


def cnn7(
    shape: Shape = (3, 32, 32), classes: int = 10, activation: str = "relu", width: int = 64, batch_norm: bool = False
) -> nn.Sequential:
    """CNN-7 of Shi et al. 2021 (https://arxiv.org/abs/2103.17268): five convolutions and two linear layers.

    ``batch_norm`` puts a batch normalisation before every activation, as in that paper.
    """
    convs = [(width, 3, 1, 1), (width, 3, 1, 1), (2 * width, 3, 2, 1), (2 * width, 3, 1, 1), (2 * width, 3, 1, 1)]
    return _stack(shape, convs, [512, classes], activation, batch_norm=batch_norm)


def cnn_small(shape: Shape = (1, 28, 28), classes: int = 10, activation: str = "relu") -> nn.Sequential:
    """The small network of Gowal et al. 2018 (https://arxiv.org/abs/1810.12715) with padding 1: images from 4 x 4 pixels on."""
    return _stack(shape, [(16, 4, 2, 1), (32, 4, 2, 1)], [100, classes], activation)


def mlp(sizes: Sequence[int] = (784, 200, 200, 200, 200, 200, 200, 200, 10), activation: str = "relu") -> nn.Sequential:
    """Linear layers of those sizes, input and classes included; by default the 8 x 200 network for MNIST."""
    if len(sizes) < 2:
        raise ValueError(f"mlp: sizes must name at least the input and the classes, got {sizes}")
    return nn.Sequential(nn.Flatten(), *_linear(sizes, activation, _ONE, False))


def resnet2b(shape: Shape = (3, 32, 32), classes: int = 10, activation: str = "relu") -> nn.Sequential:
    """ResNet-2B of VNN-COMP 2021: a strided convolution, two residual blocks, two linear layers."""
    return _resnet(shape, 8, [(16, 2), (16, 1)], classes, activation)


def resnet4b(shape: Shape = (3, 32, 32), classes: int = 10, activation: str = "relu") -> nn.Sequential:
    """ResNet-4B: a strided convolution, four residual blocks, two linear layers; no batch normalisation."""
    return _resnet(shape, 16, [(32, 2), (32, 1), (32, 2), (32, 1)], classes, activation)


def liresnet(
    shape: Shape = (3, 32, 32),
    classes: int = 10,
    depth: int = 12,
    width: int = 512,
    dense: int = 8,
    dense_width: int = 2048,
    activation: str = "max_min",
) -> nn.Sequential:
    """LiResNet (Hu et al. 2023, https://arxiv.org/abs/2301.12549) with the Cholesky-orthogonal dense layers of
    https://arxiv.org/abs/2310.02513 and a head of unit rows: 83 million parameters for CIFAR-10.

    A strided convolution, ``depth`` residual ones of ``width`` channels, two orthogonal layers down to ``dense_width`` numbers,
    ``dense`` linear residual layers. All after the convolutions is 1-Lipschitz, but for the head's pairs of rows.
    """
    C, H, W = shape
    H, W = _halved(H), _halved(W)
    stem = nn.Conv2d(C, width, 5, 2, 2)
    nn.init.orthogonal_(stem.weight)
    layers: list[nn.Module] = [Normalize([0.5] * C, [1.0] * C), stem, _activation(activation, (width, H, W), _UNIT)]
    for _ in range(depth):
        layers += [LiResConv2d(width, depth), _activation(activation, (width, H, W), _UNIT)]
    H, W = H // 4, W // 4
    if H < 1 or W < 1:
        raise ValueError(f"liresnet: images must have at least 7 x 7 pixels, got {shape[1]} x {shape[2]}")
    layers += [cholesky_rows(nn.Conv2d(width, width, 4, 4, bias=False)), nn.Flatten()]
    layers += [cholesky_rows(nn.Linear(width * H * W, dense_width)), _activation(activation, (dense_width,), _UNIT)]
    for _ in range(dense):
        layers += [lires_linear(dense_width, dense), _activation(activation, (dense_width,), _UNIT)]
    return nn.Sequential(*layers, unit_rows(nn.Linear(dense_width, classes)))


def lipnext(
    shape: Shape = (3, 32, 32),
    classes: int = 10,
    depth: int = 32,
    width: int = 1024,
    patch: int = 2,
    ratio: float = 0.125,
    beta: float = 0.5,
    checkpointing: bool = False,
) -> nn.Sequential:
    """LipNeXt (Hu et al. 2026, https://arxiv.org/abs/2601.18513): 2 depth width^2 parameters in its blocks.

    Published sizes, depth x width: 32 x 1024 (64 million), 32 x 2048, 32 x 4096 (1.07 billion), 64 x 2896. The patches are
    ours: of 2 pixels for CIFAR, 4 for Tiny-ImageNet, 16 for ImageNet leave about 200 pixels. See
    :class:`lipfast.nn.LipNeXtBlocks` for the other arguments.
    """
    C, H, W = shape
    return nn.Sequential(
        Normalize([0.5] * C, [1.0] * C),
        Patches(C, patch, width),
        LipNeXtBlocks(depth, width, (H // patch, W // patch), ratio, beta, checkpointing),
        L2Pool(),
        unit_rows(nn.Linear(width, classes)),
    )


_MODELS: list[Callable[..., nn.Sequential]] = [cifar_4c3f, cifar_6c2f, cnn7, cnn_b, cnn_small, conv_big, conv_huge]
_MODELS += [crm_6c2f, lipnext, liresnet, mlp, mnist_4c3f, resnet2b, resnet4b, tiny_8c2f]
BY_NAME: dict[str, Callable[..., nn.Sequential]] = {function.__name__: function for function in _MODELS}


def build(name: str, **arguments) -> nn.Sequential:
    """The model of that name in this module, as a checkpoint stores it. Raises ValueError for an unknown name."""
    if name not in BY_NAME:
        raise ValueError(f"build: name must be one of {', '.join(sorted(BY_NAME))}, got {name!r}")
    return BY_NAME[name](**arguments)


class ResidualBlock(nn.Module):
    """``relu(conv2(relu(conv1(x))) + shortcut(x))``; the shortcut is a 1 x 1 convolution where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int, size: tuple[int, int], activation: str = "relu"):
        super().__init__()
        shape = (c_out, *size)  # of its output
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1)
        self.relu1 = _activation(activation, shape, _UNIT)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1)
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(c_in, c_out, 1, stride)
        self.relu2 = _activation(activation, shape, _UNIT)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.conv2(self.relu1(self.conv1(x))) + self.shortcut(x))


def _resnet(shape: Shape, stem: int, blocks: Sequence[tuple[int, int]], classes: int, activation: str) -> nn.Sequential:
    C, H, W = shape
    first = nn.Conv2d(C, stem, 3, 2, 1)
    C, H, W = stem, _halved(H), _halved(W)
    layers: list[nn.Module] = [first, _activation(activation, (C, H, W), _UNIT)]
    for width, stride in blocks:
        H, W = (H, W) if stride == 1 else (_halved(H), _halved(W))
        layers.append(ResidualBlock(C, width, stride, (H, W), activation))
        C = width
    return nn.Sequential(*layers, nn.Flatten(), *_linear([C * H * W, 100, classes], activation, _ONE, False))


def _halved(pixels: int) -> int:
    return (pixels + 1) // 2  # kernel 3, stride 2, padding 1


def _stack(
    shape: Shape,
    convs: Sequence[tuple[int, int, int, int]],  # channels, kernel, stride, padding
    widths: Sequence[int],  # of the linear layers, the classes last
    activation: str,
    starts: Iterable[Thresholds] = _ONE,  # for each activation
    batch_norm: bool = False,
) -> nn.Sequential:
    layers: list[nn.Module] = []
    C, H, W = shape
    starts = iter(starts)
    for channels, kernel, stride, padding in convs:
        layers.append(nn.Conv2d(C, channels, kernel, stride, padding))
        C, H, W = channels, *((n + 2 * padding - kernel) // stride + 1 for n in (H, W))
        if H < 1 or W < 1:
            raise ValueError(f"models: images of {shape[1]} x {shape[2]} pixels are too small for this network")
        if batch_norm:
            layers.append(nn.BatchNorm2d(C))
        layers.append(_activation(activation, (C, H, W), next(starts)))
    return nn.Sequential(*layers, nn.Flatten(), *_linear([math.prod((C, H, W)), *widths], activation, starts, batch_norm))


def _linear(sizes: Sequence[int], activation: str, starts: Iterable[Thresholds], batch_norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for (n_in, n_out), start in zip(pairwise(sizes[:-1]), starts, strict=False):
        layers.append(nn.Linear(n_in, n_out))
        if batch_norm:
            layers.append(nn.BatchNorm1d(n_out))
        layers.append(_activation(activation, (n_out,), start))
    return [*layers, nn.Linear(sizes[-2], sizes[-1])]


def _activation(name: str, shape: Sequence[int], start: Thresholds) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise ValueError(f"models: activation must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name](shape, start)
