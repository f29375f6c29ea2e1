"""Where and with what a benchmark ran: a number without its machine and commit is not a result."""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import lipfast

SCHEMA = "lipfast-bench/2"
RESULTS = Path(__file__).parent / "results"
_PEERS = ("auto_LiRPA", "deel-torchlip", "geoopt", "geotorch", "orthogonium")


def circumstances(device: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "machine": {
            "name": machine(device),
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            "instruction_set": os.environ.get("LIPFAST_CPU_CAPABILITY", "best"),
        },
        "versions": {
            "lipfast": lipfast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
            **{package: _version(package) for package in _PEERS},
        },
        "kernels": lipfast.loaded,
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
    }


def machine(device: str) -> str:
    """The folder of a machine's results: ``amd-epyc``, ``nvidia-h200``."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_model()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError, in one line, for what is no result file of this schema."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: JSON expected: {error}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema {SCHEMA!r} expected, got {schema!r}")
    return found


def write(path: Path, found: dict[str, Any]) -> None:
    """At once: whoever stops the run keeps what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    half.write_text(json.dumps(found, indent=1) + "\n")
    half.replace(path)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, with a + where files differ from it; None without git or outside of a repository."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")
