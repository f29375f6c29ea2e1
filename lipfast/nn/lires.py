"""The parts of LiResNet (Hu et al. 2023, https://arxiv.org/abs/2301.12549, and https://arxiv.org/abs/2310.02513, whose dense
layers are Cholesky-orthogonal): linear residual layers, each one map, so that its norm is that of the sum of its branches:

    W = I + raw gamma / sqrt(depth),        raw the weight that is trained, gamma one number for each output channel.

Its norm is below that of the identity and the branch together, and stays near 1 in a network of ``depth`` such layers.
"""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipfast.nn._weights import weight_of
from lipfast.ops.cholesky_orthogonal import cholesky_orthogonal
from lipfast.rounding import accumulator

L = TypeVar("L", bound=nn.Module)


class LiResConv2d(nn.Module):
    """``x + branch(x) - mean + bias`` for a zero-padded convolution ``branch``; (B, C, H, W) to the same.

    ``mean`` is that of the branch's channels over batch and pixels in training, and the running mean, a constant, in eval mode:
    there the layer is a convolution by ``weight`` with the bias ``offset``. Like batch norm, it has bounds in eval mode only.

    Args:
        channels: C.
        depth: the number of such layers in the network, by whose root the branch is divided.
        kernel_size: odd.
        momentum: of the running mean.

    Start: raw from N(0, 1 / (C kernel_size^2)^2), gamma 1, bias 0.
    Raises: ValueError for an even kernel or a number below 1.
    """

    running_mean: Tensor

    def __init__(self, channels: int, depth: int = 1, kernel_size: int = 3, momentum: float = 0.1):
        super().__init__()
        if channels < 1 or depth < 1:
            raise ValueError(f"LiResConv2d: channels and depth must be at least 1, got {channels} and {depth}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"LiResConv2d: kernel_size must be odd, got {kernel_size}")
        self.depth, self.padding, self.momentum = depth, kernel_size // 2, momentum
        self.raw = nn.Parameter(torch.randn(channels, channels, kernel_size, kernel_size) / (channels * kernel_size**2))
        self.gamma = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))

    @property
    def weight(self) -> Tensor:
        """(C, C, kernel_size, kernel_size), the identity in it."""
        return _residual(self.raw, self.gamma, self.depth)

    @property
    def offset(self) -> Tensor:
        return self.bias - self.running_mean

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.conv2d(x, self.weight, self.offset, padding=self.padding)
        out = F.conv2d(x, self.weight, padding=self.padding)
        over = lambda t: t.mean((0, 2, 3), dtype=accumulator(t.dtype))
        mean = over(out) - over(x)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        return out + (self.bias - mean).to(out.dtype)[:, None, None]

    def extra_repr(self) -> str:
        return f"{len(self.bias)}, depth={self.depth}, kernel_size={2 * self.padding + 1}"


def lires_linear(width: int, depth: int = 1) -> nn.Linear:
    """A linear layer (B, width) to (B, width) of the Cholesky-orthogonal weight ``L^-1 (I + raw gamma / sqrt(depth))``.

    Contractive: see :func:`lipfast.cholesky_orthogonal`. It starts from raw of N(0, 1 / width^2), gamma 1 and bias 0.

    Raises: ValueError for a number below 1.
    """
    if width < 1 or depth < 1:
        raise ValueError(f"lires_linear: width and depth must be at least 1, got {width} and {depth}")
    layer = nn.Linear(width, width)
    nn.init.normal_(layer.weight, std=1 / width)
    nn.init.zeros_(layer.bias)
    parametrize.register_parametrization(layer, "weight", Residual(width, depth))
    parametrize.register_parametrization(layer, "weight", CholeskyOrthogonal(), unsafe=True)
    return layer


def cholesky_rows(layer: L, name: str = "weight") -> L:
    """Makes a layer's weight W = L^-1 X of what is trained, X: rows, or columns where it is tall, that are nearly orthonormal.

    Contractive and the same for all multiples of X: see :func:`lipfast.cholesky_orthogonal`, of which it takes the default
    ``eps``. A convolution's weight (O, C, ...) counts as a matrix (O, C ...): its norm is at most 1 if its windows do not
    overlap.

    Args:
        layer: changed in place; its weight becomes X, ``layer.parametrizations.weight.original``.
        name: of the weight.

    Returns:
        The layer, still of its class for :mod:`lipfast.bounds`. The weight cannot be assigned;
        ``torch.nn.utils.parametrize.remove_parametrizations(layer, name)`` leaves a plain one.

    Raises: ValueError if the layer has no such plain parameter or it has another dtype or shape.

    >>> layer = cholesky_rows(nn.Linear(4, 2))
    >>> bool(torch.linalg.matrix_norm(layer.weight, 2) < 1)
    True
    """
    weight_of("cholesky_rows", layer, name)
    parametrize.register_parametrization(layer, name, CholeskyOrthogonal(), unsafe=True)  # else it computes W to see its shape
    return layer


class CholeskyOrthogonal(nn.Module):
    """The parametrization of :func:`cholesky_rows`: (O, ...) -> (O, ...)."""

    def forward(self, raw: Tensor) -> Tensor:
        with torch.autocast(raw.device.type, enabled=False):
            return cholesky_orthogonal(raw.flatten(1)).reshape(raw.shape)


class Residual(nn.Module):
    """The first parametrization of :func:`lires_linear`, ``I + raw gamma / sqrt(depth)``: (O, O) -> (O, O)."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.depth = depth
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, raw: Tensor) -> Tensor:
        return _residual(raw, self.gamma, self.depth)


def _residual(raw: Tensor, gamma: Tensor, depth: int) -> Tensor:  # (O, O, *kernel), (O,)
    kernel = raw.shape[2:]
    identity = torch.eye(len(raw), dtype=raw.dtype, device=raw.device).reshape(*raw.shape[:2], *[1] * len(kernel))
    identity = F.pad(identity, [n // 2 for n in kernel for _ in range(2)])
    return identity + raw * (gamma / math.sqrt(depth)).reshape(-1, *[1] * (raw.ndim - 1))
