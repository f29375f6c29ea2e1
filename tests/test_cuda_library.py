"""What is known of the CUDA library without a compiler; tools/check_cuda.py builds and loads it."""

import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import lipfast
from lipfast import cayley, skew_exponential
from tools import check_cuda

FILES = sorted((Path(__file__).parents[1] / "kernels").glob("*.cu"))

LISTING = """
Fatbin elf code:
================
arch = sm_90a
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN7lipfast59_GLOBAL__N__1a5ff6c4_20_pairwise_distance_cu_df4a_1635820pairwise_sums_kernelIfLi2ELi64EEEvPKT_:
  REG:121 STACK:0 SHARED:19456 LOCAL:0 CONSTANT[0]:578 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN7lipfast58_GLOBAL__N__3b58e2ab_19_certified_radius_cu_e8b3_1635623certified_radius_kernelI13__nv_bfloat16Li1EEEvPK:
  REG:22 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_file_serves_the_op_of_its_name(file):
    assert find_spec(f"lipfast.ops.{file.stem}")
    served = re.search(
        rf'IMPL\(lipfast, CUDA, m\) {{ m\.impl\("({file.stem}(?:_forward)?)",', " ".join(file.read_text().split())
    )
    assert served
    if lipfast.loaded["cuda"]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lipfast::{served[1]}", "CUDA")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_definition_that_a_kernel_leaves_cases_to_has_a_name(file):
    for name in re.findall(r'definition_of\("lipfast::(\w+)"', file.read_text()):
        assert hasattr(torch.ops.lipfast, name)


@pytest.mark.skipif(not lipfast.loaded["cuda"], reason="there is no CUDA library here")
@pytest.mark.parametrize("op", [cayley, partial(skew_exponential, squarings=5)], ids=["cayley", "skew_exponential"])
def test_small_matrices_do_not_wait_for_the_device(op):
    """A CUDA graph, forward and backward, allows no waiting."""
    matrix = torch.randn(3, 20, 20, device="cuda", requires_grad=True)
    both = lambda: torch.autograd.grad((op(matrix) ** 3).sum(), matrix)[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    with torch.no_grad():
        matrix.mul_(-0.5)
    graph.replay()
    torch.testing.assert_close(got, both())


def test_no_file_asks_for_relaxed_arithmetic():
    build = (FILES[0].parents[1] / "CMakeLists.txt").read_text()
    assert "fast-math" not in build
    assert "fast_math" not in build
    assert "-fmad=false" in build


def test_resource_listing_is_understood():
    assert list(check_cuda.usage(LISTING)) == [
        ("sm_90a", "pairwise_sums_kernel<f, 2, 64>", 121, 19456, 0),
        ("sm_90a", "certified_radius_kernel<nv_bfloat16, 1>", 22, 0, 8),
    ]


def test_a_missing_compiler_is_told_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setattr(check_cuda, "tool", lambda name: None)
    monkeypatch.setattr("sys.argv", ["check_cuda"])
    assert check_cuda.main() == 1
    assert "no nvcc" in capsys.readouterr().err
