import gzip
import hashlib
import io
import math
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

from lipfast import data
from lipfast.data import Dataset, batches, load, shifted, steps, turned

SHARED = Path(os.environ.get("LIPFAST_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"no image data in {SHARED}; LIPFAST_TEST_DATA names another folder"
)
MNIST = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def random_images(n, c, size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, c, size, size), np.uint8), rng.integers(0, 10, n).astype(np.uint8)


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


def small(n=23, device="cpu"):
    images, labels = random_images(n, 3, 6)
    return Dataset(torch.from_numpy(images), torch.from_numpy(labels).long(), "small").to(device)


def test_an_epoch_is_a_function_of_seed_and_epoch(device):
    options = {"crop": 2, "flip": True, "rotate": 20, "shift": 0.2}
    epoch = lambda seed, epoch: torch.cat([x for x, _ in batches(small(device=device), 5, seed, epoch, **options)])
    assert torch.equal(epoch(3, 4), epoch(3, 4))
    torch.rand(1)  # the global generator has no say
    assert torch.equal(epoch(3, 4), epoch(3, 4))
    assert not torch.equal(epoch(3, 4), epoch(3, 5))
    assert not torch.equal(epoch(3, 4), epoch(4, 4))


def test_an_epoch_shows_each_image_at_most_once(device):
    data = small(device=device)
    seen = torch.cat([x for x, _ in batches(data, 5, 0, 0)])
    assert len(seen) == 5 * steps(data, 5) == 20
    known = {tuple(row) for row in data.pixels().flatten(1).tolist()}
    rows = [tuple(row) for row in seen.flatten(1).tolist()]
    assert len(set(rows)) == 20
    assert set(rows) <= known
    assert len(next(batches(data, 1000, 0, 0))[0]) == 23
    assert steps(data, 1000) == 1


def test_labels_follow_their_images(device):
    data = small(device=device)
    known = {tuple(row): label for row, label in zip(data.pixels().flatten(1).tolist(), data.labels.tolist(), strict=True)}
    for x, y in batches(data, 4, 1, 2):
        assert [known[tuple(row)] for row in x.flatten(1).tolist()] == y.tolist()


def test_parts_make_up_the_batches(device):
    data = small(device=device)
    options = {"crop": 1, "flip": True, "rotate": 5, "shift": 0.1}
    whole = list(batches(data, 6, 0, 1, **options))
    parts = [list(batches(data, 6, 0, 1, **options, part=(i, 3))) for i in range(3)]
    assert {len(p) for p in parts} == {len(whole)} == {steps(data, 6, 3)}
    for k, (x, y) in enumerate(whole):
        assert torch.equal(torch.cat([p[k][0] for p in parts]), x)
        assert torch.equal(torch.cat([p[k][1] for p in parts]), y)
    with pytest.raises(ValueError, match="cannot be shared by 24 processes"):
        next(batches(data, 100, 0, 0, part=(0, 24)))


def test_shift_is_padding_and_cropping(device):
    data = small(4, device)
    shift = torch.tensor([[0, 0], [2, -1], [-2, 2], [1, 0]], device=device)
    mirror = torch.tensor([False, False, True, True], device=device)
    got = shifted(data.images, torch.tensor([3, 1, 0, 2], device=device), shift, mirror)
    padded = torch.nn.functional.pad(data.images.double(), (2, 2, 2, 2), mode="replicate")
    for b, row in enumerate([3, 1, 0, 2]):
        i, j = (shift[b] + 2).tolist()
        want = padded[row, :, i : i + 6, j : j + 6]
        assert torch.equal(got[b].double(), want.flip(-1) if mirror[b] else want)


def test_crops_and_mirrors_occur_about_as_often_as_they_should(device):
    images = torch.zeros(2000, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 3] = 255
    data = Dataset(images, torch.zeros(2000, dtype=torch.int64), "dots").to(device)
    x = torch.cat([x for x, _ in batches(data, 500, 0, 0, crop=1, flip=True)])
    share = x.mean((0, 1)).cpu()
    assert share[3:6, 2:7].sum() == pytest.approx(1)
    columns = share.sum(0)  # 3 -1, 0, +1 or its mirror 5 -1, 0, +1
    torch.testing.assert_close(columns[2:7], torch.tensor([1, 1, 2, 1, 1]) / 6, atol=0.05, rtol=0)
    torch.testing.assert_close(share.sum(1)[3:6], torch.full((3,), 1 / 3), atol=0.05, rtol=0)


