"""The regression guard: an op's time over its definition's, beside the ratio that a committed result file holds.

Both are timed in turns, so a busy machine slows both. An op that lost more than the tolerance is measured once more; one that
loses it twice in a row fails.
"""

import itertools
from pathlib import Path
from typing import Any

from bench import cases, compare, ops, record
from bench.problem import DEFINITION, OWN, Problem
from bench.timing import quartiles, ratios, rounds

LOSS = 0.15


def run(path: Path, device: str, repeats: int, quick: bool) -> int:
    """0 if every op in the file is as fast, beside its definition, as the file says; else 1."""
    committed = record.read(path)
    here = record.circumstances(device)
    compare.check_machine(Path("this machine"), here, path, committed)
    if committed["versions"]["torch"] != here["versions"]["torch"]:
        want, got = committed["versions"]["torch"], here["versions"]["torch"]
        raise ValueError(f"this machine: torch {want} expected, with which {path} was made, got {got}")
    wanted = {key: row for key, row in compare.rows(committed).items() if key[0] in cases.names()}
    if not wanted:
        raise ValueError(f"{path}: results of ops expected, got none")
    lost = [key for name in dict.fromkeys(key[0] for key in wanted) for key in _lost(name, wanted, device, repeats, quick)]
    for key in lost:
        print("bench: lost more than {:.0%} twice: {}".format(LOSS, ", ".join(key)))
    print(f"{len(wanted)} measured, {len(lost)} lost")
    return 1 if lost else 0


def _lost(name: str, wanted: dict, device: str, repeats: int, quick: bool) -> list[compare.Key]:
    lost = []
    dtypes = dict.fromkeys(key[2] for key in wanted if key[0] == name)
    problems = itertools.chain.from_iterable(ops.problems(name, device, dtype, False, quick, beside=False) for dtype in dtypes)
    for problem in problems:
        key = (problem.name, problem.size, problem.dtype, problem.direction)
        if key in wanted and not _kept(problem, wanted[key], device, repeats):
            lost.append(key)
    return lost


def _kept(problem: Problem, row: dict[str, Any], device: str, repeats: int) -> bool:
    want = row["ratios"][DEFINITION][1]
    for attempt in ("", ", again"):
        times = rounds({who: problem.turns[who] for who in (OWN, DEFINITION)}, repeats, device)
        got = quartiles(ratios(times, DEFINITION, OWN))[1]
        kept = got >= want * (1 - LOSS)
        verdict = ("kept" if kept else "LOST") + attempt
        print(f"{problem.name:22} {problem.size:34} {problem.direction:8} {want:6.2f} {got:6.2f} {verdict}", flush=True)
        if kept:
            return True
    return False
