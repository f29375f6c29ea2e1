"""Ops against their definitions and their peers: first right, then fast."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import cases, peers, timing, work
from bench.ceilings import set_arithmetic
from bench.problem import COMPILED, DEFINITION, OWN, Problem

OWN_COMPILED = "lipfast compiled"  # matters where torch.compile sees through the op
OWN_GRAPH = "lipfast graph"
_OF_ANOTHER_NORM = ("spectral_norm_bound", "conv2d_norm_bound")  # their gradient is; autograd on the proof is no gradient


def problems(name: str, device: str, dtype: str, outward: bool, quick: bool, beside: bool = True) -> Iterator[Problem]:
    """Checks ``name`` on all of its test's cases, then yields its named sizes; ``beside``: compiled code and peers too."""
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    set_arithmetic("float32")
    cases.check(name, device, kind)
    set_arithmetic(dtype)
    sizes = {"tiny": cases.tests(name).CASES[0]} if quick else cases.tests(name).LARGE
    for size, case in sizes.items():
        call = cases.call(name, case, device, kind, outward)
        cases.check_value(call, torch.float16 if dtype == "tf32" else kind)  # both have 11 significant bits
        functions = {OWN: call.op, DEFINITION: call.reference} | (_others(call, dtype, quick) if beside else {})
        for backward in (False, True):
            problem = _problem(call, size, functions, device, dtype, backward)
            if problem:
                yield problem


def _others(call: cases.Call, dtype: str, quick: bool) -> dict[str, Callable]:
    """What else takes part, each right on this case."""
    functions: dict[str, Callable] = {}
    if not quick:
        torch.compiler.reset()
        compiled = {COMPILED: _compiled(call, call.reference), OWN_COMPILED: _compiled(call, call.op)}
        functions |= {who: f for who, f in compiled.items() if f}
    if dtype in ("float32", "float64"):
        peers.check(call)
        functions |= peers.of(call)
    return functions


def _compiled(call: cases.Call, function: Callable) -> Callable | None:
    """None where it branches on data."""
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    try:
        outs = call.bind(compiled)(*call.args)
    except RuntimeError:  # what dynamo raises, and guards on data
        return None
    for got, want in zip(outs, call.bind(call.op)(*call.args), strict=True):
        cases.assert_near(got, want, torch.bfloat16 if want.dtype == torch.bfloat16 else torch.float16)
    return compiled


def _problem(call: cases.Call, size: str, functions: dict, device: str, dtype: str, backward: bool) -> Problem | None:
    bound = {who: call.bind(f) for who, f in functions.items()}
    if backward and call.name in _OF_ANOTHER_NORM:
        del bound[DEFINITION]
    if backward:
        bound = {who: f for who, f in bound.items() if any(o.requires_grad for o in f(*_leaves(call.args)))}
        if OWN not in bound:
            return None
    outs = bound[OWN](*call.args)
    turns = {who: _turn(f, call.args, backward) for who, f in bound.items()}
    if device == "cuda" and not backward:
        turns |= timing.graphed(OWN_GRAPH, turns[OWN])
    return Problem(
        name=call.name + (", outward" if call.options.get("outward") else ""),
        size=size,
        direction="both" if backward else "forward",
        turns=turns,
        dtype=dtype,
        work=work.of_op(call, outs, backward),
        facts={"options": call.options},
    )


def _turn(function: Callable, args: tuple, backward: bool) -> Callable[[], object]:
    if not backward:
        return torch.no_grad()(lambda: function(*args))
    leaves = _leaves(args)
    wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    seeds = [torch.randn_like(o) for o in function(*leaves)]
    return lambda: torch.autograd.grad(function(*leaves), wanted, seeds, allow_unused=True)


def _leaves(args: tuple) -> tuple:
    leaf = lambda t: t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
    return tuple(leaf(t) for t in args)
