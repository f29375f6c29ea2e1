"""A torch that is too old, or missing, is told in one line: by the build, and by the import."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no CMake here")


def configured(**options) -> str:
    """What the search for torch says; nothing is compiled."""
    defined = [f"-D{name}={value}" for name, value in options.items()]
    run = subprocess.run(
        ["cmake", *defined, "-P", ROOT / "cmake/TorchStable.cmake"], capture_output=True, text=True, cwd=options["TORCH_DIR"]
    )
    assert run.returncode != 0
    return " ".join(run.stderr.split())


@needs_cmake
@pytest.mark.parametrize(
    ("version", "told"), [("2.9.1+cu128", True), ("1.13.1", True), ("2.10.0", False), ("3.0.0a0+git", False)]
)
def test_the_build_refuses_an_old_torch(version, told, tmp_path):
    (tmp_path / "version.py").write_text(f"from typing import Optional\n\n__version__ = '{version}'\ncuda = '12.8'\n")
    line = f"lipfast: PyTorch 2.10 or newer is needed, got {version} in"
    assert (line in configured(TORCH_DIR=tmp_path)) == told


@needs_cmake
def test_the_build_tells_where_it_missed_torch(tmp_path):
    told = configured(TORCH_DIR=tmp_path, Python_EXECUTABLE="/some/python")
    assert "lipfast: no PyTorch beside /some/python; 2.10 or newer is needed. Install one first (pip install torch==" in told


@pytest.mark.parametrize("arguments", [["-c", "import lipfast"], ["-m", "lipfast", "info"], ["-m", "bench"]], ids=" ".join)
def test_the_import_refuses_an_old_torch(arguments, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import torch\n\ntorch.__version__ = '2.9.1+cu128'\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.splitlines()[-1] == "ImportError: lipfast: torch 2.10 or newer is needed, got 2.9.1+cu128"
