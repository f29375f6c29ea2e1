"""Compiles the CUDA kernels, loads them and reads their registers: all that can be known of them without a GPU.

    python tools/check_cuda.py [--build build/cuda-check] [--archs "80-real;90a-real;100"]

Fails if a file of kernels/*.cu does not register the op of its name, or that op's forward part, for CUDA, or if a kernel uses
local memory (spilled registers, arrays with run-time indices) and is not in ALLOWED.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Kernels that may use local memory, by the start of their names: bytes, and why.
ALLOWED = {
    "cayley_kernel<4>": 512,  # sm_100 alone, whose ptxas does not keep 64 float64 numbers a thread in registers
    "certified_radius_kernel<d, ": 16,  # around the call of the division's slow path
    "pairwise_distances_kernel<f, 2>": 8,  # around the call that serves squares out of range
}
TOOLKIT = (
    "check_cuda: no nvcc. Put one on PATH, or: pip install 'cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2', then "
    'CUDA_HOME=$(python -c "import nvidia.cu13 as n; print(n.__path__[0])") python tools/check_cuda.py'
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cuda-check")
    parser.add_argument("--archs", default="80-real;90a-real;100")
    a = parser.parse_args()
    nvcc = tool("nvcc")
    if nvcc is None:
        print(TOOLKIT, file=sys.stderr)
        return 1
    library = build(a.build.resolve(), a.archs, nvcc)
    ops = sorted(p.stem for p in (ROOT / "kernels").glob("*.cu"))
    missing = unregistered(library, ops)
    greedy = local_memory(library)
    for op in missing:
        print(f"check_cuda: kernels/{op}.cu does not register lipfast::{op} for CUDA", file=sys.stderr)
    for line in greedy:
        print(f"check_cuda: local memory, and not in ALLOWED: {line}", file=sys.stderr)
    print(f"{library}: {len(ops)} ops, {a.archs}: " + ("FAILED" if missing or greedy else "passed"))
    return 1 if missing or greedy else 0


def tool(name: str) -> str | None:
    """From CUDA_HOME, PATH, or what the triton wheel brings."""
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / name).exists():
        return str(Path(home) / "bin" / name)
    triton = find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name if triton and triton.origin else None
    return shutil.which(name) or (str(bundled) if bundled and bundled.exists() else None)


def build(folder: Path, archs: str, nvcc: str) -> Path:
    toolkit = Path(nvcc).parents[1] / "lib"  # where the toolkit of the package index keeps its static runtime
    paths = [str(toolkit), *filter(None, [os.environ.get("LIBRARY_PATH")])]
    environment = os.environ | {"LIBRARY_PATH": ":".join(paths)}
    options = ["LIPFAST_CUDA=ON", "LIPFAST_PYBIND=OFF", f"LIPFAST_CUDA_ARCHS={archs}", "CMAKE_BUILD_TYPE=Release"]
    options += [f"CMAKE_CUDA_COMPILER={nvcc}", f"Python_EXECUTABLE={sys.executable}"]
    command = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *(f"-D{option}" for option in options)]
    subprocess.run(command, check=True, env=environment)
    subprocess.run(["cmake", "--build", folder, "--target", "_ops_cuda"], check=True, env=environment)
    return folder / "_ops_cuda.so"


def unregistered(library: Path, ops: list[str]) -> list[str]:
    """Loads the library in a fresh process, after the schemas; returns the ops without a CUDA kernel for them or their
    ``<op>_forward``."""
    code = (
        "import sys, torch, lipfast; torch.ops.load_library(sys.argv[1])\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "served = lambda op: any(has(f'lipfast::{name}', 'CUDA') for name in (op, f'{op}_forward'))\n"
        "print(*(op for op in sys.argv[2:] if not served(op)))"
    )
    environment = os.environ | {"LIPFAST_CPU_CAPABILITY": "none", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code, library, *ops], env=environment, stdout=subprocess.PIPE, text=True)
    return run.stdout.split() if run.returncode == 0 else ops


def local_memory(library: Path) -> list[str]:
    """Prints what each kernel takes; returns the lines of those that use more local memory than ALLOWED."""
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        raise SystemExit("check_cuda: no cuobjdump: it comes with CUDA and in the triton wheel (pip install triton)")
    text = subprocess.run([cuobjdump, "-res-usage", library], check=True, stdout=subprocess.PIPE, text=True).stdout
    table: dict[str, list[tuple[str, int, int, int]]] = {}
    for arch, kernel, *sizes in usage(text):
        table.setdefault(kernel, []).append((arch, *sizes))
    greedy = []
    print("registers / bytes of shared memory / bytes of local memory")
    for kernel, rows in sorted(table.items()):
        print(f"{kernel:48}", *(f"{arch:>8} {f'{r}/{s}/{m}':12}" for arch, r, s, m in rows))
        allowed = max((size for name, size in ALLOWED.items() if kernel.startswith(name)), default=0)
        greedy += [f"{kernel} {arch}: {local} bytes" for arch, _, _, local in rows if local > allowed]
    return greedy


def usage(text: str) -> Iterator[tuple[str, str, int, int, int]]:
    """(arch, kernel, registers, shared bytes, local bytes) for each kernel that cuobjdump -res-usage lists."""
    arch = ""
    for part in re.finditer(r"arch = (\w+)|Function (\S+):\s+(REG:.*)", text):
        if part[1]:
            arch = part[1]
            continue
        sizes = dict(re.findall(r"(\w+):(\d+)", part[3]))
        stack = max(int(sizes["STACK"]), int(sizes["LOCAL"]))  # spills lie in the stack frame
        yield arch, readable(part[2]), int(sizes["REG"]), int(sizes["SHARED"]), stack


def readable(mangled: str) -> str:
    """``sums_kernel<f, 2, 64>`` of a mangled name: in it a name follows its own length."""
    for found in re.finditer(r"(?=(\d+)([a-z]\w*?_kernel)(?:I(\w+?)E+v)?)", mangled):
        if found[1].endswith(str(len(found[2]))):
            arguments = re.sub(r"L[a-z](\d+)E?", r" \1", found[3] or "").split()
            return f"{found[2]}<{', '.join(re.sub(r'^[0-9]+_*(?=[a-z])', '', a) for a in arguments)}>"
    return mangled


if __name__ == "__main__":
    sys.exit(main())
