"""ReLU with a threshold per unit: min(max(x, 0), threshold), also written ReLU-theta.

Both ends of its range are constant, so a certificate can drop the units that stay there (Huang et al. 2021,
https://arxiv.org/abs/2111.01395, section 4). 1-Lipschitz in x and in the threshold.

The operator is a composition of torch's own (torch.compile fuses it with its neighbours), so this file needs no fake; its
derivative is :mod:`lipfast.ops._clip`'s, and ``reference`` the definition.
"""

import torch
from torch import Tensor

from lipfast.ops._arguments import check_alike, check_broadcasts
from lipfast.ops._clip import clip


def clipped_relu(
    x: Tensor,  # (*,)
    threshold: Tensor,  # broadcasts to x: (), or the shape of a sample, one number per unit
) -> Tensor:  # (*,)
    """``min(max(x, 0), threshold)``, elementwise.

    Args:
        x: of any shape.
        threshold: any shape that broadcasts to that of ``x``. ``threshold >= 0`` is the caller's promise and is not
            checked (training projects onto it).

    Dtypes: float64, float32, bfloat16, float16, one for both; CPU and CUDA. NaN in either gives NaN.
    Raises: ValueError if a shape, dtype or device does not fit; the message names the argument.
    Gradient: to ``x`` where ``0 < x < threshold``, to ``threshold`` where ``x >= threshold``, else 0. The second
        derivatives are 0.

    >>> clipped_relu(torch.tensor([-1.0, 0.5, 3.0]), torch.tensor(2.0))
    tensor([0.0000, 0.5000, 2.0000])
    """
    check_alike("clipped_relu", x=x, threshold=threshold)
    check_broadcasts("clipped_relu", x, threshold=threshold)
    return _clipped(x, threshold)


def reference(x: Tensor, threshold: Tensor) -> Tensor:
    clipped = (x >= threshold) | threshold.isnan()  # a NaN of x passes through relu
    return torch.where(clipped, threshold, x.relu())


def _clipped(x: Tensor, threshold: Tensor) -> Tensor:
    return clip(x, threshold.new_zeros(()), threshold)


torch.library.define("lipfast::clipped_relu", torch.library.infer_schema(reference, mutates_args=()))
torch.library.impl("lipfast::clipped_relu", "CompositeImplicitAutograd", _clipped)
