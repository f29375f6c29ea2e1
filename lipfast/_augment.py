"""RandAugment on batches: two changes, drawn from fourteen, one after the other (Cubuk et al. 2019,
https://arxiv.org/abs/1909.13719), at magnitude 9 of 30.

Changes and their ranges are those of torchvision's RandAugment: nearest pixels, black where an image ends. Each gives the bytes
that Pillow gives: hence integers, and truncation where Pillow truncates.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_SHARE = 9 / 30  # of the largest magnitude


def randaugmented(
    x: Tensor,  # (B, C, H, W)
    change: Tensor,  # (B, 2)
    sign: Tensor,  # (B, 2)
) -> Tensor:  # (B, C, H, W)
    """Each image after two changes.

    Args:
        x: uint8, or floating in [0, 1]: then images with any change are rounded to bytes first. C is 3 or 1.
        change: int64 on the CPU, places in ``CHANGES``; 0 is none.
        sign: -1 or 1, on the CPU: whether a shear, say, goes to the left or to the right.
    """
    if x.shape[1] not in (1, 3):
        raise ValueError(f"randaugment: images must be grey or RGB, got {x.shape[1]} channels")
    pixels = x.clone() if x.dtype == torch.uint8 else (x * 255).round().to(torch.uint8)
    for which, signs in zip(change.unbind(1), sign.unbind(1), strict=True):
        for k, apply in enumerate(CHANGES[1:], start=1):
            rows = (which == k).nonzero()[:, 0]
            if len(rows):
                here = rows.to(x.device)
                pixels[here] = apply(pixels[here], signs[rows].double().to(x.device))
    if x.dtype == torch.uint8:
        return pixels
    return torch.where((change > 0).any(1).to(x.device)[:, None, None, None], pixels.to(x.dtype) / 255, x)


def _identity(x: Tensor, sign: Tensor) -> Tensor:
    return x


def _shear_x(x: Tensor, sign: Tensor) -> Tensor:
    return _moved(x, (1, 0.3 * _SHARE * sign, 0), (0, 1, 0))


def _shear_y(x: Tensor, sign: Tensor) -> Tensor:
    return _moved(x, (1, 0, 0), (0.3 * _SHARE * sign, 1, 0))


def _translate_x(x: Tensor, sign: Tensor) -> Tensor:
    return _moved(x, (1, 0, int(150 / 331 * _SHARE * x.shape[3]) * sign), (0, 1, 0))


def _translate_y(x: Tensor, sign: Tensor) -> Tensor:
    return _moved(x, (1, 0, 0), (0, 1, int(150 / 331 * _SHARE * x.shape[2]) * sign))


def _rotate(x: Tensor, sign: Tensor) -> Tensor:
    angle = math.radians(30 * _SHARE)
    cos, sin = math.cos(angle), math.sin(angle) * sign
    i, j = x.shape[2] / 2, x.shape[3] / 2
    return _moved(x, (cos, -sin, j - cos * j + sin * i), (sin, cos, i - sin * j - cos * i))


def _brightness(x: Tensor, sign: Tensor) -> Tensor:
    return _away_from(torch.zeros_like(x), x, sign)


def _color(x: Tensor, sign: Tensor) -> Tensor:
    return _away_from(_grey(x), x, sign)


def _contrast(x: Tensor, sign: Tensor) -> Tensor:
    N = x[0, 0].numel()
    mean = (2 * _grey(x).sum((1, 2, 3), keepdim=True) + N) // (2 * N)  # to the nearest integer
    return _away_from(mean, x, sign)


def _sharpness(x: Tensor, sign: Tensor) -> Tensor:
    """Against the mean of 3 x 3 pixels, the middle one counted five times; the border has no such mean."""
    smooth = x.int()
    rows = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * smooth[:, :, 1:-1, 1:-1]
    smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26
    return _away_from(smooth, x, sign)


def _posterize(x: Tensor, sign: Tensor) -> Tensor:
    bits = 8 - round(4 * _SHARE)
    return x & (256 - (1 << 8 - bits))


def _solarize(x: Tensor, sign: Tensor) -> Tensor:
    return torch.where(x < 255 * (1 - _SHARE), x, 255 - x)


def _autocontrast(x: Tensor, sign: Tensor) -> Tensor:
    """Each channel stretched to 0 and 255, in Pillow's order of operations, since the result is truncated."""
    flat = x.flatten(2).double()
    low, high = flat.aminmax(dim=2, keepdim=True)
    scale = 255 / (high - low)
    stretched = (flat * scale + -low * scale).clamp(0, 255)
    return torch.where(high > low, stretched, flat).to(torch.uint8).view_as(x)


def _equalize(x: Tensor, sign: Tensor) -> Tensor:
    """Each channel's histogram flattened; left alone if fewer than 255 pixels are below its largest value."""
    B, C, H, W = x.shape
    flat = x.reshape(B * C, H * W).long()
    bins = flat + 256 * torch.arange(B * C, device=x.device)[:, None]
    count = bins.flatten().bincount(minlength=256 * B * C).view(B * C, 256)
    step = (H * W - count.gather(1, flat.amax(1, keepdim=True))) // 255
    below = count.cumsum(1) - count
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(1, flat), flat).to(torch.uint8).view_as(x)


CHANGES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (  # each of (B, C, H, W) uint8 and (B,) float64
    _identity,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
    _rotate,
    _brightness,
    _color,
    _contrast,
    _sharpness,
    _posterize,
    _solarize,
    _autocontrast,
    _equalize,
)


def _moved(x: Tensor, across: tuple, down: tuple) -> Tensor:
    """Takes each pixel from where its middle (j, i) is sent: to a j + b i + c across and d j + e i + f down.

    Args:
        across, down: (a, b, c) and (d, e, f), each a number or (B,).
    """
    B, C, H, W = x.shape
    i, j = torch.arange(H, device=x.device)[:, None], torch.arange(W, device=x.device)

    def reached(*terms) -> Tensor:  # (B, H, W); in 65536ths of a pixel, as Pillow counts
        a, b, c = (torch.as_tensor(v, device=x.device, dtype=torch.float64).view(-1, 1, 1) for v in terms)
        a, b, c = ((65536 * v + 0.5).floor().long() for v in (a, b, c + a / 2 + b / 2))
        return (a * j + b * i + c >> 16).expand(B, H, W)

    column, row = reached(*across), reached(*down)
    inside = (0 <= column) & (column < W) & (0 <= row) & (row < H)
    source = (row * W + column).where(inside, 0).view(B, 1, H * W).expand(B, C, H * W)
    return x.flatten(2).gather(2, source).view_as(x) * inside[:, None]


def _away_from(base: Tensor, x: Tensor, sign: Tensor) -> Tensor:
    """From ``base`` to ``x`` and 27 % beyond, or as much less; in float32 and truncated, as in Pillow's blend."""
    factor = (1 + 0.9 * _SHARE * sign).float()[:, None, None, None]
    return (base + factor * (x.float() - base)).clamp(0, 255).to(torch.uint8)


def _grey(x: Tensor) -> Tensor:  # (B, 1, H, W) int32
    """Luma after ITU-R 601-2, its weights in 65536ths."""
    if x.shape[1] == 1:
        return x.int()
    red, green, blue = x.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16
