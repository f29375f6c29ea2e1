"""Two result files of one machine: what became faster, what slower, and what the spread does not tell apart."""

from pathlib import Path
from typing import Any

from bench import record
from bench.problem import DEFINITION, OWN

Quartiles = tuple[float, float, float]
Key = tuple[str, str, str, str]


def run(old: Path, new: Path) -> int:
    """Prints a line for every row that both have; 1 if any became slower, else 0."""
    before, after = record.read(old), record.read(new)
    check_machine(new, after, old, before)
    first, second = rows(before), rows(after)
    shared = [key for key in first if key in second]
    print(f"{'name':26} {'size':34} {'dtype':9} {'pass':8} {'by':9} {'old ms':>10} {'new ms':>10} {'change':>8}  verdict")
    verdicts = []
    for key in shared:
        by, change, verdict = judge(first[key], second[key])
        own = [row["seconds"][OWN][1] * 1e3 for row in (first[key], second[key])]
        print(f"{key[0]:26} {key[1]:34} {key[2]:9} {key[3]:8} {by:9} {own[0]:10.4f} {own[1]:10.4f} {change:+8.1%}  {verdict}")
        verdicts.append(verdict)
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("faster", "slower", "not told apart"))
    print(f"{counts}; only in {old}: {len(first) - len(shared)}, only in {new}: {len(second) - len(shared)}")
    return 1 if "slower" in verdicts else 0


def check_machine(path: Path, found: dict[str, Any], other: Path, expected: dict[str, Any]) -> None:
    """Raises ValueError where numbers come from other machines, threads or instruction sets."""
    for what in ("cpu", "gpu", "threads", "instruction_set"):
        got, want = found["machine"].get(what), expected["machine"].get(what)
        if got != want:
            raise ValueError(f"{path}: the machine of {other} expected, with {what} {want!r}, got {got!r}")


def rows(found: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """Those with times of lipfast, by what was timed."""
    timed = [row for row in found["results"] if OWN in row.get("seconds", {}) and "pass" in row]
    return {(row["name"], row["size"], row["dtype"], row["pass"]): row for row in timed}


def cost(row: dict[str, Any], relative: bool) -> Quartiles:
    """Seconds, or times of the definition, which a busy machine slows as much."""
    if not relative:
        return tuple(row["seconds"][OWN])
    low, middle, high = row["ratios"][DEFINITION]
    return 1 / high, 1 / middle, 1 / low


def judge(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, float, str]:
    """By what the two were compared, the change of lipfast's cost, and a verdict: quartiles that overlap tell nothing."""
    relative = DEFINITION in old["ratios"] and DEFINITION in new["ratios"]
    before, after = cost(old, relative), cost(new, relative)
    change = after[1] / before[1] - 1
    if after[0] <= before[2] and before[0] <= after[2]:
        verdict = "not told apart"
    else:
        verdict = "slower" if change > 0 else "faster"
    return "x torch" if relative else "seconds", change, verdict
