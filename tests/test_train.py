import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from lipfast import checkpoint
from lipfast.bounds import interval_margin
from lipfast.data import Dataset, load
from lipfast.recipes import Interval
from lipfast.train import train
from tests.checks import assert_near

SMALL = {"limit": 200, "epochs": 3, "settings": {"batch_size": 40, "crop": 1}, "progress": False}


def run(out, recipe="interval", data="digits", **options):
    return train(recipe, data, out, **{**SMALL, **options})


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(folder):
    return load_file(folder / "checkpoint.safetensors")


def assert_same_run(got, want):
    assert metrics(got) == metrics(want)
    for key, t in weights(want).items():
        assert torch.equal(weights(got)[key], t), key


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_leaves_what_it_says(finished):
    names = sorted(path.name for path in finished.iterdir())
    assert names == [
        "checkpoint.safetensors",
        "config.json",
        "curves.png",
        "metrics.jsonl",
        "state-3.safetensors",
        "tensorboard",
    ]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = metrics(finished)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert {
        "loss",
        "robust_loss",
        "gradient_norm",
        "clean_accuracy",
        "certified_estimate",
        "certified_eps",
        "eps",
        "kappa",
        "lr",
    } <= set(lines[0])
    assert lines[-1]["loss"] < lines[0]["loss"]
    config = json.loads((finished / "config.json").read_text())
    assert (config["recipe"], config["data"], config["model"], config["images"]) == ("interval", "digits", "cnn_small", 200)
    assert config["settings"]["batch_size"] == 40
    model = checkpoint.load(finished)
    assert config["parameters"] == sum(p.numel() for p in model.parameters())


def test_the_metrics_are_those_of_the_checkpoint(finished):
    model, test = checkpoint.load(finished), load("digits", split="test", limit=200)
    assert not model.training
    x, y = test.pixels(), test.labels
    last = metrics(finished)[-1]
    assert last["clean_accuracy"] == pytest.approx((model(x).argmax(1) == y).double().mean().item())
    margin = interval_margin(model, x, y, last["certified_eps"], kind="estimate", pixel_range=(0, 1))
    assert last["certified_estimate"] == pytest.approx(((margin > 0).sum(1) == 9).double().mean().item())
    assert checkpoint.read(finished)["metadata"]["epoch"] == 3


def test_one_seed_one_result(finished, tmp_path):
    assert_same_run(run(tmp_path / "again"), finished)
    other = run(tmp_path / "other", settings={**SMALL["settings"], "seed": 1})
    assert metrics(other) != metrics(finished)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 50},
        {"lr": 1e-4},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"optimizer": "sgd"},
        {"clip": 0.1},
        {"crop": 0},
        {"flip": True},
        {"milestones": "1"},
        {"milestones": "1", "lr_decay": 0.5},
        {"model": "resnet2b"},
        {"arguments": '{"activation": "max_min"}'},
    ],
    ids=str,
)
def test_every_setting_of_the_loop_changes_the_result(finished, tmp_path, change):
    got = metrics(run(tmp_path / "run", settings={**SMALL["settings"], **change}))
    assert got[-1]["loss"] != metrics(finished)[-1]["loss"]
    assert got[-1]["loss"] > 0


def test_epochs_limit_and_data_change_the_result(finished, tmp_path):
    assert [line["eps"] for line in metrics(run(tmp_path / "a", epochs=1))] != [metrics(finished)[0]["eps"]]
    assert metrics(run(tmp_path / "b", limit=150))[0]["loss"] != metrics(finished)[0]["loss"]
    pair = load("digits", limit=200), load("digits", split="test", limit=200)
    assert_same_run(run(tmp_path / "c", data=pair), finished)


