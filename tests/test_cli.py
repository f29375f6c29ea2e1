import json
import math
import shutil
import struct
import subprocess
import sys

import pytest
import torch

from lipfast.certify import Certificate
from lipfast.cli import main
from lipfast.data import load

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

SHORT = ["--epochs", "1", "--limit", "128"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "interval", *SHORT, "--out", str(folder), "--set", "eps=1/50", "lr=2e-3", "--seed", "3"]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def _fails(capsys, words, message) -> None:
    """Status 2, and one line on standard error that says what is wrong; files made here may differ from the published."""
    assert main([str(word) for word in words]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "warning: " not in line or "differs" not in line]
    assert len(told) == 1, told
    assert told[0].startswith("lipfast: ")
    assert message in told[0], told[0]


def _mnist(folder, split: str = "t10k", count: int = 3):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + bytes(count * 784))
    (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + bytes(count))
    return folder


def test_train_takes_settings_and_seed(trained):
    config = json.loads((trained / "config.json").read_text())
    settings = config["settings"]
    assert config["images"] == 128
    assert (settings["eps"], settings["lr"], settings["seed"], settings["epochs"]) == (0.02, 2e-3, 3, 1)


def test_certify_prints_and_writes_what_it_found(run, capsys):
    assert main(["certify", str(run), "--eps", "1/100", "0.005", "--limit", "50"]) == 0
    certificate = Certificate.load(run / "certificate-interval-bound-linf.npz")
    assert certificate.eps == (0.005, 0.01)
    assert torch.equal(certificate.label, load("digits", split="test", limit=50).labels)
    assert (run / "certificate-interval-bound-linf.png").stat().st_size > 1000
    lines = capsys.readouterr().out.splitlines()
    assert "digits: 50 images, l_inf" in lines[0]
    assert lines[2].split() == ["0", "(clean)", f"{certificate.clean_accuracy:.2%}"]
    assert lines[4].split() == ["0.01", f"{certificate.certified_accuracy(0.01):.2%}"]


def test_certify_asks_by_default_about_the_radius_of_the_run(run, capsys):
    assert main(["certify", str(run / "checkpoint.safetensors"), "--limit", "20", "--p", "2", "--pixel-range", "0", "1"]) == 0
    certificate = Certificate.load(run / "certificate-interval-bound-l2.npz")
    assert certificate.eps == (0.005, 0.01, 0.02)
    assert certificate.pixel_range == (0, 1)
    assert certificate.data == "digits"


def test_an_estimate_is_printed_as_one(run, capsys):
    for kind, said in (("estimate", True), ("bound", False)):
        assert main(["certify", str(run), "--kind", kind, "--limit", "20"]) == 0
        assert ("estimate: not a certificate" in capsys.readouterr().out) == said
    assert Certificate.load(run / "certificate-interval-estimate-linf.npz").kind == "estimate"


