"""A run folder: what a training leaves behind, whole after every epoch.

    config.json              what was asked for
    checkpoint.safetensors   the model after the last finished epoch, whose number stands in its header
    state-<epoch>.safetensors  the optimiser's state that goes with it
    metrics.jsonl            one line per epoch
    tensorboard/             the same numbers
    curves.png               the same, drawn at the end

Replacing the checkpoint is what commits an epoch: its state and its metrics line are written before, and older states
deleted after, so a kill at any moment leaves a pair that fits. Lines and states that are ahead of it are dropped on resuming.
"""

import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lipfast import checkpoint


class Run:
    """One run folder, opened for writing.

    Raises: ValueError if the folder holds something else, another run, or a run that was not to be resumed.
    """

    def __init__(self, folder: str | os.PathLike, config: Mapping[str, Any], resume: bool):
        self.folder = Path(folder)
        self.config = json.loads(json.dumps(config))
        self.epoch = 0  # finished epochs
        self.metrics: list[dict[str, Any]] = []
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"train: out must be a folder, got the file {self.folder}")
        self.is_new = not self.folder.exists() or not any(self.folder.iterdir())
        if self.is_new:
            return
        if not resume:
            raise ValueError(f"train: {self.folder} exists already: resume it, or name another folder")
        self._compare()
        if (self.folder / checkpoint.NAME).exists():
            self.epoch = checkpoint.read(self.folder)["metadata"]["epoch"]
            self.metrics = self._read_metrics()

    def start(self) -> None:
        """Creates the folder or tidies what a kill left behind."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in (*self.folder.glob(".*.part"), *self._states(but=self.epoch)):
                leftover.unlink()
        except OSError as error:
            raise ValueError(f"train: out must be a folder that can be written, got {self.folder}: {error.strerror}") from error
        checkpoint.replace_file(self.folder / "config.json", _json(self.config, indent=2))
        self._write_metrics()

    def commit(self, model: nn.Module, optimizer: Optimizer, line: Mapping[str, Any]) -> None:
        """Records a finished epoch; ``line["epoch"]`` is its number, counted from 1."""
        self.epoch = line["epoch"]
        self.metrics.append(dict(line))
        tensors, numbers = _flat(optimizer)
        checkpoint.write_tensors(self.folder / f"state-{self.epoch}.safetensors", tensors, {"epoch": self.epoch, **numbers})
        self._write_metrics()
        about = {**self.config, "epoch": self.epoch}
        checkpoint.save(self.folder / checkpoint.NAME, model, self.config["model"], self.config["arguments"], about)
        for old in self._states(but=self.epoch):
            old.unlink(missing_ok=True)

    def restore(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Brings back the last committed epoch, to the bit."""
        path = self.folder / checkpoint.NAME
        checkpoint.fill(model, checkpoint.read_tensors(path)[0], str(path))
        tensors, numbers = checkpoint.read_tensors(self.folder / f"state-{self.epoch}.safetensors")
        del numbers["epoch"]
        state: dict[int, dict[str, Any]] = {}
        for key, value in {**tensors, **numbers}.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def plot(self) -> None:
        """Draws curves.png."""
        from lipfast import figures

        keys = dict.fromkeys(key for line in self.metrics for key in line if key not in ("epoch", "seconds"))
        panels = []
        for key in keys:
            points = [(float(line["epoch"]), float(line[key])) for line in self.metrics if key in line]
            panels.append((key.replace("_", " "), [("", [e for e, _ in points], [v for _, v in points])]))
        image = io.BytesIO()
        figures.training_curves(panels).savefig(image, format="png", dpi=130)
        checkpoint.replace_file(self.folder / "curves.png", image.getvalue())

    def discard_if_empty(self) -> None:
        """Removes a folder that this run created, or found empty, and in which no epoch was finished."""
        if self.is_new and self.epoch == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _compare(self) -> None:
        path = self.folder / "config.json"
        try:
            stored = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"train: {self.folder} is not a run folder: its config.json cannot be read") from error
        for key in ("recipe", "data", "images", "model", "arguments"):
            if stored.get(key) != self.config[key]:
                raise ValueError(f"resume: the run in {self.folder} has {key} {stored.get(key)!r}, got {self.config[key]!r}")
        settings = stored.get("settings", {})
        for key, value in self.config["settings"].items():
            if settings.get(key) != value:
                raise ValueError(f"resume: the run in {self.folder} has {key} = {settings.get(key)!r}, got {value!r}")

    def _states(self, but: int) -> list[Path]:
        return [path for path in self.folder.glob("state-*.safetensors") if path.name != f"state-{but}.safetensors"]

    def _read_metrics(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["epoch"] <= self.epoch]

    def _write_metrics(self) -> None:
        checkpoint.replace_file(self.folder / "metrics.jsonl", b"".join(_json(line) for line in self.metrics))


def _flat(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimiser's state as tensors and numbers under ``<parameter>.<name>``."""
    entries = {f"{i}.{name}": v for i, state in optimizer.state_dict()["state"].items() for name, v in state.items()}
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in entries.items() if key not in tensors}


def _json(value: Any, indent: int | None = None) -> bytes:
    return (json.dumps(value, indent=indent) + "\n").encode()
