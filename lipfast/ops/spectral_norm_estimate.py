"""The spectral norm of a masked matrix, from below.

Power iteration on A = D_out W D_in, where the D are 0/1 diagonal matrices (the masks of Huang et al. 2021,
https://arxiv.org/abs/2111.01395, section 4, which drop units that cannot vary):

    left <- A right / ||A right||,        right <- A^T left / ||A^T left||,        sigma = ||A right|| <= ||A||_2,

because ||right|| = 1. With the vectors held constant sigma = left^T W right, so d sigma / d W = left right^T (Miyato et al.
2018, https://arxiv.org/abs/1802.05957, eq. 10), which is the derivative of ||A||_2 once the iteration has converged.

A product that vanishes (right was orthogonal to every row) says nothing of A: the iteration goes on from a fixed random
vector of that side. Norms are taken after division by the largest entry, so squares neither overflow nor underflow.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast.ops._arguments import check_alike, check_leading, check_mask, check_shape
from lipfast.rounding import accumulator

_SURE = 1e-12, 1e18  # lengths between which no square of float32 or float64 that matters overflows or vanishes


def spectral_norm_estimate(
    weight: Tensor,  # (*, O, I)
    input_mask: Tensor | None = None,  # (*, I)
    output_mask: Tensor | None = None,  # (*, O)
    start: Tensor | None = None,  # (*, I)
    iterations: int = 10,
) -> tuple[Tensor, Tensor]:  # (*), (*, I)
    """Power iteration for the largest singular value of every ``D_out weight D_in``.

    Args:
        weight: matrices; a single (O, I) serves all masks without a copy.
        input_mask, output_mask: bool; columns and rows that count. None: all. ``*`` is the broadcast of all leading sizes.
        start: where to begin, of any length: the ``right`` of an earlier call, or one vector for all samples. A start that
            holds a NaN or Inf or that its mask leaves zero is replaced by a fixed random vector (a hash of the index).
        iterations: 0 or more; each takes a product with the weight and one with its transpose.

    Returns:
        ``(sigma, right)``: the estimate, and the unit vector that attains it (zero where the input mask is all False).

    Dtypes: float64, float32, and bfloat16/float16 computed in float32; CPU and CUDA.
    Raises: ValueError if a shape, dtype or device does not fit or iterations is negative; the message names the argument.
    Soundness: none; an estimate from below, exact in real arithmetic only, and above the norm by rounding at most. A zero
        matrix or mask gives 0; a NaN or Inf in a weight, masked or not, gives NaN or Inf.
    Gradient: to weight, with the vectors held constant; 0 where sigma is 0. ``right`` is detached.

    >>> sigma, right = spectral_norm_estimate(torch.tensor([[3., 0.], [0., 4.]]), torch.tensor([[True, True], [True, False]]))
    >>> sigma
    tensor([4.0000, 3.0000])
    """
    check_alike("spectral_norm_estimate", weight=weight, start=start)
    check_shape("spectral_norm_estimate", "weight", weight, ("*", "O", "I"))
    O, I = weight.shape[-2:]
    check_mask("spectral_norm_estimate", "input_mask", input_mask, weight, ("*", I))
    check_mask("spectral_norm_estimate", "output_mask", output_mask, weight, ("*", O))
    if start is not None:
        check_shape("spectral_norm_estimate", "start", start, ("*", I))
    vectors = {"input_mask": input_mask, "output_mask": output_mask, "start": start}
    leading = {name: None if t is None else t.shape[:-1] for name, t in vectors.items()}
    check_leading("spectral_norm_estimate", weight=weight.shape[:-2], **leading)
    if iterations < 0:
        raise ValueError(f"spectral_norm_estimate: iterations must be 0 or more, got {iterations}")
    sigma, _, right = torch.ops.lipfast.spectral_norm_estimate(weight, input_mask, output_mask, start, iterations)
    return sigma, right.detach().to(weight.dtype)


def reference(
    weight: Tensor,
    input_mask: Tensor | None = None,
    output_mask: Tensor | None = None,
    start: Tensor | None = None,
    iterations: int = 10,
) -> tuple[Tensor, Tensor, Tensor]:
    """sigma in the weight's dtype; left and right in that of the sums."""
    wide = weight.to(accumulator(weight.dtype))
    input_mask, output_mask = (None if mask is None else mask.to(wide.dtype) for mask in (input_mask, output_mask))
    lead = _leading(weight, input_mask, output_mask, start)
    with torch.no_grad():
        spare_left, spare_right = (
            _split(_masked(_random(n, wide), mask))[1]
            for n, mask in ((wide.shape[-2], output_mask), (wide.shape[-1], input_mask))
        )
        right = torch.zeros_like(spare_right) if start is None else _masked(start.to(wide.dtype), input_mask)
        right = _unit(right.where(right.isfinite().all(-1, keepdim=True), 0.0), spare_right)
        right = right.expand(*lead, -1).contiguous()
        for _ in range(iterations):
            left = _unit(_masked(_product(wide, right), output_mask), spare_left)
            right = _unit(_masked(_product(wide.mT, left), input_mask), spare_right)
    sigma, left = _split(_masked(_product(wide, right), output_mask))
    return sigma.squeeze(-1).to(weight.dtype), left.detach().contiguous(), right.contiguous()