@pytest.mark.parametrize("recipe", ["gloro", "local", "crm"])
def test_certify_takes_by_default_the_method_of_the_recipe(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", recipe, "--epochs", "1", "--limit", "64", "--out", str(run)]) == 0
    method = {"gloro": "product", "local": "local", "crm": "liplt"}[recipe]
    assert main(["certify", str(run), "--limit", "20", "--eps", "0.1"]) == 0
    assert main(["certify", str(run), "--limit", "20", "--eps", "0.1", "--kind", "estimate"]) == 0
    assert main(["certify", str(run), "--limit", "20", "--eps", "0.1", "--method", "interval"]) == 0
    for kind in ("bound", "estimate"):
        certificate = Certificate.load(run / f"certificate-{method}-{kind}-l2.npz")
        assert certificate.failure_probability == 0
        assert (certificate.method, certificate.kind, certificate.p) == (method, kind, 2)
        assert (run / f"certificate-{method}-{kind}-l2.png").exists()
    assert (run / "certificate-interval-bound-linf.npz").exists()
    assert main(["certify", str(run), "--limit", "20", "--eps", "0.01", "--method", "liplt", "--p", "inf"]) == 0
    assert Certificate.load(run / "certificate-liplt-bound-linf.npz").p == math.inf
    told = capsys.readouterr().out
    assert f"l_2, eps in pixel units; method {method}, bound" in told
    assert "probability" not in told
    words = ["certify", str(run), "--limit", "4", "--eps", "0.1", "--method", "local", "--failure-probability", "1e-6"]
    assert main(words) == 0
    assert "method local, bound with probability 1 - 1e-06" in capsys.readouterr().out
    assert Certificate.load(run / "certificate-local-bound-1e-06-l2.npz").failure_probability == 1e-6
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "run, local, bound with probability 1 - 1e-06" in text
    assert f"run, {method}, bound" in text
    assert f"run, {method}, estimate: not a certificate" in text


def test_report_holds_all_runs(run, capsys):
    main(["certify", str(run), "--limit", "20"])
    other = shutil.copytree(run, run.with_name("other"))
    assert main(["report", str(run), str(other)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    text = (run / "report.html").read_text()
    assert "other, interval, bound" in text
    assert main(["report", str(run), "--out", str(run.parent / "r.html")]) == 0
    assert "other" not in (run.parent / "r.html").read_text()


def test_resume_goes_on_with_a_finished_run(run):
    before = (run / "metrics.jsonl").read_text()
    words = ["train", "interval", *SHORT, "--out", str(run), "--set", "eps=1/50", "lr=2e-3", "--seed", "3"]
    assert main([*words, "--resume"]) == 0
    assert (run / "metrics.jsonl").read_text() == before


def test_info_names_versions_and_devices(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert ["torch", torch.__version__] in [line.split() for line in out.splitlines()]
    assert "device cpu" in out
    assert "loaded" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "train: the following arguments are required: RECIPE"),
        (["train", "magic"], "recipe must be one of interval, gloro, local, crm, lipnext, graft, got 'magic'"),
        (["train", "interval", "--data", "nowhere"], "nowhere"),
        (["train", "interval", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["train", "interval", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["train", "interval", "--limit", "0"], "limit must be at least 1, got 0"),
        (["train", "interval", "--set", "eps"], "argument --set: must be KEY=VALUE, got 'eps'"),
        (["train", "interval", "--set", "speed=3"], "no field 'speed'"),
        (["train", "interval", "--set", "eps=-0.1"], "eps must be at least 0"),
        (["train", "interval", "--set", "eps=nan"], "eps must be"),
        (["train", "interval", "--set", "lr=fast"], "lr must be float, got 'fast'"),
        (["train", "interval", "--device", "nonsense"], "argument --device: must be one that torch can use, got 'nonsense'"),
        (["certify"], "certify: the following arguments are required: RUN_OR_CHECKPOINT"),
        (["report"], "report: the following arguments are required: RUN"),
    ],
)
def test_a_wrong_command_gives_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _fails(capsys, words, message)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eps", "-0.1"], "eps must be positive and finite"),
        (["--eps", "nan"], "eps must be positive and finite"),
        (["--eps", "1/0"], "argument --eps: must be a number, got '1/0'"),
        (["--p", "3"], "p must be 1 or 2 or inf for method 'interval', got 3.0"),
        (
            ["--method", "zonotope"],
            "not available in this version; available: interval, product, liplt, local, crown, alpha-crown",
        ),
        (["--failure-probability", "1e-9"], "failure_probability must be 0 for method 'interval', got 1e-09"),
        (["--failure-probability", "some"], "argument --failure-probability: must be a number, got 'some'"),
        (["--kind", "guess"], "kind must be one of bound, estimate, got 'guess'"),
        (["--data", "mnist", "--root", "absent"], "absent"),
        (["--pixel-range", "0", "0.01"], "pixels must be within pixel_range"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--device", "cuda:99"], "argument --device: must be one that torch can use, got 'cuda:99'"),
    ],
)
def test_a_wrong_certify_gives_one_line_and_writes_nothing(words, message, run, capsys):
    before = sorted(run.iterdir())
    _fails(capsys, ["certify", run, *words], message)
    assert sorted(run.iterdir()) == before


def test_images_of_another_shape_are_refused(run, tmp_path, capsys):
    _fails(capsys, ["certify", run, "--data", _mnist(tmp_path / "mnist")], "does not accept samples of shape (1, 28, 28)")


def test_a_truncated_data_file_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "t10k"):
        folder = _mnist(tmp_path / "mnist", split)
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-10])
    _fails(capsys, ["train", "interval", "--data", "mnist", "--root", folder, "--out", "run"], "train-images-idx3-ubyte")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_absent_damaged_or_another_is_refused(run, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    path = run / "checkpoint.safetensors"
    _fails(capsys, ["certify", tmp_path / "absent"], "absent")
    whole = path.read_bytes()
    for size in (0, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        _fails(capsys, ["certify", run], "checkpoint.safetensors")
    path.write_bytes(whole)
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][:1]}, path, header)
    _fails(capsys, ["certify", run], "checkpoint from another model")
    save_file(tensors, path)
    _fails(capsys, ["certify", run], "not a checkpoint of lipfast")


def test_a_folder_that_cannot_be_written_is_refused(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    _fails(capsys, ["train", "interval", *SHORT, "--out", tmp_path / "file"], "out must be a folder")
    _fails(
        capsys, ["train", "interval", *SHORT, "--out", tmp_path / "file" / "run"], "out must be a folder that can be written"
    )
    _fails(capsys, ["train", "interval", *SHORT, "--out", run], "exists already")
    _fails(capsys, ["report", run, "--out", tmp_path / "file" / "r.html"], "cannot be written")
    _fails(capsys, ["report", tmp_path], "is no run folder")
    monkeypatch.setattr("os.access", lambda *_: False)
    _fails(capsys, ["certify", run], "cannot be written")


def test_a_missing_package_is_named_with_the_extra_that_brings_it(run, monkeypatch, capsys):
    before = sorted(run.iterdir())
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    _fails(capsys, ["certify", run], "matplotlib is needed: pip install lipfast[loops]")
    assert sorted(run.iterdir()) == before


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["lipfast.train"], "train", stop)
    assert main(["train", "interval", "--out", "my run"]) == 130
    assert capsys.readouterr().err == "lipfast: interrupted; to go on: lipfast train interval --out 'my run' --resume\n"


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="recipe must be one of"):
        main(["train", "magic", "--debug"])


def test_a_bug_is_not_called_a_mistake_of_the_user(monkeypatch):
    monkeypatch.setattr("lipfast.cli.report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["report", "run"])


def test_the_command_starts_without_the_heavy_packages():
    program = "import sys, lipfast.cli; sys.exit(' '.join({'matplotlib', 'sklearn', 'tensorboard'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""


def test_the_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "lipfast", "report", "absent"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "lipfast: report: absent is no run folder: it has no config.json\n"
    assert done.stdout == ""
