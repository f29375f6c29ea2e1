"""Reading the files of the standard data sets, written here in their formats."""

import gzip
import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from lipfast.data import load
from tests.test_data import random_images

SHARED = Path(os.environ.get("LIPFAST_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"no image data in {SHARED}; LIPFAST_TEST_DATA names another folder"
)
MNIST = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def write_mnist(folder, zipped=True, n=7):
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = random_images(n, 1, 28)
    for name in MNIST:
        if "images" in name:
            content = struct.pack(">4I", 0x803, n, 28, 28) + images.tobytes()
        else:
            content = struct.pack(">2I", 0x801, n) + labels.tobytes()
        path = folder / (name + ".gz" * zipped)
        path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def write_cifar(folder, binary, n=3):
    folder.mkdir(parents=True, exist_ok=True)
    stored = {}
    for k, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]):
        images, labels = random_images(n, 3, 32, seed=k)
        rows = images.reshape(n, -1)
        if binary:
            (folder / f"{name}.bin").write_bytes(np.concatenate([labels[:, None], rows], 1).tobytes())
        else:
            batch = {b"batch_label": b"some", b"labels": labels.tolist(), b"data": rows, b"filenames": [b"a.png"] * n}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=4))
        stored[name] = images, labels
    return stored


def write_cifar100(folder, binary, n=4):
    folder.mkdir(parents=True, exist_ok=True)
    stored = {}
    for k, name in enumerate(["train", "test"]):
        images, coarse = random_images(n, 3, 32, seed=k)
        rows, fine = images.reshape(n, -1), np.arange(n, dtype=np.uint8) + 90 + k
        if binary:
            (folder / f"{name}.bin").write_bytes(np.concatenate([coarse[:, None], fine[:, None], rows], 1).tobytes())
        else:
            batch = {
                b"coarse_labels": coarse.tolist(),
                b"fine_labels": fine.tolist(),
                b"data": rows,
                b"filenames": [b"a.png"] * n,
            }
            (folder / name).write_bytes(pickle.dumps(batch, protocol=4))
        stored[name] = images, fine
    return stored


def quiet_load(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(*args, **options)


def test_digits_split_four_to_one_without_overlap():
    train, test = load("digits"), load("digits", split="test")
    assert (len(train), len(test)) == (1438, 359)
    assert train.shape == (1, 8, 8)
    assert train.images.min() == 0
    assert train.images.max() == 1
    assert {8, 9} <= set(test.labels.tolist())
    assert len(load("digits", limit=5)) == 5


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("place", [".", "MNIST/raw"])
def test_mnist_files_read_back(tmp_path, zipped, place):
    images, labels = write_mnist(tmp_path / place, zipped)
    for split in ("train", "test"):
        got = quiet_load("mnist", tmp_path, split)
        assert torch.equal(got.images, images)
        assert torch.equal(got.labels, labels)
    assert quiet_load(tmp_path).name == "mnist"
    assert torch.equal(got.pixels(), images.float() / 255)


def test_fashion_mnist_is_told_from_mnist_by_its_folder(tmp_path):
    write_mnist(tmp_path / "FashionMNIST" / "raw")
    assert quiet_load(tmp_path).name == "fashion-mnist"
    assert quiet_load("fashion-mnist", tmp_path).name == "fashion-mnist"


@pytest.mark.parametrize("binary", [False, True])
def test_cifar_files_read_back(tmp_path, binary):
    stored = write_cifar(tmp_path, binary)
    train, test = quiet_load(tmp_path), quiet_load("cifar10", tmp_path, "test")
    assert (train.name, train.shape, len(train)) == ("cifar10", (3, 32, 32), 15)
    assert torch.equal(train.images[3:6], torch.from_numpy(stored["data_batch_2"][0]))
    assert torch.equal(train.labels[3:6], torch.from_numpy(stored["data_batch_2"][1]).long())
    assert torch.equal(test.images, torch.from_numpy(stored["test_batch"][0]))


@pytest.mark.parametrize(("binary", "place"), [(False, "cifar-100-python"), (True, "cifar-100-binary"), (True, ".")])
def test_cifar_100_files_read_back_with_their_fine_labels(tmp_path, binary, place):
    stored = write_cifar100(tmp_path / place, binary)
    train, test = quiet_load(tmp_path), quiet_load("cifar100", tmp_path, "test", limit=3)
    assert (train.name, train.shape, train.classes, len(train), len(test)) == ("cifar100", (3, 32, 32), 100, 4, 3)
    assert torch.equal(train.images, torch.from_numpy(stored["train"][0]))
    assert torch.equal(test.images, torch.from_numpy(stored["test"][0])[:3])
    assert train.labels.tolist() == [90, 91, 92, 93]
    assert test.labels.tolist() == [91, 92, 93]


@pytest.mark.parametrize("binary", [False, True])
def test_cifar_100_is_not_mistaken_for_cifar_10_nor_read_in_part(tmp_path, binary):
    write_cifar100(tmp_path, binary)
    with pytest.raises(ValueError, match=r"no cifar10 found; looked for data_batch_1 or data_batch_1\.bin in"):
        load("cifar10", tmp_path)
    path = tmp_path / ("train" + ".bin" * binary)
    path.write_bytes(path.read_bytes()[:-1])
    expected = "expected 153700000 bytes" if binary else "not a CIFAR-100 batch"
    with pytest.raises(
        ValueError, match=f"train.*{expected}.*{path.stat().st_size}|{expected}.*{path.stat().st_size}"
    ) as caught:
        quiet_load("cifar100", tmp_path)
    assert "\n" not in str(caught.value)
    if not binary:
        write_cifar(tmp_path, binary, n=1)
        (tmp_path / "test_batch").rename(path)
        with pytest.raises(ValueError, match=r"not a CIFAR-100 batch.*no entry 'fine_labels'"):
            quiet_load("cifar100", tmp_path)


def test_reads_the_pickles_of_python_2(tmp_path):
    write_cifar(tmp_path, binary=False, n=1)
    pixels = bytes(range(256)) * 12
    with io.BytesIO() as f:  # protocol 2 with byte strings, opcode by opcode as Python 2's cPickle wrote it
        text = lambda s: b"U" + bytes([len(s)]) + s
        f.write(
            b"\x80\x02}(" + text(b"data") + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b")
        )
        f.write(b"\x87R(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|"))
        f.write(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<I", 3072) + pixels + b"tb")
        f.write(text(b"labels") + b"]K\x07au.")
        (tmp_path / "test_batch").write_bytes(f.getvalue())
    got = quiet_load("cifar10", tmp_path, "test")
    assert got.images.flatten().tolist() == list(pixels)
    assert got.labels.tolist() == [7]


def test_a_pickle_that_would_run_a_program_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    write_cifar(tmp_path, binary=False)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(ValueError, match=r"test_batch: not a CIFAR-10 batch.*mkdir"):
        load("cifar10", tmp_path, "test")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("keep", [3, 12, 100, -1])
def test_truncated_idx_file_is_one_line_with_bytes(tmp_path, zipped, keep):
    write_mnist(tmp_path, zipped)
    path = tmp_path / (MNIST[0] + ".gz" * zipped)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{MNIST[0]}.*(truncated|corrupt).*") as caught:
        load("mnist", tmp_path)
    assert "\n" not in str(caught.value)
    if not zipped:
        assert f"got {len(path.read_bytes())}" in str(caught.value)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 500, -1])
