"""The questions that every op answers, and the only tolerances of the project.

A test file supplies inputs and cases, and calls check_op(module, args, **options): ``args`` are the op's tensors (or None)
in the order of its signature, ``options`` the rest by name, in the types of the registered schema.
"""

import io
import os
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

# Relative to the largest entry of the answer, elementwise, against float64. A case that needs more needs a better kernel.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    tolerance = slack * TOLERANCE[dtype]
    finite = want[want.isfinite()]
    scale = max(1.0, finite.abs().amax().item()) if finite.numel() else 1.0
    assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance * scale)


def check_op(module, args, gradient: bool = True, **options):
    """Kernel == reference in value and gradient; registration, layouts and determinism hold."""
    name = module.__name__.rsplit(".", 1)[-1]
    op = getattr(module, name)
    dtype = args[0].dtype
    before = [t.clone() if isinstance(t, Tensor) else t for t in args]

    want = _tuple(module.reference(*map(_double, args), **options))
    got = _tuple(op(*args, **options))
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert_near(g, w, dtype)
    for t, b in zip(args, before, strict=True):
        assert not isinstance(t, Tensor) or torch.equal(t, b), f"{name} wrote to its input"

    # conftest fills fresh memory with NaN, so an element that was never written shows
    for first, second in zip(got, _tuple(op(*args, **options)), strict=True):
        assert torch.equal(first, second), f"{name} gives two answers to one question"

    strided = [torch.stack([t, t], -1)[..., 0] if isinstance(t, Tensor) else t for t in args]
    for g, s in zip(got, _tuple(op(*strided, **options)), strict=True):
        assert_near(s, g, dtype)

    if gradient:
        _check_gradient(module, op, args, options, dtype)
    leaves = [t.detach().requires_grad_(gradient and t.is_floating_point()) if isinstance(t, Tensor) else t for t in args]
    torch.library.opcheck(getattr(torch.ops.lipfast, name).default, tuple(leaves), options)


def in_process(script: str, **environment: str) -> Any:
    """What ``script`` saves to its standard output, in a process of its own; threads and instruction sets are set there."""
    run = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, check=True, timeout=300
    )
    return torch.load(io.BytesIO(run.stdout))


def _check_gradient(module, op, args, options, dtype):
    leaf = lambda t: t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
    leaves, mirror = [leaf(t) for t in args], [leaf(_double(t)) for t in args]
    outs = [o for o in _tuple(op(*leaves, **options)) if o.is_floating_point()]
    refs = [o for o in _tuple(module.reference(*mirror, **options)) if o.is_floating_point()]
    seeds = [torch.randn_like(o) for o in outs]
    wanted = lambda ts: [t for t in ts if isinstance(t, Tensor) and t.requires_grad]
    grads = torch.autograd.grad(outs, wanted(leaves), seeds, allow_unused=True)
    wants = torch.autograd.grad(refs, wanted(mirror), [s.double() for s in seeds], allow_unused=True)
    for g, w in zip(grads, wants, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            assert g.dtype == dtype
            assert_near(g, w, dtype, slack=2)


def _double(t):
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t


def _tuple(out) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)
