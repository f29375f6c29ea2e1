"""The tool that builds wheels: what it refuses, which compiler it takes, what it finds wrong in a wheel. Nothing is built."""

import shutil
import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest

from tools import wheels

NAME = "lipfast-1.0+cpu-py3-none-manylinux_2_34_x86_64.whl"
CUDA = wheels.Compiler("13.0", Path("nvcc"), "the test")
needs_binutils = pytest.mark.skipif(not (shutil.which("cc") and shutil.which("readelf")), reason="no C compiler and readelf")


@pytest.fixture(autouse=True)
def _no_index(monkeypatch, tmp_path):
    """pip finds nothing; what the tool writes is written elsewhere."""
    for name in ("CUDA_HOME", "PIP_FIND_LINKS", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(wheels, "WORK", tmp_path / "work")


@pytest.fixture
def run(monkeypatch):
    def main(*arguments):
        monkeypatch.setattr("sys.argv", ["wheels", *map(str, arguments)])
        return wheels.main()

    return main


def nvcc(folder: Path, version: str) -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("text", ["11.8", "banana", "13", "13.0.2", "cu130", "13.y"])
def test_an_unknown_version_is_refused_before_anything_is_built(text, run):
    with pytest.raises(SystemExit, match=f"^wheels: expected cpu or a CUDA version from 12.0 on, .* got '{text}'$"):
        run("cpu", text)
    assert not wheels.WORK.exists()


def test_missing_and_old_torch_are_told(monkeypatch, run):
    monkeypatch.setattr(wheels.importlib.metadata, "version", lambda name: "2.9.1+cu128")
    with pytest.raises(SystemExit, match=r"^wheels: torch 2.10 or newer is needed, got 2.9.1\+cu128"):
        run("cpu")
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^wheels: no torch beside .* pip install torch==2.13.0$"):
        run("cpu")


@pytest.mark.parametrize("text", ["12.9", "13.99", "99.x"])
def test_a_missing_compiler_is_told_with_its_remedy(text, monkeypatch, run):
    monkeypatch.setattr(wheels, "on_machine", lambda: {})
    with pytest.raises(SystemExit) as told:
        run("cpu", text)
    (line,) = str(told.value).splitlines()
    assert line.startswith(f"wheels: no compiler for CUDA {text}: CUDA_HOME, PATH and /usr/local have nvcc of no version")
    assert "No matching distribution found for cuda-toolkit" in line
    assert line.endswith("Install that toolkit and set CUDA_HOME to its folder")


def test_a_toolkit_of_the_index_without_a_compiler_is_told_and_not_kept(monkeypatch):
    monkeypatch.setattr(wheels, "on_machine", lambda: {"13.0": CUDA})
    monkeypatch.setattr(wheels, "pip", lambda *words: (Path(words[2]) / "nvidia/cuda_nvcc/bin").mkdir(parents=True))
    with pytest.raises(SystemExit, match=r"have nvcc 13.0, the package index says: its cuda-toolkit 12.9 holds no nvcc\."):
        wheels.compiler("12.9")
    assert not list(wheels.WORK.iterdir())


def test_a_toolkit_of_the_index_is_fetched_once(monkeypatch, capsys):
    monkeypatch.setattr(wheels, "on_machine", lambda: {})
    monkeypatch.setattr(wheels, "pip", lambda *words: nvcc(Path(words[2]) / "nvidia" / "cu13", "13.5"))
    assert wheels.compiler("13.5") == ("13.5", wheels.WORK / "cuda-13.5/nvidia/cu13/bin/nvcc", "the package index")
    monkeypatch.setattr(wheels, "pip", lambda *words: pytest.fail("asked again"))
    assert wheels.compiler("13.5").version == "13.5"
    assert "CUDA 13.5: nvcc 13.5 from the package index" in capsys.readouterr().out


def test_the_compiler_of_the_machine_is_known_by_what_it_says(tmp_path, monkeypatch):
    old, new = nvcc(tmp_path / "old", "13.98"), nvcc(tmp_path / "new", "13.100")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    monkeypatch.setenv("PATH", f"{new.parent}:/usr/bin:/bin")
    assert wheels.compiler("13.98").nvcc == old
    assert wheels.compiler("13.100").nvcc == new
    assert wheels.compiler("13.x").nvcc == new  # the index, which would be asked too, has none here
    monkeypatch.setenv("PATH", f"{nvcc(tmp_path / 'other', '13.98').parent}:/usr/bin:/bin")
    assert wheels.compiler("13.98").nvcc == old


def test_the_newest_is_looked_for_in_the_index_too(monkeypatch):
    monkeypatch.setattr(wheels, "pip", lambda *words: '{"install": [{"metadata": {"version": "13.10.1.0"}}]}')
    assert wheels.newest("13", {"13.9": CUDA, "14.20": CUDA}) == "13.10"
    assert wheels.newest("13", {"13.11": CUDA}) == "13.11"


@pytest.fixture
def unpacked(tmp_path):
    """A wheel without a fault; its files are empty."""
    folder = tmp_path / "unpacked"
    for name in (*wheels.sources(), "lipfast-1.0+cpu.dist-info/METADATA"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for name in (*wheels.TORCH, "libother.so"):
        link(tmp_path / name, f"-Wl,-soname,{name}")
    link(folder / "lipfast/_ops_cpu.so", *(tmp_path / name for name in wheels.TORCH))
    return folder


def link(library: Path, *options) -> None:
    subprocess.run(["cc", "-shared", "-o", library, "-Wl,--no-as-needed", *options, "-x", "c", "/dev/null"], check=True)


def faults(unpacked, name=NAME, label="cpu", found=None, archs=()):
    return list(wheels.faults(name, unpacked, label, found, list(archs)))


@needs_binutils
def test_a_good_wheel_has_no_fault(unpacked, tmp_path):
    assert faults(unpacked) == []
    shutil.copy(unpacked / "lipfast/_ops_cpu.so", unpacked / "lipfast/_ops_cuda.so")
    assert faults(unpacked, found=CUDA, archs=["sm_80", "sm_90a", "sm_100", "compute_100"]) == []


@needs_binutils
def test_files_that_lack_or_do_not_belong_are_named(unpacked):
    for name in ("kernels/interval_linear.py", "_load.py", "_ops_cpu.so"):
        (unpacked / "lipfast" / name).unlink()
    for name in ("lipfast/_C.cpython-311-x86_64-linux-gnu.so", "tests/test_cli.py", "lipfast.libs/libgomp-1.so.1"):
        (unpacked / name).parent.mkdir(exist_ok=True)
        (unpacked / name).touch()
    assert faults(unpacked) == [
        "lipfast/_load.py is missing",
        "lipfast/_ops_cpu.so is missing",
        "lipfast/kernels/interval_linear.py is missing",
        "lipfast.libs/libgomp-1.so.1 does not belong in it",
        "lipfast/_C.cpython-311-x86_64-linux-gnu.so does not belong in it",
        "tests/test_cli.py does not belong in it",
    ]


@needs_binutils
def test_tags_label_and_architectures_are_checked(unpacked):
    for tags in ("cp311-cp311-manylinux_2_34_x86_64", "py3-none-linux_x86_64"):
        assert faults(unpacked, f"lipfast-1.0+cpu-{tags}.whl") == [f"expected the tags py3-none-manylinux, got {tags}"]
    assert faults(unpacked, label="") == ["expected the label none, got version 1.0+cpu"]
    assert faults(unpacked, label="cu130", found=CUDA, archs=["sm_80"]) == [
        "expected the label cu130, got version 1.0+cpu",
        "lipfast/_ops_cuda.so is missing",
        "expected the architectures sm_80 sm_90a sm_100 compute_100, got sm_80",
    ]


@needs_binutils
def test_a_library_asks_for_nothing_that_a_machine_may_lack(unpacked, tmp_path):
    link(unpacked / "lipfast/_ops_cpu.so", tmp_path / "libother.so", tmp_path / "libtorch.so", "-Wl,-rpath,/home/someone")
    assert faults(unpacked) == [
        "lipfast/_ops_cpu.so has a search path: /home/someone",
        "lipfast/_ops_cpu.so needs libother.so, which not every machine has",
        "lipfast/_ops_cpu.so is not linked to libtorch_cpu.so",
    ]


@needs_binutils
@pytest.mark.parametrize("unlabelled", [False, True])
def test_only_a_wheel_without_fault_reaches_dist(unlabelled, unpacked, tmp_path, monkeypatch, run, capsys):
    def build(folder, found, torch, label):
        assert label == ("" if unlabelled else "cpu")
        wheel = folder / NAME.replace("+cpu", f"+{label}" if label else "")
        with ZipFile(wheel, "w") as archive:
            for path in filter(Path.is_file, unpacked.rglob("*")):
                name = path.relative_to(unpacked).as_posix()
                archive.write(path, name.replace("+cpu", "") if unlabelled else name)
        return wheel

    for name, replacement in (("install_tools", lambda: None), ("build", build), ("repair", lambda wheel: wheel)):
        monkeypatch.setattr(wheels, name, replacement)
    arguments = ["cpu", "--output", tmp_path / "dist", *["--unlabelled"] * unlabelled]
    (unpacked / "lipfast/leftover.txt").touch()
    with pytest.raises(SystemExit, match=r"_x86_64.whl: lipfast/leftover.txt does not belong in it$"):
        run(*arguments)
    assert not (tmp_path / "dist").exists()
    (unpacked / "lipfast/leftover.txt").unlink()
    assert run(*arguments) == 0
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name == (NAME.replace("+cpu", "") if unlabelled else NAME)
    assert capsys.readouterr().out.splitlines()[-1].split()[:5:2] == [wheel.name, "-", "2.34"]


def test_wheels_without_a_label_would_take_each_others_place(run):
    with pytest.raises(SystemExit, match=r"^wheels: --unlabelled .* expected one version, got cpu 13.0$"):
        run("cpu", "13.0", "--unlabelled")
