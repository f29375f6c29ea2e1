"""The papers' objectives, one function each. All are differentiable, and all but ``l1`` means over the batch."""

from lipfast.losses.crm import crm
from lipfast.losses.emma import emma
from lipfast.losses.gradient_alignment import gradient_alignment
from lipfast.losses.interval import interval, relu_balance, tightness
from lipfast.losses.l1 import l1
from lipfast.losses.lipschitz import FORMS, gloro, local_lipschitz, sparsity
from lipfast.losses.slope import slope

__all__ = [
    "FORMS",
    "crm",
    "emma",
    "gloro",
    "gradient_alignment",
    "interval",
    "l1",
    "local_lipschitz",
    "relu_balance",
    "slope",
    "sparsity",
    "tightness",
]
