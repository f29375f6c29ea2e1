"""Data sets that are folders of image files, one folder per class: ImageNet, whatever is laid out like it, Tiny-ImageNet."""

import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
LONGEST = 288 / 224  # short side of an image in training, at most, over the side of the crop
CENTRAL = 256 / 224  # the same when testing
CHUNK = 32  # images that a worker decodes at a time: few, so that the shared memory of a small machine holds them

# A file and what to take of it: None for all, or the length of the short side and, of the room that the crop has in height and
# in width, the fractions above it and to its left.
Piece = tuple[str, tuple[int, float, float] | None]


@dataclass(frozen=True, eq=False)
class Folder:
    """Labelled images in files, decoded by worker processes whenever they are asked for; RGB, square.

    In training (:func:`lipfast.data.batches`) the short side of an image becomes a random number of pixels from ``size`` to
    9/7 of it, and a square of it is taken at random; otherwise 8/7, and the middle. For 224: 224 to 288, and 256. Resizing is
    linear and antialiased. Iterating gives all images in order, as batches (uint8, labels).

    Attributes:
        paths: N files.
        labels: (N,) int64 from 0 to ``classes - 1``, on the device where the images shall be.
        size: height and width that the images get.
        workers: how many processes decode; 0: this one does. The images do not depend on it.
    """

    paths: Sequence[str]
    labels: Tensor
    name: str
    classes: int
    size: int = 224
    workers: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = torch.arange(len(self)).split(256)
        return zip(self._decoded(map(self._central, rows), 256), self.labels.split(256), strict=True)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return 3, self.size, self.size

    def to(self, device: str | torch.device) -> "Folder":
        return replace(self, labels=self.labels.to(device))

    def pixels(self, rows: slice | Tensor = slice(None)) -> Tensor:  # (B, C, H, W)
        """The middles of the chosen images as float32 in [0, 1]."""
        chosen = self._central(torch.arange(len(self))[rows])
        return torch.cat(list(self._decoded([chosen], CHUNK))).float() / 255

    def in_order(self, size: int, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`lipfast.data.Dataset.in_order`."""
        rows = torch.arange(len(self)).split(size)[part[0] :: part[1]]
        for x, y in zip(self._decoded(map(self._central, rows), size), rows, strict=True):
            yield x.float() / 255, self.labels[y.to(self.labels.device)]

    def pools(self, order: Tensor, place: Tensor, slices: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`lipfast.data.Dataset.pools`. ``place``: (N, 3), the chances of short side, height and width."""
        longest = round(LONGEST * self.size)

        def pieces(here: slice) -> list[Piece]:
            chosen = zip(order[here].tolist(), place[here].tolist(), strict=True)
            return [(self.paths[k], (self.size + int(z * (longest - self.size + 1)), i, j)) for k, (z, i, j) in chosen]

        for images in self._decoded(map(pieces, slices), slices[0].stop - slices[0].start):
            yield images, torch.arange(len(images), device=images.device)

    def _central(self, rows: Tensor) -> list[Piece]:
        return [(self.paths[k], (round(CENTRAL * self.size), 0.5, 0.5)) for k in rows.tolist()]

    def _decoded(self, batches: Iterable[list[Piece]], size: int) -> Iterator[Tensor]:
        pieces = (piece for batch in batches for piece in batch)
        return decoded(pieces, self.size, size, self.workers, self.labels.device)


def read(name: str, folder: Path, split: str, limit: int | None, size: int) -> Folder:
    """One split of ImageNet, or of what is laid out like it: train/CLASS/FILE and val/CLASS/FILE."""
    homes = [home for home in (folder / "train", folder / "val") if home.is_dir()]
    home = folder / ("train" if split == "train" else "val")
    classes = _subfolders(homes[0])
    if home not in homes:
        raise ValueError(f"{name}: no folder {home}")
    if odd := sorted(set(classes) ^ set(_subfolders(home))):
        raise ValueError(f"{name}: class folder {odd[0]} must be both in {homes[0]} and in {home}")
    if not classes or (name == "imagenet" and len(classes) != 1000):
        expected = "1000 class folders (the name for any other number is images)" if name == "imagenet" else "class folders"
        raise ValueError(f"{name}: expected {expected} in {home}, got {len(classes)}")
    paths, labels = _in_turns([_files(home / c) for c in classes])
    return Folder(paths[:limit], torch.tensor(labels[:limit]), name, len(classes), size, workers())


def read_tiny(folder: Path, split: str, limit: int | None) -> tuple[Tensor, Tensor, int]:
    """One split of Tiny-ImageNet: images (N, 3, 64, 64) uint8, labels (N,) and the number of classes."""
    classes = sorted((folder / "wnids.txt").read_text().split())
    home = folder / ("train" if split == "train" else "val")
    if split == "train" or any((home / c).is_dir() for c in classes):
        files = [_files(home / c) for c in classes]
    else:
        files = _annotated(home, classes)
    paths, labels = _in_turns(files)
    if len(classes) == 200 and len(paths) != (100_000 if split == "train" else 10_000):
        warnings.warn(f"{home}: {len(paths)} images, not as many as the published tiny-imagenet has", stacklevel=3)
    pieces = [(path, None) for path in paths[:limit]]
    images = torch.empty(len(pieces), 3, 64, 64, dtype=torch.uint8)
    for target, batch in zip(images.split(CHUNK), decoded(pieces, 64, CHUNK, workers(), images.device), strict=True):
        target.copy_(batch)
    return images, torch.tensor(labels[:limit]), len(classes)


def workers() -> int:
    """As many as there are processor cores for each of the processes that torchrun started here, 16 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def is_imagenet(folder: Path) -> bool:
    """Whether there are as many classes, in a folder that is laid out so."""
    return any(home.is_dir() and len(_subfolders(home)) == 1000 for home in (folder / "train", folder / "val"))


def decoded(pieces: Iterable[Piece], side: int, size: int, workers: int, device: torch.device) -> Iterator[Tensor]:
    """Batches (B, 3, side, side) uint8 of ``size`` pieces, the last one perhaps smaller; read ahead by worker processes.

    Raises: ValueError that names the file if an image is damaged.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise ValueError("image files: Pillow is needed (pip install lipfast[loops])") from error
    loader = torch.utils.data.DataLoader(
        _Decoder(side),
        batch_size=None,
        sampler=_chunks(pieces, size),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else it would draw from the global one
    )
    parts: list[Tensor] = []
    for part in loader:
        if isinstance(part, str):
            raise ValueError(part)
        parts.append(part.to(device, non_blocking=True))
        if sum(map(len, parts)) == size:
            yield torch.cat(parts)
            parts = []
    if parts:
        yield torch.cat(parts)


def _chunks(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    rest = iter(pieces)
    while batch := list(islice(rest, size)):
        for start in range(0, len(batch), CHUNK):
            yield batch[start : start + CHUNK]


class _Decoder(torch.utils.data.Dataset):
    """What a worker does. It is handed the names of the files, so it holds no list of a million."""

    def __init__(self, side: int):
        self.side = side

    def __getitem__(self, pieces: list[Piece]) -> Tensor | str:
        try:
            return torch.stack([_pixels(path, self.side, place) for path, place in pieces])
        except ValueError as error:  # the loader would wrap it in a traceback
            return str(error)


def _pixels(path: str, side: int, place: tuple[int, float, float] | None) -> Tensor:  # (3, side, side) uint8
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Exception as error:  # Pillow's decoders fail in almost any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: damaged, or no image: {reason}") from error
    W, H = image.size
    if place is None:
        if (H, W) != (side, side):
            raise ValueError(f"{path}: expected {side} x {side} pixels, got {H} x {W}")
    else:
        short, above, left = place
        H, W = (short * H // min(H, W), short * W // min(H, W))
        i, j = int(above * (H - side + 1)), int(left * (W - side + 1))
        image = image.resize((W, H), Image.Resampling.BILINEAR).crop((j, i, j + side, i + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _subfolders(home: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(home) if entry.is_dir() and not entry.name.startswith("."))


def _files(home: Path) -> list[str]:
    """The image files of a class; Tiny-ImageNet has them one folder further down."""
    place = home / "images" if (home / "images").is_dir() else home
    names = sorted(entry.name for entry in os.scandir(place) if entry.name.lower().endswith(SUFFIXES)) if place.is_dir() else []
    if not names:
        raise ValueError(f"{place}: expected images of a class ({', '.join(SUFFIXES)}), got none")
    return [os.path.join(place, name) for name in names]


def _annotated(home: Path, classes: Sequence[str]) -> list[list[str]]:
    """The test images of each class, after the table of their names and classes."""
    table = home / "val_annotations.txt"
    files = defaultdict(list)
    for line in table.read_text().splitlines() if table.is_file() else []:
        name, _, rest = line.partition("\t")
        files[rest.partition("\t")[0]].append(os.path.join(home, "images", name))
    if odd := sorted(set(classes) ^ set(files)):
        raise ValueError(f"{table}: expected images of the {len(classes)} classes of wnids.txt; amiss: {odd[0]!r}")
    return [sorted(files[c]) for c in classes]


def _in_turns(files: Sequence[list[str]]) -> tuple[list[str], list[int]]:
    """The first file of each class, then the second of each, ...: so any beginning has its share of all classes."""
    turns = sorted((turn, label) for label, own in enumerate(files) for turn in range(len(own)))
    return [files[label][turn] for turn, label in turns], [label for _, label in turns]
