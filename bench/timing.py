"""Times in turns: every round takes each candidate once, so a busy machine slows all alike and ratios stay honest."""

import math
import statistics
import time
from collections.abc import Callable

import torch

Times = dict[str, list[float]]
_SHORTEST = 2e-3  # seconds: shorter calls are repeated inside one sample
_LONGEST = 12.0  # seconds for all rounds


def rounds(candidates: dict[str, Callable[[], object]], repeats: int, device: str) -> Times:
    """Seconds per call of each candidate, one sample per round, after two rounds that do not count.

    Where a round takes long there are fewer, but not fewer than three if so many were asked for, and all count.
    """
    clock = _cuda_clock() if device == "cuda" else _cpu_clock
    loops, whole = {}, 0.0
    for name, run in candidates.items():
        run()  # compiles, allocates
        seconds = clock(run, 1)
        loops[name] = 1 if device == "cuda" else max(1, math.ceil(_SHORTEST / max(seconds, 1e-7)))
        whole += seconds * loops[name]
    warm = 2 if whole < 1 else 0
    repeats = min(repeats, max(3, int(_LONGEST / whole)))
    times: Times = {name: [] for name in candidates}
    for turn in range(repeats + warm):
        for name, run in candidates.items():
            seconds = clock(run, loops[name])
            if turn >= warm:
                times[name].append(seconds)
    return times


def _cpu_clock(run: Callable, loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        run()
    return (time.perf_counter() - start) / loops


def _cuda_clock() -> Callable[[Callable, int], float]:
    cache = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def clock(run: Callable, loops: int) -> float:
        cache.zero_()  # every call finds its operands in device memory
        torch.cuda._sleep(1_000_000)  # half a millisecond in which the host queues the launches: kernels are timed, not Python
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    if len(samples) < 2:
        return (samples[0],) * 3
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def ratios(times: Times, other: str, own: str) -> list[float]:
    """How many times longer ``other`` took than ``own`` in every round, each a pair taken side by side."""
    return [a / b for a, b in zip(times[other], times[own], strict=True)]


def graphed(name: str, run: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """``run`` as a captured CUDA graph, replayed without the host; nothing where it waits for the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    captured = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(captured):
            run()
    except RuntimeError as error:
        print(f"note: no CUDA graph of {name}: {str(error).strip().partition(chr(10))[0]}")
        torch.cuda.synchronize()
        return {}
    return {name: captured.replay}
