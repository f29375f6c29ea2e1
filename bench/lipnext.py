"""LipNeXt's training steps: where their time and memory go, by the recipe's own loss and optimiser on random CIFAR images.

A step is taken as :func:`lipfast.train` takes it, without data loading. Times are means over the steps between two moves of
Lookahead; a projection onto the manifold is timed apart and counted by how seldom the recipe makes one.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.timing import Times, quartiles, rounds
from lipfast import beta_abs, models, spatial_shift
from lipfast.optim._matrices import distance, matrices
from lipfast.recipes.lipnext import Lipnext

TARGET = 0.08  # the optimiser's largest share of a step with L32W2048
_PIXELS = 16  # of a side, after the patches
_RECIPE = Lipnext.preset("cifar10")
_PHASES = ("forward", "backward", "clip", "optimizer")


@dataclass(frozen=True)
class Setting:
    depth: int
    width: int
    batch: int
    autocast: str = "bfloat16"
    checkpointing: bool = False
    compiled: str = ""  # "model", or "blocks": one block, once for all of them, which compiles sooner

    @property
    def model(self) -> str:
        return f"L{self.depth}W{self.width}"

    def __str__(self) -> str:
        extras = ", checkpointing" * self.checkpointing + f", compiled {self.compiled}" * bool(self.compiled)
        return f"LipNeXt {self.model}, batch {self.batch}, {self.autocast}{extras}"


BILLION = ((32, 4096), (64, 2896))
SETTINGS = {
    "cpu": [
        Setting(8, 256, 32, "float32"),
        Setting(8, 256, 32),
        Setting(8, 256, 32, checkpointing=True),
        Setting(8, 256, 32, compiled="blocks"),
    ],
    "cuda": [
        Setting(32, 2048, 256),
        Setting(32, 2048, 256, checkpointing=True),
        Setting(32, 1024, 256),
        Setting(32, 1024, 256, checkpointing=True),
        *(Setting(depth, width, 64, checkpointing=True) for depth, width in BILLION),
        Setting(32, 2048, 256, compiled="blocks"),
        Setting(32, 1024, 256, compiled="blocks"),
        Setting(32, 1024, 256, compiled="model"),  # last, for it takes minutes to compile
    ],
}
PASSES = {"cpu": (256, 32), "cuda": (2048, 256)}  # width, batch
TINY = [Setting(2, 16, 2, "float32"), Setting(2, 16, 2), Setting(2, 16, 2, checkpointing=True)]


def large(device: str, repeats: int, quick: bool) -> Iterator[dict[str, Any]]:
    """The passes over an image, the largest models' sizes, then a step in every setting. Each row as soon as it is there."""
    yield passes(16, 2, device, repeats) if quick else passes(*PASSES[device], device, repeats)
    yield from (count(depth, width) for depth, width in BILLION)
    for setting in TINY if quick else SETTINGS[device]:
        yield run(setting, device, 1 if quick else 3)


