"""``pytest bench --benchmark-enable --benchmark-only``: the same cases under pytest-benchmark, to compare and to plot."""

import pytest
import torch

from bench import cases

CASES = [(name, case) for name in cases.names() for case in cases.tests(name).LARGE]


@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
@pytest.mark.parametrize("what", ["op", "reference"])
def test_forward(benchmark, name, case, what):
    benchmark.group = f"{name} {case}"
    call = cases.call(name, case, "cpu", torch.float32)
    cases.check_value(call, torch.float32)
    with torch.no_grad():
        benchmark(call.bind(getattr(call, what)), *call.args)
