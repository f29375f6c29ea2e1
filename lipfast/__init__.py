"""lipfast: fast, trustworthy Lipschitz and interval certificates for PyTorch networks."""

from lipfast._load import load
from lipfast._version import __version__
from lipfast.ops.interval_conv2d import interval_conv2d
from lipfast.ops.interval_linear import interval_linear

loaded = load()
__all__ = ["__version__", "interval_conv2d", "interval_linear", "loaded"]
