import hashlib
import math

import numpy as np
import pytest
import torch

from lipfast import data
from lipfast.data import Dataset, batches, shifted, steps, turned


def random_images(n, c, size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, c, size, size), np.uint8), rng.integers(0, 10, n).astype(np.uint8)


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


def test_seeds_keep_their_meaning():
    known = {
        "865051d24e6798a8188c950c2d4854cd": {},
        "67abe8a71e686c55f25f60857fce7df5": {"crop": 2, "flip": True},
        "e940f760a1319b29b49f722d534a1358": {"crop": 2, "flip": True, "rotate": 20, "shift": 0.2},
    }
    for checksum, options in known.items():
        x, y = (torch.cat(parts) for parts in zip(*batches(small(), 5, 3, 4, **options), strict=True))
        assert y.tolist() == [7, 3, 5, 5, 1, 9, 6, 3, 2, 4, 8, 1, 3, 2, 9, 1, 3, 7, 7, 7]
        assert hashlib.md5((x * 255).round().byte().numpy().tobytes()).hexdigest() == checksum


def test_randaugment_changes_as_many_images_as_asked_and_nothing_else_of_an_epoch(device):
    images, labels = random_images(1000, 3, 16)
    data = Dataset(torch.from_numpy(images), torch.from_numpy(labels).long(), "noise").to(device)
    epoch = lambda **options: torch.cat([x for x, _ in batches(data, 100, 3, 4, crop=1, flip=True, **options)])
    plain, half, all = epoch(), epoch(randaugment=0.5), epoch(randaugment=1.0)
    same = (half == plain).flatten(1).all(1)
    assert 0.45 < same.float().mean() < 0.62  # one pair of changes in 14 * 14 is none at all, a few do nothing
    assert torch.equal(half[~same], all[~same])
    assert (all == plain).flatten(1).all(1).float().mean() < 0.1
    assert torch.equal(half, epoch(randaugment=0.5))
    parts = [torch.cat([x for x, _ in batches(data, 100, 3, 4, 1, True, part=(i, 2), randaugment=0.5)]) for i in range(2)]
    halves = half.unflatten(0, (10, 2, 50))
    assert all_equal(parts, [halves[:, i].flatten(0, 1) for i in range(2)])
    assert torch.equal(half * 255, (half * 255).round())


def all_equal(got, want):
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_batches_in_order_hold_every_image_once(device):
    data = small(device=device)
    for count in (1, 3):
        parts = [list(data.in_order(4, (i, count))) for i in range(count)]
        turns = [parts[k % count][k // count] for k in range(6)]
        assert sum(map(len, parts)) == 6
        assert torch.equal(torch.cat([x for x, _ in turns]), data.pixels())
        assert torch.equal(torch.cat([y for _, y in turns]), data.labels)


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
    assert data.NAMES == ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet", "imagenet", "images")
