"""Installs wheels into fresh environments, each in one command, and runs the tests of the ops on them there.

    python tools/smoke.py dist/*.whl [--torch 2.10.0 newest] [--quick]

`newest` asks for no torch: pip takes the newest that the wheel allows. The environments and a copy of the tests lie outside
the checkout, so what is tested is the wheel, and go away afterwards. Exit status 1 if a wheel fails, after all had their turn.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
OPS = sorted(path.stem for path in (ROOT / "lipfast" / "ops").glob("[!_]*.py"))
FILES = [f"tests/test_{name}.py" for name in (*OPS, "cpu_kernels", "pairwise_distance_kernel")]
QUICK = ["tests/test_interval_linear.py", "tests/test_spectral_norm_bound.py"]
FACTS = """
import json, sys, torch, lipfast
from importlib.metadata import version
facts = {"file": lipfast.__file__, "version": version("lipfast"), "torch": torch.__version__, "loaded": lipfast.loaded}
print(json.dumps(facts | {"cuda": torch.version.cuda}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--torch", nargs="+", default=["2.13.0"], metavar="VERSION", help="2.13.0 unless told; newest")
    parser.add_argument("--quick", action="store_true", help=f"run {' and '.join(QUICK)} alone")
    a = parser.parse_args()
    for wheel in a.wheels:
        if not wheel.is_file() or wheel.suffix != ".whl":
            raise SystemExit(f"smoke: expected a wheel, got {wheel}: make wheels builds them in dist/")
    for version in a.torch:
        if version != "newest" and not re.fullmatch(r"\d+\.\d+(\.\d+)?", version):
            raise SystemExit(f"smoke: expected a version of torch, as in 2.13.0, or newest, got {version!r}")
    failed = False
    for wheel in a.wheels:
        for version in a.torch:
            start = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="lipfast-smoke-") as folder:
                wrong = list(faults(wheel.resolve(), version, Path(folder), QUICK if a.quick else FILES))
            for fault in wrong:
                print(f"smoke: {wheel.name}, torch {version}: {fault}", file=sys.stderr)
            failed |= bool(wrong)
            print(f"{'FAILED' if wrong else 'passed'} in {time.monotonic() - start:.0f} s", flush=True)
    return 1 if failed else 0


def faults(wheel: Path, version: str, folder: Path, tests: list[str]) -> Iterator[str]:
    """Installs, looks, tests. One line for each thing that is not as it should be."""
    print(f"{wheel.name}, torch {version}, Python {sys.version.split()[0]}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python"
    torch = [] if version == "newest" else [f"torch=={version}"]
    # One command. The wheel needs no more than its own requirements; pytest is the tests'.
    command = [python, "-m", "pip", "install", "-qq", wheel, *torch, "pytest>=8", "pytest-benchmark>=5"]
    if subprocess.run(command).returncode:
        yield "pip could not install it"
        return
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)  # pytest's settings
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LIPFAST_CPU_CAPABILITY"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    run = subprocess.run([python, "-c", FACTS], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        yield "it cannot be imported"
        return
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    yield from loading_faults(json.loads(run.stdout), wheel, folder, "lipfast/_ops_cuda.so" in names)
    if subprocess.run([python, "-m", "pytest", "-q", *tests], cwd=folder, env=environment).returncode:
        yield "a test failed"


def loading_faults(facts: dict, wheel: Path, folder: Path, has_cuda: bool) -> Iterator[str]:
    loaded = [name for name, there in facts["loaded"].items() if there]
    print(
        f"lipfast {facts['version']}, torch {facts['torch']} with CUDA {facts['cuda']}: loaded {', '.join(loaded)}", flush=True
    )
    if not Path(facts["file"]).is_relative_to(folder):
        yield f"expected lipfast from {folder}, got {facts['file']}"
    if facts["version"] != wheel.name.split("-")[1]:
        yield f"expected version {wheel.name.split('-')[1]}, got {facts['version']}"
    for name, expected in (("cpu", True), ("cuda", has_cuda and facts["cuda"] is not None)):
        if facts["loaded"][name] != expected:
            yield f"expected the {name} library {'' if expected else 'not '}to load"


if __name__ == "__main__":
    sys.exit(main())
