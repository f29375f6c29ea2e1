"""What a machine can do at most, measured before anything else: how fast it copies, and how fast it multiplies matrices.

From an op's bytes and FLOPs follow its floor, the least time that it can take, and the share of the ceilings that it reaches.
A copy is of as many bytes as the op moves: what fits a cache of a CPU may stay there, and what does not must come from memory.
On a GPU every call finds its operands in device memory, large or small.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import torch

from bench.timing import rounds

SIZES = [1 << n for n in range(16, 31, 2)]  # bytes read and written: 64 KiB to 1 GiB
SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices


@dataclass(frozen=True)
class Work:
    """The least that must be done: each tensor read or written once, and the FLOPs of the best algorithm known."""

    bytes: int
    flops: int = 0

    def __mul__(self, times: int) -> "Work":
        return Work(times * self.bytes, times * self.flops)


class Ceilings:
    """Measured when first asked for, once per size and dtype: the best of some rounds, for no op can do better."""

    def __init__(self, device: str):
        self.device = device
        self.copy: dict[int, float] = {}  # bytes per second of a copy that moves so many
        self.product: dict[str, float] = {}  # FLOP/s by dtype

    def measure(self, dtype: str) -> None:
        """Memory's and the product's, before anything else is timed; those of the caches follow as they are asked for."""
        self.bytes_per_second(SIZES[-1])
        self.flops_per_second(dtype)

    def of(self, work: Work, dtype: str) -> dict[str, Any]:
        """The work with its ``floor`` in seconds and the ceilings that set it."""
        rate, speed = self.bytes_per_second(work.bytes), self.flops_per_second(dtype)
        floor = max(work.bytes / rate, work.flops / speed)
        return {"bytes": work.bytes, "flops": work.flops, "bytes_per_second": rate, "flops_per_second": speed, "floor": floor}

    def bytes_per_second(self, moved: int) -> float:
        size = SIZES[min(bisect_left(SIZES, moved), len(SIZES) - 1)]
        if size not in self.copy:
            source = torch.ones(size // 2, dtype=torch.int8, device=self.device)
            target = torch.empty_like(source)
            times = rounds({"copy": lambda: target.copy_(source)}, 9, self.device)
            self.copy[size] = size / min(times["copy"])
        return self.copy[size]

    def flops_per_second(self, dtype: str) -> float:
        if dtype not in self.product:
            N = SIDE[self.device]
            a = torch.randn(N, N, device=self.device, dtype=torch.float32 if dtype == "tf32" else getattr(torch, dtype))
            out = torch.empty_like(a)
            times = rounds({"product": lambda: torch.mm(a, a, out=out)}, 9, self.device)
            self.product[dtype] = 2 * N**3 / min(times["product"])
        return self.product[dtype]

    def record(self) -> dict[str, Any]:
        return {
            "bytes_per_second": {str(size): rate for size, rate in sorted(self.copy.items())},
            "flops_per_second": self.product,
        }


def set_arithmetic(dtype: str) -> None:
    """Whether float32 products on CUDA run in tf32, in matrix products and convolutions alike."""
    precision = "tf32" if dtype == "tf32" else "ieee"
    backends: Any = torch.backends
    backends.cuda.matmul.fp32_precision = precision
    backends.cudnn.conv.fp32_precision = precision
