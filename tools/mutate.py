"""Would the tests notice? Breaks the ops, one way at a time, in a temporary copy, and reports which breakage survives.

    python tools/mutate.py            all of them; exit status 1 if one survives or no longer applies
    python tools/mutate.py sign csrc  those with one of these words in their line

A breakage is a text of a file and what replaces it. Python is broken with the compiled kernels left out, so that what runs
is what is broken; C++ is compiled again. The last group puts a bad kernel over a good reference, as a new device would.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    what: str
    file: str
    old: str
    new: str
    tests: str  # file names in tests/, without test_ and .py


LINEAR, CONV, BALL = "lipfast/ops/interval_linear.py", "lipfast/ops/interval_conv2d.py", "lipfast/ops/ball_linear.py"
ROUND, BOXES = "lipfast/rounding.py", "lipfast/bounds/interval.py"
OUTWARD = "interval_linear interval_conv2d"

MUTANTS = [
    Mutant(
        "reference forgets |W|", LINEAR, "weight.abs())\n    return center", "weight)\n    return center", "interval_linear"
    ),
    Mutant("reference forgets the bias", LINEAR, "/ 2, weight, bias)", "/ 2, weight)", "interval_linear"),
    Mutant("backward drops sign()", LINEAR, "weight.sign() * from_radius", "from_radius", "interval_linear"),
    Mutant(
        "backward swaps the gradients of lower and upper",
        LINEAR,
        "low, high = through_center - through_radius, through_center + through_radius",
        "high, low = through_center - through_radius, through_center + through_radius",
        "interval_linear",
    ),
    Mutant("backward forgets a half", LINEAR, "grad_center @ weight / 2, ", "grad_center @ weight, ", "interval_linear"),
    Mutant("backward of the bias sees one side", LINEAR, "_rows(grad_lower).sum(0) + ", "", "interval_linear"),
    Mutant("fake has the wrong size", LINEAR, "lower.shape[:-1], weight.shape[0])", "lower.shape)", "interval_linear"),
    Mutant(
        "fake has the wrong dtype",
        LINEAR,
        "return out, torch.empty_like(out)",
        "return out, torch.empty_like(out, dtype=torch.float64)",
        "interval_linear",
    ),
    Mutant("no derivative is registered", LINEAR, "_op.register_autograd(backward, setup_context=save)", "", "interval_linear"),
    Mutant("outward does nothing", LINEAR, "    if outward:", "    if False:", "interval_linear"),
    Mutant("outward counts one term", LINEAR, "weight.shape[1], F.linear", "1, F.linear", "interval_linear"),
    Mutant(
        "upper is not checked",
        LINEAR,
        'check_shape("interval_linear", "upper"',
        'id or ("interval_linear", "upper"',
        "interval_linear",
    ),
    Mutant(
        "reference forgets |W|",
        CONV,
        "weight.abs(), None, *where)\n    return",
        "weight, None, *where)\n    return",
        "interval_conv2d",
    ),
    Mutant("backward drops sign()", CONV, "weight.sign() * from_radius", "from_radius", "interval_conv2d"),
    Mutant(
        "backward swaps padding and dilation",
        CONV,
        "stride, padding, dilation, False",
        "stride, dilation, padding, False",
        "interval_conv2d",
    ),
    Mutant("backward ignores groups", CONV, "[0, 0], groups, [need", "[0, 0], 1, [need", "interval_conv2d"),
    Mutant("fake ignores dilation", CONV, "- d * (k - 1) - 1", "- (k - 1) - 1", "interval_conv2d"),
    Mutant(
        "outward ignores groups", CONV, "weight.reshape(groups, O // groups, -1)", "weight.reshape(1, O, -1)", "interval_conv2d"
    ),
    Mutant("gamma |m| is forgotten", ROUND, " + g * center.abs() + tiny", " + tiny", OUTWARD),
    Mutant(
        "rounds to nearest at the end",
        ROUND,
        "    return torch.where(rounded.to",
        "    return rounded\n    torch.where(rounded.to",
        OUTWARD,
    ),
    Mutant("rounds down where it should round up", ROUND, "return -down(-value, dtype)", "return down(value, dtype)", OUTWARD),
    Mutant("the last sums' rounding is forgotten", ROUND, " + 4 * eps * mid.abs() + tiny", " + tiny", OUTWARD),
    Mutant("underflow is forgotten", ROUND, "+ g * center.abs() + tiny", "+ g * center.abs()", OUTWARD),
    Mutant(
        "the rounding of the center is forgotten",
        ROUND,
        "torch.maximum(high - center, center - low)",
        "(high - low) / 2",
        OUTWARD,
    ),
    Mutant("gamma counts no terms", ROUND, "1.01 * (terms + 16)", "1.01 * 1", OUTWARD),
    Mutant("gamma is ten times too wide", ROUND, "1.01 * (terms + 16)", "10 * (terms + 16)", OUTWARD),
    Mutant(
        "the norm of the rows is forgotten",
        BALL,
        "reach = radius[..., None] * norms",
        "reach = radius[..., None] + 0 * norms",
        "ball_linear",
    ),
    Mutant("outward trusts the norms", BALL, "norms * (1 + (terms + 16) * 2.0**-52)", "norms * (1 - 2.0**-20)", "ball_linear"),
    Mutant("backward forgets what the norms say of W", BALL, " + pull(from_norms.double())[0]", "", "ball_linear"),
    Mutant("outward forgets the spread's rounding", "csrc/simd/box.h", "spread * (1 + 2 * gamma) + 4", "spread + 4", OUTWARD),
    Mutant("outward forgets gamma |m|", "csrc/simd/box.h", "gamma * magnitude + kTiny<T>", "kTiny<T>", OUTWARD),
    Mutant("the bias is ignored", "csrc/simd/box.h", "  mid += bias;\n", "", OUTWARD),
    Mutant("half types round to nearest", "csrc/simd/number.h", "wide(n) > v ? bf16{below(n.bits)} : n", "n", OUTWARD),
    Mutant(
        "upper ends are rounded down", "csrc/simd/number.h", "S n = Number<S>::down(-v)", "S n = Number<S>::narrow(-v)", OUTWARD
    ),
    Mutant(
        "a long sum starts again",
        "csrc/simd/linear.cpp",
        "sum<T, true, true>(t, lanes)",
        "sum<T, true, false>(t, lanes)",
        "interval_linear",
    ),
    Mutant(
        "a long batch starts again",
        "csrc/simd/linear.cpp",
        "sum<T, false, true>(t, lanes)",
        "sum<T, false, false>(t, lanes)",
        "interval_linear",
    ),
    Mutant("the gradient takes |W| for W", "csrc/simd/linear.cpp", "sign = (v > 0) - (v < 0)", "sign = 1", "interval_linear"),
    Mutant(
        "strips of a large batch overlap",
        "csrc/interval_linear.cpp",
        "i / blocks * kRows;",
        "i / blocks * (kRows - 1);",
        "interval_linear",
    ),
    Mutant(
        "columns are dilated as rows",
        "csrc/interval_conv2d.cpp",
        "j * g.dilation[1] - g",
        "j * g.dilation[0] - g",
        "interval_conv2d",
    ),
    Mutant(
        "outward uses transforms",
        "csrc/interval_conv2d.cpp",
        "return !outward && stride <= 2",
        "return stride <= 2",
        "interval_conv2d",
    ),
    Mutant("gamma counts no terms", "csrc/host.cpp", "1.01 * double(terms + 16)", "1.01 * 1", OUTWARD),
]

KERNELS = {  # what a bad kernel of interval_linear does with the right answer, low and high
    "last row unwritten": "low[..., :-1], high[...] = want[0][..., :-1], want[1]",
    "bias ignored": "low, high = reference(lower, upper, weight, None)",
    "one part in a thousand off": "low, high = want[0] * 1.001, want[1]",
    "sums in bfloat16": "low, high = (t.to(lower.dtype) for t in reference(*(t if t is None else t.bfloat16() for t in args)))",
    "weight taken for contiguous": "low, high = reference(lower, upper, weight.as_strided(weight.shape, (weight.shape[1], 1)))",
    "input overwritten": "low, high = want; upper.add_(0.5)",
    "two answers to one question": "low, high = want[0] * (1 + 1e-7 * torch.rand(())), want[1]",
    "NaN and Inf swallowed": "low, high = (t.nan_to_num() for t in want)",
    "outward ignored": "low, high = reference(lower, upper, weight, bias)",
    "lower and upper in one memory": "low = high = want[1]",
}
KERNEL = """
import torch
from lipfast.ops.interval_linear import reference

