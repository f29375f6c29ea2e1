"""The training loop: every recipe runs in it.

Randomness is a function of (seed, epoch, process) and nothing else, so a run that is resumed after a kill goes on as if
nothing had happened: on the CPU, with the same number of threads, to the bit.
"""

import importlib.util
import inspect
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lipfast import models, recipes
from lipfast._processes import Processes, processes
from lipfast._run import Run
from lipfast._version import __version__
from lipfast.data import Images, batches, load, steps
from lipfast.recipes.recipe import Memory, Recipe

if TYPE_CHECKING:
    from tqdm import tqdm


def train(
    recipe: str | Recipe,
    data: str | os.PathLike | tuple[Images, Images] | None = None,
    out: str | os.PathLike = "run",
    device: str | torch.device | None = None,
    epochs: int | None = None,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    root: str | os.PathLike | None = None,
    limit: int | None = None,
    deterministic: bool = False,
    progress: bool = True,
) -> Path:
    """Trains a network by a recipe and returns the run folder.

    Args:
        recipe: a name, whose preset for the data set is taken, or a :class:`lipfast.recipes.Recipe`.
        data: a data set's name or folder as in :func:`lipfast.data.load`, or (training, test); by default the recipe's own.
        out: the run folder; must be new or empty unless ``resume``. :mod:`lipfast._run` lists what it will hold.
        device: by default CUDA where there is one.
        epochs: stretches or squeezes the recipe's schedules to this length.
        resume: continue the run in ``out`` after its last finished epoch, or begin if there is none. Recipe, data and model
            must be those of the run.
        settings: other values for the recipe's fields, see :meth:`Recipe.with_settings`.
        root: the folder of the data's files.
        limit: only the first so many images of each split.
        deterministic: refuse operations that torch cannot repeat to the bit.
        progress: show a progress bar.

    Under torchrun each process takes an equal slice of every batch; the first one writes. Batch norm then uses the statistics
    of its process's slice.

    ``metrics.jsonl`` has one line per epoch: the means of the loss and its parts over the epoch; on the test split
    ``clean_accuracy`` and ``certified_estimate``, the fraction certified at ``certified_eps`` without regard to rounding (it is
    no certificate: :func:`lipfast.certify` gives one); the scheduled quantities at the end of the epoch; ``lr``; and
    ``seconds``, the training time so far.

    Raises: ValueError, in one line, for an unknown name, a setting out of range, missing or damaged data, an ``out`` that
    cannot be used, or a loss that is not finite. A folder in which no epoch was finished is removed again.
    """
    for package in ("matplotlib", "safetensors", "tensorboard", "tqdm"):  # asked now, not after hours of work
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"train: {package} is needed: pip install lipfast[loops]", name=package)
    source = data if data is not None else "digits" if isinstance(recipe, str) else recipe.data
    images, test = source if isinstance(source, tuple) else (load(source, root, split, limit) for split in ("train", "test"))
    plan = recipes.find(recipe, images.name) if isinstance(recipe, str) else recipe
    plan = plan.with_settings(settings or {})
    if epochs is not None:
        if epochs < 1:
            raise ValueError(f"train: epochs must be at least 1, got {epochs}")
        plan = plan.with_epochs(epochs)
    if root is None and isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
        root = source
    config = {"data": images.name, "root": root and os.path.abspath(root), "images": len(images)}
    with processes(device) as group, _deterministic(deterministic):
        return _train(plan, images.to(group.device), test.to(group.device), config, out, group, resume, progress)


def _train(
    recipe: Recipe,
    data: Images,
    test: Images,
    config: dict[str, Any],
    out: str | os.PathLike,
    group: Processes,
    resume: bool,
    progress: bool,
) -> Path:
    torch.manual_seed(recipe.seed)
    model, arguments = _build(recipe, data)
    recipe.initialise(model)
    model = model.to(group.device)
    optimizer = recipe.make_optimizer(model)
    run = Run(out, {**config, **_config(recipe, model, arguments)}, resume)
    if run.epoch:
        run.restore(model, optimizer)
    group.wait()  # all have read before the first process writes
    if group.rank == 0:
        run.start()
    try:
        _epochs(recipe, model, optimizer, data, test, run, group, progress)
    except BaseException:
        if group.rank == 0:
            run.discard_if_empty()
        raise
    if group.rank == 0:
        run.plot()
        recipe.conclude(model, test, run.folder)
    return run.folder


