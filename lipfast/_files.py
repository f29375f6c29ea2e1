"""The files of the standard data sets: where they are, what they hold, whether they are the published ones."""

import hashlib
import io
import math
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lipfast._folders import is_imagenet

NAMES = ("mnist", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet", "imagenet", "images")
CLASSES = {"mnist": 10, "fashion-mnist": 10, "cifar10": 10, "cifar100": 100}

_IDX = {
    "train": ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"],
    "test": ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"],
}
_STEMS = {
    "mnist": _IDX,
    "fashion-mnist": _IDX,
    "cifar10": {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]},
    "cifar100": {"train": ["train"], "test": ["test"]},
}
# What shows that a folder holds a data set that is no pair of such lists.
_MARKS = {"tiny-imagenet": ["wnids.txt"], "imagenet": ["train/", "val/"], "images": ["train/", "val/"]}
_SUBFOLDERS = {
    "mnist": (".", "mnist", "MNIST/raw"),
    "fashion-mnist": (".", "fashion-mnist", "FashionMNIST/raw"),
    "cifar10": (".", "cifar10", "cifar-10-batches-bin", "cifar-10-batches-py"),
    "cifar100": (".", "cifar100", "cifar-100-binary", "cifar-100-python"),
    "tiny-imagenet": (".", "tiny-imagenet", "tiny-imagenet-200"),
    "imagenet": (".", "imagenet", "ILSVRC2012"),
    "images": (".", "images"),
}


class _Cifar(NamedTuple):
    """What tells CIFAR's files apart."""

    title: str
    labels: int  # bytes before the pixels of an image; the last is its class
    entry: str  # the classes, in the Python files
    images: dict[str, int]  # per file


_CIFAR = {
    "cifar10": _Cifar("CIFAR-10", 1, "labels", {"train": 10_000, "test": 10_000}),
    "cifar100": _Cifar("CIFAR-100", 2, "fine_labels", {"train": 50_000, "test": 10_000}),
}

# md5 of the published files: MNIST by content, Fashion-MNIST as gzipped, CIFAR as Python files; CIFAR-10's binary files
# by git's blob hash (sha1).
_MD5 = {
    ("mnist", "train-images-idx3-ubyte"): "6bbc9ace898e44ae57da46a324031adb",
    ("mnist", "train-labels-idx1-ubyte"): "a25bea736e30d166cdddb491f175f624",
    ("mnist", "t10k-images-idx3-ubyte"): "2646ac647ad5339dbf082846283269ea",
    ("mnist", "t10k-labels-idx1-ubyte"): "27ae3e4e09519cfbb04c329615203637",
    ("fashion-mnist", "train-images-idx3-ubyte.gz"): "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    ("fashion-mnist", "train-labels-idx1-ubyte.gz"): "25c81989df183df01b3e8a0aad5dffbe",
    ("fashion-mnist", "t10k-images-idx3-ubyte.gz"): "bef4ecab320f06d8554ea6380940ec79",
    ("fashion-mnist", "t10k-labels-idx1-ubyte.gz"): "bb300cfdad3c16e7a12a480ee83cd310",
    ("cifar10", "data_batch_1"): "c99cafc152244af753f735de768cd75f",
    ("cifar10", "data_batch_2"): "d4bba439e000b95fd0a9bffe97cbabec",
    ("cifar10", "data_batch_3"): "54ebc095f3ab1f0389bbae665268c751",
    ("cifar10", "data_batch_4"): "634d18415352ddfa80567beed471001a",
    ("cifar10", "data_batch_5"): "482c414d41f54cd18b22e5b47cb7c3cb",
    ("cifar10", "test_batch"): "40351d587109b95175f43aff81a1287e",
    ("cifar100", "train"): "16019d7e3df5f24257cddd939b257f8d",
    ("cifar100", "test"): "f0ef6b0ae62326f3e7ffdfab6717acfc",
}
_BLOB = {
    ("cifar10", "data_batch_1.bin"): "da09f891072747be90e69e4f00ba7cba870dc87e",
    ("cifar10", "data_batch_2.bin"): "7e958840b7a55df3353574298ebc9ca0e4bba48e",
    ("cifar10", "data_batch_3.bin"): "5259a3e9674ffdf2d5c33a1067f7192ff06c9e2f",
    ("cifar10", "data_batch_4.bin"): "301e7d16d78428f13262e87a5bc78ed45b8224aa",
    ("cifar10", "data_batch_5.bin"): "51fe428dfbdd065852912743ae8b7b63bb1e9d8d",
    ("cifar10", "test_batch.bin"): "e3f3b4653f18f27ada1558cabc3352a3ed1b25cc",
}


