"""The spectral norm of a masked convolution, from above with a stated probability.

Masks break the shift invariance on which :func:`lipfast.conv2d_norm_bound` rests. The Lanczos method needs only products: on
M = A^T A, A = D_out W D_in, from a start uniform on the sphere of the inputs that the mask keeps, q steps give theta, the
largest Rayleigh quotient of M in span(b, M b, ..., M^(q-1) b). It is below lambda = ||A||^2, but not far:

    P(theta < (1 - e) lambda)  <=  1.648 sqrt(n) exp(-(2q - 1) sqrt(e))        for n inputs

(Kuczynski and Wozniakowski 1992, SIAM J. Matrix Anal. Appl. 13(4), theorem 4.2). For take lambda = 1, b of unit length and b_1
its coefficient at the first eigenvector. The vector p(M) b, p(x) = T(y) / y with T Chebyshev's polynomial of degree 2q - 1 and
y^2 = 1 - x / (1 - e), shows that theta < 1 - e only if b_1^2 sinh^2((2q - 1) atanh sqrt(e)) < 1 - b_1^2, hence |b_1| < 2
exp(-(2q - 1) sqrt(e)); and P(|b_1| <= t) <= sqrt(2 n / pi) t. So with e that makes the right side the failure probability,

    ||A||  <=  sqrt(theta / (1 - e))

but with that probability. A start that is chosen, or taken from an earlier call, proves nothing.

**Rounding**, float64 and full reorthogonalisation. The value gets a factor of 1 + 2^-30, beyond what 100 steps with sums of a
thousand products lose at worst. What rounding does to the direction is taken to be no more than a shift of b_1 by 2^-48, which
costs 0.824 sqrt(n) 2^-48 of the failure probability (5e-13 at n = 32768); that is an assumption, and the only one. Weights
that are 2^200 times smaller than the largest may underflow when squared: the result is raised by 2^-200 of the largest.

No operator of torch.library: those are functions of their tensors alone, and this one draws.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lipfast import rounding
from lipfast.ops._arguments import check_alike, check_leading, check_mask, check_shape
from lipfast.ops._gram_norm import next_up, rescaled, scaled
from lipfast.ops.conv2d_norm_bound import conv2d_norm_bound
from lipfast.ops.conv2d_norm_estimate import _convolve, _flat, _gradients, _masked, _unit, convolution

_PART = 2**24  # numbers of the bases in work at a time


@torch.no_grad()
def conv2d_norm_confidence(
    weight: Tensor,  # (O, C / groups, kernel height, kernel width)
    input_size: int | Sequence[int],  # H, W
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    input_mask: Tensor | None = None,  # (*, C, H, W)
    output_mask: Tensor | None = None,  # (*, O, H', W')
    failure_probability: float = 1e-9,
    iterations: int = 60,
    generator: torch.Generator | None = None,
    bound: Tensor | None = None,  # ()
) -> Tensor:  # (*)
    """An upper confidence limit of the largest singular value of every masked ``x -> conv2d(x, weight, ...)``, zero padding.

    Args:
        weight, input_size, stride, padding, dilation, groups: as in :func:`lipfast.conv2d_norm_bound`.
        input_mask, output_mask: bool; where False, the input or output counts as zero. ``*`` is their broadcast.
        failure_probability: above 0, below 1: of each number of the result by itself, over its own random start.
        iterations: 1 or more; each takes a convolution and a transposed one. The limit is above the norm by a factor of about
            1 + (log(1.648 sqrt(C H W) / failure_probability) / (2 iterations - 1))^2 / 2, at most 1.03 by default up to
            C H W = 32768.
        generator: of the starts, which must not depend on the weight or the masks. None: entropy of the operating system,
            whatever torch.manual_seed was told, so that two calls differ a little.
        bound: a proven bound at hand; None: :func:`lipfast.conv2d_norm_bound`.

    Returns:
        The limits, in the dtype of ``weight``, rounded up; never above ``bound``, and equal to it where the iterations are too
        few for the probability. 0 where a mask leaves nothing.

    Dtypes: float64, float32, bfloat16 and float16, all computed in float64; CPU and CUDA.
    Raises: ValueError if a shape, dtype, device, the geometry or a number does not fit; the message names the argument.
    Soundness: with probability 1 - ``failure_probability``; what is assumed of rounding is in the module's docstring. NaN or
        Inf in the weight gives NaN or Inf.
    Gradient: none.
    Memory: ``iterations`` images in float64 per sample, samples in parts of 128 MiB.

    >>> conv2d_norm_confidence(torch.ones(1, 1, 1, 2), (1, 2), output_mask=torch.zeros(3, 1, 1, 1, dtype=torch.bool))
    tensor([0., 0., 0.])
    """
    name = "conv2d_norm_confidence"
    check_alike(name, weight=weight)
    check_shape(name, "weight", weight, ("O", "C/groups", "kernel height", "kernel width"))
    size, where, output = convolution(name, weight, input_size, stride, padding, dilation, groups)
    where = (*where, groups)
    image = [weight.shape[1] * groups, *size]
    check_mask(name, "input_mask", input_mask, weight, ("*", *image))
    check_mask(name, "output_mask", output_mask, weight, ("*", *output))
    leading = {"input_mask": input_mask, "output_mask": output_mask}
    sizes = {key: None if m is None else m.shape[:-3] for key, m in leading.items()}
    check_leading(name, **sizes)
    if not 0 < failure_probability < 1:
        raise ValueError(f"{name}: failure_probability must be above 0 and below 1, got {failure_probability}")
    if iterations < 1:
        raise ValueError(f"{name}: iterations must be 1 or more, got {iterations}")
    if bound is not None and not (isinstance(bound, Tensor) and bound.is_floating_point() and bound.shape == ()):
        raise ValueError(f"{name}: bound must be a floating tensor (), got {bound}")
    bound = conv2d_norm_bound(weight, size, stride, padding, dilation, groups) if bound is None else bound.to(weight.device)
    lead = torch.broadcast_shapes(*(s for s in sizes.values() if s is not None))
    shortfall = _shortfall(math.prod(image), failure_probability, iterations)
    if shortfall >= 1:
        return rounding.up(bound.double(), weight.dtype).expand(lead).clone()
    exponent, wide = rescaled(weight.double(), weight.abs().amax().double())
    columns, rows = (None if m is None else _flat(m, lead, 3) for m in leading.values())
    count = lead.numel()
    limits, step = [wide.new_zeros(0)], max(1, _PART // (iterations * math.prod(image)))
    for first in range(0, count, step):
        here = [m if m is None or len(m) == 1 else m[first : first + step] for m in (columns, rows)]
        start = _starts([min(step, count - first), *image], generator).to(wide.device)
        theta = _largest_ritz_value(wide, here[0], here[1], start, where, iterations)
        limit = (theta / (1 - shortfall)).sqrt() * (1 + 2.0**-30) + 2.0**-200
        for mask in here:
            limit = limit if mask is None else limit.where(mask.flatten(1).any(1) | limit.isnan(), 0.0)
        limits.append(torch.minimum(next_up(scaled(limit, exponent)), bound.double()))
    return rounding.up(torch.cat(limits), weight.dtype).view(lead)


def _shortfall(n: int, failure_probability: float, iterations: int) -> float:
    """e of the module's docstring; 1 where the method says nothing."""
    left = failure_probability - 0.824 * math.sqrt(n) * 2.0**-48
    if left <= 0:
        return 1.0
    return min(1.0, (math.log(1.648 * math.sqrt(n) / left) / (2 * iterations - 1)) ** 2 * (1 + 2.0**-40))


