"""How far the differences of logits can move while the last hidden value moves within a ball and a box.

For r = w_k - w_label the problem  max r.d  over  ||d|| <= rho,  low <= d <= high  (low <= 0 <= high) has the dual

    U(lambda) = lambda rho^2/2 + sum_i (r_i d_i - lambda d_i^2/2),      d_i = clip(r_i/lambda, low_i, high_i),

an upper bound for every lambda > 0. The minimising lambda makes d as long as rho, and

    lambda  <-  || r_i of the d_i not clipped || / sqrt(rho^2 - || clipped d ||^2)

reaches it in a few steps, since an entry once clipped stays so. One problem per sample and class (the box translation of Lee
et al. 2020, https://arxiv.org/abs/2006.09699, section 4, on the label's column only).
"""

import torch
from torch import Tensor

_STEPS = 8
_CHUNK = 2**22  # numbers of a (B, k, I) block


def largest_increment(
    weight: Tensor,  # (K, I)
    label: Tensor,  # (B,)
    low: Tensor,  # (B, I)
    high: Tensor,  # (B, I)
    radius: Tensor,  # (B,)
    outward: bool = False,
) -> Tensor:  # (B, K)
    """Upper bounds of (w_k - w_label).d over the intersections; with ``outward``, in float64, rounding included."""
    if outward:
        return _forward(weight, label, low, high, radius, outward)[0]
    return _LargestIncrement.apply(weight, label, low, high, radius)


class _LargestIncrement(torch.autograd.Function):
    """Keeps lambda instead of the (B, K, I) increments, which it computes again block by block."""

    @staticmethod
    def forward(ctx, weight, label, low, high, radius):
        value, dual = _forward(weight, label, low, high, radius, False)
        ctx.save_for_backward(weight, label, low, high, radius, dual)
        return value

    @staticmethod
    def backward(ctx, grad):
        weight, label, low, high, radius, dual = ctx.saved_tensors
        grad_weight, grad_low, grad_high = torch.zeros_like(weight), torch.zeros_like(low), torch.zeros_like(high)
        for k in _chunks(weight, low):
            row, g, scale = _rows(weight, label, k), grad[:, k, None], dual[:, k, None]
            free = row / scale
            d = free.clamp(low[:, None], high[:, None])
            pull = row - scale * d  # of an end where d is clipped to it, else 0 up to rounding
            grad_low += (g * pull * (free < low[:, None])).sum(1)
            grad_high += (g * pull * (free > high[:, None])).sum(1)
            share = g * d
            grad_weight[k] += share.sum(0)
            grad_weight.index_add_(0, label, -share.sum(1))
        return grad_weight, None, grad_low, grad_high, (grad * dual).sum(1) * radius


def _chunks(weight: Tensor, low: Tensor) -> list[slice]:
    K = len(weight)
    step = max(1, _CHUNK // max(1, low.numel()))
    return [slice(start, min(start + step, K)) for start in range(0, K, step)]


def _rows(weight: Tensor, label: Tensor, k: slice) -> Tensor:  # (B, k, I)
    return weight[k] - weight[label][:, None]


def _forward(weight, label, low, high, radius, outward) -> tuple[Tensor, Tensor]:
    value, dual = [], []
    eps, tiny = torch.finfo(weight.dtype).eps, torch.finfo(weight.dtype).tiny ** 0.5
    rho = radius[:, None].clamp_min(tiny)  # (B, 1)
    low, high = low[:, None], high[:, None]
    for k in _chunks(weight, low):
        row = _rows(weight, label, k)
        scale = (row.norm(dim=-1) / rho).clamp_min(tiny)  # (B, k)
        least = (scale * eps).clamp_min(tiny)  # where the ball contains the box
        for _ in range(_STEPS):
            free = row / scale[..., None]
            square = free.clamp(low, high).square_()
            held = torch.where((free < low) | (free > high), square, 0).sum(-1)
            rest = (rho * rho - held).clamp_min(0).sqrt()
            better = scale * (square.sum(-1) - held).clamp_min(0).sqrt() / rest
            scale = torch.where(rest > 0, torch.maximum(better, least), scale)
        d = (row / scale[..., None]).clamp(low, high)
        bought = scale[..., None] * d * d / 2
        bound = scale * rho * rho / 2 + (row * d - bought).sum(-1)
        if outward:  # every term rounds a few times, then the sum of I terms
            size = scale * rho * rho / 2 + ((row * d).abs() + bought).sum(-1)
            bound = bound + (weight.shape[1] + 16) * eps * size + tiny * tiny
        value.append(bound)
        dual.append(scale)
    return torch.cat(value, 1), torch.cat(dual, 1)
