"""Images from their standard files, and batches of them.

    digits          scikit-learn's 1797 images of 8 x 8 pixels, part of that package; every fifth is a test image
    mnist           the four idx files, gzipped or not (LeCun et al. 1998)
    fashion-mnist   the same four names (Xiao et al. 2017, https://arxiv.org/abs/1708.07747)
    cifar10         data_batch_1 to 5 and test_batch, as binary (.bin) or Python files (Krizhevsky 2009)
    cifar100        train and test, as binary (.bin) or Python files; the 100 fine classes
    tiny-imagenet   the folders train and val, and wnids.txt; 64 x 64 pixels, read into memory (1.2 GB)
    imagenet        the folders train and val with one folder of images for each of the 1000 classes; read as they are needed
    images          the same for any number of classes

Nothing is downloaded. Pixels become floats in [0, 1] when batched; normalisation belongs to the network.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast import _files, _folders
from lipfast._augment import CHANGES, randaugmented
from lipfast._folders import Folder

NAMES = ("digits", *_files.NAMES)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, on one device.

    Attributes:
        images: (N, C, H, W), uint8 from 0 to 255 or float32 from 0 to 1.
        labels: (N,) int64 from 0 to ``classes - 1``.
    """

    images: Tensor
    labels: Tensor
    name: str
    classes: int = 10

    def __post_init__(self):
        if self.images.ndim != 4 or self.images.dtype not in (torch.uint8, torch.float32):
            raise ValueError(f"{self.name}: images must be (N, C, H, W) uint8 or float32, got {_describe(self.images)}")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(f"{self.name}: labels must be ({len(self.images)},) int64, got {_describe(self.labels)}")
        if len(self.labels) and not (0 <= self.labels.min() and self.labels.max() < self.classes):
            raise ValueError(f"{self.name}: labels must be from 0 to {self.classes - 1}, got {self.labels.max()}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, C, H, W = self.images.shape
        return C, H, W

    def to(self, device: str | torch.device) -> "Dataset":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def pixels(self, rows: slice | Tensor = slice(None)) -> Tensor:  # (B, C, H, W)
        """The chosen images as float32 in [0, 1]."""
        return unit(self.images[rows])

    def in_order(self, size: int, part: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of ``size`` images (B, C, H, W) float32 and labels, in order; for part (i, n) every n-th from the i-th on."""
        for start in range(part[0] * size, len(self), part[1] * size):
            rows = slice(start, start + size)
            yield self.pixels(rows), self.labels[rows]

    def pools(self, order: Tensor, place: Tensor, slices: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each slice images (N', C, H, W) and rows (B,) of them: those are the images that ``order`` has there."""
        for here in slices:
            yield self.images, order[here]


Images = Dataset | Folder


def load(
    name: str | os.PathLike,
    root: str | os.PathLike | None = None,
    split: str = "train",
    limit: int | None = None,
    size: int = 224,
) -> Images:
    """Reads one split of a data set.

    Args:
        name: one of ``NAMES``, or a folder, in which the data set is then recognised by its files.
        root: the folder that holds the files, or a folder of such folders; by default what the environment variable
            LIPFAST_DATA names. digits needs none.
        split: ``"train"`` or ``"test"``; where a data set has a validation split instead of labelled tests, that.
        limit: only the first so many images. Those of folders of classes are ordered class by class in turns.
        size: height and width of what is cut from images of any size (imagenet, images); see :class:`Folder`.

    Raises: ValueError, in one line, if files are missing (with what was looked for), truncated or corrupt.
    Warns if a file differs from the published one.

    >>> load("digits", split="test").shape
    (1, 8, 8)
    """
    if split not in ("train", "test"):
        raise ValueError(f"load: split must be 'train' or 'test', got {split!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"load: limit must be at least 1, got {limit}")
    if size < 1:
        raise ValueError(f"load: size must be at least 1, got {size}")
    if name == "digits":
        images, labels = _digits(split)
        return Dataset(images[:limit], labels[:limit], "digits")
    name, folder = _files.find(name, root)
    if name in ("imagenet", "images"):
        return _folders.read(name, folder, split, limit, size)
    if name == "tiny-imagenet":
        images, labels, classes = _folders.read_tiny(folder, split, limit)
        return Dataset(images, labels, name, classes)
    images, labels = _files.read(name, folder, split)
    return Dataset(images[:limit], labels[:limit], name, _files.CLASSES[name])


def batches(
    data: Images,
    size: int,
    seed: int,
    epoch: int,
    crop: int = 0,
    flip: bool = False,
    rotate: float = 0.0,
    shift: float = 0.0,
    randaugment: float = 0.0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:  # (B, C, H, W) float32, (B,)
    """One epoch of shuffled batches, a function of ``(seed, epoch)`` alone.

    Args:
        size: images per batch, over all parts. The last images, fewer than that, sit this epoch out; a data set smaller
            than one batch is one batch.
        crop: shift each image by up to so many pixels in each direction, repeating the border (padding and random crop).
        flip: mirror each image with probability one half.
        rotate: turn each image by up to so many degrees in either direction, see :func:`turned`.
        shift: then shift it by up to this fraction of its height and of its width in either direction.
        randaugment: with this probability an image, cropped and mirrored but not yet turned, is changed by RandAugment
            (:mod:`lipfast._augment`), which knows grey and RGB images.
        part: (i, n): yield the i-th of n equal slices of every batch, for process i of n.
    """
    size = min(size, len(data)) // part[1]
    if size < 1:
        raise ValueError(f"batches: {len(data)} images cannot be shared by {part[1]} processes")
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
    device = data.labels.device
    N = len(data)
    order = torch.randperm(N, generator=generator).to(device)
    step = torch.randint(-crop, crop + 1, (N, 2), generator=generator).to(device)
    mirror = (torch.randint(0, 2, (N,), generator=generator) * flip).bool().to(device)
    # As many numbers whatever is asked for: the other changes of a seed stay the same.
    motion = (torch.rand((N, 3), generator=generator) * 2 - 1) * torch.tensor([math.radians(rotate), shift, shift])
    motion = motion.to(device)
    # On the CPU, which decides what to run.
    chosen = torch.rand((N, 1), generator=generator) < randaugment
    change = torch.randint(0, len(CHANGES), (N, 2), generator=generator) * chosen
    sign = torch.randint(0, 2, (N, 2), generator=generator) * 2 - 1
    place = torch.rand((N, 3), generator=generator)
    slices = [slice(k, k + size) for k in range(part[0] * size, N - (part[1] - part[0]) * size + 1, part[1] * size)]
    for here, (images, rows) in zip(slices, data.pools(order, place, slices), strict=True):
        x = shifted(images, rows, step[here], mirror[here]) if crop or flip else images[rows]
        if randaugment:
            x = randaugmented(x, change[here], sign[here])
        x = unit(x)
        if rotate or shift:
            x = turned(x, motion[here, 0], motion[here, 1:])
        yield x, data.labels[order[here]]


def steps(data: Images, size: int, parts: int = 1) -> int:
    """How many batches one epoch of :func:`batches` has."""
    return len(data) // max(1, min(size, len(data)) // parts * parts)


def shifted(
    images: Tensor,  # (N, C, H, W)
    rows: Tensor,  # (B,)
    shift: Tensor,  # (B, 2)
    mirror: Tensor,  # (B,) bool
) -> Tensor:  # (B, C, H, W)
    """Image ``rows[b]`` moved by ``shift[b]`` pixels, the border repeated, then mirrored left to right where ``mirror[b]``.

    One gather: the pixel at (i, j) comes from (i + shift, j + shift) clamped to the image.
    """
    _, _, H, W = images.shape
    i = torch.arange(H, device=images.device)
    j = torch.arange(W, device=images.device)
    j = torch.where(mirror[:, None], W - 1 - j, j)  # (B, W)
    i = (i + shift[:, :1]).clamp(0, H - 1)  # (B, H)
    j = (j + shift[:, 1:]).clamp(0, W - 1)
    return images[rows[:, None, None], :, i[:, :, None], j[:, None, :]].permute(0, 3, 1, 2).contiguous()


def turned(
    x: Tensor,  # (B, C, H, W)
    angle: Tensor,  # (B,)
    shift: Tensor,  # (B, 2)
) -> Tensor:  # (B, C, H, W)
    """Each image turned about its centre, then shifted; between pixels interpolated linearly, the border repeated.

    Args:
        x: floating.
        angle: in radians; above 0 counter-clockwise, rows being counted downwards.
        shift: as fractions of height and width; above 0 downwards and to the right.
    """
    B, _, H, W = x.shape
    cos, sin = angle.cos(), angle.sin()
    # Where the pixel at (right, down), in halves of width and height, comes from.
    back = torch.stack([cos, -sin * H / W, sin * W / H, cos], 1).reshape(B, 2, 2)
    moved = back @ (-2 * shift.flip(1))[:, :, None]
    where = F.affine_grid(torch.cat([back, moved], 2).to(x), [*x.shape], align_corners=False)
    return F.grid_sample(x, where, padding_mode="border", align_corners=False)


def unit(images: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _digits(split: str) -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("digits: scikit-learn is needed (pip install lipfast[loops])") from error
    raw = load_digits()
    test = torch.arange(len(raw.target)) % 5 == 4
    rows = test if split == "test" else ~test
    images = torch.from_numpy(raw.images).float()[:, None] / 16
    return images[rows], torch.from_numpy(raw.target).long()[rows]


def _describe(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype}"
