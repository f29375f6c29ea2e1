"""Trained networks on disk: weights in safetensors, the model's name and arguments in the same file's header.

No pickle is read or written, and a file appears under its name only when it is whole.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lipfast import models

NAME = "checkpoint.safetensors"  # in a run folder


def save(
    path: str | os.PathLike,
    model: nn.Module,
    name: str,
    arguments: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes ``model`` with what :func:`load` needs to build it again.

    Args:
        name, arguments: ``models.build(name, **arguments)`` is a model of this shape; arguments are JSON values.
        metadata: further JSON values, returned by :func:`read`.

    Raises: ValueError if the file cannot be written.
    """
    about = {"model": name, "arguments": dict(arguments or {}), "metadata": dict(metadata or {})}
    write_tensors(path, model.state_dict(), about)


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> nn.Module:
    """The stored model in eval mode. ``path``: a checkpoint, or a run folder that holds one.

    Raises: ValueError, naming the fault, if there is none, the file is truncated or not a checkpoint of lipfast, or its
    tensors are not those of the model that it names.
    """
    tensors, about = read_tensors(_file(path), device)
    model = models.build(_entry(path, about, "model"), **_entry(path, about, "arguments")).to(device)
    fill(model, tensors, str(path))
    return model.eval()


def read(path: str | os.PathLike) -> dict[str, Any]:
    """``{"model": name, "arguments": ..., "metadata": ...}`` of a checkpoint or run folder, without the weights."""
    about = read_header(_file(path))
    return {key: _entry(path, about, key) for key in ("model", "arguments", "metadata")}


def fill(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copies ``tensors`` into ``model``. Raises ValueError unless names and shapes are the model's own."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        fault = f"{missing[0]!r} is missing" if missing else f"{extra[0]!r} is not among the model's tensors"
        raise ValueError(f"{where}: checkpoint from another model: {fault}")
    for key, t in own.items():
        if t.shape != tensors[key].shape:
            raise ValueError(
                f"{where}: checkpoint from another model: {key!r} must be {tuple(t.shape)}, got {tuple(tensors[key].shape)}"
            )
    model.load_state_dict(dict(tensors))


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """One safetensors file with ``about`` (JSON values) in its header, written whole or not at all."""
    from safetensors.torch import save as serialized

    stored = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    header = {"lipfast": json.dumps(about, sort_keys=True)}
    replace_file(path, serialized(stored, header))


def read_tensors(path: str | os.PathLike, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write_tensors` wrote. Raises ValueError if the file is missing, truncated or another's."""
    from safetensors.torch import load_file

    about = read_header(path)
    return load_file(path, str(device)), about


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as raw:
            start = raw.read(9)
    except OSError as error:
        raise ValueError(f"{path}: cannot read a checkpoint: {error.strerror}") from error
    if len(start) < 9 or start[8:] != b"{":  # eight bytes of length, then a JSON header
        raise ValueError(f"{path}: not a safetensors file ({size} bytes)")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged safetensors file ({size} bytes): {error}") from error
    if "lipfast" not in header:
        raise ValueError(f"{path}: a safetensors file, but not a checkpoint of lipfast")
    return json.loads(header["lipfast"])


def replace_file(path: str | os.PathLike, content: bytes) -> None:
    """Writes a temporary file, then gives it its name: readers see the old file or the new, whole."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if part.is_file():
            part.unlink()
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error


def _file(path: str | os.PathLike) -> Path:
    return Path(path) / NAME if Path(path).is_dir() else Path(path)


def _entry(path: str | os.PathLike, about: dict[str, Any], key: str) -> Any:
    if key not in about:
        raise ValueError(f"{path}: no model checkpoint: {key!r} is not recorded in it")
    return about[key]