def _starts(shape: list[int], generator: torch.Generator | None) -> Tensor:
    if generator is not None:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return torch.from_numpy(np.random.default_rng().standard_normal(shape))


def _largest_ritz_value(
    weight: Tensor, input_mask: Tensor | None, output_mask: Tensor | None, start: Tensor, where: Sequence, iterations: int
) -> Tensor:  # (B,)
    v = _unit(_masked(start, input_mask))
    basis = v.new_zeros(len(v), iterations, v[0].numel())
    diagonal, beside = v.new_zeros(len(v), iterations), v.new_zeros(len(v), iterations)
    for j in range(iterations):
        basis[:, j] = v.flatten(1)
        u = _masked(_convolve(v, weight, *where), output_mask)
        image = _masked(_gradients(True, u, v, weight, *where), input_mask).flatten(1)
        diagonal[:, j] = (basis[:, j] * image).sum(1)
        once = _orthogonal(image, basis[:, : j + 1])
        rest = _orthogonal(once, basis[:, : j + 1])
        length = torch.linalg.vector_norm(rest, dim=1)
        # What a second pass still shortens is rounding: the space is complete, and theta the norm itself. It keeps the factor
        # 1 / (1 - e) all the same, and zeros follow, which add nothing.
        length = length.where(length > torch.linalg.vector_norm(once, dim=1) / 2, 0.0)
        beside[:, j] = length
        v = torch.where(length[:, None] > 0, rest / length[:, None], 0.0).view_as(v)
    off = beside[:, :-1]
    matrix = torch.diag_embed(diagonal) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    finite = matrix.isfinite().all(-1).all(-1)
    theta = torch.linalg.eigvalsh(matrix.where(finite[:, None, None], 0.0))[:, -1].clamp_min(0.0)
    return theta.where(finite, torch.nan)


def _orthogonal(x: Tensor, basis: Tensor) -> Tensor:  # (B, N), (B, T, N) -> (B, N)
    return x - (basis.mT @ (basis @ x[..., None]))[..., 0]
