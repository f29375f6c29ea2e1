"""Batches of matrices: in parts that fit a CPU's cache, factorised, transposed, and products that mirror themselves."""

from collections.abc import Callable

import torch
from torch import Tensor

_PART = 2**18  # numbers of a matrix or of several that a CPU takes at once
_SIDE = {"cpu": 128, "cuda": 1024}  # of a block of a product, at least: smaller ones are slow
_ROWS = 8  # of blocks, at most
_UNBLOCKED = 32  # the side up to which LAPACK factorises column by column, on one thread


def in_parts(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """``function``, which takes each matrix by itself, of a few matrices of all ``batches`` at a time."""
    return joined([function(*part) for part in zip(*map(parts, batches), strict=True)])


def parts(batch: Tensor) -> tuple[Tensor, ...]:
    step = _PART // max(1, batch.shape[1:].numel()) if batch.device.type == "cpu" else len(batch)
    return batch.split(max(1, step))


def joined(batches: list[Tensor]) -> Tensor:
    return batches[0] if len(batches) == 1 else torch.cat(batches)


def inverse(
    batch: Tensor,  # (B, N, N)
) -> Tensor:  # (B, N, N)
    """By LU factorisation; no check of the result, which would wait for the device."""
    return by_factors(lambda matrix: torch.linalg.inv_ex(matrix).inverse, batch)


def by_factors(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """``function``, which factorises by LU, of ``batches``; on a CPU of one matrix at a time.

    torch factorises the matrices of a batch on several threads. After a call to ``torch.set_num_threads`` each of these asks
    MKL for several more, and the factors come out wrong (https://github.com/pytorch/pytorch/issues/142815).
    """
    first = batches[0]
    if first.device.type != "cpu" or len(first) < 2 or first.shape[-1] <= _UNBLOCKED:
        return function(*batches)
    return torch.stack([function(*matrices) for matrices in zip(*batches, strict=True)])


def transposed(batch: Tensor) -> Tensor:
    """``batch.mT``, to be added to something: torch copies a single matrix by tiles, but does not add one by tiles."""
    return batch[0].T.contiguous()[None] if len(batch) == 1 and batch.device.type == "cpu" else batch.mT


def symmetric_part(batch: Tensor) -> Tensor:
    return (batch + transposed(batch)).div_(2)


def symmetric_product(
    left: Tensor,  # (B, N, O)
    right: Tensor,  # (B, O, N)
) -> Tensor:  # (B, N, N)
    """``left @ right`` where that is known to be symmetric: half of it is computed."""
    return _half_product(left, right, 1)


def skew_product(
    left: Tensor,  # (B, N, O)
    right: Tensor,  # (B, O, N)
) -> Tensor:  # (B, N, N)
    """``left @ right`` where that is known to be skew: half of it is computed."""
    return _half_product(left, right, -1)


def _half_product(left: Tensor, right: Tensor, sign: int) -> Tensor:
    B, N = left.shape[:2]
    side = max(_SIDE.get(left.device.type, 1024), -(-N // _ROWS))
    if N < 2 * side:
        return left @ right
    out = left.new_empty(B, N, N)
    for first in range(0, N, side):
        row, rest = slice(first, first + side), slice(first + side, N)
        out[:, row, first:].baddbmm_(left[:, row], right[:, :, first:], beta=0)
        mirrored = out[:, row, rest].mT
        out[:, rest, row] = mirrored if sign > 0 else -mirrored
    return out