def fake(weight, input_mask=None, output_mask=None, start=None, iterations=10):
    lead = _leading(weight, input_mask, output_mask, start)
    left, right = (weight.new_empty(*lead, n, dtype=accumulator(weight.dtype)) for n in weight.shape[-2:])
    return weight.new_empty(lead), left, right


def save(ctx, inputs, output):
    ctx.weight = inputs[0].shape, inputs[0].dtype
    _, left, right = output
    ctx.save_for_backward(left, right)
    ctx.mark_non_differentiable(left, right)


def backward(ctx, grad, _left, _right):
    left, right = ctx.saved_tensors
    shape, dtype = ctx.weight
    left = grad[..., None].to(left.dtype) * left
    if len(shape) == 2:
        product = _rows(left).mT @ _rows(right)
    else:
        product = (left[..., None] * right[..., None, :]).sum_to_size(shape)
    return product.to(dtype), None, None, None, None


def _leading(weight: Tensor, *vectors: Tensor | None) -> torch.Size:
    return torch.broadcast_shapes(weight.shape[:-2], *(v.shape[:-1] for v in vectors if v is not None))


def _masked(vector: Tensor, mask: Tensor | None) -> Tensor:
    return vector if mask is None else vector * mask  # a product, so that a NaN stays one


def _product(weight: Tensor, vector: Tensor) -> Tensor:  # (*, O, I), (*, I) -> (*, O)
    if weight.ndim == 2:
        return F.linear(vector, weight)  # one product for all samples
    return (weight @ vector[..., None]).squeeze(-1)


def _split(vector: Tensor) -> tuple[Tensor, Tensor]:  # (*, N) -> (*, 1), (*, N)
    """Length and direction; the direction of zero is zero."""
    if vector.shape[-1] == 0:
        return vector.sum(-1, keepdim=True), vector
    if vector.device.type != "cpu":  # to look at a length would wait for the device
        return _scaled_split(vector)
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    sure = (length > _SURE[0]) & (length < _SURE[1])  # NaN is not
    plain = length, vector / length
    if sure.all():
        return plain
    length, direction = (torch.where(sure, *both) for both in zip(plain, _scaled_split(vector), strict=True))
    return length, direction


def _scaled_split(vector: Tensor) -> tuple[Tensor, Tensor]:
    largest = vector.detach().abs().amax(-1, keepdim=True)
    scale = largest.where((largest > 0) & (largest < torch.inf), 1.0)
    length = torch.linalg.vector_norm(vector / scale, dim=-1, keepdim=True)
    return scale * length, vector / scale / length.where(length != 0, 1.0)


def _unit(vector: Tensor, spare: Tensor) -> Tensor:
    length, direction = _split(vector)
    if vector.device.type == "cpu" and length.all():
        return direction
    return torch.where(length == 0, spare, direction)


def _random(n: int, like: Tensor) -> Tensor:  # (n,)
    """Numbers in (-1, 1), never 0: the same on every device and in every dtype, made without a copy from the host."""
    bits = torch.arange(1, n + 1, device=like.device)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x31848BAB), (14, 0x2C1B3C6D)):
        bits = (((bits >> shift) ^ bits) * factor) & 0xFFFFFFFF
    return ((bits >> 8) | 1).to(like.dtype) * 2.0**-23 - 1


def _rows(t: Tensor) -> Tensor:
    return t.flatten(0, -2) if t.ndim > 1 else t[None]


_op = torch.library.custom_op("lipfast::spectral_norm_estimate", reference, mutates_args=())
_op.register_fake(fake)
_op.register_autograd(backward, setup_context=save)
