"""What a user would otherwise run instead of an op, on the same arguments: torch's own, a few lines by hand, other libraries.

Spectral norms: torch's SVD, the largest eigenvalue of the Gram matrix, power iterations in a few lines without the op's care
for scales and zeros. None of them is a bound. Orthogonal matrices: torch's solver, exponential and SVD, the series of
orthogonium's Bjorck iteration and of deel-torchlip's. MaxMin: theirs, which pair neighbouring channels.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Call

ACCURACY = 1e-3  # relative, between all of them; a bound may be above the norm by as much
_FFT = "fft, circular"  # another operator, nearby


def of(call: Call) -> dict[str, Callable[..., Tensor]]:
    """The peers of an op on this case by their names; each takes the op's tensors and options."""
    known = {**_PEERS.get(call.name, {}), **_installed_peers(call)}
    if call.options.get("stride", [1, 1]) != [1, 1]:
        known.pop(_FFT, None)
    if any(t is None for t in call.args):  # written for masks and a start
        known.pop("by hand", None)
    if call.options.get("p", 2) != 2:
        known.pop("cdist", None)
    return known


def check(call: Call) -> None:
    """Never time a wrong peer: all agree with the op where they compute what it does."""
    for name, peer in of(call).items():
        if name == _FFT:
            continue
        (want,), (got,) = call.bind(call.op)(*call.args), call.bind(peer)(*call.args)
        if call.name == "max_min":  # other pairs of the same numbers
            want, got = (t.flatten().sort().values for t in (want, got))
        scale = want.abs() if "norm" in call.name else want.abs().amax()  # each norm by itself; matrices as a whole
        assert ((got.to(want) - want).abs() <= ACCURACY * scale).all(), (call.name, name, got, want)


def installed(package: str) -> Any | None:
    try:
        return importlib.import_module(package)
    except ImportError:
        return None


def _installed_peers(call: Call) -> dict[str, Callable[..., Tensor]]:
    peers: dict[str, Callable[..., Tensor]] = {}
    lip, ortho = installed("deel.torchlip.functional"), installed("orthogonium.layers.custom_activations")
    if call.name == "max_min":
        if lip:
            peers["deel-torchlip"] = lip.group_sort_2
        if ortho:
            peers["orthogonium"] = ortho.MaxMin()
    if call.name == "polar":
        matrix = call.args[0]
        if matrix.ndim == 2 and (norms := installed("deel.torchlip.normalizers")):
            peers["deel-torchlip"] = norms.bjorck_normalization
        if ortho and (maps := installed("orthogonium.reparametrizers")):
            peers["orthogonium"] = maps.BatchedBjorckOrthogonalization(matrix.shape)
    return peers


def _polar_svd(matrix: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U @ Vh


def _cayley_solve(skew: Tensor) -> Tensor:
    A, eye = (skew - skew.mT) / 2, torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye + A, eye - A)


def _matrix_exponential(skew: Tensor, squarings: int | None = None) -> Tensor:
    return torch.linalg.matrix_exp((skew - skew.mT) / 2)


def _distances(rows: Tensor, p: float) -> Tensor:
    return torch.cdist(rows, rows, p)


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
    "cayley": {"solve": _cayley_solve},
    "skew_exponential": {"matrix_exp": _matrix_exponential},
    "polar": {"svd": _polar_svd},
    "pairwise_distance": {"cdist": _distances},
    "spectral_norm_bound": {"svd": _matrix_norm, "eigvalsh": _gram_eigenvalue},
    "spectral_norm_estimate": {"by hand": _power_iteration},
    "conv2d_norm_bound": {_FFT: _circular},
    "conv2d_norm_estimate": {"by hand": _convolution_power_iteration},
}
