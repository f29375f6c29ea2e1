"""The least time that an op can take on a device: its FLOPs and its bytes over what the device can do."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import Call
from bench.timing import quartiles, rounds

# bytes/s and FLOP/s that large copies and matrix products reach. Any other device is measured at the start of a run.
FIGURES = {
    "NVIDIA H200": {"bytes": 4.3e12, "bfloat16": 788e12, "float16": 788e12, "tf32": 400e12, "float32": 55e12},
}

# FLOPs of the forward and the backward pass, from the first output and the call. Ops not here are bound by their bytes.
FLOPS: dict[str, Callable[[Tensor, Call], tuple[int, int]]] = {
    "interval_linear": lambda out, c: _twice(4 * out.numel() * c.args[2][0].numel()),
    "interval_conv2d": lambda out, c: _twice(4 * out.numel() * c.args[2][0].numel()),
    "ball_linear": lambda out, c: _twice(2 * out.numel() * c.args[2][0].numel() + 2 * c.args[2].numel()),
    "ball_conv2d": lambda out, c: _twice(2 * out.numel() * c.args[2][0].numel() + 2 * c.args[2].numel()),
    "pairwise_distance": lambda out, c: _twice(c.args[0].numel() * c.args[0].shape[-2]),  # symmetric: half of K x K
    "spectral_norm_estimate": lambda out, c: _power(c, out.numel() * c.args[0][0].numel() * c.args[0].shape[-2]),
    "conv2d_norm_estimate": lambda out, c: _power(c, c.args[2].numel() * c.args[0][0].numel()),  # by the output mask's size
}
FLOAT64 = {"spectral_norm_bound", "conv2d_norm_bound"}  # inside, whatever the dtype: no floor from the dtype's rate


def _twice(flops: int) -> tuple[int, int]:
    return flops, 2 * flops


def _power(call: Call, products: int) -> tuple[int, int]:
    """Two products per iteration and one at the end; the gradient is one of two vectors."""
    return 2 * products * (2 * call.options["iterations"] + 1), 2 * products


def set_arithmetic(arithmetic: str) -> None:
    """Whether float32 products on CUDA run in tf32, in matrix products and convolutions alike."""
    precision = "tf32" if arithmetic == "tf32" else "ieee"
    backends: Any = torch.backends
    backends.cuda.matmul.fp32_precision = precision
    backends.cudnn.conv.fp32_precision = precision


def rates(device: str, arithmetic: str) -> dict[str, float]:
    """``bytes`` and ``flops`` per second; empty where a listed device has no figure for this arithmetic."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    figures = next((f for key, f in FIGURES.items() if name.startswith(key)), None)
    if figures is None:
        return _measured(device, arithmetic)
    return {"bytes": figures["bytes"], "flops": figures[arithmetic]} if arithmetic in figures else {}


def _measured(device: str, arithmetic: str) -> dict[str, float]:
    dtype = torch.float32 if arithmetic == "tf32" else getattr(torch, arithmetic)
    N = 4096 if device == "cuda" else 1024
    a = torch.randn(N, N, device=device, dtype=dtype)
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    times = rounds({"product": lambda: a @ a, "copy": lambda: target.copy_(source)}, 5, device)
    fast = {name: quartiles(samples)[0] for name, samples in times.items()}
    return {"bytes": 8 * source.numel() / fast["copy"], "flops": 2 * N**3 / fast["product"]}


def floor(call: Call, outs: tuple[Tensor, ...], backward: bool, rate: dict[str, float]) -> float | None:
    """Seconds. Each tensor is read or written once per pass."""
    if not rate or call.name in FLOAT64:
        return None
    size = lambda ts: sum(t.numel() * t.element_size() for t in ts if isinstance(t, Tensor))
    moved = size(call.args) + size(outs)
    flops, again = FLOPS[call.name](outs[0], call) if call.name in FLOPS else (0, 0)
    if backward:
        moved, flops = 2 * moved + size(call.args), flops + again
    return max(moved / rate["bytes"], flops / rate["flops"])