def run(setting: Setting, device: str, cycles: int) -> dict[str, Any]:
    """``cycles`` of Lookahead. Where it does not fit or compile, the row says so and has no times."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row: dict[str, Any] = {
        "name": "lipnext, training",
        "size": str(setting),
    }
    try:
        row |= _measure(setting, device, cycles)
    except torch.OutOfMemoryError:
        row["failed"] = f"out of memory, with {_memory()}"
    except (RuntimeError, AssertionError) as error:  # what torch.compile raises
        if not setting.compiled:
            raise
        row["failed"] = f"torch.compile: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    print(f"{setting}: {row['failed']}" if "failed" in row else f"{setting}:\n  {_line(row)}", flush=True)
    return row


def count(depth: int, width: int) -> dict[str, Any]:
    """On the meta device: nothing is stored."""
    with torch.device("meta"):
        model = models.lipnext(depth=depth, width=width)
    parameters, in_blocks = (sum(p.numel() for p in part.parameters()) for part in (model, model[2]))
    of_matrices = 2 * depth * width**2
    assert in_blocks == of_matrices + depth * (_PIXELS**2 + width), in_blocks
    assert parameters == in_blocks + 10 * (width + 1), parameters
    print(
        f"LipNeXt L{depth}W{width}: {of_matrices / 1e9:.3f} billion parameters in the matrices, {parameters:,} in all",
        flush=True,
    )
    return {"name": "lipnext, parameters", "size": f"L{depth}W{width}", "parameters": parameters, "in_matrices": of_matrices}


def passes(width: int, batch: int, device: str, repeats: int) -> dict[str, Any]:
    """The parts of a block in bfloat16, forward and backward, beside a copy of the same image."""
    torch.manual_seed(0)
    shape = (batch, width, _PIXELS, _PIXELS)
    image = torch.randn(shape, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
    of = lambda *size: torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True)
    bias, position, matrix = of(width), of(_PIXELS, _PIXELS), of(width, width)
    parts: dict[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]] = {
        "product": (lambda: F.linear(image.permute(0, 2, 3, 1), matrix).permute(0, 3, 1, 2), (image, matrix)),
        "spatial_shift": (lambda: spatial_shift(image), (image,)),
        "beta_abs": (lambda: beta_abs(image, 0.5, bias, position), (image, bias, position)),
    }
    target = torch.empty_like(image)
    turns: dict[str, Callable] = {"copy": lambda: target.copy_(image.detach())}
    seed = torch.randn_like(image)
    for name, (part, inputs) in parts.items():
        turns[name] = part
        turns[f"{name} backward"] = partial(torch.autograd.grad, part(), inputs, seed, retain_graph=True)
    times = rounds(turns, min(repeats, 9), device)
    seconds = {name: quartiles(samples) for name, samples in times.items()}
    numbers = image.numel()
    signs = numbers // 16  # bytes: a bit for each channel that is folded, half of all
    moved = {name: 4 * numbers + (signs if name.startswith("beta_abs") else 0) for name in turns if "product" not in name}
    rate = moved["copy"] / seconds["copy"][1]
    above = {name: seconds[name][1] * rate / moved[name] for name in moved if name != "copy"}
    flops = 2 * numbers * width / seconds["product"][1]
    print(f"LipNeXt's passes, {batch} images of {width} channels, bfloat16: a copy moves {rate / 1e9:.0f} GB/s")
    for name, times_floor in above.items():
        print(f"  {name:23} {seconds[name][1] * 1e3:9.3f} ms, {times_floor:.2f}x the time of its bytes at that rate")
    both = " + ".join(f"{seconds[name][1] * 1e3:.3f}" for name in ("product", "product backward"))
    block = _block_seconds(seconds)
    shares = {name: part / sum(block.values()) for name, part in block.items()}
    print(f"  {'product, there and back':23} {both} ms, {flops / 1e12:.2f} TFLOP/s forward")
    print("  of a block: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()), flush=True)
    return {
        "name": "lipnext, passes",
        "size": "x".join(map(str, shape)),
        "seconds": seconds,
        "bytes_per_second": rate,
        "flops": flops,
        "above_the_floor": above,
        "of_a_block": shares,
    }


def _block_seconds(seconds: dict[str, tuple[float, float, float]]) -> dict[str, float]:
    """Both ways, by part: two products, a shift and beta_abs."""
    both = lambda name: seconds[name][1] + seconds[f"{name} backward"][1]
    return {"product": 2 * both("product"), **{name: both(name) for name in ("spatial_shift", "beta_abs")}}


def _measure(setting: Setting, device: str, cycles: int) -> dict[str, Any]:
    torch.manual_seed(0)
    start = time.perf_counter()
    with torch.device(device):  # there the matrices' decompositions are quick
        model = models.lipnext(depth=setting.depth, width=setting.width, checkpointing=setting.checkpointing)
    _wait(device)
    built = time.perf_counter() - start
    plan = dataclasses.replace(_RECIPE, autocast=setting.autocast, retraction=0)  # timed apart
    optimizer: Any = plan.make_optimizer(model)
    _compile(model, setting.compiled)
    start = time.perf_counter()
    for _ in range(plan.lookahead):  # compiles, allocates, and gives Adam a past
        _step(plan, model, optimizer, _images(setting.batch, device), _Watch(device))
    _wait(device)
    first = time.perf_counter() - start
    times: Times = {phase: [] for phase in _PHASES}
    for _ in range(cycles):
        watches = [_Watch(device) for _ in range(plan.lookahead)]
        for watch in watches:
            _step(plan, model, optimizer, _images(setting.batch, device), watch)
        for phase, samples in zip(_PHASES, zip(*(watch.seconds() for watch in watches), strict=True), strict=True):
            times[phase].append(sum(samples) / len(samples))
    norm = _step_norm(optimizer)
    watch = _Watch(device)
    watch.mark()
    optimizer.retract()
    watch.mark()
    times["retraction"] = [seconds / _RECIPE.retraction for seconds in watch.seconds()]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    seconds = {phase: quartiles(samples) for phase, samples in times.items()}
    total = sum(middle for _, middle, _ in seconds.values())
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": {**seconds, "build": built, "first steps": first},
        "optimizer_share": (seconds["optimizer"][1] + seconds["retraction"][1]) / total,
        "images_per_second": setting.batch / total,
        "peak_bytes": peak,
        "step_norm": norm,
        "off_manifold": max(distance(X).item() for p in _orthogonal(optimizer)["params"] for X in matrices(p)),
    }


def _compile(model: Any, what: str) -> None:
    torch.compiler.reset()  # or it takes another width for one that varies
    if what == "model":
        model.compile()
    elif what == "blocks":
        model[2]._block = torch.compile(model[2]._block)


def _step(plan: Lipnext, model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor], watch: "_Watch") -> None:
    """As in lipfast/train.py, when the radius has grown."""
    parameters = list(model.parameters())
    watch.mark()
    loss, _ = plan.loss(model, *batch, plan.epochs / 2, {})
    optimizer.zero_grad()
    watch.mark()
    loss.backward()
    watch.mark()
    nn.utils.clip_grad_norm_(parameters, plan.clip)
    watch.mark()
    optimizer.step()
    plan.project(model)
    watch.mark()


def _images(batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Others at every step, so that Adam's steps are of the size that noise gives them."""
    return torch.rand(batch, 3, 2 * _PIXELS, 2 * _PIXELS, device=device), torch.randint(10, (batch,), device=device)


