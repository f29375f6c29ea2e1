"""Interval bound propagation: the worst case of Gowal et al. 2018 and the regularisers of Shi et al. 2021.

Under ``torch.distributed`` the statistics of :func:`tightness` and :func:`relu_balance` are those of the whole batch: each is
a ratio of means, and a mean of ratios would make the result depend on the number of processes.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Box = tuple[Tensor, Tensor]
_LEAST = 1e-12  # keeps quotients finite, and their squares normal numbers in float32


def interval(
    margin: Tensor,  # (B, K)
    label: Tensor,  # (B,)
    logits: Tensor | None = None,  # (B, K)
    kappa: float = 0.0,
) -> Tensor:  # ()
    """Cross entropy of the worst case that the bounds allow, mixed with that of the image itself.

        kappa CE(logits, y) + (1 - kappa) CE(worst, y),    worst_j = -margin_j

    (Gowal et al. 2018, https://arxiv.org/abs/1810.12715, eq. 12). With ``margin_j <= z_y - z_j`` over the ball, 0 at the
    label, ``worst`` is an upper bound of every ``z_j - z_y`` at once, so the second term bounds the cross entropy of every
    point of the ball from above (softmax ignores a common shift).

    Args:
        margin: from :func:`lipfast.bounds.interval_margin`.
        logits: of the image; needed where ``kappa > 0``.
        kappa: from 0, worst case only, to 1, image only.

    Raises: ValueError if ``kappa`` is not in [0, 1], or the logits are missing or of another shape.

    >>> interval(torch.tensor([[0.0, 0.0]]), torch.tensor([0])).item() == torch.tensor(2.0).log().item()
    True
    """
    if not 0 <= kappa <= 1:
        raise ValueError(f"interval: kappa must be from 0 to 1, got {kappa}")
    if kappa == 0:
        return F.cross_entropy(-margin, label)
    if logits is None or logits.shape != margin.shape:
        raise ValueError(f"interval: logits must be {tuple(margin.shape)} where kappa > 0, got {_shape(logits)}")
    natural = F.cross_entropy(logits, label)
    return natural if kappa == 1 else kappa * natural + (1 - kappa) * F.cross_entropy(-margin, label)


def tightness(layers: Iterable[Box], start: Box, tolerance: float = 0.5) -> Tensor:  # ()
    """Penalty on layers whose boxes are wider than the input's by more than ``1/tolerance``.

        1/(tau m) sum_i relu(tau - E[width_0]/E[width_i])

    over the m layers, E the mean over batch and units (L_tightness of Shi et al. 2021, https://arxiv.org/abs/2103.17268).

    Args:
        layers: boxes before each activation, as in ``Boxes.layers.values()``.
        start: the box of the input.
    """
    first, *widths = batch_means(start[1] - start[0], *(upper - lower for lower, upper in layers))
    penalties = [F.relu(tolerance - first / width.clamp_min(_LEAST)) for width in widths]
    return _average(penalties, first) / tolerance


def relu_balance(layers: Iterable[Box], tolerance: float = 0.5) -> Tensor:  # ()
    """Penalty on layers where units that are always active outweigh those that never are, or the reverse.

        1/(tau m) sum_i relu(tau - alpha_i) + relu(tau - beta_i)

    With centers c of the boxes, A the units with lower > 0 and I those with upper < 0 (L_relu of Shi et al. 2021):

        alpha = r(sum_A c, -sum_I c)    beta = r(sum_A (c - E c)^2, sum_I (c - E c)^2)    r(a, b) = min(a/b, b/a).

    Where A or I is empty r is 0: a constant, without gradient.
    """
    penalties = []
    like = torch.zeros(())
    for lower, upper in layers:
        center = like = (lower + upper) / 2
        active, inactive = lower > 0, upper < 0
        mean, on, off = batch_means(center, center * active, -center * inactive)
        square = (center - mean) ** 2
        spread_on, spread_off = batch_means(square * active, square * inactive)
        penalties.append(F.relu(tolerance - _ratio(on, off)) + F.relu(tolerance - _ratio(spread_on, spread_off)))
    return _average(penalties, like) / tolerance


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.minimum(a, b) / torch.maximum(a, b).clamp_min(_LEAST)


def _average(penalties: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(penalties).mean() if penalties else like.new_zeros(())


def batch_means(*values: Tensor) -> Tensor:
    """The mean of each, over all processes too: they hold equally many samples."""
    means = torch.stack([value.mean() for value in values])
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.nn.functional import all_reduce

        means = all_reduce(means) / dist.get_world_size()
    return means


def _shape(t: Tensor | None) -> object:
    return None if t is None else tuple(t.shape)