def test_turning_by_nothing_is_the_identity(device):
    x = torch.rand(3, 2, 5, 8, device=device, dtype=torch.float64)
    zero = torch.zeros(3, device=device, dtype=torch.float64)
    torch.testing.assert_close(turned(x, zero, zero[:, None].expand(3, 2)), x)


def test_a_quarter_turn_is_counter_clockwise(device):
    x = torch.rand(2, 3, 6, 6, device=device, dtype=torch.float64)
    angle = torch.tensor([math.pi / 2, -math.pi], device=device, dtype=torch.float64)
    got = turned(x, angle, torch.zeros(2, 2, device=device, dtype=torch.float64))
    torch.testing.assert_close(got[0], x[0].rot90(1, (1, 2)))
    torch.testing.assert_close(got[1], x[1].rot90(2, (1, 2)))


def test_a_turn_keeps_angles_in_an_image_that_is_not_square(device):
    x = torch.zeros(1, 1, 5, 9, device=device)
    x[0, 0, 2, 6] = 1  # two pixels right of the centre
    got = turned(x, torch.tensor([math.pi / 2], device=device), torch.zeros(1, 2, device=device))
    torch.testing.assert_close(got[0, 0, 0, 4], torch.ones((), device=device))  # two pixels above it


def test_a_shift_by_whole_pixels_repeats_the_border(device):
    x = torch.rand(2, 3, 4, 5, device=device, dtype=torch.float64)
    shift = torch.tensor([[1 / 4, 0.0], [0.0, -2 / 5]], device=device, dtype=torch.float64)
    got = turned(x, torch.zeros(2, device=device, dtype=torch.float64), shift)
    torch.testing.assert_close(got[0], x[0][:, [0, 0, 1, 2]])  # one down
    torch.testing.assert_close(got[1], x[1][:, :, [2, 3, 4, 4, 4]])  # two to the left


def test_turns_come_first(device):
    x = torch.rand(1, 1, 6, 6, device=device, dtype=torch.float64)
    angle, shift = (torch.tensor([v], device=device, dtype=torch.float64) for v in (math.pi / 2, [1 / 6, 0.0]))
    torch.testing.assert_close(turned(x, angle, shift)[0, 0], x[0, 0].rot90()[[0, 0, 1, 2, 3, 4]])


def test_rotations_and_shifts_spread_over_their_range_and_leave_the_rest_of_an_epoch_alone(device):
    y, x = torch.meshgrid(torch.arange(21.0), torch.arange(21.0), indexing="ij")
    ramps = torch.stack([x, y])[None].expand(400, 2, 21, 21) / 20  # the gradient of an image tells its angle
    data = Dataset(ramps.contiguous(), torch.arange(400) % 10, "ramps").to(device)
    options = {"seed": 3, "epoch": 1, "rotate": 30, "shift": 0.1}
    seen, labels = (torch.cat(parts) for parts in zip(*batches(data, 100, **options), strict=True))
    assert torch.equal(labels, torch.cat([y for _, y in batches(data, 100, seed=3, epoch=1)]))
    inner = seen[:, :, 9:12, 9:12]
    angle = torch.atan2(inner[:, 0, 2, 1] - inner[:, 0, 0, 1], inner[:, 0, 1, 2] - inner[:, 0, 1, 0]).rad2deg()
    assert 28 < angle.max() < 30
    assert -30 < angle.min() < -28
    assert angle.mean().abs() < 3
    still = torch.cat([x for x, _ in batches(data, 100, **options | {"rotate": 0})])
    down = 0.5 - still[:, 1, 10, 10]  # in images of 20 pixels between their ends
    assert 0.09 < 20 / 21 * down.max() < 0.1
    assert 0.09 < -20 / 21 * down.min() < 0.1


def test_a_data_set_checks_itself():
    x, y = torch.zeros(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="images must be"):
        Dataset(x[0], y, "mine")
    with pytest.raises(ValueError, match="labels must be"):
        Dataset(x, y[:1], "mine")
    with pytest.raises(ValueError, match="labels must be"):
        Dataset(x, y.float(), "mine")
    assert data.NAMES == ("digits", "mnist", "fashion-mnist", "cifar10")
