"""The radius within which a prediction cannot change.

If L_yj bounds the Lipschitz constant of z_y - z_j, no perturbation smaller than

    radius = min over j != y of (z_y - z_j) / L_yj,        y = argmax z,

lifts another class above y (Tsuzuki et al. 2018, https://arxiv.org/abs/1802.04034, proposition 1; Leino et al. 2021,
https://arxiv.org/abs/2102.08452, section 3). The radius is in the norm that the constants were taken in.

Rounding, with u = eps/2: the computed difference and quotient are at most (1 + u)^2 times the exact ones, so

    fl( fl( quotient (1 - 4 eps) ) - tiny )  <=  (1 + u)^4 (1 - 8u) exact  <  exact,

where tiny, the smallest normal number, outweighs any rounding among subnormal numbers. Overflow is cut to the largest
number, and a half type takes the result rounded down.
"""

import math

import torch
from torch import Tensor

from lipfast.ops._arguments import check_alike, check_shape
from lipfast.rounding import accumulator, down


def certified_radius(
    logits: Tensor,  # (*, K)
    lipschitz: Tensor,  # (), (K, K) or (*, K, K)
) -> tuple[Tensor, Tensor]:  # (*), (*)
    """Certified radius and predicted class of every sample.

    Args:
        logits: the network's outputs at the clean inputs, K >= 2 classes.
        lipschitz: upper bounds of the Lipschitz constants of ``z_y - z_j`` at ``[y, j]``: one for every pair, a matrix, or a
            matrix per sample. Only row y counts, without its diagonal entry.

    Returns:
        ``(radius, prediction)``; prediction is int64, as of :func:`torch.argmax`: the first of equal maxima; a NaN counts
        as the largest.

    Dtypes: float64, float32, and bfloat16/float16 computed in float32; CPU and CUDA.
    Raises: ValueError if a shape, dtype or device does not fit; the message names the argument.
    Soundness: a bound: never above the quotient of the numbers handed over. What rounding did to the logits, or to
        constants that were narrowed to nearest, is the caller's (:func:`lipfast.rounding.up` narrows soundly).
        The radius is 0 at a tie, where a logit is not finite, and where a constant that counts is negative, NaN or Inf.
        A constant 0 says that class j never gains on y: with a positive margin it sets no limit. A radius is always
        finite; the dtype's largest number stands for no limit.
    Gradient: to both arguments, through the class that attains the minimum, the first if several do; 0 where the radius is.

    >>> certified_radius(torch.tensor([[3., 1., 2.]]), torch.tensor(2.))
    (tensor([0.5000]), tensor([0]))
    """
    check_alike("certified_radius", logits=logits, lipschitz=lipschitz)
    check_shape("certified_radius", "logits", logits, ("*", "K"))
    K = logits.shape[-1]
    if K < 2:
        raise ValueError(f"certified_radius: logits must be (*, K) with K at least 2, got {tuple(logits.shape)}")
    if tuple(lipschitz.shape) not in ((), (K, K), (*logits.shape, K)):
        expected = f"(), ({K}, {K}) or {(*logits.shape, K)}"
        raise ValueError(f"certified_radius: lipschitz must be {expected}, got {tuple(lipschitz.shape)}")
    return torch.ops.lipfast.certified_radius(logits, lipschitz)


def reference(logits: Tensor, lipschitz: Tensor) -> tuple[Tensor, Tensor]:
    prediction = logits.argmax(-1)
    quotient = _quotients(logits, lipschitz, prediction)[0].min(-1).values
    limits = torch.finfo(quotient.dtype)
    radius = (quotient * (1 - 4 * limits.eps) - limits.tiny).clamp(min=0)
    return radius if radius.dtype == logits.dtype else down(radius, logits.dtype), prediction


