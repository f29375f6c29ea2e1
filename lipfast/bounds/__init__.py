"""What can be said about a whole network over a set of inputs."""

from lipfast.bounds.crown import Crown, crown, crown_margin
from lipfast.bounds.interval import Boxes, interval, interval_margin
from lipfast.bounds.jacobian import jacobian
from lipfast.bounds.liplt import Liplt, liplt
from lipfast.bounds.lipschitz import lipschitz
from lipfast.bounds.local import Local, local, local_lipschitz
from lipfast.bounds.network import Network, read
from lipfast.bounds.norms import Norms, norms

__all__ = [
    "Boxes",
    "Crown",
    "Liplt",
    "Local",
    "Network",
    "Norms",
    "crown",
    "crown_margin",
    "interval",
    "interval_margin",
    "jacobian",
    "liplt",
    "lipschitz",
    "local",
    "local_lipschitz",
    "norms",
    "read",
]
