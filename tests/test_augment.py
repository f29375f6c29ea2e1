"""RandAugment: each change beside Pillow's, byte for byte."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from lipfast._augment import CHANGES, randaugmented

NAMES = [change.__name__[1:] for change in CHANGES]


def shear_x(image, sign):
    return image.transform(image.size, Image.Transform.AFFINE, (1, sign * 0.09, 0, 0, 1, 0))


def shear_y(image, sign):
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, 0, sign * 0.09, 1, 0))


def translate_x(image, sign):
    pixels = int(150 / 331 * 0.3 * image.width)
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, sign * pixels, 0, 1, 0))


def translate_y(image, sign):
    pixels = int(150 / 331 * 0.3 * image.height)
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, sign * pixels))


PILLOW = {
    "identity": lambda image, sign: image,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": lambda image, sign: image.rotate(9 * sign),
    "brightness": lambda image, sign: ImageEnhance.Brightness(image).enhance(1 + 0.27 * sign),
    "color": lambda image, sign: ImageEnhance.Color(image).enhance(1 + 0.27 * sign),
    "contrast": lambda image, sign: ImageEnhance.Contrast(image).enhance(1 + 0.27 * sign),
    "sharpness": lambda image, sign: ImageEnhance.Sharpness(image).enhance(1 + 0.27 * sign),
    "posterize": lambda image, sign: ImageOps.posterize(image, 7),
    "solarize": lambda image, sign: ImageOps.solarize(image, 178.5),
    "autocontrast": lambda image, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, sign: ImageOps.equalize(image),
}


def samples(C, H, W):
    """Noise, a dim and a bright picture, a ramp, a flat and an almost flat one."""
    rng = np.random.default_rng(H * W)
    noise = rng.integers(0, 256, (C, H, W))
    ramp = np.linspace(0, 255, C * H * W).reshape(C, H, W)
    dots = np.full((C, H, W), 9)
    dots[:, 0, 0] = 200
    pictures = [noise, 40 + noise // 4, 255 - noise // 3, ramp, np.full((C, H, W), 77), dots]
    return torch.from_numpy(np.stack(pictures).astype(np.uint8))


def by_pillow(x, name, sign):
    out = []
    for image, s in zip(x.permute(0, 2, 3, 1).numpy(), sign.tolist(), strict=True):
        picture = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
        out.append(torch.from_numpy(np.array(PILLOW[name](picture, s))).reshape(image.shape))
    return torch.stack(out).permute(0, 3, 1, 2)


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 31, 45), (1, 28, 28), (3, 1, 1), (3, 224, 200)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_changes_are_those_of_pillow(name, shape, device):
    x = samples(*shape).repeat_interleave(2, 0)
    sign = torch.tensor([-1, 1]).repeat(len(x) // 2)
    kept = x.clone()
    change = torch.tensor([NAMES.index(name), 0]).expand(len(x), 2)
    got = randaugmented(x.to(device), change, torch.stack([sign, -sign], 1)).cpu()
    assert torch.equal(got, by_pillow(x, name, sign))
    assert torch.equal(x, kept)


def test_two_changes_follow_each_other(device):
    x = samples(3, 32, 32)[:3]
    change = torch.tensor([[NAMES.index("equalize"), NAMES.index("color")]] * 3)
    sign = torch.tensor([[1, -1], [1, 1], [-1, -1]])
    got = randaugmented(x.to(device), change, sign).cpu()
    assert torch.equal(got, by_pillow(by_pillow(x, "equalize", sign[:, 0]), "color", sign[:, 1]))


def test_each_image_has_changes_of_its_own(device):
    x = samples(3, 32, 32)[:1].expand(14, 3, 32, 32)
    change = torch.stack([torch.arange(14), torch.arange(14).flip(0)], 1)
    sign = torch.ones(14, 2, dtype=torch.int64)
    got = randaugmented(x.to(device), change, sign).cpu()
    for b, (first, second) in enumerate(change.tolist()):
        want = by_pillow(by_pillow(x[:1], NAMES[first], sign[:1, 0]), NAMES[second], sign[:1, 0])
        assert torch.equal(got[b], want[0]), (NAMES[first], NAMES[second])


def test_floating_images_change_as_their_bytes_do(device):
    x = samples(1, 28, 28).to(device)
    change = torch.tensor([[NAMES.index("rotate"), 0], [0, 0], [5, 9], [1, 2], [0, 13], [7, 7]])
    sign = torch.ones(6, 2, dtype=torch.int64)
    want = randaugmented(x, change, sign)
    assert torch.equal(randaugmented(x / 255, change, sign), want / 255)
    between = (x[:2].float() + 0.3) / 256
    got = randaugmented(between, change[:2], sign[:2])
    assert torch.equal(got[1], between[1])  # with no change, not even rounded
    assert not torch.equal(got[0], between[0])


def test_images_of_other_channels_are_refused():
    zero = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="grey or RGB, got 2 channels"):
        randaugmented(torch.zeros(1, 2, 4, 4), zero, zero)
