"""The spectral norm of a two-dimensional convolution, from above, rounding included.

**Torus.** Take one side of the image (the other is alike): n pixels, p zeros at each end, stride s, dilation d. Output i
of n' reads pixel s i + d t - p by tap t, so pixels from -p to L = s (n' - 1) + d (taps - 1) - p. Lay the image into a torus
of N pixels, zero elsewhere. If N >= n + p and N > L, none of these outside the image meets one inside modulo N; if N is a
multiple of s and at least s n', no two outputs meet. Then T = P C E with C the convolution on the torus, E an embedding
and P a choice of rows, so ||T|| <= ||C||. With circular padding N = n where s divides n (if n' = n / s, T is C), else the
padded image is laid into the torus; a pixel that E, or an output that P, repeats m times costs a factor of sqrt(m).

**Symbol.** Renaming pixel s q + a to (q, channel a) makes C a convolution of stride 1 on M = N / s pixels with s times the
input channels. The Fourier transform makes that block diagonal: ||C|| = max ||S(w)|| over the frequencies w of Z_M x Z_M,

    S(w)[o, (c, a)] = sum of weight[o, c, t] exp(2 pi i w q(t) / M) over the taps t with d t = s q(t) + a

(p is a translation of the torus; the two sides multiply). S(-w) is the conjugate of S(w), so half of the frequencies do.
Groups are blocks. For stride 1 see Sedghi et al. 2019, https://arxiv.org/abs/1805.10408, theorem 6.

**Rounding.** Angles are reduced to [-pi, pi] in integers; with their own roundings and two units in the last place for each
sine and cosine, a factor exp(...) errs by at most 13 u, u = 2^-53. A sum over n taps adds gamma_n, hence an entry of S errs by
at most gamma_(n + 32) times the sum of |weight| over its taps, and S by gamma_(n + 32) sqrt(n) ||weight||_F in Frobenius
norm. :func:`gram_norm` bounds the norm of every matrix so near.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast import rounding
from lipfast.ops._arguments import check_alike, check_shape
from lipfast.ops._gram_gradient import gram_gradient
from lipfast.ops._gram_norm import gram_norm, largest_norm, next_up, rescaled, scaled
from lipfast.ops.conv2d_norm_estimate import convolution
from lipfast.ops.interval_conv2d import _output_size

_PART = {"cpu": 2**17, "cuda": 2**22}  # numbers of the matrices in work at a time


def conv2d_norm_bound(
    weight: Tensor,  # (O, C / groups, kernel height, kernel width)
    input_size: int | Sequence[int],  # H, W
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    explicit: int = 1024,
    iterations: int = 12,
) -> Tensor:  # ()
    """Never below the largest singular value of ``x -> conv2d(x, weight, ...)`` on images of ``input_size``.

    Args:
        weight, stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`, "same" and "valid" padding
            included.
        input_size: height and width of the image.
        padding_mode: "zeros" or "circular", as in :class:`torch.nn.Conv2d`.
        explicit: where the operator has at most so many inputs, or outputs, its matrix is formed and bounded as well, and
            the smaller bound returned. 0 switches this off.
        iterations: Gram iterations, see :func:`lipfast.spectral_norm_bound`.

    Returns:
        The bound, in the dtype of ``weight``, computed in float64 and rounded up.

    Dtypes: float64, float32, bfloat16, float16; CPU and CUDA.
    Raises: ValueError if a shape, dtype, the geometry or a number does not fit; the message names the argument.
    Soundness: proven, rounding included (see the module). NaN or Inf in the weight gives NaN or Inf. Tightness: circular
        padding, the stride dividing the image, min(O, C s^2)^(2^-(iterations + 1)); zero padding loses what the torus sees
        beyond the border.
    Gradient: that of the norm on the torus (also where the explicit bound is smaller).

    >>> conv2d_norm_bound(torch.ones(1, 1, 1, 2), (1, 2))
    tensor(1.4142)
    """
    name = "conv2d_norm_bound"
    check_alike(name, weight=weight)
    check_shape(name, "weight", weight, ("O", "C/groups", "kernel height", "kernel width"))
    size, where, _ = convolution(name, weight, input_size, stride, padding, dilation, groups)
    if padding_mode not in ("zeros", "circular"):
        raise ValueError(f"{name}: padding_mode must be 'zeros' or 'circular', got {padding_mode!r}")
    circular = padding_mode == "circular"
    if circular and any(p > n for p, n in zip(where[1], size, strict=True)):
        raise ValueError(f"{name}: padding must be at most input_size {size} if circular, got {where[1]}")
    for argument, value in (("explicit", explicit), ("iterations", iterations)):
        if value < 0:
            raise ValueError(f"{name}: {argument} must be 0 or more, got {value}")
    return torch.ops.lipfast.conv2d_norm_bound(weight, size, *where, groups, circular, explicit, iterations)[0]


def reference(
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    circular: bool,
    explicit: int,
    iterations: int,
) -> tuple[Tensor, Tensor]:  # (), and the deciding frequency (2,)
    exponent, wide = rescaled(weight.double(), weight.abs().amax().double())
    wide = wide.unflatten(0, (groups, -1))  # (G, O, C, kernel height, kernel width)
    sides = _sides(weight, input_size, stride, padding, dilation, circular)
    taps = weight[0, 0].numel()
    error = rounding.gamma(taps + 32, torch.float64, weight.device) * taps**0.5 * wide.square().sum().sqrt() * (1 + 2.0**-20)
    bound, frequency = _torus_norm(wide, sides, error, iterations)
    bound = bound * _repeats(sides)
    outputs, inputs = sides[0].outputs * sides[1].outputs, input_size[0] * input_size[1]
    if min(weight.shape[0] * outputs, weight.shape[1] * groups * inputs) <= explicit:
        error = error * outputs**0.5 if circular else None  # two taps may read one pixel; without, entries are exact
        bound = torch.minimum(bound, gram_norm(_matrix(wide, sides), iterations, error).amax())
    return rounding.up(next_up(scaled(bound, exponent)), weight.dtype), frequency


class _Side(NamedTuple):
    """One dimension of the convolution, in the letters of the module."""

    circular: bool
    pixels: int
    outputs: int
    taps: int
    stride: int
    padding: int
    dilation: int

    @property
    def torus(self) -> tuple[int, int]:
        """N, and how often a pixel or an output is repeated at most."""
        n, out, s, p = self.pixels, self.outputs, self.stride, self.padding
        if not self.circular:
            N, repeats = max(n + p, s * (out - 1) - p + self.dilation * (self.taps - 1) + 1, s * out), 1
        elif n % s == 0:
            N, repeats = n, -(-s * out // n)
        else:
            N, repeats = n + 2 * p, -(-(n + 2 * p) // n)
        return -(-N // s) * s, repeats

    @property
    def period(self) -> int:
        """M; 1 where all q(t) are zero, so that every frequency has the same symbol."""
        return self.torus[0] // self.stride if self.dilation * (self.taps - 1) >= self.stride else 1

    def reads(self, device) -> Tensor:  # (outputs, taps, pixels)
        """1 where a tap of an output falls on a pixel, else 0."""
        first = torch.arange(self.outputs, device=device)[:, None] * self.stride - self.padding
        position = (first + torch.arange(self.taps, device=device) * self.dilation)[..., None]
        pixel = torch.arange(self.pixels, device=device)
        return ((position - pixel) % self.pixels == 0 if self.circular else position == pixel).double()


def _sides(weight, input_size, stride, padding, dilation, circular) -> list[_Side]:
    outputs = _output_size(weight.new_empty(()).expand(1, 1, *input_size), weight, stride, padding, dilation)
    return [_Side(circular, *s) for s in zip(input_size, outputs, weight.shape[2:], stride, padding, dilation, strict=True)]


def _repeats(sides: list[_Side]) -> float:  # rounded up; 1 is exact
    repeats = sides[0].torus[1] * sides[1].torus[1]
    return 1.0 if repeats == 1 else repeats**0.5 * (1 + 2.0**-50)


def _torus_norm(weight: Tensor, sides: list[_Side], error: Tensor, iterations: int) -> tuple[Tensor, Tensor]:  # (), (2,)
    """A bound on max over w of ||S(w)||, and the w that decides it."""
    highest = frequency = None
    for part in _frequencies(weight, sides):
        bound, first = largest_norm(_symbols(weight, part, sides).flatten(0, 1), iterations, error, highest)
        if highest is None or not bound <= highest:
            highest, frequency = bound, part[first // len(weight)].clone()
    assert highest is not None, "there is a frequency"
    assert frequency is not None
    return highest, frequency


def _frequencies(weight: Tensor, sides: list[_Side]) -> Sequence[Tensor]:
    """Half of all frequencies, (F, 2), some at a time."""
    down, across = (side.period for side in sides)
    half = (torch.arange(n, device=weight.device) for n in (down, across // 2 + 1))
    entries = weight[..., 0, 0].numel() * sides[0].stride * sides[1].stride
    return torch.cartesian_prod(*half).split(max(1, _PART[weight.device.type] // entries))


def _symbols(weight: Tensor, frequencies: Tensor, sides: list[_Side]) -> Tensor:  # (F, G, O, C s s), complex
    """S(w) for weight (G, O, C, kernel height, kernel width) and frequencies (F, 2)."""
    (down, across), M = sides, sides[0].period * sides[1].period
    taps = [torch.arange(side.taps, device=weight.device) * side.dilation for side in sides]
    q, a = (
        torch.cartesian_prod(*(f(t, side.stride) for t, side in zip(taps, sides, strict=True)))
        for f in (torch.floor_divide, torch.remainder)
    )
    turns = (frequencies[:, :1] * q[:, 0] * across.period + frequencies[:, 1:] * q[:, 1] * down.period) % M  # (F, taps)
    angle = torch.where(2 * turns > M, turns - M, turns).double() * (2 * math.pi / M)
    phase = a[:, 0] * across.stride + a[:, 1]
    own = phase == torch.arange(down.stride * across.stride, device=weight.device)[:, None]  # (s s, taps)
    spread = (weight.flatten(3)[..., None, :] * own).flatten(2, 3)  # (G, O, C s s, taps)
    parts = torch.stack([angle.cos(), angle.sin()]) @ spread.flatten(0, 2).mT
    return torch.complex(*parts).unflatten(-1, spread.shape[:-1])


def _matrix(weight: Tensor, sides: list[_Side]) -> Tensor:  # (G, O H' W', C H W)
    """The operator of each group. Sums of one entry and zeros: exact where no two taps read one pixel."""
    down, across = (side.reads(weight.device) for side in sides)
    return torch.einsum("gocij,yih,xjw->goyxchw", weight, down, across).flatten(4).flatten(1, 3)


def fake(weight, input_size, stride, padding, dilation, groups, circular, explicit, iterations):
    return weight.new_empty(()), weight.new_empty(2, dtype=torch.int64)


def save(ctx, inputs, output):
    weight, *ctx.where, _, ctx.iterations = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(weight, output[1])


def backward(ctx, grad, _frequency):
    weight, frequency = ctx.saved_tensors
    size, stride, padding, dilation, groups, circular = ctx.where
    sides = _sides(weight, size, stride, padding, dilation, circular)
    symbol = lambda w: torch.view_as_real(_symbols(w.unflatten(0, (groups, -1)), frequency[None], sides)[0])
    S, pull = torch.func.vjp(symbol, weight.double())[:2]
    S = torch.view_as_complex(S)  # (G, O, C s s)
    norms = gram_norm(S, ctx.iterations, chain=True)  # the other way reads numbers, which a trace cannot
    first = torch.arange(groups, device=weight.device) == norms.argmax()
    slope = gram_gradient(S, norms, ctx.iterations) * first[:, None, None] * grad * _repeats(sides)
    return pull(torch.view_as_real(slope))[0].to(weight.dtype), *[None] * 8


_op = torch.library.custom_op("lipfast::conv2d_norm_bound", reference, mutates_args=())
_op.register_fake(fake)
_op.register_autograd(backward, setup_context=save)
