"""Data sets that are folders of image files, written here by Pillow."""

import dataclasses
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lipfast import _folders, certify, data
from lipfast._processes import processes
from lipfast.data import Folder, batches, load, steps
from lipfast.nn import Normalize
from lipfast.recipes import Interval
from lipfast.train import evaluate

SIZES = [(40, 50), (60, 40), (37, 37), (20, 90)]  # W, H


def picture(width, height, seed, mode="RGB"):
    """Smooth, so that JPEG keeps it."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return small.convert(mode)


def write_images(root, classes=("cat", "dog", "owl"), train=4, val=2):
    for split, n in (("train", train), ("val", val)):
        for c, name in enumerate(classes):
            home = root / split / name
            home.mkdir(parents=True)
            for k in range(n):
                mode, suffix = ("L", "JPEG") if k == 1 else ("RGBA", "png") if k == 2 else ("RGB", "jpg")
                picture(*SIZES[(c + k) % 4], 10 * c + k + 100 * (split == "val"), mode).save(home / f"{k}.{suffix}")
            (home / "notes.txt").write_text("no image")
    return root


def write_tiny(root, classes=("n02", "n01", "n03"), train=3, val=2, sorted_into_folders=False):
    for c, name in enumerate(classes):
        home = root / "train" / name / "images"
        home.mkdir(parents=True)
        (root / "train" / name / f"{name}_boxes.txt").write_text("")
        for k in range(train):
            picture(64, 64, 10 * c + k, "L" if k == 1 else "RGB").save(home / f"{name}_{k}.JPEG")
    (root / "wnids.txt").write_text("\n".join(classes) + "\n")
    table = []
    for k in range(val * len(classes)):
        name = classes[k % len(classes)]
        home = root / "val" / (name if sorted_into_folders else "") / "images"
        home.mkdir(parents=True, exist_ok=True)
        picture(64, 64, 100 + k).save(home / f"val_{k}.JPEG")
        table.append(f"val_{k}.JPEG\t{name}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(table))
    return root


def by_pillow(path, size, short, above=0.5, left=0.5):
    image = Image.open(path).convert("RGB")
    W, H = (short * side // min(image.size) for side in image.size)
    i, j = int(above * (H - size + 1)), int(left * (W - size + 1))
    cut = image.resize((W, H), Image.Resampling.BILINEAR).crop((j, i, j + size, i + size))
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "birds")


@pytest.fixture(params=["annotated", "in class folders"])
def tiny(tmp_path, request):
    return write_tiny(tmp_path / "tiny-imagenet-200", sorted_into_folders=request.param != "annotated")


def test_tiny_imagenet_reads_back(tiny):
    train, test = load(tiny), load("tiny-imagenet", tiny.parent, "test")
    assert (train.name, train.shape, train.classes, len(train), len(test)) == ("tiny-imagenet", (3, 64, 64), 3, 9, 6)
    assert train.labels.tolist() == [0, 1, 2] * 3  # n01, n02, n03 in turns
    assert test.labels.tolist() == [0, 1, 2] * 2
    for row, name in enumerate(["n01_0", "n02_0", "n03_0", "n01_1"]):
        want = np.array(Image.open(tiny / "train" / name[:3] / "images" / f"{name}.JPEG").convert("RGB"))
        assert torch.equal(train.images[row], torch.from_numpy(want).permute(2, 0, 1)), name
    grey = train.images[3]
    assert torch.equal(grey[0], grey[1])
    want = np.array(Image.open(next(tiny.rglob("val_4.JPEG"))).convert("RGB"))  # the second of n01
    assert torch.equal(test.images[3], torch.from_numpy(want).permute(2, 0, 1))
    assert torch.equal(load(tiny, limit=2).images, train.images[:2])


def test_a_damaged_tiny_imagenet_is_one_line_with_a_name(tmp_path):
    def refused(match, spoil, split="train"):
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        spoil(write_tiny(tmp_path / "t"))
        with pytest.raises(ValueError, match=match) as caught:
            load(tmp_path / "t", split=split)
        assert "\n" not in str(caught.value)

    a_file = "train/n03/images/n03_2.JPEG"
    refused(f"{a_file}: damaged", lambda t: (t / a_file).write_bytes((t / a_file).read_bytes()[:-200]))
    refused(f"{a_file}: expected 64 x 64 pixels, got 30 x 40", lambda t: picture(40, 30, 0).save(t / a_file))
    refused("n03/images: expected images of a class", lambda t: [p.unlink() for p in (t / "train/n03/images").iterdir()])
    table = "val/val_annotations.txt"
    refused(f"{table}: .*amiss: 'n01'", lambda t: (t / table).write_text("val_0.JPEG\tn02\nval_2.JPEG\tn03\n"), "test")
    refused(f"{table}: .*amiss: ''", lambda t: (t / table).open("a").write("nonsense"), "test")
    refused("val_0.JPEG: damaged", lambda t: (t / "val/images/val_0.JPEG").unlink(), "test")


def test_warns_when_tiny_imagenet_is_not_whole(tmp_path, monkeypatch):
    names = [f"n{k:03}" for k in range(200)]
    write_tiny(tmp_path, names, train=1, val=1)
    with pytest.warns(UserWarning, match="train: 200 images, not as many as the published"):
        assert load(tmp_path).classes == 200


def test_class_folders_are_read_in_turns(images):
    train, test = load(images), load("images", images, "test", limit=4, size=32)
    assert isinstance(train, Folder)
    assert (train.name, train.shape, train.classes, len(train), len(test)) == ("images", (3, 224, 224), 3, 12, 4)
    assert train.labels.tolist() == [0, 1, 2] * 4
    assert [path[len(str(images)) :] for path in test.paths] == [
        f"/val/{name}" for name in ("cat/0.jpg", "dog/0.jpg", "owl/0.jpg", "cat/1.JPEG")
    ]


def test_test_images_are_cut_from_the_middle(images):
    test = load(images, split="test", size=28)
    want = torch.stack([by_pillow(path, 28, 32) for path in test.paths])
    assert torch.equal(test.pixels(), want.float() / 255)
    assert torch.equal(test.pixels(slice(1, 3)), want[1:3].float() / 255)
    assert torch.equal(test.pixels(torch.tensor([4, 0])), want[[4, 0]].float() / 255)
    seen, labels = (torch.cat(parts) for parts in zip(*test, strict=True))
    assert torch.equal(seen, want)
    assert torch.equal(labels, test.labels)
    for count in (1, 2):
        parts = [list(test.in_order(2, (i, count))) for i in range(count)]
        turns = [parts[k % count][k // count] for k in range(3)]
        assert torch.equal(torch.cat([x for x, _ in turns]), want.float() / 255)
        assert torch.equal(torch.cat([y for _, y in turns]), test.labels)


def test_resizing_is_linear_and_antialiased(images):
    test = load(images, split="test", size=14)
    path = test.paths[0]  # 40 x 50 pixels, of which 16 x 20 remain
    whole = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None].float()
    want = torch.nn.functional.interpolate(whole, (20, 16), mode="bilinear", antialias=True)[0, :, 3:17, 1:15]
    assert (255 * test.pixels()[0] - want).abs().max() < 1  # the one rounds twice, the other never


def test_training_images_are_cut_at_random_from_random_sizes(images, monkeypatch):
    train = load(images, size=28)
    asked = []
    monkeypatch.setattr(_folders, "decoded", lambda pieces, *_: asked.extend(pieces) or iter([torch.zeros(12, 3, 28, 28)]))
    for epoch in range(100):
        list(batches(train, 12, 0, epoch))
    places = [place for _, place in asked]
    assert sorted(asked[k][0] for k in range(12)) == sorted(train.paths)
    assert {short for short, _, _ in places} == set(range(28, 37))
    for chances in zip(*places, strict=True):
        assert len(set(chances)) in (9, 1200)
    assert np.mean([i for _, i, _ in places]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([j for _, _, j in places]) == pytest.approx(0.5, abs=0.03)


def test_training_batches_are_those_pieces(images, monkeypatch):
    train = load(images, size=28)
    asked, plain = [], _folders.decoded
    kept = lambda pieces, *rest: plain((asked.append(p) or p for p in pieces), *rest)
    monkeypatch.setattr(_folders, "decoded", kept)
    x, y = (torch.cat(parts) for parts in zip(*batches(train, 5, 1, 2), strict=True))
    want = torch.stack([by_pillow(path, 28, *place) for path, place in asked])
    assert torch.equal(x, want.float() / 255)
    assert y.tolist() == [train.labels[train.paths.index(path)] for path, _ in asked]
    assert len(x) == 5 * steps(train, 5) == 10
    mirrored = torch.cat([x for x, _ in batches(train, 5, 1, 2, flip=True, crop=3)])
    assert (x == mirrored).flatten(1).all(1).sum() < 5


@pytest.mark.parametrize("chunk", [1, 3, 32])
def test_the_number_of_workers_changes_nothing(images, monkeypatch, chunk):
    monkeypatch.setattr(_folders, "CHUNK", chunk)
    options = {"crop": 1, "flip": True, "randaugment": 0.5}
    before = torch.get_rng_state()
    seen = []
    for workers in (0, 1, 2):
        train = dataclasses.replace(load(images, size=16), workers=workers)
        parts = [list(batches(train, 6, 3, 4, **options, part=(i, 2))) for i in range(2)]
        seen.append([torch.cat([torch.cat([parts[i][k][j] for i in range(2)]) for k in range(2)]) for j in range(2)])
        seen[-1].append(train.pixels())
    whole = [torch.cat(parts) for parts in zip(*batches(train, 6, 3, 4, **options), strict=True)]
    for some in seen:
        assert all(torch.equal(a, b) for a, b in zip(some, [*whole, train.pixels()], strict=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_one_line_with_its_name(tmp_path, workers):
    root = write_images(tmp_path)
    path = root / "train" / "dog" / "3.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    train = dataclasses.replace(load(root, size=8), workers=workers)
    with pytest.raises(ValueError, match=r"train/dog/3.jpg: damaged, or no image: image file is truncated") as caught:
        list(batches(train, 3, 0, 0))
    assert "\n" not in str(caught.value)
    path.write_text("a text")
    with pytest.raises(ValueError, match=r"train/dog/3.jpg: damaged, or no image: cannot identify"):
        train.pixels()


def test_class_folders_must_agree(tmp_path):
    root = write_images(tmp_path)
    (root / "val" / "owl").rename(root / "val" / "ape")
    with pytest.raises(ValueError, match=r"images: class folder ape must be both in .*train and in .*val"):
        load(root, split="test")
    with pytest.raises(ValueError, match=r"imagenet: expected 1000 class folders .*images.* got 3"):
        load("imagenet", root)
    shutil.rmtree(root / "train")
    assert load(root, split="test").classes == 3  # the tests alone will do
    with pytest.raises(ValueError, match=r"images: no folder .*train"):
        load(root)
    with pytest.raises(ValueError, match="no imagenet found; looked for train/ or val/ in"):
        load("imagenet", tmp_path / "val")
    with pytest.raises(ValueError, match="size must be at least 1"):
        load(root, size=0)


def test_a_thousand_classes_are_imagenet(tmp_path):
    for k in range(1000):
        home = tmp_path / "val" / f"n{k:08}"
        home.mkdir(parents=True)
        (home / "a.JPEG").write_bytes(b"")
    assert load(tmp_path, split="test", limit=2).name == "imagenet"
    assert load("imagenet", tmp_path, "test", limit=1500).classes == 1000


def test_networks_are_evaluated_and_certified_on_class_folders(images):
    test = load(images, split="test", size=8)
    model = torch.nn.Sequential(Normalize([0.5] * 3, [0.25] * 3), torch.nn.Flatten(), torch.nn.Linear(192, 3))
    pair = data.Dataset((test.pixels() * 255).round().byte(), test.labels, "images", 3)
    with processes("cpu") as group:
        lines = [evaluate(Interval.preset("digits"), model, d, 1, group, size=4) for d in (test, pair)]
    assert lines[0] == lines[1]
    got, want = (certify(model, d, 0.01, progress=False) for d in (test, pair))
    assert torch.equal(got.radius, want.radius)
    assert torch.equal(got.label, want.label)
    assert len(certify(model, test, 0.01, progress=False, limit=2).radius) == 2


def test_nothing_warns(images):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(images, split="test", size=8).pixels()
