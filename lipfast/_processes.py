"""The processes that train together: one, or as many as torchrun started."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """This process's place among ``count``, and its device."""

    rank: int
    count: int
    device: torch.device

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes, in one exchange per dtype."""
        if self.count == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for t in tensors:
            by_dtype.setdefault(t.dtype, []).append(t)
        for group in by_dtype.values():
            flat = torch.cat([t.reshape(-1) for t in group])
            dist.all_reduce(flat)
            for t, mean in zip(group, (flat / self.count).split([t.numel() for t in group]), strict=True):
                t.copy_(mean.view_as(t))

    def average_buffers(self, model: nn.Module) -> None:
        """Batch norm's running statistics become those of all processes."""
        self.average(buffer for buffer in model.buffers() if buffer.is_floating_point())

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()


@contextmanager
def processes(device: str | torch.device | None) -> Iterator[Processes]:
    """Joins the group that torchrun's environment describes, or the one that exists already; else a single process."""
    cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    own = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    together = own or dist.is_initialized()
    if cuda and together:
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    else:
        place = torch.device(device if device is not None else "cuda" if cuda else "cpu")
    if own:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), place) if together else Processes(0, 1, place)
    finally:
        if own:
            dist.destroy_process_group()
