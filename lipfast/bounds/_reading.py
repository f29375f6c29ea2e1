"""How modules and functions of torch and lipfast become layers: one entry each."""

import math
import operator
from collections.abc import Callable
from functools import partial, singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import lipfast.nn
from lipfast.bounds.layers import (
    ABSOLUTE,
    RELU,
    AveragePool,
    Conv,
    Elementwise,
    Grafted,
    L2Pool,
    Layer,
    Linear,
    MaxMin,
    MaxPool,
    Pad,
    PartialAbs,
    Rearrange,
    Scale,
    Unsupported,
)
from lipfast.ops._clip import clip
from lipfast.ops.beta_abs import beta_abs
from lipfast.ops.clipped_relu import clipped_relu
from lipfast.ops.grafted_relu import grafted_relu
from lipfast.ops.l2_pool import l2_pool_over
from lipfast.ops.max_min import max_min
from lipfast.ops.spatial_shift import reference as shifted
from lipfast.ops.spatial_shift import spatial_shift


def knows(module: nn.Module) -> bool:
    return of_module.dispatch(type(module)) is not of_module.dispatch(object)


@singledispatch
def of_module(module: nn.Module, name: str) -> list[Layer]:
    """The layers that a module stands for, in order; the last has the module's output."""
    raise Unsupported(name, type(module).__name__)


@of_module.register
def _(module: nn.Linear, name: str) -> list[Layer]:
    return [Linear(module.weight, module.bias)]


@of_module.register(nn.Conv1d)
@of_module.register(nn.Conv2d)
def _(module, name: str) -> list[Layer]:
    padding, before = module.padding, []
    if padding == "valid":
        padding = (0,) * len(module.kernel_size)
    if padding == "same" or (module.padding_mode != "zeros" and any(padding)):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        before = [Pad(tuple(module._reversed_padding_repeated_twice), mode)]
        padding = (0,) * len(module.kernel_size)
    return [*before, Conv(module.weight, module.bias, module.stride, tuple(padding), module.dilation, module.groups)]


_PADDINGS: dict[type, str] = {
    nn.ZeroPad2d: "constant",
    nn.CircularPad2d: "circular",
    nn.ReflectionPad2d: "reflect",
    nn.ReplicationPad2d: "replicate",
}


def _padding_module(module, name: str) -> list[Layer]:
    return [Pad(tuple(module.padding), _PADDINGS[type(module)])]


for _kind in _PADDINGS:
    of_module.register(_kind)(_padding_module)


@of_module.register(nn.BatchNorm1d)
@of_module.register(nn.BatchNorm2d)
def _(module, name: str) -> list[Layer]:
    if module.training or module.running_mean is None:
        raise ValueError(f"layer {name!r}: batch norm has bounds in eval mode with running statistics only; call model.eval()")
    factor = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        factor = factor * module.weight.double()
    column = lambda t: None if t is None else t[:, None, None] if isinstance(module, nn.BatchNorm2d) else t
    return [Scale(column(module.running_mean), column(factor), column(module.bias))]


@of_module.register
def _(module: lipfast.nn.Normalize, name: str) -> list[Layer]:
    return [Scale(module.mean, 1 / module.std.double())]


@of_module.register(nn.Dropout)
@of_module.register(nn.Dropout1d)
@of_module.register(nn.Dropout2d)
def _(module, name: str) -> list[Layer]:
    if module.training and module.p > 0:
        raise ValueError(f"layer {name!r}: dropout has bounds in eval mode only; call model.eval()")
    return [Rearrange(lambda x: x)]


@of_module.register
def _(module: nn.Identity, name: str) -> list[Layer]:
    return [Rearrange(lambda x: x)]


@of_module.register(nn.Flatten)
@of_module.register(nn.Unflatten)
def _(module, name: str) -> list[Layer]:
    return [Rearrange(module.forward)]


@of_module.register(nn.AvgPool1d)
@of_module.register(nn.AvgPool2d)
def _(module, name: str) -> list[Layer]:
    rank = 2 if isinstance(module, nn.AvgPool2d) else 1
    sizes = lambda v: (v,) * rank if isinstance(v, int) else tuple(v)
    kernel, padding = sizes(module.kernel_size), sizes(module.padding)
    counted = module.count_include_pad or not any(padding)
    whole = counted and not module.ceil_mode and not getattr(module, "divisor_override", None)
    window = (kernel, sizes(module.stride or kernel), padding) if whole else None
    return [AveragePool(module.forward, math.prod(kernel), window)]


