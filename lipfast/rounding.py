"""What floating point adds to a bound.

Notation: eps is the spacing of the numbers at 1 (2^-23 in float32), u = eps/2 the error of one rounding to nearest.

A sum of n products, added in any order, fused or not, has an error of at most gamma_n times the same sum with absolute
values, gamma_n = n u/(1 - n u) (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1). So

    |fl(W m) - W m| <= gamma |W| |m|,

and since r is multiplied by |W| anyway, feeding r + gamma |m| to that product covers the error of the center at no extra
cost (midpoint-radius arithmetic: Rump 1999, BIT 39, 534-554). :func:`image` writes this out.

Matrix units that read operands in fewer bits add the operand's relative error: 2^-10 for tf32 (its products may truncate),
2^-8 for bfloat16. Tensor cores add with truncation, aligned to the largest term of a block (Fasi et al. 2021, PeerJ CS
7:e330): adding k terms to the running sum costs at most (k + 1) 2^-23 of the absolute sum, so n 2^-22 covers every block size.

Not covered: a process that flushes subnormal numbers to zero (:func:`torch.set_flush_denormal`); and, in tf32 alone, a
subnormal weight, of which up to 2^-136 is lost, against inputs above 1000.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_OPERAND_ERROR = {"none": 0.0, "ieee": 0.0, "tf32": 2.0**-10, "bf16": 2.0**-8}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of ``dtype`` are formed: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gamma(terms: int, dtype: torch.dtype, device: torch.device) -> float:
    """Relative error of a sum of ``terms`` products of ``dtype`` on ``device``, whatever the order of summation.

    Sixteen terms are added, for the few roundings before and after the sum. On CUDA the figure holds for tensor cores;
    it follows torch's own float32 precision setting. Raises ValueError above 1/4, where the error is no longer small.
    """
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    operand = 0.0 if dtype == torch.float64 else _OPERAND_ERROR[backend.matmul.fp32_precision]
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-22 if device.type == "cuda" else 2.0**-24
    value = (1 + operand) ** 2 - 1 + 1.01 * (terms + 16) * unit
    if value > 0.25:
        raise ValueError(f"outward: at most {int(0.24 / unit)} terms can be summed soundly in {dtype}, got {terms}")
    return value


def image(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    terms: int,
    product: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """A box that contains W x + b for every x in the input box, rounding included.

    ``product(x, weight)`` forms plain sums of ``terms`` products; ``bias`` broadcasts against its result.

    With c the rounded center, e >= |x - c|, g >= gamma and hats for computed values, each step only widens:

        radius  >= e + g |c|                            4 eps covers its own roundings, tiny their underflow
        |mid^ - W c| <= g |W||c|                        rounding of the product
        spread^ (1 + 2 g) >= |W| radius                 since (1 + 2g)(1 - g) >= 1 for g <= 1/4, with g/2 to spare
        result  mid^ -+ (spread^ (1 + 2 g) + 4 eps |mid^ + b|)      the last sums' roundings

    and the result is rounded away from the center into the dtype of the input.
    """
    wide = accumulator(lower.dtype)
    low, high, w = lower.to(wide), upper.to(wide), weight.to(wide)
    eps, tiny = torch.finfo(wide).eps, torch.finfo(wide).tiny
    g = gamma(terms, lower.dtype, lower.device)
    center = low / 2 + high / 2
    radius = torch.maximum(high - center, center - low) * (1 + 4 * eps) + g * center.abs() + tiny
    mid, spread = product(center, w), product(radius, w.abs())
    if bias is not None:
        mid = mid + bias.to(wide)
    spread = spread * (1 + 2 * g) + 4 * eps * mid.abs() + tiny
    return down(mid - spread, lower.dtype), up(mid + spread, lower.dtype)


def down(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of ``dtype`` that is not above ``value``."""
    rounded = value.to(dtype)
    return torch.where(rounded.to(value.dtype) > value, torch.nextafter(rounded, rounded.new_tensor(-torch.inf)), rounded)


def up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest number of ``dtype`` that is not below ``value``."""
    return -down(-value, dtype)
