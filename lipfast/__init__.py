"""lipfast: fast, trustworthy Lipschitz and interval certificates for PyTorch networks."""

from lipfast._load import load
from lipfast._version import __version__
from lipfast.certify import Certificate, certify
from lipfast.ops._autocast import leave_autocast
from lipfast.ops.ball_conv2d import ball_conv2d
from lipfast.ops.ball_linear import ball_linear
from lipfast.ops.beta_abs import beta_abs
from lipfast.ops.cayley import cayley
from lipfast.ops.certified_radius import certified_radius
from lipfast.ops.cholesky_orthogonal import cholesky_orthogonal
from lipfast.ops.clipped_relu import clipped_relu
from lipfast.ops.conv2d_norm_bound import conv2d_norm_bound
from lipfast.ops.conv2d_norm_confidence import conv2d_norm_confidence
from lipfast.ops.conv2d_norm_estimate import conv2d_norm_estimate
from lipfast.ops.grafted_relu import grafted_relu
from lipfast.ops.interval_conv2d import interval_conv2d
from lipfast.ops.interval_linear import interval_linear
from lipfast.ops.l2_pool import l2_pool
from lipfast.ops.max_min import max_min
from lipfast.ops.pairwise_distance import pairwise_distance
from lipfast.ops.polar import polar
from lipfast.ops.skew import skew
from lipfast.ops.skew_exponential import skew_exponential
from lipfast.ops.spatial_shift import spatial_shift
from lipfast.ops.spectral_norm_bound import spectral_norm_bound
from lipfast.ops.spectral_norm_estimate import spectral_norm_estimate
from lipfast.train import train

loaded = load()
leave_autocast()
__all__ = [
    "Certificate",
    "__version__",
    "ball_conv2d",
    "ball_linear",
    "beta_abs",
    "cayley",
    "certified_radius",
    "certify",
    "cholesky_orthogonal",
    "clipped_relu",
    "conv2d_norm_bound",
    "conv2d_norm_confidence",
    "conv2d_norm_estimate",
    "grafted_relu",
    "interval_conv2d",
    "interval_linear",
    "l2_pool",
    "loaded",
    "max_min",
    "pairwise_distance",
    "polar",
    "skew",
    "skew_exponential",
    "spatial_shift",
    "spectral_norm_bound",
    "spectral_norm_estimate",
    "train",
]
