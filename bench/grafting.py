"""Scoring ConvHuge's units for grafting: time per calibration image, and peak memory, which must not grow with their number.

``python -m bench.grafting`` runs it on the CPU. ``python -m bench.grafting NETWORK BATCH BATCHES`` prints what one call takes;
each runs in a process of its own: what an earlier one left in the allocator would count.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.memory import _STATUS, _kilobytes
from lipfast import models
from lipfast.grafting import score, select

EPS = 2 / 255
BATCH = 8
BATCHES = (2, 16)  # few and many
CALIBRATION = 1000  # images
# Large blocks go back to the system at once: else memory is what the allocator keeps of blocks that fit no more.
_EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def run(name: str = "conv_huge", batch: int = BATCH, device: str = "cpu") -> dict[str, Any] | None:
    """None where the system does not tell the memory: on the CPU only Linux does."""
    if device == "cpu" and not _STATUS.exists():
        return None
    measure = _measured if device == "cuda" else _apart
    used = [measure(name, batch, n, device, _EXACT)["bytes"] for n in BATCHES]
    timed = measure(name, batch, BATCHES[1], device)
    each = timed["score"] / (batch * BATCHES[1])
    print(
        f"{name} grafting scores, {timed['units']} units, batch {batch} {each * 1e3:8.2f} ms per image, "
        f"{each * CALIBRATION:.1f} s for {CALIBRATION}   select {timed['select']:.2f} s   "
        f"memory of {BATCHES[0]} and {BATCHES[1]} batches {used[0] / 2**20:.1f} and {used[1] / 2**20:.1f} MiB",
        flush=True,
    )
    seconds = {"image": each, "select": timed["select"]}
    return {"name": "grafting scores", "size": f"{name}, batch {batch}", "batches": BATCHES, "seconds": seconds, "bytes": used}


def _apart(name: str, batch: int, batches: int, device: str, environment: dict[str, str] | None = None) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.grafting", name, str(batch), str(batches)]
    env = {**os.environ, **(environment or {})}
    out = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True, check=True).stdout
    return json.loads(out)


def _measured(name: str, batch: int, batches: int, device: str, _: object = None) -> dict[str, float]:
    """Seconds of scoring and of selecting, bytes above those of the model and its images."""
    torch.manual_seed(0)
    model = models.build(name).to(device)
    x = torch.rand(batch * batches, 3, 32, 32, device=device)
    score(model, x[:1], EPS, progress=False)  # loads what is loaded once
    before, peak = _memory(device)
    start = time.perf_counter()
    scores = score(model, x, EPS, batch_size=batch, progress=False)
    units = sum(t.numel() for t in scores.count.values())
    scored, used = time.perf_counter(), peak() - before
    masks = select(model, scores)
    assert any(mask.any() for mask in masks.values())
    return {"units": units, "score": scored - start, "select": time.perf_counter() - scored, "bytes": used}


def _memory(device: str):
    """What is in use, and what asks for the most that ever was."""
    if device == "cpu":
        return 1024 * _kilobytes("VmRSS"), lambda: 1024 * _kilobytes("VmHWM")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        print(json.dumps(_measured(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "cpu")))
    else:
        run()
