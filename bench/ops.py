"""Ops against their references: first right, then fast."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from bench import cases, floors, peers
from bench.timing import quartiles, ratio, rounds

HEAD = f"{'op':22} {'case':42} {'dtype':9} {'pass':5} {'ms':>9} {'torch':>7} {'compiled':>8} {'floor ms':>9} {'x floor':>7}"


def run(name: str, device: str, dtype: str, outward: bool, repeats: int, quick: bool, rate: dict[str, float]) -> list[dict]:
    """Checks ``name``, then times it; prints one line per case and pass, and returns them."""
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    floors.set_arithmetic("float32")
    cases.check(name, device, kind)
    floors.set_arithmetic(dtype)
    rows = []
    for case in cases.tests(name).CASES[:1] if quick else cases.tests(name).LARGE:
        call = cases.call(name, case, device, kind, outward)
        cases.check_value(call, torch.float16 if dtype == "tf32" else kind)  # both have 11 significant bits
        if dtype in ("float32", "float64"):
            peers.check(call)
        for backward in (False, True):
            row = _time(call, device, dtype, backward, repeats, quick, rate)
            if row:
                print(_line(row), flush=True)
                rows.append(row)
    return rows


def _time(call: cases.Call, device, dtype, backward, repeats, quick, rate) -> dict[str, Any] | None:
    torch.compiler.reset()
    functions = {"lipfast": call.op, "torch": call.reference}
    if not quick and (compiled := _compiled(call)):
        functions["compiled"] = compiled
    if dtype in ("float32", "float64"):
        functions |= peers.of(call)
    bound = {name: call.bind(f) for name, f in functions.items()}
    if backward:
        bound = {name: f for name, f in bound.items() if any(o.requires_grad for o in f(*_leaves(call.args)))}
        if "lipfast" not in bound:
            return None
    times = rounds({name: _candidate(f, call.args, backward) for name, f in bound.items()}, repeats, device)
    outs = bound["lipfast"](*call.args)
    return {
        "op": call.name,
        "case": call.case,
        "options": call.options,
        "dtype": dtype,
        "pass": "both" if backward else "fwd",
        "seconds": {name: quartiles(samples) for name, samples in times.items()},
        "ratios": {name: ratio(times, name, "lipfast") for name in times if name != "lipfast"},
        "floor": floors.floor(call, outs, backward, rate),
    }


def _compiled(call: cases.Call) -> Callable | None:
    """The reference under torch.compile; None where it branches on data."""
    function = torch.compile(call.reference, fullgraph=True, dynamic=False)
    try:
        call.bind(function)(*call.args)
    except TorchDynamoException:
        return None
    return function


def _candidate(function: Callable, args: tuple, backward: bool) -> Callable[[], object]:
    if not backward:
        return torch.no_grad()(lambda: function(*args))
    leaves = _leaves(args)
    wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    seeds = [torch.randn_like(o) for o in function(*leaves)]
    return lambda: torch.autograd.grad(function(*leaves), wanted, seeds, allow_unused=True)


def _leaves(args: tuple) -> tuple:
    leaf = lambda t: t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
    return tuple(leaf(t) for t in args)


def _text(part: object) -> str:
    if isinstance(part, dict):
        return " ".join(f"{name}={value}" for name, value in part.items())
    return "x".join(map(str, part)) if isinstance(part, tuple) else str(part)


def _line(row: dict) -> str:
    case = " ".join(_text(c) for c in row["case"])
    own, floor = row["seconds"]["lipfast"][1], row["floor"]
    times = lambda name: f"{row['ratios'][name]:.2f}x" if name in row["ratios"] else "-"
    beside = "".join(f"   {name} {times(name)}" for name in row["ratios"] if name not in ("torch", "compiled"))
    ending = f"{floor * 1e3:9.4f} {own / floor:7.2f}" if floor else f"{'-':>9} {'-':>7}"
    marked = row["op"] + (" outward" if row["options"].get("outward") else "")
    return (
        f"{marked:22} {case[:42]:42} {row['dtype']:9} {row['pass']:5} {own * 1e3:9.4f} {times('torch'):>7} "
        f"{times('compiled'):>8} {ending}{beside}"
    )