SCRIPT = """
import sys
from lipfast.train import train
out, resume = sys.argv[1], sys.argv[2] == "resume"
settings = {"batch_size": 20, "crop": 1, "optimizer": "adamw", "weight_decay": 0.01}
train("interval", "digits", out, epochs=4, settings=settings, resume=resume, progress=False, deterministic=True)
"""


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    whole = start(tmp_path / "whole", "new")
    killed = start(tmp_path / "killed", "new")
    log = tmp_path / "killed" / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 2) and killed.poll() is None:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert len(metrics(tmp_path / "killed")) < 4
    finish(whole)
    finish(start(tmp_path / "killed", "resume"))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    state = load_file(tmp_path / "whole" / "state-4.safetensors")
    for key, t in load_file(tmp_path / "killed" / "state-4.safetensors").items():
        assert torch.equal(t, state[key]), key


@pytest.mark.parametrize("moment", range(8))
def test_a_kill_at_any_moment_of_saving_loses_at_most_an_epoch(finished, tmp_path, monkeypatch, moment):
    """Writing stops for good after so many files: none, the state, the metrics, the checkpoint, of one epoch or the next."""
    real, written = checkpoint.replace_file, []

    def stop(path, content):
        if len(written) == 2 + moment:  # two files are written before the first epoch
            raise KeyboardInterrupt
        written.append(path)
        real(path, content)

    monkeypatch.setattr(checkpoint, "replace_file", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run")
    monkeypatch.setattr(checkpoint, "replace_file", real)
    assert_same_run(run(tmp_path / "run", resume=True), finished)
    assert len(list((tmp_path / "run").glob("state-*"))) == 1


def test_resuming_a_finished_run_changes_nothing(finished, tmp_path):
    before = weights(finished)
    run(finished, resume=True)
    assert all(torch.equal(t, before[key]) for key, t in weights(finished).items())
    assert_same_run(run(tmp_path / "new", resume=True), finished)  # nothing to resume: it begins


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, "exists already: resume it"),
        ({"resume": True, "epochs": 4}, "has epochs = 3, got 4"),
        ({"resume": True, "settings": {"batch_size": 40, "crop": 1, "lr": 0.1}}, r"has lr = 0.01, got 0\.1"),
        ({"resume": True, "settings": {"batch_size": 40, "crop": 1, "model": "cnn7"}}, "has model 'cnn_small', got 'cnn7'"),
        ({"resume": True, "limit": 100}, "has images 200, got 100"),
    ],
)
def test_a_run_is_not_overwritten_or_mixed(finished, options, fault):
    before = metrics(finished)
    with pytest.raises(ValueError, match=fault):
        run(finished, **options)
    assert metrics(finished) == before


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"settings": {"eps": -0.1}}, "recipe: eps must be at least 0 and finite"),
        ({"settings": {"lr": 1e30}}, "became (nan|inf) in epoch 1"),
        ({"settings": {"model": "resnet"}}, "name must be one of .*cnn_small.* got 'resnet'"),
        ({"settings": {"arguments": '{"depth": 3}'}}, "model cnn_small takes shape, .* got 'depth'"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"recipe": "nothing"}, "recipe must be one of interval, gloro, local, crm"),
        ({"data": "nowhere"}, "data must be one of digits"),
    ],
)
def test_a_fault_is_one_line_and_leaves_nothing(tmp_path, options, fault):
    with pytest.raises(ValueError, match=fault) as caught:
        run(tmp_path / "run", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_folder_is_told_before_training(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="out must be a folder, got the file"):
        run(tmp_path / "file")
    with pytest.raises(ValueError, match="out must be a folder that can be written"):
        run(tmp_path / "file" / "run")
    with pytest.raises(ValueError, match="out must be a folder that can be written"):
        run("/proc/lipfast")
    with pytest.raises(ValueError, match="full exists already"):
        run(tmp_path / "full")
    with pytest.raises(ValueError, match="not a run folder"):
        run(tmp_path / "full", resume=True)
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path / "full") == ["mine.txt"]


