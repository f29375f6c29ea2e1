"""What every op asks of its tensors. Messages name the op, the argument, what was expected and what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_alike(op: str, **tensors: Tensor | None) -> None:
    """The first tensor is of a floating dtype that lipfast knows; the others share its dtype and device."""
    (first, lead), *rest = tensors.items()
    if not isinstance(lead, Tensor) or lead.dtype not in FLOATING:
        raise ValueError(f"{op}: {first} must be a float64, float32, bfloat16 or float16 tensor, got {_kind(lead)}")
    for name, t in rest:
        if t is None:
            continue
        if not isinstance(t, Tensor) or t.dtype != lead.dtype:
            raise ValueError(f"{op}: {name} must be a {lead.dtype} tensor as {first} is, got {_kind(t)}")
        if t.device != lead.device:
            raise ValueError(f"{op}: {name} must be on {lead.device} as {first} is, got {t.device}")


def check_shape(op: str, name: str, t: Tensor, expected: Sequence[int | str | None]) -> None:
    """``expected``: a size, a letter for any size, or a leading ``"*"`` for any leading dimensions."""
    sizes = list(t.shape)
    want = list(expected)
    if want and want[0] == "*":
        want = want[1:]
        sizes = sizes[-len(want) :] if want else []
    if len(sizes) != len(want) or any(isinstance(w, int) and w != s for w, s in zip(want, sizes, strict=True)):
        text = ", ".join(str(e) for e in expected)
        raise ValueError(f"{op}: {name} must be ({text}), got {tuple(t.shape)}")


def check_broadcasts(op: str, x: Tensor, **tensors: Tensor) -> None:
    """Each tensor broadcasts to the shape of ``x``."""
    for name, t in tensors.items():
        sizes = zip(t.shape[::-1], x.shape[::-1], strict=False)
        if t.ndim > x.ndim or any(own not in (1, size) for own, size in sizes):
            raise ValueError(f"{op}: {name} must broadcast to x {tuple(x.shape)}, got {tuple(t.shape)}")


def check_mask(op: str, name: str, mask: Tensor | None, like: Tensor, expected: Sequence[int | str | None]) -> None:
    """A bool tensor of the expected shape on ``like``'s device; None is no mask."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError(f"{op}: {name} must be a bool tensor, got {_kind(mask)}")
    if mask.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {mask.device}")
    check_shape(op, name, mask, expected)


def check_leading(op: str, **sizes: Sequence[int] | None) -> None:
    """Each argument's leading sizes broadcast with those before it."""
    lead: list[int] = []
    for name, own in sizes.items():
        if own is None:
            continue
        length = max(len(lead), len(own))
        old, new = ([1] * (length - len(s)) + list(s) for s in (lead, own))
        if any(a != b and 1 not in (a, b) for a, b in zip(old, new, strict=True)):
            raise ValueError(f"{op}: {name} must have leading sizes that broadcast with {tuple(lead)}, got {tuple(own)}")
        lead = [b if a == 1 else a for a, b in zip(old, new, strict=True)]


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
