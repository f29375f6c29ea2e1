"""Objectives made of Lipschitz constants: GloRo and Local-Lip.

Both know a (K+1)-th class, "not certified", whose logit b is the largest that another class can reach on the ball. The cross
entropy over the K+1 classes splits,

    log(sum_i exp z_i + exp b) - z_y = CE(z, y) + softplus(b - log sum_i exp z_i),

into that of the image and a term that weighs the certificate alone. The second is also the divergence
KL((softmax(z), 0) || softmax(z, b)), so GloRo's TRADES form is the same sum with another weight.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast.losses.interval import interval
from lipfast.nn import ClippedMaxMin, ClippedReLU
from lipfast.ops.max_min import max_min

FORMS = ("B", "G")  # of :func:`local_lipschitz`


def gloro(
    logits: Tensor,  # (B, K)
    lipschitz: Tensor,  # (K, K) or (B, K, K)
    label: Tensor,  # (B,)
    eps: float,
    trades: float = 1.0,
) -> Tensor:  # ()
    """Cross entropy of the image and of being certified there (Leino et al. 2021, https://arxiv.org/abs/2102.08452).

        CE(z, y) + trades softplus(b - log sum_i exp z_i),    b = max_{i != j} z_i + eps lipschitz[j, i],    j = argmax z

    With ``trades`` 1 the cross entropy over z and b; with another weight the paper's TRADES form.

    Args:
        lipschitz: constants of the logits' differences, from :func:`lipfast.bounds.lipschitz`, or one matrix per image from
            :func:`lipfast.bounds.local_lipschitz`.
        eps: radius, in the norm and units of ``lipschitz``.
        trades: lambda of the paper.

    Raises: ValueError if ``lipschitz`` has another shape, or ``eps`` or ``trades`` is negative or NaN.

    >>> logits, label = torch.tensor([[2.0, 1.0]]), torch.tensor([0])
    >>> torch.testing.assert_close(
    ...     gloro(logits, torch.ones(2, 2), label, 0.5), F.cross_entropy(torch.tensor([[2.0, 1.0, 1.5]]), label)
    ... )
    """
    B, K = logits.shape
    if lipschitz.shape not in ((K, K), (B, K, K)):
        raise ValueError(f"gloro: lipschitz must be {(K, K)} or {(B, K, K)}, got {tuple(lipschitz.shape)}")
    for name, value in (("eps", eps), ("trades", trades)):
        if not value >= 0:
            raise ValueError(f"gloro: {name} must be at least 0, got {value}")
    predicted = logits.argmax(1)
    rows = lipschitz[predicted] if lipschitz.ndim == 2 else lipschitz[torch.arange(B, device=logits.device), predicted]
    return F.cross_entropy(logits, label) + trades * _uncertified(logits, logits + eps * rows, predicted)


def local_lipschitz(
    margin: Tensor,  # (B, K)
    label: Tensor,  # (B,)
    logits: Tensor,  # (B, K)
    kappa: float = 0.0,
    form: str = "B",
) -> Tensor:  # ()
    """Cross entropy of the worst case over an l2 ball, mixed with that of the image (Huang et al. 2021,
    https://arxiv.org/abs/2111.01395, section 4.2).

        B    kappa CE(z, y) + (1 - kappa) CE(worst, y),                   worst_i = z_y - margin_i
        G    kappa CE(z, y) + (1 - kappa) CE((z, max_{i != y} worst_i), y)

    B bounds the cross entropy of every point of the ball; G asks only for a certificate, and its paper takes kappa 0.

    Args:
        margin: lower bounds of z_y - z_i over the ball, 0 at the label, as ``Local.margin`` of :func:`lipfast.bounds.local`.
        logits: of the image.
        kappa: from 0 to 1.

    Raises: ValueError if ``kappa`` is not in [0, 1], ``form`` is unknown or the logits have another shape than the margins.
    """
    if form not in FORMS:
        raise ValueError(f"local_lipschitz: form must be one of {', '.join(FORMS)}, got {form!r}")
    if not 0 <= kappa <= 1:
        raise ValueError(f"local_lipschitz: kappa must be from 0 to 1, got {kappa}")
    if logits.shape != margin.shape:
        raise ValueError(f"local_lipschitz: logits must be {tuple(margin.shape)} as margin, got {tuple(logits.shape)}")
    if form == "B":
        return interval(margin, label, logits, kappa)
    worst = logits.gather(1, label[:, None]) - margin
    return F.cross_entropy(logits, label) + (1 - kappa) * _uncertified(logits, worst, label)


def sparsity(
    layers: Iterable[tuple[Tensor, Tensor, ClippedReLU | ClippedMaxMin]],
    balance: float = 0.1,
) -> Tensor:  # ()
    """Penalty on units that vary over the ball, for how far they are from a threshold (Huang et al. 2021, in its code).

        clipped ReLU      E relu(upper) + balance E relu(threshold - lower)
        clipped MaxMin    E relu(threshold_upper - l) + E relu(u - threshold_lower)

    summed over the layers, E the mean over batch and units, l and u the ends of the larger's and the smaller's box.

    Args:
        layers: for each activation the box (lower, upper), (B, ...), before it, and its module.
        balance: how much the upper threshold of a clipped ReLU counts.

    Raises: ValueError for another module.
    """
    total = torch.zeros(())
    for lower, upper, module in layers:
        if isinstance(module, ClippedReLU):
            penalty = F.relu(upper).mean() + balance * F.relu(module.threshold - lower).mean()
        elif isinstance(module, ClippedMaxMin):
            larger, _ = max_min(lower).chunk(2, 1)
            _, smaller = max_min(upper).chunk(2, 1)
            penalty = F.relu(module.upper - larger).mean() + F.relu(smaller - module.lower).mean()
        else:
            raise ValueError(f"sparsity: layers must be of ClippedReLU or ClippedMaxMin, got {type(module).__name__}")
        total = total.to(penalty) + penalty
    return total


def _uncertified(logits: Tensor, worst: Tensor, but: Tensor) -> Tensor:  # (B, K), (B, K), (B,) -> ()
    """softplus(b - log sum exp z), b the largest of ``worst`` but for one class per image."""
    bottom = worst.scatter(1, but[:, None], -torch.inf).amax(1)
    return F.softplus(bottom - logits.logsumexp(1)).mean()
