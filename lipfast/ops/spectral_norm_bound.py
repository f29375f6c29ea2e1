"""The spectral norm of a masked matrix, from above, rounding included.

Gram iteration (Delattre et al. 2023, https://arxiv.org/abs/2305.16173, section 3) on A = D_out W D_in, in float64:
P_1 = A A^H or A^H A, the smaller, P_{t+1} = G_t G_t^H, where G_t = P_t / 2^e has a Frobenius norm in [1/2, 1). In real
arithmetic the norms of A, P_1, ... are squares of each other, and ||G_T||_2 <= ||G_T||_F ends the chain above ||A||_2, by a
factor of at most r^(2^-(T+1)) for r singular values: T = 12 gives 1.0009 at r = 1024.

Rounding. ||G||_2^2 = ||G G^H||_2 for every matrix G, Hermitian or not, and a computed product P has |P - G G^H| <=
gamma |G| |G|^H, entry by entry, whatever its order of summation (lipfast.rounding), hence

    ||G_t||_2^2  <=  2^e ||G_{t+1}||_2 + gamma ||G_t||_F^2,        G_0 = A,

which is applied backwards from ||G_T||_2 <= min(||G_T||_F, sqrt(||G_T||_1 ||G_T||_inf)). Nothing is assumed of the
condition of A. The scalars' own roundings are relative, below 4 eps a step; powers of two are exact. gamma counts 4k terms
for a complex sum of k: 2k real products for each part, or Gauss' three products. Its sixteen spare terms also pay for
underflow, which loses at most 2^-1074 an entry while ||G||_F >= 1/2. The slack is gamma r <= r (k + 16) eps relative, 2e-10 at
r = k = 1024. Not covered: float64 products that a library emulates in lower precision.

Near a multiple of an orthogonal matrix, where every step of the chain still loses the factor of r, the first product tells
more: for the mean c of its diagonal, or any other number,

    ||A||_2^2  <=  c + ||P_1 - c I||_2 + gamma ||A||_F^2,

with the norm on the right bounded as above. As ||A||_2^2 >= c up to rounding, it is seen to be enough where it is.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lipfast.ops._arguments import check_alike, check_leading, check_mask, check_shape
from lipfast.rounding import gamma, up

_SIDE = 512  # of a product from which on halving pays
_PART = 2**22  # numbers of the matrices in work at a time


def spectral_norm_bound(
    weight: Tensor,  # (*, O, I)
    input_mask: Tensor | None = None,  # (*, I)
    output_mask: Tensor | None = None,  # (*, O)
    iterations: int = 12,
) -> Tensor:  # (*)
    """An upper bound on the largest singular value of every ``D_out weight D_in``.

    Args:
        weight: matrices; a single (O, I) serves all masks.
        input_mask, output_mask: bool; columns and rows that count. None: all. ``*`` is the broadcast of all leading sizes.
        iterations: 0 or more products; 0 gives the Frobenius norm or the smaller of it and sqrt(||A||_1 ||A||_inf).

    Returns:
        The bounds. At most ``min(O, I) ** 2 ** -(iterations + 1)`` times the norm, and rounding.

    Dtypes: float64, float32, bfloat16 and float16, all computed in float64; CPU and CUDA.
    Raises: ValueError if a shape, dtype or device does not fit or iterations is negative; the message names the argument.
    Soundness: a bound, never below the norm of the exact matrix of these numbers, rounding included: the module's docstring
        has the proof. Rounded up into the weight's dtype. A zero matrix or mask gives 0; a NaN or Inf in a weight, masked or
        not, gives NaN or Inf.
    Gradient: to weight, the bound times that of the logarithm of the Schatten norm of order 2^(iterations + 1), which it
        bounds; 0 where the bound is 0.
    Memory: masked matrices are made and multiplied in parts of 32 MiB, or one at a time if they are larger.

    >>> spectral_norm_bound(torch.tensor([[3., 0.], [0., 4.]]), torch.tensor([[True, True], [True, False]]))
    tensor([4.0000, 3.0000])
    """
    check_alike("spectral_norm_bound", weight=weight)
    check_shape("spectral_norm_bound", "weight", weight, ("*", "O", "I"))
    O, I = weight.shape[-2:]
    check_mask("spectral_norm_bound", "input_mask", input_mask, weight, ("*", I))
    check_mask("spectral_norm_bound", "output_mask", output_mask, weight, ("*", O))
    leading = {"input_mask": input_mask, "output_mask": output_mask}
    sizes = {name: None if m is None else m.shape[:-1] for name, m in leading.items()}
    check_leading("spectral_norm_bound", weight=weight.shape[:-2], **sizes)
    if iterations < 0:
        raise ValueError(f"spectral_norm_bound: iterations must be 0 or more, got {iterations}")
    return torch.ops.lipfast.spectral_norm_bound(weight, input_mask, output_mask, iterations)


def reference(
    weight: Tensor, input_mask: Tensor | None = None, output_mask: Tensor | None = None, iterations: int = 12
) -> Tensor:
    bounds = [gram_norm(part, iterations) for part in _parts(weight, input_mask, output_mask)]
    sigma = torch.cat([weight.new_zeros(0, dtype=torch.float64), *bounds])
    return up(sigma, weight.dtype).view(_leading(weight, input_mask, output_mask))


def fake(weight, input_mask=None, output_mask=None, iterations=12):
    return weight.new_empty(_leading(weight, input_mask, output_mask))


def save(ctx, inputs, output):
    weight, input_mask, output_mask, ctx.iterations = inputs
    ctx.save_for_backward(weight, input_mask, output_mask, output)


def backward(ctx, grad):
    return torch.ops.lipfast.spectral_norm_bound_backward(grad, *ctx.saved_tensors, ctx.iterations), None, None, None


def backward_reference(
    grad: Tensor,  # (*)
    weight: Tensor,  # (*, O, I)
    input_mask: Tensor | None,  # (*, I)
    output_mask: Tensor | None,  # (*, O)
    sigma: Tensor,  # (*)
    iterations: int,
) -> Tensor:  # (*, O, I)
    slopes, first = [weight.new_zeros(0, *weight.shape[-2:], dtype=torch.float64)], 0
    for part in _parts(weight, input_mask, output_mask):
        here = slice(first, first := first + len(part))
        slope = grad.flatten()[here, None, None] * gram_gradient(part, sigma.flatten()[here].double(), iterations)
        slopes.append(slope.sum(0, keepdim=True) if weight.ndim == 2 else slope)
    slope = torch.cat(slopes)
    slope = slope.sum(0) if weight.ndim == 2 else slope.view(*sigma.shape, *weight.shape[-2:]).sum_to_size(weight.shape)
    return slope.to(weight.dtype)


def backward_fake(grad, weight, input_mask, output_mask, sigma, iterations):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def backward_save(ctx, inputs, output):
    *tensors, ctx.iterations = inputs
    ctx.save_for_backward(*tensors)


def backward_backward(ctx, again):
    grad, weight, input_mask, output_mask, sigma = ctx.saved_tensors
    of_floats = lambda grad, weight, sigma: backward_reference(grad, weight, input_mask, output_mask, sigma, ctx.iterations)
    to_grad, to_weight, to_sigma = torch.func.vjp(of_floats, grad, weight, sigma)[1](again)
    return to_grad, to_weight, None, None, to_sigma, None


def gram_norm(
    matrix: Tensor,  # (*, M, N)
    iterations: int,
    error: Tensor | None = None,  # (*)
    chain: bool = False,
) -> Tensor:  # (*)
    """A bound on the spectral norm of a float64 or complex128 matrix, or of any that is ``error`` (spectral norm) from it.

    ``chain``: by the Gram iteration alone.
    """
    M, N = matrix.shape[-2:]
    if M * N == 0:
        return matrix.real.sum((-2, -1)) if error is None else error.clone()
    of = lambda terms: gamma(4 * terms if matrix.is_complex() else terms, torch.float64, matrix.device)
    first, G = _rescaled(matrix, _parts_of(matrix).abs().flatten(matrix.ndim - 2).amax(-1))
    steps, near = [], None
    for t in range(iterations):
        norm = _frobenius(G)
        product = _gram(G if M <= N else G.mH)
        if t == 0 and not chain:
            near, least = _near_orthogonal(product, norm, of(max(M, N)))
            if (near <= least * min(M, N) ** 2.0 ** -(iterations + 1)).all():
                near = _next(_scaled(near, first))
                return near if error is None else _next(near + error)
        exponent, G = _rescaled(product, _frobenius(product))
        steps.append((norm, exponent, of(max(M, N) if t == 0 else min(M, N))))
    size = _modulus(G)
    rows, columns = size.sum(-1).amax(-1), size.sum(-2).amax(-1)
    bound = torch.minimum(_frobenius(G), (rows * columns).sqrt() * (1 + of(M + N)))
    for norm, exponent, slack in reversed(steps):
        bound = (_scaled(bound, exponent) + slack * norm.square()).sqrt() * (1 + 4 * _EPS)
    bound = _next(_scaled(bound if near is None else torch.minimum(bound, near), first))
    return bound if error is None else _next(bound + error)


def _near_orthogonal(product: Tensor, norm: Tensor, slack: float) -> tuple[Tensor, Tensor]:  # (*, r, r), (*) -> (*), (*)
    """A bound that is close where ``product``, computed from A, is nearly a multiple of I; and what ||A|| hardly is below."""
    mean = product.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    rest = product.clone()
    rest.diagonal(dim1=-2, dim2=-1).sub_(mean[..., None])
    size = _frobenius(rest)
    if (size <= 2.0**-4 * mean).all():  # otherwise not close enough to spend products on
        size = gram_norm(rest, 4, chain=True)
    bound = (mean + size * (1 + 4 * _EPS) + slack * norm.square()).sqrt() * (1 + 4 * _EPS)
    return bound, mean.sqrt()


def gram_gradient(
    matrix: Tensor,  # (*, M, N)
    norm: Tensor,  # (*)
    iterations: int,
) -> Tensor:  # (*, M, N)
    """The derivative of :func:`gram_norm`, whose value is ``norm``.

    For q = 2^iterations the Schatten norm (trace (A A^H)^q)^(1/2q) has the derivative M / <A, M> times itself, where
    M = (A A^H)^(q-1) A is the product of all Gram matrices and A, because q - 1 = 1 + 2 + 4 + ...
    """
    if matrix.numel() == 0:
        return matrix
    wide = matrix.shape[-2] <= matrix.shape[-1]
    exponent, A = _rescaled(matrix, _parts_of(matrix.detach()).abs().flatten(matrix.ndim - 2).amax(-1))
    G = product = A
    for _ in range(iterations):
        square = G @ G.mH if wide else G.mH @ G
        _, G = _rescaled(square, _frobenius(square.detach()))
        product = G @ product if wide else product @ G
        _, product = _rescaled(product, _frobenius(product.detach()))
    inner = (A.conj() * product).real.sum((-2, -1))
    return (_scaled(norm, -exponent) / inner.where(inner != 0, 1.0))[..., None, None] * product


_EPS = torch.finfo(torch.float64).eps


def _gram(G: Tensor) -> Tensor:  # (*, M, N) -> (*, M, M)
    """G G^H, of whose mirrored blocks one is computed and the other copied."""
    M = G.shape[-2]
    if M < _SIDE:
        return G @ G.mH
    top, bottom = G[..., : M // 2, :], G[..., M // 2 :, :]
    corner = top @ bottom.mH
    product = G.new_empty(*G.shape[:-1], M)
    product[..., : M // 2, : M // 2], product[..., M // 2 :, M // 2 :] = _gram(top), _gram(bottom)
    product[..., : M // 2, M // 2 :], product[..., M // 2 :, : M // 2] = corner, corner.mH
    return product


def _frobenius(matrix: Tensor) -> Tensor:  # (*, M, N) -> (*), rounded up
    terms = sum(matrix.shape[-2:])
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(_parts_of(matrix).flatten(matrix.ndim - 1), dim=-1), dim=-1)
    return norm * (1 + gamma(terms, torch.float64, matrix.device))


def _modulus(matrix: Tensor) -> Tensor:
    """Of every entry; what squares lose to underflow is far below a rounding of the largest."""
    return torch.linalg.vector_norm(torch.view_as_real(matrix), dim=-1) if matrix.is_complex() else matrix.abs()


def _parts_of(matrix: Tensor) -> Tensor:  # (*, M, N) -> (*, M, N, 2) if complex
    return torch.view_as_real(matrix) if matrix.is_complex() else matrix


def _rescaled(matrix: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """(e, matrix / 2^e) where size / 2^e is near 1, but e at most 1000 either way; e is 0 for a size of 0, NaN or Inf."""
    exponent = torch.frexp(size).exponent.where(size.isfinite(), 0).clamp(-1000, 1000)
    return exponent, _scaled(matrix, -exponent[..., None, None])


def _scaled(t: Tensor, exponent: Tensor) -> Tensor:
    """t 2^exponent, the factor made of bits, which is exact."""
    factor = ((exponent.long() + 1023) << 52).view(torch.float64)
    return torch.view_as_complex(torch.view_as_real(t) * factor[..., None]) if t.is_complex() else t * factor


def _next(bound: Tensor) -> Tensor:
    """Past one rounding, also among subnormal numbers; 0 is exact."""
    return torch.where(bound > 0, torch.nextafter(bound, bound.new_tensor(torch.inf)), bound)


def _leading(weight: Tensor, *masks: Tensor | None) -> torch.Size:
    return torch.broadcast_shapes(weight.shape[:-2], *(m.shape[:-1] for m in masks if m is not None))


def _parts(weight: Tensor, input_mask: Tensor | None, output_mask: Tensor | None) -> Iterator[Tensor]:
    """The masked matrices in float64, some at a time, (B, O, I) each."""
    lead, (O, I) = _leading(weight, input_mask, output_mask), weight.shape[-2:]
    count, step = math.prod(lead), max(1, _PART // max(1, O * I))
    flat = lambda t, *shape: t.expand(*lead, *shape).reshape(count, *shape)
    columns = None if input_mask is None else flat(input_mask, I)
    rows = None if output_mask is None else flat(output_mask, O)
    matrices = weight[None].double() if weight.ndim == 2 else flat(weight, O, I)
    for first in range(0, count, step):
        here = slice(first, first + step)
        part = matrices if weight.ndim == 2 else matrices[here].double()
        if columns is not None:
            part = part * columns[here, None, :]  # a product, so that a NaN stays one
        if rows is not None:
            part = part * rows[here, :, None]
        yield part


_op = torch.library.custom_op("lipfast::spectral_norm_bound", reference, mutates_args=())
_op.register_fake(fake)
_op.register_autograd(backward, setup_context=save)
_backward = torch.library.custom_op("lipfast::spectral_norm_bound_backward", backward_reference, mutates_args=())
_backward.register_fake(backward_fake)
_backward.register_autograd(backward_backward, setup_context=backward_save)
