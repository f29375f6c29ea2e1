"""Losses that are means over a random number of samples or units, on two processes (gloo, on the CPU)."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F

from lipfast import losses
from tests.test_gradient_alignment import gradient, problem, seeded, shift

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
HALVES = slice(0, 4), slice(4, 8)


def boxes():
    """The first half has more unstable units."""
    center = torch.linspace(-1, 1, 56, dtype=torch.float64).reshape(8, 7)
    return (center - 0.1).requires_grad_(), (center + 0.6).requires_grad_()


def batch():
    """Three samples of the first half have no gradient."""
    model, x, y = problem("cpu", B=8)
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.zero_()
    x[:3] = -9
    return model, x, y


def process(rank, store, alignment, slope, low):
    torch.manual_seed(0)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        part = HALVES[rank]
        model, x, y = batch()
        torch.testing.assert_close(losses.gradient_alignment(model, x[part], y[part], 0.5, seeded("cpu")), alignment)
        lower, upper = boxes()
        got = losses.slope([(lower[part], upper[part], None)])
        torch.testing.assert_close(got, slope)
        grad = torch.autograd.grad(got, lower)[0] / 2  # the loop takes the mean of the processes' gradients
        torch.testing.assert_close(grad[part], low[part])
    finally:
        dist.destroy_process_group()


def test_two_processes_take_the_mean_of_one(tmp_path):
    model, x, y = batch()
    alive = x.flatten(1).amin(1) >= 0
    nearby = torch.cat([x[part] + shift(x[part], 0.5) for part in HALVES])
    alignment = 1 - F.cosine_similarity(gradient(model, x, y), gradient(model, nearby, y))[alive].mean()
    assert alive.tolist() == [False] * 3 + [True] * 5
    lower, upper = boxes()
    counts = [((lower < 0) & (upper > 0))[part].sum() for part in HALVES]
    assert counts[0] > 2 * counts[1] > 0
    slope = losses.slope([(lower, upper, None)])
    (low,) = torch.autograd.grad(slope, lower)
    multiprocessing.spawn(process, (str(tmp_path / "store"), alignment, slope.detach(), low), nprocs=2)
