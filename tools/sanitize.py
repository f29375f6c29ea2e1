"""Runs every CUDA C++ kernel on its test's cases and compares with the reference: the program to start under compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 1 python tools/sanitize.py
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import lipfast  # noqa: E402
from bench import cases  # noqa: E402
from tests.checks import DTYPES  # noqa: E402

if not lipfast.loaded["cuda"]:
    raise SystemExit("sanitize: lipfast has no CUDA library here, so there is nothing to check")
torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
for op in sorted(p.stem for p in (ROOT / "kernels").glob("*.cu")):
    made = [(case, dtype) for case in cases.tests(op).CASES for dtype in DTYPES]
    for case, dtype in made:
        cases.check_value(cases.call(op, case, "cuda", dtype), dtype)
    torch.cuda.synchronize()
    print(f"{op}: {len(made)} cases")
