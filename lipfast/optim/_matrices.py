"""The matrices of parameters: whole, stacked, shared out among processes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_AT_ONCE = {"cpu": 2**18, "cuda": 2**25}  # numbers of one update: what a cache holds; what fills a GPU
Part = list[tuple[Tensor, slice, int]]  # parameter, its rows here, the first row that its state holds


def check_matrix(name: str, p: Tensor) -> None:
    if p.ndim not in (2, 3) or p.shape[-1] != p.shape[-2] or p.shape[-1] < 1:
        raise ValueError(f"ManifoldAdam: {name} must be orthogonal matrices (d, d) or (N, d, d), got {tuple(p.shape)}")
    if p.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"ManifoldAdam: {name} must be float32 or float64 (autocast computes with half types beside it), got {p.dtype}"
        )
    for placement in getattr(p, "placements", ()):
        if not placement.is_replicate() and not (placement.is_shard(0) and p.ndim == 3):
            raise ValueError(
                f"ManifoldAdam: {name} must be sharded into whole matrices, got {placement} of {tuple(p.shape)}: "
                "stack the matrices as (N, d, d) and shard dimension 0"
            )


def named(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    names = group.get("param_names") or [f"parameter {i} of shape {tuple(p.shape)}" for i, p in enumerate(group["params"])]
    return list(zip(names, group["params"], strict=True))


def buckets(params: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters that can be updated together."""
    found: dict[Any, list[Tensor]] = {}
    for p in params:
        found.setdefault((p.shape[-1], p.dtype, p.device), []).append(p)
    return list(found.values())


def parts(shares: list[tuple[Tensor, slice]]) -> Iterator[Part]:
    """The shares cut and joined into updates of at most _AT_ONCE numbers, or one matrix."""
    part: Part = []
    room = most = 0
    if shares:
        like = shares[0][0]
        room = most = max(1, _AT_ONCE.get(like.device.type, _AT_ONCE["cuda"]) // like.shape[-1] ** 2)
    for p, own in shares:
        at = own.start
        while at < own.stop:
            taken = min(room, own.stop - at)
            part.append((p, slice(at, at + taken), own.start))
            at, room = at + taken, room - taken
            if room == 0:
                yield part
                part, room = [], most
    if part:
        yield part


def matrices(t: Tensor) -> Tensor:  # (d, d) or (N, d, d) -> (N, d, d)
    """This process's whole matrices, without gradient, in the same memory."""
    local = t.to_local() if hasattr(t, "to_local") else t
    return local.detach() if t.ndim == 3 else local.detach()[None]


def together(views: list[Tensor]) -> Tensor:
    return views[0] if len(views) == 1 else torch.cat(views)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def distance(X: Tensor) -> Tensor:
    E = X.mT @ X
    E.diagonal().sub_(1)
    return torch.linalg.matrix_norm(E) / len(X) ** 0.5


def any_process(p: Tensor, fault: bool) -> bool:
    """Whether any of the processes that hold shards of ``p`` found a fault: then all raise."""
    if not hasattr(p, "device_mesh"):
        return fault
    flag = torch.tensor(float(fault), device=matrices(p).device)
    for i in range(p.device_mesh.ndim):
        dist.all_reduce(flag, dist.ReduceOp.MAX, p.device_mesh.get_group(i))
    return bool(flag)


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 products as such, whatever shortcut the caller's own may take."""
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [s.fp32_precision for s in settings]
    try:
        for s in settings:
            s.fp32_precision = "ieee"
        yield
    finally:
        for s, precision in zip(settings, before, strict=True):
            s.fp32_precision = precision
