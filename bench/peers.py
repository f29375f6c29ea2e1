"""What a user would otherwise run instead of an op, on the same arguments.

Spectral norms: torch's SVD, the largest eigenvalue of the Gram matrix, power iterations in a few lines without the op's care
for scales and zeros. None of them is a bound.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Call

ACCURACY = 1e-3  # relative, between all of them; a bound may be above the norm by as much


def of(call: Call) -> dict[str, Callable[..., Tensor]]:
    """The peers of an op on this case by their names; each takes the op's tensors and options."""
    known = dict(_PEERS.get(call.name, {}))
    if call.options.get("stride", [1, 1]) != [1, 1]:
        known.pop("fft", None)
    if any(t is None for t in call.args):  # written for masks and a start
        known.pop("by hand", None)
    return known


def check(call: Call) -> None:
    """Never time a wrong peer: all agree with the op where they compute what it does."""
    for name, peer in of(call).items():
        if name != "fft":  # of the circular convolution, another operator
            (want,), (got,) = call.bind(call.op)(*call.args), call.bind(peer)(*call.args)
            got = got.to(want)
            assert ((got - want).abs() <= ACCURACY * want.abs()).all(), (call.name, name, got, want)


def _matrices(weight: Tensor, input_mask: Tensor | None, output_mask: Tensor | None) -> Tensor:
    weight = weight if output_mask is None else weight * output_mask[..., None]
    return weight if input_mask is None else weight * input_mask[..., None, :]


def _matrix_norm(weight: Tensor, input_mask: Tensor | None, output_mask: Tensor | None, iterations: int) -> Tensor:
    return torch.linalg.matrix_norm(_matrices(weight, input_mask, output_mask), ord=2)


def _gram_eigenvalue(weight: Tensor, input_mask: Tensor | None, output_mask: Tensor | None, iterations: int) -> Tensor:
    matrices = _matrices(weight, input_mask, output_mask)
    return torch.linalg.eigvalsh(matrices.mT @ matrices)[..., -1].sqrt()


def _power_iteration(weight: Tensor, input_mask: Tensor, output_mask: Tensor, start: Tensor, iterations: int) -> Tensor:
    v = F.normalize(start * input_mask, dim=-1)
    with torch.no_grad():
        for _ in range(iterations):
            u = F.normalize((v @ weight.mT) * output_mask, dim=-1)
            v = F.normalize((u @ weight) * input_mask, dim=-1)
        u = F.normalize((v @ weight.mT) * output_mask, dim=-1)
    return (u * (v @ weight.mT)).sum(-1)


def _convolution_power_iteration(
    weight: Tensor,
    input_mask: Tensor,
    output_mask: Tensor,
    start: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    iterations: int,
) -> Tensor:
    """As in Huang et al.'s code, with F.conv_transpose2d; every stride of the cases divides."""
    forth = lambda v: F.conv2d(v, weight, None, stride, padding, dilation, groups)
    back = lambda u: F.conv_transpose2d(u, weight, None, stride, padding, 0, groups, dilation)
    unit = lambda v: F.normalize(v.flatten(1), dim=1).view_as(v)
    v = unit(start * input_mask)
    with torch.no_grad():
        for _ in range(iterations):
            u = unit(forth(v) * output_mask)
            v = unit(back(u) * input_mask)
        u = unit(forth(v) * output_mask)
    return (u * forth(v)).sum((1, 2, 3))


def _circular(weight: Tensor, input_size: Sequence[int], **options) -> Tensor:
    """The norm of the circular convolution (Sedghi et al. 2019): the largest singular value over all frequencies."""
    symbols = torch.fft.fft2(weight, s=tuple(input_size)).permute(2, 3, 0, 1)
    return torch.linalg.svdvals(symbols).amax()


_PEERS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "spectral_norm_bound": {"svd": _matrix_norm, "eigvalsh": _gram_eigenvalue},
    "spectral_norm_estimate": {"by hand": _power_iteration},
    "conv2d_norm_bound": {"fft": _circular},
    "conv2d_norm_estimate": {"by hand": _convolution_power_iteration},
}
