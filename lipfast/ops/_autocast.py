"""Ops under ``torch.autocast``: those that compute products or sums run outside it.

Autocast would compute the products of a definition in a half type, behind the back of a proof that counts float32's roundings,
and of an orthogonal matrix. So half tensors become float32 on entering an op, as for torch's own sensitive operations, and
float64 stays as it is. Ops that only move or compare numbers take what they are given.
"""

import sys

import torch

_TAKES_ALL = ("beta_abs", "clipped_relu", "max_min", "skew", "spatial_shift")


def leave_autocast() -> None:
    """Says so to torch for the ops defined so far."""
    defined = {name.removeprefix("lipfast.ops."): m for name, m in sys.modules.items() if name.startswith("lipfast.ops.")}
    modules = [module for name, module in defined.items() if name not in _TAKES_ALL]
    ops = {op for module in modules for op in vars(module).values() if isinstance(op, torch.library.CustomOpDef)}
    for op in ops:
        for device in ("cpu", "cuda"):
            op.register_autocast(device, torch.float32)
