"""Certified radius maximisation (CRM; Fazlyab et al. 2023, https://arxiv.org/abs/2310.00116)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FORMS = ("soft_min", "min")


def crm(
    logits: Tensor,  # (B, K)
    lipschitz: Tensor,  # (K, K)
    label: Tensor,  # (B,)
    weight: float,
    sharpness: float,
    radius_cap: float,
    form: str = "soft_min",
    misclassified: bool = False,
    boosted: bool = False,
) -> Tensor:  # ()
    """Cross entropy, and a pull on certified radii that are below a cap.

    With c the predicted class, R_j = (z_c - z_j) / lipschitz[c, j] and R = min_j R_j over j != c, an image's certified radius,

        CE(z, y) + weight 1/B sum (1/t) log sum_j exp(-t R_j)    form "soft_min"
        CE(z, y) + weight 1/B sum (1/t) exp(-t R)                form "min"

    the sums over the images with c = y and R < radius_cap, t the sharpness. The first form is minus a soft minimum of the R_j,
    which lies between R - log(K - 1)/t and R. Margins and constants get gradient; a radius does not change when both are
    scaled, so the pull never makes logits large. B counts all images of the batch. A radius that is not finite is left out:
    that of a pair whose constant is 0 or not finite.

    Args:
        lipschitz: constants of the logits' differences, as ``Liplt.pairwise`` of :func:`lipfast.bounds.liplt`; its units are
            those of the radii.
        weight: lambda of the paper, in logits per unit of radius.
        sharpness: t of the paper, per unit of radius.
        radius_cap: r_0 of the paper: images that are certified so far feel no pull.
        misclassified: take images with c != y too, as the authors' code can; then their wrong class is pulled for.
        boosted: the cross entropy is - log p_y - log(1 - max_{j != y} p_j), p the softmax (in the authors' code).

    Raises: ValueError if ``logits`` have fewer than two classes, ``lipschitz`` another shape than (K, K), ``form`` is unknown,
        ``weight`` negative, ``sharpness`` or ``radius_cap`` not positive, or one of them NaN or Inf.

    >>> logits, label = torch.tensor([[2.0, 1.0]]), torch.tensor([0])
    >>> torch.testing.assert_close(
    ...     crm(logits, 4 * torch.ones(2, 2), label, 3.0, 5.0, 1.0), F.cross_entropy(logits, label) - 3 * 0.25
    ... )
    """
    _check(logits, lipschitz, weight, sharpness, radius_cap, form)
    predicted = logits.argmax(1)
    margin, constants = logits.gather(1, predicted[:, None]) - logits, lipschitz[predicted]  # (B, K)
    with torch.no_grad():
        radii = margin / constants
        other = torch.arange(logits.shape[1], device=logits.device) != predicted[:, None]
        radii = radii.where(other & radii.isfinite() & constants.isfinite(), torch.inf)
        radius = radii.amin(1)
        pulled = radius < radius_cap
        if not misclassified:
            pulled &= predicted == label
        # A pair that adds nothing to the sum may have so small a constant that 0 times its derivative is NaN.
        near = pulled[:, None] & (sharpness * (radii - radius[:, None]) < -math.log(torch.finfo(radii.dtype).tiny))
    radii = (margin / constants.where(near, 1.0)).where(near, torch.inf)
    if form == "soft_min":
        penalty = (-sharpness * radii.where(pulled[:, None], 0.0)).logsumexp(1)
    else:
        penalty = (-sharpness * radii.amin(1)).exp()
    pull = penalty.where(pulled, 0.0).sum() / (sharpness * len(logits))
    return (_boosted(logits, label) if boosted else F.cross_entropy(logits, label)) + weight * pull


def _boosted(logits: Tensor, label: Tensor) -> Tensor:  # ()
    """Mean of - log p_y - log(1 - p_j), j the likeliest of the other classes."""
    second = logits.scatter(1, label[:, None], -torch.inf).argmax(1)
    rest = logits.scatter(1, second[:, None], -torch.inf).logsumexp(1)
    return F.cross_entropy(logits, label) + (logits.logsumexp(1) - rest).mean()


def _check(logits: Tensor, lipschitz: Tensor, weight: float, sharpness: float, radius_cap: float, form: str) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"crm: logits must be (B, K) of two classes or more, got {tuple(logits.shape)}")
    K = logits.shape[1]
    if lipschitz.shape != (K, K):
        raise ValueError(f"crm: lipschitz must be {(K, K)}, got {tuple(lipschitz.shape)}")
    if form not in FORMS:
        raise ValueError(f"crm: form must be one of {', '.join(FORMS)}, got {form!r}")
    if not 0 <= weight < math.inf:
        raise ValueError(f"crm: weight must be at least 0 and finite, got {weight}")
    for name, value in (("sharpness", sharpness), ("radius_cap", radius_cap)):
        if not 0 < value < math.inf:
            raise ValueError(f"crm: {name} must be positive and finite, got {value}")
