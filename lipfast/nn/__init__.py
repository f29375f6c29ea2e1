"""Layers made of lipfast's ops."""

from lipfast.nn.beta_abs import BetaAbs
from lipfast.nn.clipped_max_min import ClippedMaxMin
from lipfast.nn.clipped_relu import ClippedReLU
from lipfast.nn.max_min import MaxMin
from lipfast.nn.normalize import Normalize

__all__ = ["BetaAbs", "ClippedMaxMin", "ClippedReLU", "MaxMin", "Normalize"]