def find(name: str | os.PathLike, root: str | os.PathLike | None) -> tuple[str, Path]:
    """The data set's name and the folder that holds its files; ``name`` may itself be a folder of an unnamed one."""
    if name in NAMES:
        home = root if root is not None else os.environ.get("LIPFAST_DATA")
        if home is None:
            raise ValueError(f"load: name the folder that holds {name} (root, or the environment variable LIPFAST_DATA)")
        names: tuple[str, ...] = (str(name),)
    else:
        home, names = name, NAMES
        if not Path(home).is_dir():
            raise ValueError(f"load: data must be one of digits, {', '.join(NAMES)} or a folder, got {str(name)!r}")
    looked = [(known, Path(home) / sub) for known in names for sub in _SUBFOLDERS[known]]
    for known, folder in looked:
        if any((folder / m).is_dir() if m.endswith("/") else (folder / m).is_file() for m in _marks(known, "train", "test")):
            return known if name in NAMES else _which(known, folder), folder
    files = sorted({mark for known in names for mark in _marks(known, "train")[:2]})
    folders = sorted({str(folder) for _, folder in looked})
    raise ValueError(f"load: no {', '.join(names)} found; looked for {' or '.join(files)} in {', '.join(folders)}")


def read(name: str, folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) uint8 and labels (N,) int64 of one split."""
    return _cifar(name, folder, split) if name in _CIFAR else _idx_pair(name, folder, split)


def _marks(name: str, *splits: str) -> list[str]:
    """Files, any of which shows that a folder holds the data set; folders end in "/"."""
    return _MARKS.get(name) or [stem + s for split in splits for stem in _STEMS[name][split] for s in _suffixes(name)]


def _suffixes(name: str) -> tuple[str, ...]:
    return (".bin", "") if name in _CIFAR else ("", ".gz")


def _present(folder: Path, name: str, stem: str) -> Path | None:
    return next((folder / (stem + s) for s in _suffixes(name) if (folder / (stem + s)).is_file()), None)


def _which(known: str, folder: Path) -> str:
    """Some names of files are shared. MNIST and Fashion-MNIST are told apart by the folder's name, else by a checksum."""
    if known == "imagenet":
        return "imagenet" if is_imagenet(folder) else "images"
    if known != "mnist":
        return known
    labels = folder / (_IDX["test"][1] + ".gz")
    same = labels.is_file() and hashlib.md5(labels.read_bytes()).hexdigest() == _MD5["fashion-mnist", labels.name]
    return "fashion-mnist" if same or "fashion" in "/".join(folder.resolve().parts[-2:]).lower() else "mnist"


def _read(name: str, folder: Path, stem: str) -> tuple[Path, bytes]:
    path = _present(folder, name, stem)
    if path is None:
        wanted = " or ".join(stem + s for s in _suffixes(name))
        raise ValueError(f"{name}: looked for {wanted} in {folder}, found neither")
    try:
        return path, path.read_bytes()
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path}: {error.strerror}") from error


def _compare(name: str, path: Path, stem: str, raw: bytes, content: bytes) -> None:
    """Warns if a checksum is known for this form of the file and another came out."""
    for want, got in (
        (_MD5.get((name, path.name)), lambda: hashlib.md5(raw).hexdigest()),
        (_MD5.get((name, stem)) if name == "mnist" else None, lambda: hashlib.md5(content).hexdigest()),
        (_BLOB.get((name, path.name)), lambda: hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()),
    ):
        if want is not None and got() != want:
            warnings.warn(f"{path} differs from the published {name} file (checksum {got()}, published {want})", stacklevel=5)
            return


