"""One thing that is timed: who takes part, on what, and what the machine would need at least."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.ceilings import Ceilings, Work
from bench.timing import quartiles, ratios, rounds

OWN = "lipfast"
DEFINITION, COMPILED = "torch", "compiled"  # the same mathematics in plain torch, and under torch.compile
HEAD = (
    f"{'name':22} {'size':34} {'dtype':9} {'pass':8} {'ms':>10} {'spread':>7} {'floor ms':>9} {'x floor':>7}   others over ours"
)


@dataclass
class Problem:
    """``turns`` holds lipfast's own first; each is called as often as the others. Checked already: nothing wrong is timed."""

    name: str
    size: str
    direction: str  # "forward", or "both" with the backward pass
    turns: dict[str, Callable[[], object]]
    dtype: str = "float32"
    work: Work | None = None  # None: not known
    targets: dict[str, float] = field(default_factory=dict)  # the least ratio aimed at
    scale: dict[str, float] = field(default_factory=dict)  # of what a turn does to what is compared: half the batch, 2
    facts: dict[str, Any] = field(default_factory=dict)  # what else was measured


def measure(problem: Problem, repeats: int, device: str, ceilings: Ceilings | None) -> dict[str, Any]:
    """Times a problem and prints its line; the row of the result file."""
    times = rounds(problem.turns, repeats, device)
    times = {who: [problem.scale.get(who, 1.0) * s for s in samples] for who, samples in times.items()}
    row = {
        "name": problem.name,
        "size": problem.size,
        "dtype": problem.dtype,
        "pass": problem.direction,
        "seconds": {who: quartiles(samples) for who, samples in times.items()},
        "ratios": {who: quartiles(ratios(times, who, OWN)) for who in times if who != OWN},
        "targets": problem.targets,
        "work": None,
        **problem.facts,
    }
    if ceilings and problem.work:
        row["work"] = ceilings.of(problem.work, problem.dtype)
    print(line(row), flush=True)
    return row


def line(row: dict[str, Any]) -> str:
    low, middle, high = row["seconds"][OWN]
    floor = row["work"]["floor"] if row["work"] else None
    against = f"{floor * 1e3:9.4f} {middle / floor:7.2f}" if floor else f"{'-':>9} {'-':>7}"
    cells = [_cell(who, *quarters, row["targets"].get(who)) for who, quarters in row["ratios"].items()]
    return (
        f"{row['name']:22} {row['size']:34} {row['dtype']:9} {row['pass']:8} {middle * 1e3:10.4f} "
        f"{(high - low) / middle:7.1%} {against}   {', '.join(cells)}"
    )


def _cell(who: str, low: float, middle: float, high: float, target: float | None) -> str:
    return f"{who} {middle:.2f}x" + (f" (target {target:g})" if target else "")
