"""What is timed. All that a benchmark needs to know of an op stands in tests/test_<op>.py: ``inputs``, ``CASES``, ``LARGE``.

A case of ``LARGE`` may end in a dict of options. Where the op returns more than its value, ``SIGMA`` holds the part that is
timed: an op and a reference with the names of theirs.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import lipfast.ops
from tests.checks import assert_near

FOLDER = Path(__file__).parents[1]


@dataclass
class Call:
    """One op on one case: ``op`` is the public function (or SIGMA's), ``reference`` its definition in plain torch."""

    name: str
    case: tuple
    op: Callable
    reference: Callable
    args: tuple
    options: dict[str, Any]

    def bind(self, function: Callable) -> Callable[..., tuple[Tensor, ...]]:
        """``function`` of the tensors alone, its floating outputs in a tuple."""

        def run(*args):
            outs = function(*args, **self.options)
            return tuple(o for o in ((outs,) if isinstance(outs, Tensor) else outs) if o.is_floating_point())

        return run


def names() -> list[str]:
    """Every op whose test file has large cases."""
    stems = sorted(p.stem for p in Path(inspect.getfile(lipfast.ops)).parent.glob("[!_]*.py"))
    files = [s for s in stems if (FOLDER / "tests" / f"test_{s}.py").exists()]
    return [s for s in files if hasattr(tests(s), "LARGE")]


def tests(name: str) -> ModuleType:
    return importlib.import_module(f"tests.test_{name}")


def call(name: str, case: tuple, device: str, dtype: torch.dtype, outward: bool = False) -> Call:
    module = importlib.import_module(f"lipfast.ops.{name}")
    torch.manual_seed(0)
    shape, chosen = (case[:-1], case[-1]) if case and isinstance(case[-1], dict) else (case, {})
    made = tests(name).inputs(*shape, device, dtype)
    args, options = made if isinstance(made, tuple) and isinstance(made[-1], dict) else (made, {})
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    given = inspect.signature(getattr(module, name)).parameters
    rest = list(inspect.signature(module.reference).parameters)[len(args) :]  # a schema need not have the op's defaults
    options = {**{key: given[key].default for key in rest if key in given}, **options, **chosen}
    if "outward" in options:
        options["outward"] = outward
    timed = getattr(tests(name), "SIGMA", module)
    return Call(name, case, getattr(timed, name), timed.reference, args, options)


def check(name: str, device: str, dtype: torch.dtype) -> None:
    """The op's own ``test_op`` on all of its own cases, as tests/conftest.py runs it: fresh memory is NaN, one seed."""
    test = tests(name).test_op
    choices = [_choices(*mark.args) for mark in test.pytestmark if mark.name == "parametrize"]
    torch.use_deterministic_algorithms(True)
    try:
        for parts in product(*choices):
            choice = {key: value for part in parts for key, value in part.items()}
            if choice.get("dtype", dtype) == dtype:
                torch.manual_seed(0)
                test(**choice, device=device)
    finally:
        torch.use_deterministic_algorithms(False)


def _choices(names: str | Sequence[str], values: Sequence) -> list[dict[str, Any]]:
    """One ``parametrize`` mark as the arguments that it gives."""
    if isinstance(names, str):
        return [{names: value} for value in values]
    return [dict(zip(names, value, strict=True)) for value in values]


def check_value(c: Call, tolerance: torch.dtype) -> None:
    """The very case that is timed, against the reference in float64, to the tolerance of tests.checks for a dtype."""
    wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in c.args]
    for got, want in zip(c.bind(c.op)(*c.args), c.bind(c.reference)(*wide), strict=True):
        assert_near(got, want, tolerance)
