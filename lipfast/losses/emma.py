"""EMMA, efficient margin maximisation (Hu et al. 2023, https://arxiv.org/abs/2301.12549, in its code; LipNeXt, Hu et al. 2026,
https://arxiv.org/abs/2601.18513, trains with it)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def emma(
    logits: Tensor,  # (B, K)
    lipschitz: Tensor,  # (K, K) or (B, K, K)
    label: Tensor,  # (B,)
    eps: float,
    least: float = 0.01,
) -> Tensor:  # ()
    """Cross entropy of logits that each class raises within a ball of its own.

        CE(w, y),    w_i = z_i + r_i eps lipschitz[y, i],    r_i = clip((z_y - z_i) / (eps lipschitz[y, i]), least, 1)

    r_i eps is the largest radius up to eps at which class i does not win yet: a class that is certified gets all of eps, one
    that is ahead of the label the part ``least``, and one between is raised to the label's own logit. r is held constant, so
    logits and constants get gradient as if the radii were given.

    Args:
        lipschitz: constants of the logits' differences, from :func:`lipfast.bounds.lipschitz`, or one matrix per image from
            :func:`lipfast.bounds.local_lipschitz`. Of unit rows w behind a 1-Lipschitz network: ||w_y - w_i||.
        eps: radius, in the norm and units of ``lipschitz``; recipes raise it over the epochs.
        least: from 0 to 1; with 1 every class gets all of eps, the margin loss of the authors' code.

    Raises: ValueError if ``logits`` are no (B, K), ``lipschitz`` has another shape, ``eps`` is negative, or one of the numbers
        NaN, Inf or out of its range.

    >>> logits, label = torch.tensor([[2.0, 1.0, 1.9]]), torch.tensor([0])
    >>> torch.testing.assert_close(
    ...     emma(logits, torch.ones(3, 3), label, 0.5), F.cross_entropy(torch.tensor([[2.0, 1.5, 2.0]]), label)
    ... )
    """
    if logits.ndim != 2:
        raise ValueError(f"emma: logits must be (B, K), got {tuple(logits.shape)}")
    B, K = logits.shape
    if lipschitz.shape not in ((K, K), (B, K, K)):
        raise ValueError(f"emma: lipschitz must be {(K, K)} or {(B, K, K)}, got {tuple(lipschitz.shape)}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"emma: eps must be at least 0 and finite, got {eps}")
    if not 0 <= least <= 1:
        raise ValueError(f"emma: least must be from 0 to 1, got {least}")
    rows = lipschitz[label] if lipschitz.ndim == 2 else lipschitz[torch.arange(B, device=logits.device), label]
    reach = (eps * rows).scatter(1, label[:, None], 0.0)  # (B, K)
    with torch.no_grad():
        margin = logits.gather(1, label[:, None]) - logits
        part = (margin / reach.clamp_min(torch.finfo(reach.dtype).tiny)).clamp(least, 1)
    return F.cross_entropy(logits + part * reach, label)
