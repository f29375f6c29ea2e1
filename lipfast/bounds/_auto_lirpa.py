"""Estimates by auto_LiRPA (https://github.com/Verified-Intelligence/auto_LiRPA), which is imported only when it is asked."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipfast.bounds.interval import _start
from lipfast.bounds.layers import AveragePool, Conv, Elementwise, Grafted, Layer, Linear, MaxPool, Pad, Rearrange, Scale, Sum
from lipfast.bounds.network import Network

_LR = 0.1  # of the slopes: auto_LiRPA's example, and what alpha-beta-CROWN takes


def library() -> Any:
    """The package. Raises ValueError if it is missing."""
    try:
        import auto_LiRPA
    except ImportError as error:
        raise ValueError(
            "crown: kind 'estimate' needs auto_LiRPA: pip install git+https://github.com/Verified-Intelligence/auto_LiRPA "
            f"(kind 'bound' needs nothing) ({error})"
        ) from error
    return auto_LiRPA


def margin(
    network: Network,
    x: Tensor,  # (B, ...)
    label: Tensor,  # (B,)
    eps: float | Tensor,
    p: float,
    pixel_range: tuple[float, float] | None,
    method: str,
    iterations: int,
) -> Tensor:  # (B, K)
    """Of :func:`lipfast.bounds.crown_margin`, by auto_LiRPA's ``method``, the last layer merged with e_label - e_j."""
    if p != math.inf:
        raise ValueError(f"p: inf expected for an estimate, got {p}")
    library()
    wide = x if x.dtype == torch.float64 and not iterations else x.float()
    reason = ""
    # Patches are much quicker than matrices. They do not know all layers, and have failed where matrices did not; these, and
    # the slopes that move, have places for float32 only.
    for mode, values in (("patches", wide), ("matrix", x.float())):
        options: dict[str, Any] = {"conv_mode": mode}
        if iterations:
            options["optimize_bound_args"] = {"iteration": iterations, "lr_alpha": _LR}
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # of torch, about what auto_LiRPA calls
            try:
                start = _start(values, eps, p, "estimate", pixel_range)
                found = _margin(network, values, start, label, method, options)
                return found.to(x.dtype).scatter(1, label[:, None], 0.0)
            except Exception as error:  # asserts, key errors and many more, for what it does not know
                reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
    raise ValueError(f"model: auto_LiRPA does not read this network ({reason.strip()}); kind 'bound' may")


def _margin(network: Network, x: Tensor, start: Any, label: Tensor, method: str, options: dict[str, Any]) -> Tensor:
    auto_lirpa = library()
    ball = auto_lirpa.BoundedTensor(x, auto_lirpa.PerturbationLpNorm(norm=math.inf, x_L=start[0], x_U=start[1]))
    units = torch.eye(network.nodes[-1].shape[0]).to(x)
    bounded = auto_lirpa.BoundedModule(_Plain(network).to(x), x, bound_opts=options)
    apart = units[label][:, None] - units  # (B, K, K)
    return bounded.compute_bounds((ball,), C=apart, method=method, bound_upper=False)[0].detach()


class _Plain(nn.Module):
    """The network in torch's own functions that auto_LiRPA reads, one per node."""

    def __init__(self, network: Network):
        super().__init__()
        self.inputs = [node.inputs for node in network.nodes[1:]]
        steps = [_step(node.layer, network.nodes[node.inputs[0]].shape, node.shape) for node in network.nodes[1:]]
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step, inputs in zip(self.steps, self.inputs, strict=True):
            values.append(step(*(values[i] for i in inputs)))
        return values[-1]


class _Step(nn.Module):
    def __init__(self, function: Callable[..., Tensor], *tensors: Tensor | None):
        super().__init__()
        self.function, self.names = function, [f"tensor{i}" for i in range(len(tensors))]
        for name, tensor in zip(self.names, tensors, strict=True):
            parameter = None if tensor is None else nn.Parameter(tensor.detach().clone(), requires_grad=False)
            self.register_parameter(name, parameter)

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x, *(getattr(self, name) for name in self.names))


def _step(layer: Layer, before: tuple[int, ...], after: tuple[int, ...]) -> _Step:
    """A layer from samples of shape ``before`` to ``after``."""
    if isinstance(layer, Linear):
        return _Step(F.linear, layer.weight, layer.bias)
    if isinstance(layer, Conv):
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        convolution = F.conv1d if layer.weight.ndim == 3 else F.conv2d
        return _Step(lambda x, weight, bias: convolution(x, weight, bias, *geometry), layer.weight, layer.bias)
    if isinstance(layer, Scale):
        factor = _by_channel(layer.factor, 1.0, after)
        constant = _by_channel(layer.offset, 0.0, after) - _by_channel(layer.shift, 0.0, after) * factor
        if len(after) == 3 and max(factor.shape[2:] + constant.shape[2:]) == 1:  # patches know convolutions best
            return _Step(F.conv2d, factor.flatten().diag()[:, :, None, None], constant.flatten())
        return _Step(lambda x, factor, constant: x * factor + constant, factor, constant)
    if isinstance(layer, Sum):
        return _Step(torch.add if layer.signs[1] > 0 else torch.sub)
    if isinstance(layer, Pad):
        return _pad(layer, before)
    if isinstance(layer, Rearrange):
        places = torch.arange(math.prod(before)).reshape(1, *before)
        flat = len(after) == 1 and torch.equal(layer.function(places), places.flatten(1))
        return _Step(nn.Flatten() if flat else layer.function)
    if isinstance(layer, Grafted) and layer.mask.any():
        # Straight units are at 0 inside of the ReLU, so nothing relaxes them.
        line = lambda x, curved, slope, offset: (x * curved).relu() + (x * slope + offset)
        mask = layer.mask.expand(1, *after)
        straight = lambda t: torch.where(mask, t.double(), 0.0)
        return _Step(line, (~mask).double(), straight(layer.slope), straight(layer.intercept))
    if isinstance(layer, (Elementwise, AveragePool, MaxPool)):
        return _Step(torch.relu if isinstance(layer, Grafted) else layer.function)
    raise ValueError(f"model: auto_LiRPA has nothing for {type(layer).__name__}")


def _by_channel(t: Tensor | None, missing: float, shape: tuple[int, ...]) -> Tensor:  # (1, C, ...)
    t = torch.as_tensor(missing if t is None else t).double().cpu()
    t = t.reshape(*[1] * (len(shape) + 1 - t.ndim), *t.shape)
    return t.expand(1, shape[0], *t.shape[2:])


def _pad(layer: Pad, before: tuple[int, ...]) -> _Step:
    """Zeros around an image as a convolution with one weight of 1, since auto_LiRPA misreads torch's padding."""
    if layer.mode != "constant" or len(before) != 3 or len(layer.amounts) != 4 or min(layer.amounts) < 0:
        return _Step(layer)
    left, right, top, bottom = layer.amounts
    weight = torch.zeros(before[0], before[0], 1 + abs(top - bottom), 1 + abs(left - right), dtype=torch.float64)
    weight[:, :, max(bottom - top, 0), max(right - left, 0)] = torch.eye(before[0])
    return _Step(lambda x, weight: F.conv2d(x, weight, None, 1, (max(top, bottom), max(left, right))), weight)