def _idx_pair(name: str, folder: Path, split: str) -> tuple[Tensor, Tensor]:
    images, labels = (_idx(name, folder, stem, 3 if "idx3" in stem else 1) for stem in _IDX[split])
    if len(images) != len(labels):
        raise ValueError(f"{name}: {len(images)} images but {len(labels)} labels in {folder}")
    return images[:, None], labels.long()


def _idx(name: str, folder: Path, stem: str, rank: int) -> Tensor:
    path, raw = _read(name, folder, stem)
    content, whole = _gunzipped(path, raw) if path.suffix == ".gz" else (raw, True)
    head = 4 + 4 * rank
    if len(content) < head:
        raise ValueError(f"{path}: truncated: expected at least {head} bytes, got {len(content)}")
    magic, *sizes = struct.unpack(f">{1 + rank}I", content[:head])
    if magic != 0x800 + rank:  # 8 is the format's code for unsigned bytes
        raise ValueError(f"{path}: not an idx file of {rank}-dimensional bytes: expected magic {0x800 + rank}, got {magic}")
    expected = head + math.prod(sizes)
    if len(content) != expected or not whole:
        state = "too long" if len(content) > expected else "truncated"
        raise ValueError(f"{path}: {state}: expected {expected} bytes for {sizes}, got {len(content)}")
    _compare(name, path, stem, raw, content)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=head).reshape(sizes).copy())


def _gunzipped(path: Path, raw: bytes) -> tuple[bytes, bool]:
    """What can be read of the gzip file, and whether its end was there."""
    stream = zlib.decompressobj(wbits=31)
    try:
        return stream.decompress(raw), stream.eof
    except zlib.error as error:
        raise ValueError(f"{path}: corrupt gzip file of {len(raw)} bytes: {error}") from error


def _cifar(name: str, folder: Path, split: str) -> tuple[Tensor, Tensor]:
    parts = []
    for stem in _STEMS[name][split]:
        path, raw = _read(name, folder, stem)
        parts.append((_cifar_binary if path.suffix == ".bin" else _cifar_python)(path, raw, _CIFAR[name], split))
        _compare(name, path, stem, raw, raw)
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return torch.from_numpy(images).reshape(-1, 3, 32, 32), torch.from_numpy(labels).long()


def _cifar_binary(path: Path, raw: bytes, cifar: _Cifar, split: str) -> tuple[np.ndarray, np.ndarray]:
    row, full = cifar.labels + 3072, (cifar.labels + 3072) * cifar.images[split]
    if not raw or len(raw) % row:
        whole = str(full) if len(raw) < full else f"a multiple of {row}"
        raise ValueError(f"{path}: truncated or corrupt: expected {whole} bytes ({row} per image), got {len(raw)}")
    rows = np.frombuffer(raw, np.uint8).reshape(-1, row)
    return rows[:, cifar.labels :], rows[:, cifar.labels - 1]


class _Unpickler(pickle.Unpickler):
    """Builds numpy arrays and plain values, nothing else: a pickle from elsewhere could run any program."""

    def find_class(self, module: str, name: str):
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return _reconstruct
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")


def _reconstruct(kind: type, shape: tuple, code: str) -> np.ndarray:
    """The empty array that a pickle then fills."""
    return np.ndarray.__new__(np.ndarray, shape, code)


def _cifar_python(path: Path, raw: bytes, cifar: _Cifar, split: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        stored = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in stored.items()}
        images, labels = batch["data"], np.array(batch[cifar.entry], np.int64)
        if images.dtype != np.uint8 or images.shape != (len(labels), 3072):
            raise ValueError(f"expected ({len(labels)}, 3072) uint8 pixels, got {images.shape} {images.dtype}")
    except Exception as error:  # a damaged pickle can fail in almost any way
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error).splitlines()[0] if str(error) else "corrupt"
        about = f"{len(raw)} bytes, expected about {3105 * cifar.images[split]}"
        raise ValueError(f"{path}: not a {cifar.title} batch ({about}): {reason}") from error
    return images, labels