def fake(logits, lipschitz):
    radius = logits.new_empty(logits.shape[:-1])
    return radius, torch.empty_like(radius, dtype=torch.int64)


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def backward(ctx, grad_radius, _):
    logits, lipschitz, radius, prediction = ctx.saved_tensors
    closest = torch.ops.lipfast.certified_radius_closest(logits.detach(), lipschitz.detach())
    top, runner, K = prediction[..., None], closest[..., None], logits.shape[-1]  # (*, 1)
    wide, limits = accumulator(logits.dtype), torch.finfo(accumulator(logits.dtype))
    margin = (logits.gather(-1, top).to(wide) - logits.gather(-1, runner).to(wide)).clamp(max=limits.max)
    constant = _entry(lipschitz, top, runner).to(wide)
    live = (radius[..., None] > 0) & (constant > 0) & (margin / constant < limits.max)
    margin, constant = margin.where(live, 0.0), constant.where(live, 1.0)
    flow = torch.where(live, grad_radius[..., None] / constant, 0.0)
    entries, share = torch.cat((top, runner), -1), -flow * (margin / constant)
    grad_logits = _spread(torch.cat((flow, -flow), -1).to(logits.dtype), entries, K)
    return grad_logits, _to_constants(share, top * K + runner, lipschitz, K).to(logits.dtype)


def closest_reference(logits: Tensor, lipschitz: Tensor) -> Tensor:  # (*)
    """The class that attains the minimum, the first if several do."""
    return _quotients(logits, lipschitz, logits.argmax(-1))[0].argmin(-1)


def closest_fake(logits, lipschitz):
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64)


def _quotients(logits: Tensor, lipschitz: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:  # (*, K), (*, K)
    """Margins over constants, and the constants; 0 where nothing is certified, inf for the predicted class itself."""
    z, constant = logits.to(accumulator(logits.dtype)), _row(lipschitz, prediction).to(accumulator(logits.dtype))
    constant = constant.expand(z.shape)
    largest, top = torch.finfo(z.dtype).max, prediction[..., None]
    margin = (z.gather(-1, top) - z).clamp(max=largest)
    quotient = (margin / constant.where(constant > 0, 1.0)).clamp(max=largest)
    sound = (margin > 0) & (constant >= 0) & constant.isfinite() & z.isfinite().all(-1, keepdim=True)
    quotient = quotient.where(constant != 0, largest).where(sound, 0.0)
    return quotient.scatter(-1, top, torch.inf), constant


def _row(lipschitz: Tensor, prediction: Tensor) -> Tensor:  # () or (*, K)
    if lipschitz.ndim == 0:
        return lipschitz
    if lipschitz.ndim == 2:
        return lipschitz.index_select(0, prediction.flatten()).view(*prediction.shape, lipschitz.shape[1])
    return lipschitz.gather(-2, prediction[..., None, None].expand(*prediction.shape, 1, lipschitz.shape[-1])).squeeze(-2)


def _entry(lipschitz: Tensor, top: Tensor, runner: Tensor) -> Tensor:  # () or (*, 1)
    if lipschitz.ndim < 3:
        return lipschitz if lipschitz.ndim == 0 else lipschitz[top, runner]
    return lipschitz.flatten(-2).gather(-1, top * lipschitz.shape[-1] + runner)


def _to_constants(share: Tensor, entry: Tensor, lipschitz: Tensor, K: int) -> Tensor:
    """``share`` (*, 1) of every sample, added at ``entry`` (*, 1) of its matrix."""
    if lipschitz.ndim == 0:
        return share.sum()
    if lipschitz.ndim > 2:
        return _spread(share.to(lipschitz.dtype), entry, K * K).view(lipschitz.shape)
    # index_put sorts its entries on CUDA and so adds in one order; scatter_add would use atomics
    return share.new_zeros(K * K).index_put((entry.flatten(),), share.flatten(), accumulate=True).view(K, K)


def _spread(values: Tensor, entries: Tensor, size: int) -> Tensor:  # (*, size)
    """``values`` at ``entries``, which differ, and 0 elsewhere; for half types much faster on a CPU than scatter."""
    *lead, n = entries.shape
    B = math.prod(lead)
    places = entries.reshape(B, n) + size * torch.arange(B, device=entries.device)[:, None]
    return values.new_zeros(B * size).index_put_((places,), values.reshape(B, n)).view(*lead, size)


_op = torch.library.custom_op("lipfast::certified_radius", reference, mutates_args=())
_op.register_fake(fake)
_op.register_autograd(backward, setup_context=save)
_closest = torch.library.custom_op("lipfast::certified_radius_closest", closest_reference, mutates_args=())
_closest.register_fake(closest_fake)
