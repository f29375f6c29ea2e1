"""``pytest bench --benchmark-enable --benchmark-only``: the ops' named sizes under pytest-benchmark, to compare and to plot."""

import pytest
import torch

from bench import cases

SIZES = [(name, size) for name in cases.names() for size in cases.tests(name).LARGE]


@pytest.mark.parametrize(("name", "size"), SIZES, ids=str)
@pytest.mark.parametrize("what", ["op", "reference"])
def test_forward(benchmark, name, size, what):
    benchmark.group = f"{name}, {size}"
    call = cases.call(name, cases.tests(name).LARGE[size], "cpu", torch.float32)
    cases.check_value(call, torch.float32)
    with torch.no_grad():
        benchmark(call.bind(getattr(call, what)), *call.args)