def _epochs(recipe, model, optimizer, data, test, run, group, progress) -> None:
    before = run.metrics[-1]["seconds"] if run.metrics else 0.0
    start = time.perf_counter()
    count = steps(data, recipe.batch_size, group.count)
    with _bar(recipe.epochs * count, run.epoch * count, progress and group.rank == 0) as bar, _board(run, group) as board:
        for epoch in range(run.epoch, recipe.epochs):
            torch.manual_seed(int(np.random.SeedSequence((recipe.seed, epoch, group.rank, 1)).generate_state(1)[0]))
            bar.set_description(f"epoch {epoch + 1}/{recipe.epochs}", refresh=False)
            recipe.before_epoch(model, optimizer, data, epoch)
            line = {"epoch": epoch + 1, **_one_epoch(recipe, model, optimizer, data, epoch, group, bar)}
            group.average_buffers(model)
            recipe.after_epoch(model, epoch + 1)
            line |= evaluate(recipe, model, test, epoch + 1, group)
            seconds = round(before + time.perf_counter() - start, 3)
            line |= {**recipe.schedule(epoch + 1), "lr": recipe.lr_at(epoch), "seconds": seconds}
            _require_finite(line, epoch)
            shown = {key: f"{line[key]:.3f}" for key in ("loss", "clean_accuracy", "certified_estimate")}
            bar.set_postfix(shown, refresh=False)
            if group.rank == 0:
                run.commit(model, optimizer, line)
                for key in line.keys() - {"epoch"}:
                    board.add_scalar(key, line[key], epoch + 1)
            group.wait()


def _one_epoch(
    recipe: Recipe, model: nn.Module, optimizer: Optimizer, data: Images, epoch: int, group: Processes, bar: "tqdm"
) -> dict[str, float]:
    """One pass over the data; the means of the loss and its parts."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    memory: Memory = {}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    count = steps(data, recipe.batch_size, group.count)
    changes = recipe.crop, recipe.flip, recipe.rotate, recipe.shift, recipe.randaugment
    shuffled = batches(data, recipe.batch_size, recipe.seed, epoch, *changes, part=(group.rank, group.count))
    for step, (x, y) in enumerate(shuffled):
        for settings in optimizer.param_groups:
            settings["lr"] = recipe.lr_at(epoch + step / count) * settings.get("lr_factor", 1.0)
        loss, parts = recipe.loss(model, x, y, epoch + step / count, memory)
        optimizer.zero_grad()
        loss.backward()
        group.average(p.grad for p in parameters if p.grad is not None)
        norm = nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        recipe.project(model)
        for name, value in {"loss": loss.detach(), **parts, "gradient_norm": norm}.items():
            sums[name] = sums.get(name, 0) + value
            counts[name] = counts.get(name, 0) + 1
        if step % 50 == 49:  # seldom, since it waits for the device; the same on all processes, so all stop together
            _require_finite({"gradient_norm": sums["gradient_norm"].item()}, epoch)
        bar.update()
    means = group.total(torch.stack([sums[name].double() / counts[name] for name in sums])) / group.count
    return dict(zip(sums, means.tolist(), strict=True))


@torch.no_grad()
def evaluate(recipe: Recipe, model: nn.Module, data: Images, epoch: int, group: Processes, size: int = 512) -> dict[str, float]:
    """Clean accuracy and the fraction estimated to be certified at ``recipe.eps``, after so many epochs."""
    model.eval()
    memory: Memory = {}
    names = ("test_loss", "clean_accuracy", "certified_estimate", *recipe.measured)  # the same on processes without an image
    sums = {name: torch.zeros((), dtype=torch.float64, device=group.device) for name in names}
    for x, y in data.in_order(size, (group.rank, group.count)):
        logits = model(x)
        right = logits.argmax(1) == y
        found = {
            "test_loss": nn.functional.cross_entropy(logits, y, reduction="none"),
            "clean_accuracy": right,
            "certified_estimate": right & recipe.certified(model, x, y, epoch, memory),
            **recipe.measures(model, x, y),
        }
        for name in names:
            sums[name] += found[name].sum(dtype=torch.float64)
    means = (group.total(torch.stack(list(sums.values()))) / len(data)).tolist()
    return dict(zip(sums, means, strict=True)) | {"certified_eps": recipe.eps}


def _build(recipe: Recipe, data: Images) -> tuple[nn.Module, dict[str, Any]]:
    """The recipe's model for the data, and its arguments: shape and classes are the data's if the model asks for them."""
    asked = inspect.signature(models.BY_NAME[recipe.model]).parameters if recipe.model in models.BY_NAME else {}
    known = {"shape": data.shape, "classes": data.classes}
    arguments = {key: value for key, value in known.items() if key in asked} | recipe.arguments
    unknown = [key for key in arguments if asked and key not in asked]
    if unknown:
        raise ValueError(f"train: model {recipe.model} takes {', '.join(asked)}, got {unknown[0]!r}")
    return models.build(recipe.model, **arguments), arguments


def _config(recipe: Recipe, model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "recipe": type(recipe).__name__.lower(),
        "settings": recipe.as_dict(),
        "model": recipe.model,
        "arguments": arguments,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"lipfast": __version__, "torch": torch.__version__},
    }


def _require_finite(values: Mapping[str, float], epoch: int) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"train: {name} became {value} in epoch {epoch + 1}: lower lr, clip or eps, or lengthen the ramp")


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def _bar(total: int, done: int, shown: bool) -> "tqdm":
    from tqdm import tqdm

    often = 0.1 if sys.stderr.isatty() else 10.0  # seconds between lines in a log file
    return tqdm(total=total, initial=done, disable=not shown, unit="step", dynamic_ncols=True, mininterval=often)


@contextmanager
def _board(run: Run, group: Processes) -> Iterator[Any]:
    """TensorBoard's writer on the first process. On resuming, entries of unfinished epochs are dropped."""
    if group.rank:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.epoch + 1) as board:
        yield board