@of_module.register(nn.AdaptiveAvgPool1d)
@of_module.register(nn.AdaptiveAvgPool2d)
def _(module, name: str) -> list[Layer]:
    return [AveragePool(module.forward, 2**16)]  # terms only enter a rounding error; no window of an image is larger


@of_module.register(nn.MaxPool1d)
@of_module.register(nn.MaxPool2d)
def _(module, name: str) -> list[Layer]:
    if module.return_indices:
        raise Unsupported(name, "max pooling with return_indices")
    return [MaxPool(module.forward, _disjoint(module) and _all_ones(module.dilation))]


@of_module.register(nn.LPPool1d)
@of_module.register(nn.LPPool2d)
def _(module, name: str) -> list[Layer]:
    if float(module.norm_type) != 2:
        raise Unsupported(name, f"L{module.norm_type} pooling (only L2)")
    pool = F.avg_pool1d if isinstance(module, nn.LPPool1d) else F.avg_pool2d
    terms = _size(module.kernel_size, module)
    square_sum = lambda x: pool(x, module.kernel_size, module.stride, 0, module.ceil_mode) * terms
    return [L2Pool(square_sum, terms, _disjoint(module) and not module.ceil_mode)]  # torch scales a window that is cut


class _WholeImage(L2Pool):
    """To one pixel per channel, which a rearrangement then drops: a pooled image is an image."""

    def shape_after(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[0], 1, 1


def _size(kernel, module) -> int:
    if isinstance(kernel, tuple):
        return math.prod(kernel)
    return kernel ** (2 if type(module).__name__.endswith("2d") else 1)


def _disjoint(module) -> bool:
    pair = lambda v: tuple(v) if isinstance(v, (tuple, list)) else (v, v)
    return all(s >= k for s, k in zip(pair(module.stride or module.kernel_size), pair(module.kernel_size), strict=True))


def _all_ones(value) -> bool:
    return all(v == 1 for v in (value if isinstance(value, (tuple, list)) else (value,)))


@of_module.register
def _(module: lipfast.nn.MaxMin, name: str) -> list[Layer]:
    return [MaxMin()]


@of_module.register
def _(module: lipfast.nn.BetaAbs, name: str) -> list[Layer]:
    return [_beta_abs(module.beta)]


@of_module.register
def _(module: lipfast.nn.Patches, name: str) -> list[Layer]:
    return [Rearrange(partial(F.pixel_unshuffle, downscale_factor=module.side)), Pad(module.zeros, "constant")]


@of_module.register
def _(module: lipfast.nn.LipNeXtBlocks, name: str) -> list[Layer]:
    mixed = lambda matrix, bias=None: Conv(matrix[:, :, None, None], bias, (1, 1), (0, 0), (1, 1), 1)
    layers: list[Layer] = []
    for R, M, bias, position in zip(module.rotation, module.mixing, module.bias, module.position, strict=True):
        shift = Rearrange(partial(shifted, ratio=module.ratio))
        layers += [Scale(offset=position[None]), mixed(R), shift, mixed(R.mT), mixed(M, bias), _beta_abs(module.beta)]
    return layers


@of_module.register
def _(module: lipfast.nn.LiResConv2d, name: str) -> list[Layer]:
    if module.training:
        raise ValueError(f"layer {name!r}: LiResConv2d has bounds in eval mode with its running mean only; call model.eval()")
    return [Conv(module.weight, module.offset, (1, 1), (module.padding, module.padding), (1, 1), 1)]


@of_module.register
def _(module: lipfast.nn.ClippedMaxMin, name: str) -> list[Layer]:
    if module.upper.ndim == 0:
        raise Unsupported(name, "ClippedMaxMin with one threshold for all units (give it the shape of a sample)")
    low = torch.cat([torch.full_like(module.upper, -math.inf), module.lower])
    high = torch.cat([module.upper, torch.full_like(module.lower, math.inf)])
    function = lambda x: clip(x, low.to(x.dtype), high.to(x.dtype))
    return [MaxMin(), Elementwise("clip", function, (0.0, 1.0), kinks=(low, high), pieces=(0.0, 1.0, 0.0))]


@of_module.register
def _(module: lipfast.nn.ClippedReLU, name: str) -> list[Layer]:
    return [_clipped(module.threshold)]


@of_module.register
def _(module: lipfast.nn.GraftedReLU, name: str) -> list[Layer]:
    return [Grafted(module.mask[None], module.slope[None], module.intercept[None])]


def _beta_abs(beta: float = 0.5) -> Layer:
    return PartialAbs("beta_abs", partial(beta_abs, beta=beta), ABSOLUTE.slopes, beta=beta)


def _beta_abs_between(name: str, rank: int, beta: float = 0.5, bias=None, position=None) -> list[Layer]:
    """The absolute value between the two sums of a call of the function."""
    for value in (bias, position):
        if value is not None and (not isinstance(value, Tensor) or isinstance(value, FakeTensor)):
            raise Unsupported(name, "beta_abs with a bias or position that is computed inside forward")
    before = [] if bias is None else [Scale(offset=bias.reshape(-1, *(1,) * (rank - 1)))]
    return [*before, _beta_abs(beta), *([] if position is None else [Scale(offset=position)])]


def _clipped(threshold) -> Layer:
    function = lambda x: clipped_relu(x, torch.as_tensor(threshold, dtype=x.dtype, device=x.device))
    return Elementwise("clipped_relu", function, (0.0, 1.0), kinks=(0.0, threshold), pieces=(0.0, 1.0, 0.0))


def _grafted(name: str, shape: tuple[int, ...], mask, slope, intercept) -> Layer:
    values = [mask, slope, intercept]
    if not all(isinstance(value, Tensor) and not isinstance(value, FakeTensor) for value in values):
        raise Unsupported(name, "grafted_relu with a mask, slope or intercept that is computed inside forward")
    if any(value.ndim > len(shape) for value in values):
        raise Unsupported(name, "grafted_relu with a mask, slope or intercept for each sample")
    return Grafted(*(value.expand(1, *shape) for value in values))


def _leaky(slope: float) -> Layer:
    function, slopes = partial(F.leaky_relu, negative_slope=slope), (min(slope, 1.0), max(slope, 1.0))
    least = (0.0, 0.0, 0.0) if slope < 0 else None
    return Elementwise("leaky_relu", function, slopes, least, error=1, kinks=(0.0,), pieces=(slope, 1.0))


def _elu(alpha: float, scale: float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda x: scale * F.elu(x, alpha)


_SMOOTH = 16.0  # spacings: more than any of torch's implementations errs, against 1 + |x| + |f(x)|

# GELU and SiLU: extrema of the derivative; the minimum of GELU lies near -0.752, that of SiLU near -1.2785. All rounded
# outward.
_ELEMENTWISE: dict[type, Callable[..., Layer]] = {
    nn.ReLU: lambda m: RELU,
    nn.ReLU6: lambda m: Elementwise("relu6", F.relu6, (0.0, 1.0), kinks=(0.0, 6.0), pieces=(0.0, 1.0, 0.0)),
    nn.Hardtanh: lambda m: Elementwise(
        "hardtanh",
        lambda x: x.clamp(m.min_val, m.max_val),
        (0.0, 1.0),
        error=1,
        kinks=(m.min_val, m.max_val),
        pieces=(0.0, 1.0, 0.0),
    ),
    nn.LeakyReLU: lambda m: _leaky(m.negative_slope),
    nn.ELU: lambda m: Elementwise("elu", _elu(m.alpha), (0.0, max(1.0, m.alpha)), error=_SMOOTH * max(1.0, m.alpha)),
    nn.CELU: lambda m: Elementwise("celu", partial(F.celu, alpha=m.alpha), (0.0, 1.0), error=_SMOOTH * max(1.0, m.alpha)),
    nn.SELU: lambda m: Elementwise("selu", F.selu, (0.0, 1.7581), error=2 * _SMOOTH),
    nn.Tanh: lambda m: Elementwise("tanh", torch.tanh, (0.0, 1.0), error=_SMOOTH),
    nn.Sigmoid: lambda m: Elementwise("sigmoid", torch.sigmoid, (0.0, 0.25), error=_SMOOTH),
    nn.Softsign: lambda m: Elementwise("softsign", F.softsign, (0.0, 1.0), error=_SMOOTH),
    # Beyond its threshold torch returns x itself, which is log(1 + exp(-threshold))/beta too low.
    nn.Softplus: lambda m: Elementwise(
        "softplus",
        partial(F.softplus, beta=m.beta, threshold=m.threshold),
        (0.0, 1.0),
        error=_SMOOTH * max(1.0, 1 / m.beta),
        jump=1.01 * math.log1p(math.exp(-m.threshold)) / m.beta,
    ),
    nn.GELU: lambda m: Elementwise(
        "gelu",
        partial(F.gelu, approximate=m.approximate),
        (-0.1292, 1.1292),
        (-0.170041 if m.approximate == "tanh" else -0.169972, -0.76, -0.74),
        error=_SMOOTH,
    ),
    nn.SiLU: lambda m: Elementwise("silu", F.silu, (-0.09985, 1.09985), (-0.278465, -1.28, -1.27), error=_SMOOTH),
}


def _elementwise_module(module, name: str) -> list[Layer]:
    return [_ELEMENTWISE[type(module)](module)]


for _kind in _ELEMENTWISE:
    of_module.register(_kind)(_elementwise_module)


def of_function(function, name: str, args: tuple, kwargs: dict, shape: tuple[int, ...]) -> list[Layer]:
    """The layers of a function or tensor method inside forward; ``args`` without the first, ``shape`` of its result."""
    if function in _RESHAPES:
        return [Rearrange(lambda x: x.reshape(len(x), *shape))]
    if function in _PERMUTES:
        return [Rearrange(lambda x: _PERMUTES[function](x, *args, **kwargs))]
    if function in _MODULE_OF:
        return of_module(_MODULE_OF[function](*args, **kwargs), name)
    if function in (F.linear, F.conv1d, F.conv2d):
        return _affine_function(function, args, kwargs)
    if function in (torch.abs, "abs", abs, operator.abs):
        return [ABSOLUTE]
    if function in (torch.neg, "neg", operator.neg):
        return [Scale(factor=torch.tensor(-1.0))]
    if function is clipped_relu:
        return [_clipped(*args, **kwargs)]
    if function is grafted_relu:
        return [_grafted(name, shape, *args, **kwargs)]
    if function is max_min:
        return [MaxMin()]
    if function is beta_abs:
        return _beta_abs_between(name, len(shape), *args, **kwargs)
    if function is spatial_shift:  # its definition moves any numbers, an analysis's indices and masks too
        return [Rearrange(lambda x: shifted(x, *args, **kwargs))]
    if function is l2_pool_over:
        (pixels,) = args
        return [_WholeImage(lambda x: x.sum((2, 3), keepdim=True), pixels, True), Rearrange(lambda x: x.flatten(1))]
    if function in (F.dropout, F.dropout1d, F.dropout2d):
        return of_module(
            nn.Dropout(*args, **{k: v for k, v in kwargs.items() if k == "p"}).train(kwargs.get("training", True)), name
        )
    raise Unsupported(name, f"the function {getattr(function, '__name__', function)!r}")


def _affine_function(function, args: tuple, kwargs: dict) -> list[Layer]:
    names = ("weight", "bias", "stride", "padding", "dilation", "groups")
    given = {
        "bias": None,
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        **dict(zip(names, args, strict=False)),
        **kwargs,
    }
    if function is F.linear:
        return [Linear(given["weight"], given["bias"])]
    rank = given["weight"].ndim - 2
    sizes = lambda v: (v,) * rank if isinstance(v, int) else tuple(v)
    if isinstance(given["padding"], str):
        raise Unsupported("conv", "a convolution function with padding by name (use nn.Conv2d)")
    stride, padding, dilation = (sizes(given[k]) for k in ("stride", "padding", "dilation"))
    return [Conv(given["weight"], given["bias"], stride, padding, dilation, given["groups"])]


_RESHAPES = {torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, "flatten", "view", "reshape", "squeeze", "unsqueeze"}
_RESHAPES |= {"contiguous", "clone", torch.clone}
_PERMUTES: dict[Any, Callable] = {
    torch.permute: torch.permute,
    "permute": Tensor.permute,
    torch.transpose: torch.transpose,
    "transpose": Tensor.transpose,
}
_MODULE_OF: dict[Any, Callable[..., nn.Module]] = {
    F.relu: lambda inplace=False: nn.ReLU(),
    torch.relu: nn.ReLU,
    "relu": nn.ReLU,
    F.relu6: lambda inplace=False: nn.ReLU6(),
    F.leaky_relu: nn.LeakyReLU,
    F.elu: nn.ELU,
    F.celu: nn.CELU,
    F.selu: nn.SELU,
    F.hardtanh: nn.Hardtanh,
    F.tanh: nn.Tanh,
    torch.tanh: nn.Tanh,
    "tanh": nn.Tanh,
    F.sigmoid: nn.Sigmoid,
    torch.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    F.softplus: nn.Softplus,
    F.softsign: nn.Softsign,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    F.avg_pool1d: nn.AvgPool1d,
    F.avg_pool2d: nn.AvgPool2d,
    F.adaptive_avg_pool1d: nn.AdaptiveAvgPool1d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.max_pool1d: nn.MaxPool1d,
    F.max_pool2d: nn.MaxPool2d,
}
