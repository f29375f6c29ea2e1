"""What only the compiled CPU kernel of pairwise_distance can get wrong: blocks, instruction sets, threads, ranges."""

import math

import pytest
import torch

import lipfast.ops.pairwise_distance as module
from lipfast import loaded, pairwise_distance
from tests.checks import DTYPES, assert_near, in_process

pytestmark = pytest.mark.skipif(not loaded["cpu"], reason="the CPU kernels are not built")

NORMS = [1.0, 2.0, math.inf]
#        leading sizes, K, I: tiles of 4 rows, blocks of 60 and 64; 256, 512 and 1024 columns at once
SIZES = [((), 64, 16), ((2,), 65, 17), ((), 61, 257), ((), 129, 3), ((3, 2), 4, 513), ((), 6, 1025), ((), 2, 2050)]


def answers(size, p, dtype):
    """Distances and gradient, of rows that no pair shares a scale."""
    torch.manual_seed(0)
    shape, K, I = size
    rows = (torch.randn(*shape, K, I) * torch.rand(*shape, K, 1) * 8).to(dtype).requires_grad_()
    seed = torch.randn(*shape, K, K).to(dtype)
    distance = pairwise_distance(rows, p)
    return rows.detach(), seed, distance.detach(), torch.autograd.grad(distance, rows, seed)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_definition_at_every_boundary(size, p, dtype):
    rows, seed, distance, gradient = answers(size, p, dtype)
    want = module.reference(rows.double(), p)
    assert_near(distance, want, dtype)
    assert_near(gradient, module.backward_reference(seed.double(), rows.double(), want, p), dtype, slack=2)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_strided_rows_and_expanded_gradients(dtype, p):
    rows = torch.randn(70, 140, dtype=dtype)[::2, 3:100].mT.requires_grad_()
    distance = pairwise_distance(rows, p)
    assert torch.equal(distance, pairwise_distance(rows.contiguous(), p))
    (gradient,) = torch.autograd.grad(distance.sum(), rows)
    want = module.backward_reference(torch.ones(97, 97).double(), rows.detach().double(), distance.detach().double(), p)
    assert_near(gradient, want, dtype, slack=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("far", [True, False])
def test_gradient_survives_quotients_out_of_range(far, dtype):
    """Seeds over distances that overflow, or vanish, beside others that do not."""
    limits = torch.finfo(dtype)
    scale = 2.0 ** round(0.9 * math.log2(limits.max)) if far else limits.smallest_normal
    rows = torch.randn(70, 40, dtype=dtype)
    rows[5:8] *= scale
    rows[62:] *= scale
    distance = module.reference(rows)
    seed = torch.randn(70, 70, dtype=dtype) * (1 / scale if far else 64)
    got = torch.ops.lipfast.pairwise_distance_backward(seed, rows, distance, 2.0)
    difference = rows[:, None] - rows
    slope = difference / distance.where(distance != 0, math.inf)[..., None]
    want = ((seed + seed.mT)[..., None] * slope).sum(1)
    assert got.isfinite().all()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("p", NORMS)
def test_gradient_of_nan_and_inf_is_the_definitions(p):
    rows = torch.randn(70, 130)
    rows[2, 69], rows[5, 0], rows[64, 129], rows[66, 0] = math.nan, math.inf, -math.inf, math.inf
    rows[9, [3, 100]] = math.nan
    seed, distance = torch.randn(70, 70), pairwise_distance(rows, p)
    got = torch.ops.lipfast.pairwise_distance_backward(seed, rows, distance, p)
    want = module.backward_reference(seed, rows, module.reference(rows, p), p)
    torch.testing.assert_close(got, want, equal_nan=True)


SCRIPT = """
import sys, torch
from tests.test_pairwise_distance_kernel import DTYPES, NORMS, SIZES, answers
out = [t for size in SIZES + [((), 300, 70)] for p in NORMS for dtype in DTYPES for t in answers(size, p, dtype)[2:]]
torch.save((torch.ops.lipfast.cpu_capability(), out), sys.stdout.buffer)
"""


@pytest.fixture(scope="module")
def here():
    return in_process(SCRIPT, OMP_NUM_THREADS="1")


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_answers(capability, here):
    name, got = in_process(SCRIPT, LIPFAST_CPU_CAPABILITY=capability)
    if name != capability:
        pytest.skip(f"this machine has no {capability}")
    for g, w in zip(got, here[1], strict=True):
        assert_near(g, w, g.dtype, slack=2)


def test_answers_do_not_depend_on_the_number_of_threads(here):
    _, got = in_process(SCRIPT, OMP_NUM_THREADS="3")
    assert all(map(torch.equal, got, here[1]))