def test_a_loss_that_diverges_later_keeps_the_finished_epochs(tmp_path):
    class Diverging(Interval):
        def loss(self, model, x, y, epoch, memory):
            total, parts = super().loss(model, x, y, epoch, memory)
            return (total * float("inf") if epoch >= 2 else total), parts

    recipe = Diverging(data="digits", model="cnn_small", epochs=3, batch_size=40, eps=0.1, ramp_length=1)
    with pytest.raises(ValueError, match=r"became (nan|inf) in epoch 3"):
        run(tmp_path / "run", recipe, settings={})
    assert len(metrics(tmp_path / "run")) == 2
    assert all(t.isfinite().all() for t in weights(tmp_path / "run").values())


def test_deterministic_mode_ends_with_the_run(tmp_path):
    seen = []

    class Watching(Interval):
        def loss(self, *arguments):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().loss(*arguments)

    recipe = Watching(data="digits", model="cnn_small", epochs=1, batch_size=100, eps=0.1, ramp_length=1)
    torch.use_deterministic_algorithms(False)
    try:
        run(tmp_path / "a", recipe, settings={}, epochs=None)
        run(tmp_path / "b", recipe, settings={}, epochs=None, deterministic=True)
        assert seen == [False, False, True, True]
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("interval", {"model": "cnn7", "arguments": '{"width": 4, "batch_norm": true}'}),
        ("gloro", {"lr_end": 1e-5}),
        ("local", {"local_start": 20, "ramp_length": 10, "arguments": '{"activation": "clipped_max_min"}'}),
        ("crm", {"robust_start": 0, "rotate": 10, "shift": 0.1}),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, recipe, settings):
    options = {"recipe": recipe, "settings": {"batch_size": 50, **settings}, "limit": 100, "epochs": 2}
    whole = run(tmp_path / "whole", **options)
    real = checkpoint.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            checkpoint, "save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt) if a[-1]["epoch"] == 2 else real(*a)
        )
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", **options)
    assert_same_run(run(tmp_path / "stopped", resume=True, **options), whole)


def test_batch_norm_keeps_statistics(tmp_path):
    settings = {"model": "cnn7", "arguments": '{"width": 4, "batch_norm": true}', "batch_size": 50}
    folder = run(tmp_path / "run", settings=settings, limit=100, epochs=1)
    assert "natural_loss" in metrics(folder)[0]
    assert weights(folder)["1.running_mean"].abs().max() > 0


def test_thresholds_never_turn_negative(tmp_path):
    folder = run(tmp_path / "run", "local", settings={"lr": 0.2, "sparsity": 10, "ramp_length": 0})
    thresholds = torch.cat([t.flatten() for key, t in weights(folder).items() if key.endswith("threshold")])
    assert thresholds.min() == 0


TWO = """
import sys
from lipfast.train import train
settings = {"batch_size": 40, "optimizer": "sgd", "lr": 0.05, "crop": 1, "flip": True}
train("interval", "digits", sys.argv[1], device="cpu", limit=207, epochs=2, settings=settings, progress=False)
"""


@pytest.mark.slow
def test_two_processes_do_the_work_of_one(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command, out in (([sys.executable], "one"), (together, "two")):
        subprocess.run(
            [*command, tmp_path / "two.py", tmp_path / out], check=True, env=environment, capture_output=True, timeout=300
        )
    for key, t in weights(tmp_path / "one").items():
        assert_near(weights(tmp_path / "two")[key], t, torch.float32, slack=2)
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert_near(torch.tensor(two[key]), torch.tensor(one[key]), torch.float32, slack=2)


def test_data_of_other_shapes_and_classes_build_their_model(tmp_path):
    x = torch.rand(60, 3, 10, 10)
    data = Dataset(x, torch.arange(60) % 3, "mine", classes=3)
    recipe = Interval(data="mine", model="cnn_small", epochs=1, batch_size=30, eps=0.01, ramp_length=1)
    folder = run(tmp_path / "run", recipe, (data, data), settings={}, epochs=None)
    assert checkpoint.load(folder)(x).shape == (60, 3)