def test_truncated_cifar_file_is_one_line_with_bytes(tmp_path, binary, keep):
    write_cifar(tmp_path, binary)
    path = tmp_path / ("data_batch_4" + ".bin" * binary)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"data_batch_4.*{path.stat().st_size}") as caught:
        quiet_load("cifar10", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil", [lambda b: b"\0\0\x09\x03" + b[4:], lambda b: b + b"x"], ids=["magic", "too long"])
def test_corrupt_idx_file_is_named(tmp_path, spoil):
    write_mnist(tmp_path, zipped=False)
    path = tmp_path / MNIST[0]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{MNIST[0]}: .*expected"):
        load("mnist", tmp_path)


def test_flipped_bit_in_a_gzip_file_is_found(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / (MNIST[1] + ".gz")
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{MNIST[1]}.gz: corrupt gzip"):
        load("mnist", tmp_path)


def test_labels_that_do_not_fit_are_refused(tmp_path):
    write_mnist(tmp_path, zipped=False)
    (tmp_path / MNIST[1]).write_bytes(struct.pack(">2I", 0x801, 6) + bytes(6))
    with pytest.raises(ValueError, match="7 images but 6 labels"):
        quiet_load("mnist", tmp_path)
    (tmp_path / MNIST[1]).write_bytes(struct.pack(">2I", 0x801, 7) + bytes([1, 2, 3, 4, 5, 6, 10]))
    with pytest.raises(ValueError, match="labels must be from 0 to 9, got 10"):
        quiet_load("mnist", tmp_path)


def test_missing_files_are_listed(tmp_path, monkeypatch):
    monkeypatch.delenv("LIPFAST_DATA", raising=False)
    with pytest.raises(ValueError, match=r"looked for train-images-idx3-ubyte or train-images-idx3-ubyte.gz in .*MNIST/raw"):
        load("mnist", tmp_path)
    write_mnist(tmp_path)
    (tmp_path / (MNIST[3] + ".gz")).unlink()
    with pytest.raises(ValueError, match=r"looked for t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz"):
        quiet_load("mnist", tmp_path, "test")
    with pytest.raises(ValueError, match="name the folder that holds mnist"):
        load("mnist")
    with pytest.raises(ValueError, match=r"data must be one of digits, mnist.* got 'nonsense'"):
        load("nonsense")
    with pytest.raises(ValueError, match="split must be"):
        load("digits", split="valid")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load("digits", limit=0)


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setenv("LIPFAST_DATA", str(tmp_path))
    assert quiet_load("mnist").name == "mnist"


def test_warns_when_a_file_is_not_the_published_one(tmp_path):
    write_mnist(tmp_path)
    with pytest.warns(UserWarning, match="train-images-idx3-ubyte.gz differs from the published mnist file"):
        load("mnist", tmp_path)


@needs_shared
def test_the_real_mnist_reads_without_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, test = load(SHARED / "mnist"), load("mnist", SHARED, "test")
    assert (train.images.shape, test.images.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert round(train.pixels().mean().item(), 4) == 0.1307
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@needs_shared
@pytest.mark.slow
def test_the_real_cifar10_reads(tmp_path):
    subprocess.run([sys.executable, SHARED / "cifar10" / "read_cifar10.py", tmp_path], check=True, capture_output=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train = load(tmp_path)
    assert (train.name, len(train)) == ("cifar10", 50000)
    mean = train.pixels().double().mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.tensor([0.49139968, 0.48215841, 0.44653091]).double(), atol=1e-6, rtol=0)
    content = (tmp_path / "test_batch.bin").read_bytes()
    known = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == "e3f3b4653f18f27ada1558cabc3352a3ed1b25cc"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert load("cifar10", tmp_path, "test").labels.bincount().tolist() == [1000] * 10
    assert bool(found) == (not known)
