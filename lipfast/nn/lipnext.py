"""The parts of LipNeXt (Hu et al. 2026, https://arxiv.org/abs/2601.18513): patches, blocks, l_2 pooling.

Every part is 1-Lipschitz in l_2 as far as its matrices are orthogonal, and keeps the norm of what passes through it but for the
constants that are added. Between the channels of a pixel only matrices act, and between pixels only shifts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lipfast.ops.beta_abs import beta_abs, check_beta
from lipfast.ops.l2_pool import l2_pool
from lipfast.ops.spatial_shift import spatial_shift


class Patches(nn.Module):
    """Images (B, C, H, W) cut into squares of ``side`` pixels, (B, width, H / side, W / side): each becomes a pixel of
    C side^2 channels, and zeros fill up to ``width``. An isometry without parameters.

    The paper does not tell its stem; this one is ours.

    Args:
        channels: C.

    Raises: ValueError where a square has more numbers than ``width``, ``side`` does not divide the image, or it has other
        channels.
    """

    def __init__(self, channels: int, side: int, width: int):
        super().__init__()
        if channels < 1 or side < 1:
            raise ValueError(f"Patches: channels and side must be at least 1, got {channels} and {side}")
        if width < channels * side**2:
            raise ValueError(f"Patches: width must be at least {channels} x {side}^2 = {channels * side**2}, got {width}")
        self.channels, self.side, self.width = channels, side, width

    @property
    def zeros(self) -> tuple[int, ...]:
        """As torch's padding counts them."""
        return 0, 0, 0, 0, 0, self.width - self.channels * self.side**2

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.channels or x.shape[2] % self.side or x.shape[3] % self.side:
            raise ValueError(
                f"Patches: x must be (B, {self.channels}, H, W), sides divisible by {self.side}, got {tuple(x.shape)}"
            )
        return F.pad(F.pixel_unshuffle(x, self.side), self.zeros)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, side={self.side}, width={self.width}"


class LipNeXtBlocks(nn.Module):
    """``depth`` blocks ``x <- beta_abs(M R^T S(R (x + p)) + b)``, the same matrices R and M at every pixel.

    S is :func:`lipfast.spatial_shift`; p is a number for each pixel, b one for each channel. All blocks' matrices are two
    parameters, ``rotation`` and ``mixing``: one batched update for an optimiser, and shards of whole matrices for FSDP2.

    Args:
        depth, width: number of blocks L and of channels C; 2 L C^2 numbers in the matrices.
        size: (H, W) of the image.
        ratio: of the channels moved in each direction, see :func:`lipfast.spatial_shift`.
        beta: see :func:`lipfast.beta_abs`.
        checkpointing: keep only the blocks' inputs for the backward pass, and compute what lies between once more.

    Shape: (B, C, H, W) -> (B, C, H, W), both channels last: any other input is copied once.
    Start: matrices from Haar's distribution with determinant 1, which an optimiser that walks along the manifold keeps; p
        and b zero.
    Raises: ValueError if a number is out of range, ``ratio`` times ``width`` is no whole number, or x has another shape.
    """

    orthogonal_parameters = ("rotation", "mixing")

    def __init__(
        self,
        depth: int,
        width: int,
        size: Sequence[int],
        ratio: float = 0.125,
        beta: float = 0.5,
        checkpointing: bool = False,
    ):
        super().__init__()
        if depth < 1 or width < 1:
            raise ValueError(f"LipNeXtBlocks: depth and width must be at least 1, got {depth} and {width}")
        spatial_shift(torch.empty(0, width, 1, 1), ratio)  # says whether the channels divide
        check_beta("LipNeXtBlocks", beta)
        self.depth, self.width, self.ratio, self.beta, self.checkpointing = depth, width, ratio, beta, checkpointing
        self.rotation = nn.Parameter(torch.empty(depth, width, width))
        self.mixing = nn.Parameter(torch.empty(depth, width, width))
        self.position = nn.Parameter(torch.empty(depth, *size))
        self.bias = nn.Parameter(torch.empty(depth, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.position.zero_()
        self.bias.zero_()
        for X in (*self.rotation, *self.mixing):
            nn.init.orthogonal_(X)
            X[:, 0] *= torch.linalg.slogdet(X.double()).sign

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != (self.width, *self.position.shape[1:]):
            expected = ", ".join(map(str, (self.width, *self.position.shape[1:])))
            raise ValueError(f"LipNeXtBlocks: x must be (B, {expected}), got {tuple(x.shape)}")
        x = (x + self.position[0].to(x.dtype)).contiguous(memory_format=torch.channels_last)
        following = [*self.position.unbind()[1:], None]  # the next block's p is added as this one ends
        for parameters in zip(self.rotation.unbind(), self.mixing.unbind(), self.bias.unbind(), following, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._block, x, *parameters, use_reentrant=False)
            else:
                x = self._block(x, *parameters)
        return x

    def _block(self, x: Tensor, R: Tensor, M: Tensor, bias: Tensor, position: Tensor | None) -> Tensor:
        x = spatial_shift(_mixed(x, R), self.ratio)
        if x.numel() // self.width > self.width:  # a product of matrices is cheaper than one with all pixels
            x = _mixed(x, M @ R.mT)
        else:
            x = _mixed(_mixed(x, R.mT), M)
        return beta_abs(x, self.beta, bias.to(x.dtype), None if position is None else position.to(x.dtype))

    def extra_repr(self) -> str:
        size = "x".join(map(str, self.position.shape[1:]))
        return f"depth={self.depth}, width={self.width}, size={size}, ratio={self.ratio}, beta={self.beta}"


class L2Pool(nn.Module):
    """:func:`lipfast.l2_pool` as a layer: (B, C, H, W) -> (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return l2_pool(x)


def _mixed(x: Tensor, matrix: Tensor) -> Tensor:
    """The channels of every pixel times ``matrix``; (B, C, H, W), channels last, without a copy."""
    return F.linear(x.permute(0, 2, 3, 1), matrix).permute(0, 3, 1, 2)
