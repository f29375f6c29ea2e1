"""The papers' objectives, one function each. Every loss is a mean over the batch and differentiable."""

from lipfast.losses.crm import crm
from lipfast.losses.emma import emma
from lipfast.losses.interval import interval, relu_balance, tightness
from lipfast.losses.lipschitz import FORMS, gloro, local_lipschitz, sparsity

__all__ = ["FORMS", "crm", "emma", "gloro", "interval", "local_lipschitz", "relu_balance", "sparsity", "tightness"]
