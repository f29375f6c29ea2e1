"""The spectral norm of a masked matrix A = D_out W D_in, from above, rounding included: see :mod:`lipfast.ops._gram_norm`."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lipfast.ops._arguments import check_alike, check_leading, check_mask, check_shape
from lipfast.ops._gram_gradient import eigen_gradient, gram_gradient
from lipfast.ops._gram_norm import gram_norm
from lipfast.rounding import up

_PART = {"cpu": 2**18, "cuda": 2**22}  # numbers of the matrices in work at a time


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
        The bounds. At most ``min(O, I) ** 2 ** -(iterations + 1)`` times the norm, and rounding; on a CPU, for 7 or more
        iterations, at most ``1 + 2 ** -20`` times.

    Dtypes: float64, float32, bfloat16 and float16, all computed in float64; CPU and CUDA.
    Raises: ValueError if a shape, dtype or device does not fit or iterations is negative; the message names the argument.
    Soundness: a bound, never below the norm of the exact matrix of these numbers, rounding included: the module's docstring
        has the proof. Rounded up into the weight's dtype. A zero matrix or mask gives 0; a NaN or Inf in a weight, masked or
        not, gives NaN or Inf.
    Gradient: to weight, the bound times that of the logarithm of the Schatten norm of order 2^(iterations + 1), which it
        bounds; 0 where the bound is 0.
    Memory: masked matrices are made and multiplied in parts of 32 MiB (on a CPU 2 MiB), or one at a time if they are larger.

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
    return _slope(gram_gradient, grad, weight, input_mask, output_mask, sigma, iterations)


def _backward_on_cpu(
    grad: Tensor,
    weight: Tensor,
    input_mask: Tensor | None,
    output_mask: Tensor | None,
    sigma: Tensor,
    iterations: int,
) -> Tensor:
    return _slope(eigen_gradient, grad, weight, input_mask, output_mask, sigma, iterations)


def _slope(gradient, grad, weight, input_mask, output_mask, sigma, iterations) -> Tensor:
    slopes, first = [weight.new_zeros(0, *weight.shape[-2:], dtype=torch.float64)], 0
    for part in _parts(weight, input_mask, output_mask):
        here = slice(first, first := first + len(part))
        slope = grad.flatten()[here, None, None] * gradient(part, sigma.flatten()[here].double(), iterations)
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


def _leading(weight: Tensor, *masks: Tensor | None) -> torch.Size:
    return torch.broadcast_shapes(weight.shape[:-2], *(m.shape[:-1] for m in masks if m is not None))


def _parts(weight: Tensor, input_mask: Tensor | None, output_mask: Tensor | None) -> Iterator[Tensor]:
    """The masked matrices in float64, some at a time, (B, O, I) each."""
    lead, (O, I) = _leading(weight, input_mask, output_mask), weight.shape[-2:]
    count, step = math.prod(lead), max(1, _PART[weight.device.type] // max(1, O * I))
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
_backward.register_kernel("cpu", _backward_on_cpu)
_backward.register_fake(backward_fake)
_backward.register_autograd(backward_backward, setup_context=backward_save)
