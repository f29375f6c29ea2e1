"""A block of LipNeXt, both ways, beside the same mathematics in plain torch: rolls, a concatenation, absolute values."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import timing, work
from bench.problem import COMPILED, DEFINITION, OWN, Problem
from lipfast.nn import LipNeXtBlocks
from lipfast.ops.beta_abs import reference as beta_abs
from lipfast.ops.spatial_shift import reference as spatial_shift
from tests.checks import assert_near

PIXELS = 16  # of a side, after the patches
SIZES = {"cpu": [(256, 32)], "cuda": [(1024, 256), (2048, 256)]}  # width, batch
TINY = (8, 2)


def problems(width: int, batch: int, device: str, dtype: str, quick: bool) -> Iterator[Problem]:
    torch.manual_seed(0)
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    block = LipNeXtBlocks(1, width, (PIXELS, PIXELS)).to(device, kind)
    x = torch.randn(batch, width, PIXELS, PIXELS, device=device, dtype=kind)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    parameters = [block.rotation, block.mixing, block.position, block.bias]
    candidates: dict[str, Callable] = {OWN: lambda x, *_: block(x), DEFINITION: _plain}
    if not quick:
        torch.compiler.reset()
        candidates |= {COMPILED: torch.compile(_plain), "lipfast compiled": torch.compile(candidates[OWN])}
    want = _plain(x.detach().double(), *(p.detach().double() for p in parameters))
    for run in candidates.values():
        assert_near(run(x, *parameters), want, kind if dtype != "tf32" else torch.float16, slack=2)
    flops = 2 * 2 * x.numel() * width
    nominal = work.Work(2 * x.numel() * x.element_size() + sum(p.numel() * p.element_size() for p in parameters), flops)
    for direction in ("forward", "both"):
        turns = {who: _turn(run, x, parameters, direction == "both") for who, run in candidates.items()}
        if device == "cuda" and direction == "forward":
            turns |= timing.graphed("lipfast graph", turns[OWN])
        floor = nominal * (1 if direction == "forward" else 3)
        yield Problem("lipnext_block", f"width {width}, batch {batch}", direction, turns, dtype=dtype, work=floor)


def _plain(x: Tensor, rotation: Tensor, mixing: Tensor, position: Tensor, bias: Tensor) -> Tensor:
    """As the paper writes it: both matrices, and the first once more, at every pixel."""
    mixed = lambda x, matrix: F.linear(x.permute(0, 2, 3, 1), matrix).permute(0, 3, 1, 2)
    x = mixed(spatial_shift(mixed(x + position[0], rotation[0])), rotation[0].mT)
    return beta_abs(mixed(x, mixing[0]), 0.5, bias[0])


def _turn(run: Callable, x: Tensor, parameters: list[Tensor], backward: bool) -> Callable[[], object]:
    if not backward:
        return torch.no_grad()(lambda: run(x, *parameters))
    seed = torch.randn_like(x)
    return lambda: torch.autograd.grad(run(x, *parameters), [x, *parameters], seed)
