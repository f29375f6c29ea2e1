"""``python -m bench``: checks every op, then times it on its test's large cases. ``--peers``: whole networks."""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import cases, floors, grafting, jacobian, liplt, lipnext, local, manifold, memory, networks, ops, record

DTYPES = ["float32", "tf32", "bfloat16", "float16", "float64"]
LARGE = ["liplt", "lipnext", "grafting"]
PEERS = ["interval", "local", "liplt", "manifold", "jacobian", "memory"]


def main() -> int:
    a = _arguments()
    torch.set_num_threads(a.threads)
    facts = record.circumstances(a.device)
    print(
        "lipfast {lipfast}, torch {torch}".format(**facts["versions"]), "on", facts["machine"]["gpu"] or facts["machine"]["cpu"]
    )
    missing = [name for name, loaded in facts["kernels"].items() if not loaded]
    if a.device == "cpu" and "cpu" in missing:
        print("note: no compiled kernels here, so every op is its reference: pip install -e .")
    results: list[dict] = []
    if a.ops or not (a.peers or a.large):
        results += _time_ops(a)
    _write(a, results)
    for row in itertools.chain(_time_networks(a), _time_large(a)):
        results.append(row)
        _write(a, results)  # the next one may not fit, or be stopped
    return 0


def _write(a: argparse.Namespace, results: list[dict]) -> None:
    if a.json:
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps({**record.circumstances(a.device), "results": results}, indent=1) + "\n")


def _time_large(a: argparse.Namespace) -> Iterator[dict]:
    if "liplt" in a.large:
        yield liplt.large(a.device, *(liplt.TINY if a.quick else liplt.LARGE))
    if "lipnext" in a.large:
        yield from lipnext.large(a.device, a.repeats, a.quick)
    if "grafting" in a.large:
        scored = grafting.run("cnn_b" if a.quick else "conv_huge", grafting.BATCH, a.device)
        yield from [] if scored is None else [scored]


def _time_networks(a: argparse.Namespace) -> Iterator[dict]:
    if "interval" in a.peers:
        for name, build in {"small": networks.small}.items() if a.quick else networks.NETWORKS.items():
            yield from networks.run(name, build, a.device, 2 if a.quick else 64, a.repeats)
    if "local" in a.peers:
        for name, (net, batch) in {"small": (local.small, 2)}.items() if a.quick else local.NETWORKS.items():
            yield from local.run(name, net, batch, a.device, min(a.repeats, 5))
    if "liplt" in a.peers:
        for name, (make, shape) in {"small": (liplt.small, (3, 32, 32))}.items() if a.quick else liplt.NETWORKS.items():
            yield from liplt.run(name, make, shape, a.device, min(a.repeats, 9))
        for name in [] if a.quick else liplt.PROOFS:
            yield liplt.prove(name, *liplt.NETWORKS[name], a.device, 3)
    if "manifold" in a.peers:
        for shape in manifold.TINY if a.quick else manifold.SIZES:
            yield from manifold.run(shape, a.device, min(a.repeats, 9))
    if "jacobian" in a.peers:
        for name, case in (jacobian.SMALL if a.quick else jacobian.NETWORKS).items():
            yield from jacobian.run(name, *case, a.device, min(a.repeats, 3))
    if "memory" in a.peers:
        used = memory.run("small", 64, a.device) if a.quick else memory.run("6C2F", memory.BATCH, a.device)
        yield from [] if used is None else [used]


def _time_ops(a: argparse.Namespace) -> list[dict]:
    print(ops.HEAD)
    rows = []
    for dtype in a.dtype:
        floors.set_arithmetic(dtype)
        rate = {} if a.quick else floors.rates(a.device, dtype)
        for name in a.ops or cases.names():
            rows += ops.run(name, a.device, dtype, a.outward, a.repeats, a.quick, rate)
    return rows


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help="all, if none is named")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--outward", action="store_true", help="the boxes that hold in floating point")
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, metavar="NAME", help=f"beside others' code: {', '.join(PEERS)}; or all"
    )
    parser.add_argument(
        "--large",
        nargs="*",
        choices=LARGE,
        metavar="NAME",
        help="minutes: liplt, 1000 classes and ResNet-50's size in 24 GiB; lipnext, training; grafting, scores; or all",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=None, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="every check, tiny sizes, no meaningful time")
    a = parser.parse_args()
    if unknown := set(a.ops) - set(cases.names()):
        parser.error(f"no such op: {', '.join(sorted(unknown))}; there are {', '.join(cases.names())}")
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if a.device == "cpu" and "tf32" in a.dtype:
        parser.error("--dtype tf32 is an arithmetic of --device cuda")
    a.peers, a.large = (every if chosen == [] else chosen or [] for every, chosen in ((PEERS, a.peers), (LARGE, a.large)))
    a.repeats = a.repeats or (2 if a.quick else 20)
    return a


if __name__ == "__main__":
    sys.exit(main())
