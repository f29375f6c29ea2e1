"""The tool that tests wheels in fresh environments: what it refuses, what it runs, what it makes of an installed wheel."""

from pathlib import Path

import pytest

from tools import smoke

WHEEL = Path("lipfast-1.0+cu130-py3-none-manylinux_2_34_x86_64.whl")
FACTS = {"file": "/new/env/lipfast/__init__.py", "version": "1.0+cu130", "torch": "2.10.0", "cuda": "12.8"}


def faults(has_cuda=True, **changes):
    loaded = {"cpu": True, "cuda": True, "triton": True} | changes.pop("loaded", {})
    return list(smoke.loading_faults(FACTS | changes | {"loaded": loaded}, WHEEL, Path("/new"), has_cuda))


def test_every_test_file_that_it_runs_is_there():
    assert len(smoke.FILES) > 20
    assert [name for name in (*smoke.FILES, *smoke.QUICK) if not (smoke.ROOT / name).is_file()] == []


def test_the_wheel_itself_must_be_what_is_loaded():
    assert faults() == []
    assert faults(file="/checkout/lipfast/__init__.py") == ["expected lipfast from /new, got /checkout/lipfast/__init__.py"]
    assert faults(version="1.0+cpu") == ["expected version 1.0+cu130, got 1.0+cpu"]


def test_each_library_loads_where_torch_has_its_device():
    assert faults(loaded={"cpu": False}) == ["expected the cpu library to load"]
    assert faults(loaded={"cuda": False}) == ["expected the cuda library to load"]
    assert faults(loaded={"cuda": False}, cuda=None) == []
    assert faults(cuda=None) == ["expected the cuda library not to load"]
    assert faults(has_cuda=False, loaded={"cuda": False}) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["dist/*.whl"], r"^smoke: expected a wheel, got dist/\*\.whl: make wheels"),
        ([__file__], r"^smoke: expected a wheel, got .*test_smoke\.py"),
        (
            [WHEEL, "--torch", "2.13.0", "banana"],
            r"^smoke: expected a version of torch, as in 2\.13\.0, or newest, got 'banana'$",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    WHEEL.touch()
    monkeypatch.setattr("sys.argv", ["smoke", *map(str, words)])
    with pytest.raises(SystemExit, match=told):
        smoke.main()


def test_one_failure_fails_the_run_after_all_wheels_had_their_turn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    WHEEL.touch()
    seen = []

    def tried(wheel, version, folder, tests):
        seen.append((version, folder.is_dir(), tests))
        return ["a test failed"] if version == "2.10.0" else []

    monkeypatch.setattr(smoke, "faults", tried)
    monkeypatch.setattr("sys.argv", ["smoke", str(WHEEL), "--torch", "2.10.0", "newest", "--quick"])
    assert smoke.main() == 1
    assert seen == [("2.10.0", True, smoke.QUICK), ("newest", True, smoke.QUICK)]
    assert capsys.readouterr().err.split() == f"smoke: {WHEEL}, torch 2.10.0: a test failed".split()
