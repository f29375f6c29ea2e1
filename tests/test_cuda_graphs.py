"""Ops and whole bounds as CUDA graphs, which allow no waiting for the device and no other stream than the caller's."""

from functools import partial

import pytest
import torch

from bench import cases
from lipfast import models
from lipfast.bounds import interval, jacobian, liplt, local, norms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# They look at the matrix to choose how many products it needs; their pages say so.
WAITS = {"conv2d_norm_bound", "polar", "skew_exponential", "spectral_norm_bound"}
BOUNDS = {
    "interval, bound": lambda net, x: interval(net, x, 0.01, pixel_range=(0, 1)).lower,
    "interval, estimate": lambda net, x: interval(net, x, 0.01, kind="estimate").lower,
    "interval, l_2": lambda net, x: interval(net, x, 0.01, p=2).lower,
    "jacobian, estimate": lambda net, x: jacobian(net, x, 0.01, kind="estimate"),
    "liplt": lambda net, x: liplt(net, (3, 32, 32), 3).pairwise,
    "local": lambda net, x: local(net, x, 0.01, kind="estimate", norms=norms(net, (3, 32, 32), kind="estimate")).pairwise(),
}


@pytest.fixture(autouse=True)
def _plain_memory():
    """Deterministic mode fills every fresh tensor, which would count among what is captured."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


def replayed(run):
    """The answer of a graph that was captured beside other work on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            want = run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    torch.cuda.synchronize()
    return got, want


@pytest.mark.parametrize("name", [name for name in cases.names() if name not in WAITS])
def test_op_is_captured_and_right_on_another_stream(name):
    call = cases.call(name, cases.tests(name).CASES[0], "cuda", torch.float32)
    run = call.bind(call.op)
    got, want = replayed(torch.no_grad()(partial(run, *call.args)))
    for g, w, plain in zip(got, want, run(*call.args), strict=True):
        assert torch.equal(g, w)
        assert torch.equal(g, plain)


@pytest.mark.parametrize("name", BOUNDS)
def test_bound_is_captured(name):
    net, x = models.cifar_6c2f().cuda(), torch.rand(2, 3, 32, 32, device="cuda")
    got, want = replayed(torch.no_grad()(lambda: BOUNDS[name](net, x)))
    torch.testing.assert_close(got, want)
