"""``python -m bench [NAME ...]``: checks ops and whole bounds, then times them beside what a user would otherwise run."""

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import (
    block,
    cases,
    ceilings,
    compare,
    crown,
    grafting,
    guard,
    jacobian,
    liplt,
    lipnext,
    local,
    manifold,
    memory,
    networks,
    ops,
    problem,
    record,
    tables,
)

DTYPES = ["float32", "tf32", "bfloat16", "float16", "float64"]
BOUNDS = ["interval", "local", "liplt", "jacobian", "crown", "manifold", "lipnext_block"]
LARGE = ["liplt_large", "lipnext_training", "grafting_scores", "local_memory"]
GROUPS = {"bounds": BOUNDS, "large": LARGE}  # and "ops"


def main() -> int:
    a = _arguments()
    try:
        _check(a)
        torch.set_num_threads(a.threads)
        if a.compare:
            return compare.run(*a.compare)
        if a.tables:
            return tables.write(a.tables)
        if a.check:
            return guard.run(a.check, a.device, a.repeats, a.quick)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return _measure(a)


def _measure(a: argparse.Namespace) -> int:
    warnings.simplefilter("ignore")  # what peers and torch.compile remark would stand between the lines
    logging.disable(logging.INFO)
    facts = record.circumstances(a.device)
    print(
        "lipfast {lipfast}, torch {torch}".format(**facts["versions"]), "on", facts["machine"]["gpu"] or facts["machine"]["cpu"]
    )
    missing = [name for name, loaded in facts["kernels"].items() if not loaded]
    if a.device == "cpu" and "cpu" in missing:
        print("note: no compiled kernels here, so every op is its reference: pip install -e .")
    limits = None if a.quick else ceilings.Ceilings(a.device)
    found: dict[str, Any] = {**facts, "ceilings": None, "results": []}
    print(problem.HEAD)
    for dtype in a.dtype:
        ceilings.set_arithmetic(dtype)
        if limits:
            limits.measure(dtype)
        for p in _problems(a, dtype):
            found["results"].append(problem.measure(p, a.repeats, a.device, limits))
            _save(a, found, limits)
    ceilings.set_arithmetic("float32")
    for row in _large(a):
        found["results"].append(row)
        _save(a, found, limits)  # the next one may not fit, or be stopped
    return 0


def _save(a: argparse.Namespace, found: dict[str, Any], limits: ceilings.Ceilings | None) -> None:
    if a.json:
        record.write(a.json, {**found, "ceilings": limits and limits.record()})


def _problems(a: argparse.Namespace, dtype: str) -> Iterator[problem.Problem]:
    for name in (n for n in a.names if n in cases.names()):
        yield from ops.problems(name, a.device, dtype, a.outward, a.quick, beside=not a.guard)
    if "lipnext_block" in a.names:
        for size in [block.TINY] if a.quick else block.SIZES[a.device]:
            yield from block.problems(*size, a.device, dtype, a.quick)
    if dtype == "float32":
        yield from _whole_bounds(a)


def _whole_bounds(a: argparse.Namespace) -> Iterator[problem.Problem]:
    if "interval" in a.names:
        for name, build in {"small": networks.small}.items() if a.quick else networks.NETWORKS.items():
            yield from networks.problems(name, build, 2 if a.quick else 64, a.device)
    if "local" in a.names:
        for name, (net, batch) in {"small": (local.small, 2)}.items() if a.quick else local.NETWORKS.items():
            yield from local.problems(name, net, batch, a.device)
    if "liplt" in a.names:
        for name, (make, shape) in {"small": (liplt.small, (3, 32, 32))}.items() if a.quick else liplt.NETWORKS.items():
            yield from liplt.problems(name, make, shape, a.device)
        for name in [] if a.quick else liplt.PROOFS:
            yield liplt.proof(name, *liplt.NETWORKS[name], a.device)
    if "jacobian" in a.names:
        for name, case in (jacobian.SMALL if a.quick else jacobian.NETWORKS).items():
            yield jacobian.problem(name, *case, a.device)
    if "crown" in a.names:
        for name, case in (jacobian.SMALL if a.quick else crown.NETWORKS).items():
            yield from crown.problems(name, *case, a.device)
    if "manifold" in a.names:
        for shape in manifold.TINY if a.quick else manifold.SIZES:
            yield from manifold.problems(shape, a.device)


def _large(a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if "liplt_large" in a.names:
        yield liplt.large(a.device, *(liplt.TINY if a.quick else liplt.LARGE))
    if "lipnext_training" in a.names:
        yield from lipnext.large(a.device, a.repeats, a.quick)
    if "grafting_scores" in a.names:
        scored = grafting.run("cnn_b" if a.quick else "conv_huge", grafting.BATCH, a.device)
        yield from [] if scored is None else [scored]
    if "local_memory" in a.names:
        used = memory.run("small", 64, a.device) if a.quick else memory.run("6C2F", memory.BATCH, a.device)
        yield from [] if used is None else [used]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    known = "an op (any of lipfast.ops), a bound ({}), a long run ({}), or all of a kind: ops, bounds, large"
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=known.format(", ".join(BOUNDS), ", ".join(LARGE)) + "; none: ops and bounds",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="of ops and blocks")
    parser.add_argument("--outward", action="store_true", help="the boxes that hold in floating point")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=None, metavar="N", help="rounds (9)")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="where to keep the results, after each of them (bench/results/<machine>/bench.json)",
    )
    parser.add_argument("--quick", action="store_true", help="every check, tiny sizes, no meaningful time")
    parser.add_argument("--guard", action="store_true", help="ops beside their definitions alone, as --check takes them")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="two result files of one machine")
    instead.add_argument(
        "--check",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="whether an op has lost more than 15 %% against FILE (this machine's committed results)",
    )
    instead.add_argument(
        "--tables", type=Path, nargs="+", metavar="FILE", help="docs/speed.md, its plots and the README's table"
    )
    return parser.parse_args()


def _check(a: argparse.Namespace) -> None:
    """Resolves what has a default; raises ValueError for what cannot be run here."""
    a.names = names(a.names)
    a.repeats = (2 if a.quick else 9) if a.repeats is None else a.repeats
    for option in ("threads", "repeats"):
        if getattr(a, option) < 1:
            raise ValueError(f"--{option}: at least 1 expected, got {getattr(a, option)}")
    if a.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    if a.device == "cpu" and "tf32" in a.dtype:
        raise ValueError("--dtype: an arithmetic of the CPU expected, got tf32")
    committed = record.RESULTS / record.machine(a.device)
    a.json = committed / ("guard.json" if a.guard else "bench.json") if a.json == Path() else a.json
    a.check = committed / "guard.json" if a.check == Path() else a.check


def names(asked: list[str]) -> list[str]:
    """Groups resolved. Raises ValueError for a name that there is not."""
    groups = {"ops": cases.names(), **GROUPS}
    every = [name for group in groups.values() for name in group]
    if unknown := [name for name in asked if name not in (*every, *groups)]:
        raise ValueError(f"no such op or bound: {', '.join(unknown)}; there are {', '.join([*every, *groups])}")
    return [name for word in asked or ["ops", "bounds"] for name in groups.get(word, [word])]


if __name__ == "__main__":
    sys.exit(main())