@torch.library.register_kernel("lipfast::interval_linear", "cpu")
def kernel(lower, upper, weight, bias=None, outward=False):
    args = (lower, upper, weight, bias)
    want = reference(*args, outward)
    low, high = (lower.new_empty(t.shape) for t in want)
    {body}
    return low, high
"""
# An editable install would put the original before the copy.
PYTEST = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable")]
sys.path.insert(0, ".")
import lipfast, pytest
assert lipfast.__file__.startswith({folder!r}), lipfast.__file__
sys.exit(pytest.main(["-q", "-x", "--no-header", *sys.argv[1:]]))
"""


class Copy:
    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("lipfast", "tests", "csrc", "cmake", "kernels", "CMakeLists.txt", "pyproject.toml"):
            source, target = ROOT / name, folder / name
            ignored = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(source, target, ignore=ignored) if source.is_dir() else shutil.copy(source, target)
        (folder / "lipfast/kernels").symlink_to(folder / "kernels")

    def build(self) -> None:
        options = ["-G", "Ninja", "-DLIPFAST_PYBIND=OFF", "-DLIPFAST_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
        self._run(["cmake", "-S", ".", "-B", "build", "-DCMAKE_BUILD_TYPE=Release", *options])
        self._run(["cmake", "--build", "build"])
        shutil.copy(self.folder / "build/_ops_cpu.so", self.folder / "lipfast")

    def test(self, names: str, kernels: bool) -> tuple[bool, str]:
        """Whether the tests pass, and their first error."""
        capability = {} if kernels else {"LIPFAST_CPU_CAPABILITY": "none"}
        files = [f"tests/test_{name}.py" for name in names.split()]
        command = [sys.executable, "-c", PYTEST.format(folder=str(self.folder)), *files]
        done = self._run(command, check=False, **capability)
        errors = [line for line in done.stdout.splitlines() if line.startswith("E ")] or done.stderr.splitlines()[-1:]
        return done.returncode == 0, (errors or [""])[0]

    def _run(self, command, check=True, **environment):
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
        return subprocess.run(command, cwd=self.folder, env=environment, check=check, capture_output=True, text=True)


def main(words: list[str]) -> int:
    wanted = lambda line: not words or any(word in line for word in words)
    failures = 0

    def report(line: str, passed: bool, error: str) -> None:
        nonlocal failures
        failures += passed
        print(f"{'SURVIVED' if passed else 'caught':9} {line:75} {error[:60]}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder).resolve())
        mutants = [m for m in MUTANTS if wanted(f"{m.file}: {m.what}")]
        for compiled in sorted({m.file.startswith("csrc") for m in mutants}):
            if compiled:
                copy.build()
            passed, error = copy.test(OUTWARD, compiled)
            if not passed:
                print(f"the tests fail before anything is broken: {error}")
                return 1
        for mutant in mutants:
            line = f"{mutant.file}: {mutant.what}"
            path = copy.folder / mutant.file
            text = path.read_text()
            if text.count(mutant.old) != 1:
                print(f"STALE     {line}: its text occurs {text.count(mutant.old)} times")
                failures += 1
                continue
            path.write_text(text.replace(mutant.old, mutant.new))
            compiled = mutant.file.startswith("csrc")
            if compiled:
                copy.build()
            report(line, *copy.test(mutant.tests, compiled))
            path.write_text(text)  # the next build brings it back
        start = copy.folder / "lipfast/__init__.py"
        start.write_text(start.read_text() + "\nimport lipfast.mutant\n")
        for what, body in KERNELS.items():
            if wanted(f"kernel: {what}"):
                (copy.folder / "lipfast/mutant.py").write_text(KERNEL.format(body=body))
                report(f"kernel: {what}", *copy.test("interval_linear", False))
    return failures > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
