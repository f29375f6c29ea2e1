"""The l_1 norm of a network's weights: it makes weights small, which makes units stable (Xiao et al. 2019,
https://arxiv.org/abs/1809.03008), and so cheap to set to zero afterwards (:func:`lipfast.grafting.prune`)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lipfast.rounding import accumulator


def l1(model: nn.Module) -> Tensor:  # ()
    """Sum of ``|w|`` over the weights of all linear and convolution layers, torch's classes and theirs.

    Biases, thresholds, slopes and intercepts are left out. A parametrised weight counts as it is computed. Half weights are
    summed in float32. The gradient at 0 is 0, so this alone brings no weight back from there.

    >>> model = nn.Sequential(nn.Linear(2, 1), nn.ReLU())
    >>> model[0].weight.data = torch.tensor([[1.0, -2.0]])
    >>> l1(model).item()
    3.0
    """
    weights = [module.weight for _, module in weighted(model)]
    norms = [torch.linalg.vector_norm(w, 1, dtype=accumulator(w.dtype)) for w in weights]
    return torch.stack(norms).sum() if norms else torch.zeros(())


def weighted(model: nn.Module) -> Iterator[tuple[str, nn.Linear | _ConvNd]]:
    """Name and module of every linear and convolution layer, one that is used twice once."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, _ConvNd)))
