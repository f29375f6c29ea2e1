"""Attacks: :func:`pgd` looks for points of the ball that a certificate says do not exist, :func:`fgsm` makes points to train
on."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipfast import rounding


def pgd(
    model: nn.Module,
    x: Tensor,  # (B, ...)
    label: Tensor,  # (B,)
    eps: float | Tensor,  # () or (B,)
    p: float = math.inf,
    steps: int = 40,
    restarts: int = 1,
    step_size: float | Tensor | None = None,
    pixel_range: tuple[float, float] | None = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:  # (B, ...)
    """Points of the l_p balls around ``x`` with a large margin loss, ``max(logits[j], j != label) - logits[label]``: projected
    gradient descent (Madry et al. 2018, https://arxiv.org/abs/1706.06083).

    Of all points visited, ``x`` among them, each sample keeps its worst; NaN logits count as the worst of all.

    Args:
        model: from a batch like ``x`` to logits (B, K). Its mode is left as it is: call ``eval()`` before, since dropout
            and batch statistics make a different function of every call. Its parameters receive no gradient.
        x: pixels within ``pixel_range``, float32 or float64 (a half type cannot resolve a small ball).
        label: int64 class indices.
        eps: radius of the ball, in the units of ``x``; one number, or one per sample, such as its certified radius.
        p: 2 or inf.
        steps: gradient steps of each start, at least 0.
        restarts: starts, at least 1: the first from ``x``, the others uniformly from the ball.
        step_size: l_p length of the first step, 10 eps/steps by default; the steps shrink linearly to nothing.
        pixel_range: least and greatest value of a pixel; None for any.
        generator: of the random starts, on the device of ``x``; with the same state the result is the same.

    Returns:
        Points within ``eps`` of ``x``, but for the rounding of float64 arithmetic: what float32 rounds is taken off the
        radius beforehand. eps 0 returns ``x``.

    Raises: ValueError for another ``p`` or dtype, ``x`` outside of ``pixel_range`` or a negative ``eps``.

    >>> model = nn.Linear(2, 2)
    >>> model.weight.data = torch.eye(2)
    >>> pgd(model, torch.tensor([[0.5, 0.5]]), torch.tensor([0]), 0.25)
    tensor([[0.2500, 0.7500]])
    """
    _check("pgd", x, p)
    if steps < 0 or restarts < 1:
        raise ValueError(f"pgd: steps must be at least 0 and restarts at least 1, got {steps} and {restarts}")
    # Clipping a pixel that lies outside would carry it out of the ball.
    if pixel_range is not None and not ((x >= pixel_range[0]) & (x <= pixel_range[1])).all():
        raise ValueError(f"pgd: x must lie in pixel_range {pixel_range}, got [{x.min().item()}, {x.max().item()}]")
    x, column = x.detach(), _column(x)
    radius = torch.as_tensor(eps, dtype=torch.float64, device=x.device)
    if radius.ndim > 1 or (radius.ndim and len(radius) != len(x)) or not (radius >= 0).all():
        raise ValueError(f"pgd: eps must not be negative and one number or one per sample, got {eps}")
    radius = radius.expand(len(x)).reshape(column)
    size = 10 * radius / max(steps, 1) if step_size is None else torch.as_tensor(step_size).to(radius).reshape(column)
    best, worst_margin = x.clone(), x.new_full((len(x),), -math.inf)
    for restart in range(restarts):
        point = x
        if restart:
            point = _into_ball(x, radius * _random_shift(x.double(), p, generator), radius, p, pixel_range)
        for step in range(steps + 1):
            margin, gradient = _margin_and_gradient(model, point, label)
            worse = margin > worst_margin
            best = torch.where(worse.reshape(column), point, best)
            worst_margin = torch.where(worse, margin, worst_margin)
            if step < steps:
                shift = point.double() - x.double() + size * (1 - step / steps) * _direction(gradient.double(), p)
                point = _into_ball(x, shift, radius, p, pixel_range)
    return best


def fgsm(
    model: nn.Module,
    x: Tensor,  # (B, ...)
    label: Tensor,  # (B,)
    eps: float | Tensor,  # () or (B,)
    p: float = math.inf,
    step_size: float | Tensor | None = None,
    pixel_range: tuple[float, float] | None = (0.0, 1.0),
    start: str = "random",
    generator: torch.Generator | None = None,
) -> Tensor:  # (B, ...)
    """One gradient step of the cross entropy from a random point of the l_p ball around ``x``: images to train on, at the price
    of one forward and backward pass. Fast gradient sign method with a random start (Wong et al. 2020,
    https://arxiv.org/abs/2001.03994); with p = 2 the step is along the gradient.

    To break certificates take :func:`pgd`, which is stronger and exact about the ball.

    Args:
        model: from a batch like ``x`` to logits (B, K). Its mode is left as it is; Wong et al. and their followers attack in
            eval mode and train on the result in training mode. Its parameters receive no gradient.
        x: pixels within ``pixel_range``, float32 or float64. That they are is not checked: it would wait for the device.
        label: int64 class indices.
        eps: radius of the ball, in the units of ``x``; one number, or one per sample.
        p: 2 or inf.
        step_size: l_p length of the step, 1.25 eps by default; the result is projected on the ball. One number, or one per
            sample.
        pixel_range: least and greatest value of a pixel, of the random start too; None for any.
        start: "random", uniform in the ball, or "zero", at ``x``: there with step_size eps the FGSM of Goodfellow et al. 2015.
        generator: of the random start, on the device of ``x``.

    Returns:
        Points within ``eps`` of ``x``, but for rounding in the dtype of ``x``. NaN gradients count as 0.

    Raises: ValueError for another ``p``, dtype or ``start``, a negative number, or tensors that are not one number per sample.

    >>> model = nn.Linear(2, 2)
    >>> model.weight.data = torch.eye(2)
    >>> fgsm(model, torch.tensor([[0.5, 0.5]]), torch.tensor([0]), 0.25, start="zero")
    tensor([[0.2500, 0.7500]])
    """
    _check("fgsm", x, p)
    if start not in ("random", "zero"):
        raise ValueError(f"fgsm: start must be random or zero, got {start!r}")
    radius = _numbers("eps", eps, x)
    size = 1.25 * radius if step_size is None else _numbers("step_size", step_size, x)
    clipped = lambda point: point if pixel_range is None else point.clamp(*pixel_range)
    x = x.detach()
    point = clipped(x + radius * _random_shift(x, p, generator)) if start == "random" else x
    with torch.enable_grad():
        leaf = point.detach().requires_grad_()
        # A mean over the batch would divide gradients that may be close to underflow.
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), label, reduction="sum"), leaf)
    point = point + size * _direction(gradient, p)
    if p == math.inf:
        return clipped(torch.minimum(torch.maximum(point, x - radius), x + radius))
    shift = point - x
    return clipped(x + shift * (radius / _length(shift).clamp(min=torch.finfo(x.dtype).tiny)).clamp(max=1))


def _check(attack: str, x: Tensor, p: float) -> None:
    if p not in (2, math.inf):
        raise ValueError(f"{attack}: p must be 2 or inf, got {p!r}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{attack}: x must be a float32 or float64 tensor, got {x.dtype}")


def _numbers(name: str, value: float | Tensor, x: Tensor) -> float | Tensor:
    """One number as it is, one per sample as a column."""
    if isinstance(value, Tensor) and value.ndim and value.shape != x.shape[:1]:
        raise ValueError(f"fgsm: {name} must be one number or one per sample, got {tuple(value.shape)}")
    on_device = isinstance(value, Tensor) and value.is_cuda  # a look there would wait for it
    if not (on_device or (torch.as_tensor(value) >= 0).all()):
        raise ValueError(f"fgsm: {name} must not be negative, got {value}")
    return value.to(x).reshape(_column(x)) if isinstance(value, Tensor) and value.ndim else value


def _column(x: Tensor) -> tuple[int, ...]:
    return (-1, *[1] * (x.ndim - 1))


def _margin_and_gradient(model: nn.Module, point: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        point = point.detach().requires_grad_()
        logits = model(point)
        of_label = logits.gather(1, label[:, None])
        margin = logits.scatter(1, label[:, None], -math.inf).amax(1) - of_label.squeeze(1)
        (gradient,) = torch.autograd.grad(margin.sum(), point)
    return margin.detach().to(point.dtype).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf), gradient


def _direction(gradient: Tensor, p: float) -> Tensor:
    """The step of l_p length 1 that raises the loss most."""
    gradient = gradient.nan_to_num()
    if p == math.inf:
        return gradient.sign()
    return gradient / _length(gradient).clamp(min=torch.finfo(gradient.dtype).tiny)


def _length(t: Tensor) -> Tensor:  # (B, ...) -> (B, 1, ...)
    return t.flatten(1).norm(dim=1).reshape(_column(t))


def _random_shift(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """Uniform in the unit ball, of the shape and dtype of ``x``."""
    uniform = lambda shape: torch.rand(shape, generator=generator, dtype=x.dtype, device=x.device)
    if p == math.inf:
        return 2 * uniform(x.shape) - 1
    normal = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return uniform((len(x), *_column(x)[1:])) ** (1 / max(x[0].numel(), 1)) * _direction(normal, p)


def _into_ball(x: Tensor, shift: Tensor, radius: Tensor, p: float, pixel_range: tuple[float, float] | None) -> Tensor:
    """x + shift projected on the ball and clipped to the pixels, in the dtype of ``x``; shift and radius are float64."""
    if p == math.inf:
        # Rounding inward keeps every pixel in the ball.
        least, greatest = rounding.up(x.double() - radius, x.dtype), rounding.down(x.double() + radius, x.dtype)
        point = torch.minimum(torch.maximum((x.double() + shift).to(x.dtype), least), greatest)
    else:
        # Rounding to nearest moves x + shift by at most eps/2 of its length, and |x + shift| <= |x| + radius.
        room = (radius - torch.finfo(x.dtype).eps * (_length(x.double()) + radius)).clamp(min=0)
        length = _length(shift)
        point = (x.double() + shift * torch.where(length > room, room / length, 1.0)).to(x.dtype)
    return point if pixel_range is None else point.clamp(*pixel_range)
