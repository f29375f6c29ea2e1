"""What can be said about a whole network over a set of inputs."""

from lipfast.bounds.interval import Boxes, interval, interval_margin
from lipfast.bounds.network import Network, read

__all__ = ["Boxes", "Network", "interval", "interval_margin", "read"]
