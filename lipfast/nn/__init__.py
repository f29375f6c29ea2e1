"""Layers made of lipfast's ops."""

from lipfast.nn.beta_abs import BetaAbs
from lipfast.nn.clipped_max_min import ClippedMaxMin
from lipfast.nn.clipped_relu import ClippedReLU
from lipfast.nn.grafted_relu import GraftedReLU
from lipfast.nn.lipnext import L2Pool, LipNeXtBlocks, Patches
from lipfast.nn.lires import LiResConv2d, cholesky_rows, lires_linear
from lipfast.nn.max_min import MaxMin
from lipfast.nn.normalize import Normalize
from lipfast.nn.orthogonal import Orthogonal, orthogonal
from lipfast.nn.unit_rows import UnitRows, unit_rows

__all__ = [
    "BetaAbs",
    "ClippedMaxMin",
    "ClippedReLU",
    "GraftedReLU",
    "L2Pool",
    "LiResConv2d",
    "LipNeXtBlocks",
    "MaxMin",
    "Normalize",
    "Orthogonal",
    "Patches",
    "UnitRows",
    "cholesky_rows",
    "lires_linear",
    "orthogonal",
    "unit_rows",
]
