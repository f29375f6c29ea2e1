"""Peak memory of a local Lipschitz training step, bound, loss and backward pass, against a plain one of the same batch.

``python -m bench.memory NETWORK BATCH STEP`` prints the bytes of one step, which runs in a process of its own on the CPU: what
an earlier one left in the allocator would count.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import local

STEPS = ("nominal", "scalar", "translation")
BATCH = 256
TARGET = 2.5  # the most times a plain step's memory
_NETWORKS = {"small": local.small, **{name: build for name, (build, _) in local.NETWORKS.items()}}


def run(name: str, batch: int, device: str) -> dict[str, Any] | None:
    """None where the system does not tell: on the CPU only Linux does."""
    if device == "cpu" and not _STATUS.exists():
        return None
    measure = _on_cuda if device == "cuda" else _apart
    bytes_ = {step: measure(name, batch, step) for step in STEPS}
    ratios = {step: bytes_[step] / bytes_["nominal"] for step in STEPS[1:]}
    cells = "   ".join(f"{step} {ratio:.2f}x" for step, ratio in ratios.items())
    print(
        f"{name} local, batch {batch} memory, nominal {bytes_['nominal'] / 2**20:.0f} MiB   {cells} (target {TARGET})",
        flush=True,
    )
    return {"name": "local, memory", "size": f"{name}, batch {batch}", "bytes": bytes_, "ratios_of_bytes": ratios}


def _apart(name: str, batch: int, step: str) -> int:
    command = [sys.executable, "-m", "bench.memory", name, str(batch), step]
    return int(subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True).stdout)


def _on_cuda(name: str, batch: int, step: str) -> int:
    run = _step(name, batch, step, "cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def _here(name: str, batch: int, step: str) -> int:
    _step(name, 2, step, "cpu")()  # loads what is loaded once
    run = _step(name, batch, step, "cpu")
    before = _kilobytes("VmRSS")
    run()
    return 1024 * (_kilobytes("VmHWM") - before)


def _step(name: str, batch: int, step: str, device: str):
    return local.steps(*local.problem(_NETWORKS[name], batch, device))[step].run(backward=True)


_STATUS = Path("/proc/self/status")


def _kilobytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found, field
    return int(found.group(1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(_here(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