class _Watch:
    """Moments as the device meets them; between two of a GPU, its waits for the host count."""

    def __init__(self, device: str):
        self.device = device
        self.moments: list[Any] = []

    def mark(self) -> None:
        if self.device == "cuda":
            self.moments.append(torch.cuda.Event(enable_timing=True))
            self.moments[-1].record()
        else:
            self.moments.append(time.perf_counter())

    def seconds(self) -> list[float]:
        _wait(self.device)
        if self.device == "cuda":
            return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self.moments)]
        return [after - before for before, after in pairwise(self.moments)]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _step_norm(optimizer: Optimizer) -> float:
    """Of the last step's skew matrices the largest Frobenius norm, which decides about the order of FastExp."""
    group = _orthogonal(optimizer)
    (b1, b2), sizes = group["betas"], []
    for p in group["params"]:
        state = optimizer.state[p]
        step = int(state["step"])
        for m, v in zip(matrices(state["exp_avg"]), matrices(state["exp_avg_sq"]), strict=True):
            sizes.append((m / ((v / (1 - b2**step)).sqrt() + group["eps"])).norm() * group["lr"] / (1 - b1**step))
    return torch.stack(sizes).max().item()


def _orthogonal(optimizer: Optimizer) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if group["orthogonal"])


def _memory() -> str:
    _, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB reached of {total / 2**30:.0f}"


def _line(row: dict[str, Any]) -> str:
    phases = ", ".join(f"{phase} {row['seconds'][phase][1] * 1e3:.2f}" for phase in (*_PHASES, "retraction"))
    aimed = f" (target {TARGET:.0%})" if row["size"].startswith("LipNeXt L32W2048") else ""
    peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 2**30:.1f} GiB"
    return (
        f"{phases} ms, the optimizer {row['optimizer_share']:.1%}{aimed}, {row['images_per_second']:.1f} images/s{peak}; "
        f"built in {row['seconds']['build']:.1f} s, norm of a step {row['step_norm']:.2g}, off the manifold "
        f"{row['off_manifold']:.1e}"
    )
