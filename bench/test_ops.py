"""``pytest bench``: the forward pass of the ops' named sizes under pytest-benchmark, which keeps, compares and plots runs."""

import pytest
import torch

from bench import cases

SIZES = [(name, size) for name in cases.names() for size in cases.tests(name).LARGE]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "size"), SIZES, ids=str)
@pytest.mark.parametrize("what", ["op", "reference"])
def test_forward(benchmark, name, size, what):
    benchmark.group = f"{name}, {size}"
    call = cases.call(name, cases.tests(name).LARGE[size], "cpu", torch.float32)
    cases.check_value(call, torch.float32)
    with torch.no_grad():
        benchmark(call.bind(getattr(call, what)), *call.args)
