"""GradAlign (Andriushchenko and Flammarion 2020, https://arxiv.org/abs/2007.02617): training on single gradient steps stays
useful as long as the loss is close to linear over the ball, that is, as long as its gradients point one way there."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipfast.losses.interval import batch_means


def gradient_alignment(
    model: nn.Module,
    x: Tensor,  # (B, ...)
    label: Tensor,  # (B,)
    eps: float,
    generator: torch.Generator | None = None,
) -> Tensor:  # ()
    """How far the gradient of the cross entropy turns within the l_inf ball: from 0, not at all, to 2, round to its opposite.

        1 - mean cos(g(x), g(x + eta)),    g = grad_x CE(f(x), y),    eta ~ U(-eps, eps) per pixel

    ``g(x)`` is held constant, as in the authors' code; through ``g(x + eta)`` the parameters get a gradient of second order.
    Samples where one of the two gradients is zero, or shorter than 1e-19 (float32) or 1e-154 (float64), so that its square
    underflows, have no direction: they are left out of the mean, which is 0 where none is left. The mean is that of the whole
    batch under ``torch.distributed`` too.

    Args:
        model: from a batch like ``x`` to logits (B, K). It runs twice, in its own mode: batch norm in training mode updates its
            statistics twice, dropout drops other units. Its operations must have second derivatives; those of
            :func:`torch.compile` have none.
        x: float32 or float64. ``x + eta`` is not clipped to the pixels.
        label: int64 class indices.
        eps: at least 0 and finite.
        generator: of eta, on the device of ``x``.

    Autocast is left: gradients of confident samples underflow in half types.
    Raises: ValueError for a half type, or ``eps`` out of range.

    >>> x, label = torch.rand(3, 4), torch.tensor([0, 1, 0])
    >>> gradient_alignment(nn.Linear(4, 2), x, label, 0.1).item() < 1e-12  # of two classes: one direction everywhere
    True
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"gradient_alignment: x must be a float32 or float64 tensor, got {x.dtype}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"gradient_alignment: eps must be at least 0 and finite, got {eps}")
    with torch.autocast(x.device.type, enabled=False):
        at_x = _gradient(model, x, label, keep_graph=False)
        shift = eps * (2 * torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator) - 1)
        nearby = _gradient(model, x + shift, label, keep_graph=True)
        least = torch.finfo(x.dtype).tiny ** 0.5
        counted = ~((at_x.norm(dim=1) <= least) | (nearby.norm(dim=1) <= least)).detach()  # NaN counts
        one = torch.ones_like(at_x)  # where a direction can be taken without a division by 0
        first, second = (F.normalize(g.where(counted[:, None], one), eps=0) for g in (at_x, nearby))
        # Half the squared distance of two unit vectors is 1 - cos without its cancellation.
        turned = (first - second).square().sum(1) / 2
        total, count = batch_means(turned.where(counted, 0), counted.to(x.dtype))
        return total / count.clamp_min(torch.finfo(x.dtype).tiny)


def _gradient(model: nn.Module, x: Tensor, label: Tensor, keep_graph: bool) -> Tensor:  # (B, ...)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = F.cross_entropy(model(x), label, reduction="sum")  # a mean would bring small gradients closer to underflow
        (gradient,) = torch.autograd.grad(loss, x, create_graph=keep_graph)
    return gradient.flatten(1)
