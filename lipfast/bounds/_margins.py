"""Margins at an image from below: the network in float64, and how far its rounding can have led.

Boxes lose too much here. A box of one rounding around a value grows by the norm of |W| with every layer, which is about sqrt(C)
for an orthogonal W of C channels: some thirty layers use float64 up. A ball grows by the norm of W only. So each value v comes
with a radius e, the exact value lying within e of v in the l_2 norm of the sample, and a layer f with the Lipschitz constant g,
computed as f^ with an error of at most r on v, makes that

    |f(x) - f^(v)|  <=  |f(x) - f(v)| + |f(v) - f^(v)|  <=  g e + r.

For a product r = gamma_n (a |v| + |b|), a >= || |W| || (lipfast.rounding); the other layers' r are those of their boxes.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipfast import rounding
from lipfast.bounds._gains import UP, fixed_gain, scale_gain
from lipfast.bounds._interval_rules import conv2d_arguments, sum_error
from lipfast.bounds.interval import _final_linear
from lipfast.bounds.layers import AveragePool, Conv, Elementwise, Input, L2Pool, Layer, Linear, MaxMin, MaxPool, Pad, Scale, Sum
from lipfast.bounds.network import Network, Node, read
from lipfast.bounds.norms import Norms, norms, operators
from lipfast.ops.interval_conv2d import plain_conv2d
from lipfast.ops.max_min import max_min

Ball = tuple[Tensor, Tensor]  # (B, ...) and its radius (B,)
_ENOUGH = 2.0**20  # growth of an error that float64 has room for
_LOST = 2.0**-300  # far more than squares of numbers below 2^-511 lose, and averages of subnormal ones


class Margins:
    """Lower bounds of ``logit[label] - logit[j]`` of a model at images.

    Args:
        model, input_shape: as for :func:`lipfast.bounds.lipschitz`.
        norms: of the model, kind "bound", if they are there already; else computed if cheaper ones do not do.
        dtype: of the computation. In float32 its errors are large enough to be seen.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        norms: Norms | None = None,
        dtype: torch.dtype = torch.float64,
    ):
        self._model, self._shape, self._dtype = model, tuple(input_shape), dtype
        network = read(model, self._shape)
        self._size = {at: _schur(node.layer) for at, node in enumerate(network.nodes) if isinstance(node.layer, (Linear, Conv))}
        self._gain = dict(self._size)
        if norms is not None or _growth(network, self._gain) > _ENOUGH:
            self._gain = _spectral(model, network, self._gain, norms)

    @torch.no_grad()
    def __call__(self, x: Tensor, label: Tensor) -> Tensor:  # (B, ...), (B,) -> (B, K) float64
        """0 where j is the label, NaN or -Inf where numbers overflow. x: of no more digits than ``dtype``."""
        network = read(self._model, self._shape)
        last = _final_linear(network)
        values: list = []
        readers = network.readers()
        for at, node in enumerate(network.nodes[:-1] if last is not None else network.nodes):
            inputs = [values[i] for i in node.inputs]
            start = (x.to(self._dtype), x.new_zeros(len(x), dtype=torch.float64))
            values.append(self._image(at, node, inputs) if inputs else start)
            for i in node.inputs:
                if readers[i][-1] == at:
                    values[i] = None
        v, e = values[network.nodes[-1].inputs[0] if last is not None else -1]
        if last is None:
            v = v.double()
            margin, slack = v.gather(1, label[:, None]) - v, 1.5 * e[:, None]
        else:
            margin, slack = _differences(v, e, last, label)
        lower = margin - (slack + 2 * _eps(margin) * (margin.abs() + slack) + _LOST)
        return lower.scatter(1, label[:, None], 0.0)

    def _image(self, at: int, node: Node, inputs: list[Ball]) -> Ball:
        layer, (v, e) = node.layer, inputs[0]
        if isinstance(layer, Sum):
            (v, e), (w, f) = inputs
            out = v + w if layer.signs[1] > 0 else v - w
            return out, (e + f + _eps(v) * _norm(out)) * UP
        if isinstance(layer, (Linear, Conv)):
            weight, bias = layer.weight.to(v), None if layer.bias is None else layer.bias.to(v)
            out = _product(replace(layer, weight=weight, bias=bias), v)
            added = 0.0 if bias is None else _norm(bias[None]) * math.sqrt(math.prod(out.shape[1:]) // len(bias))
            g = rounding.gamma(weight[0].numel() + 1, v.dtype, v.device)
            return out, (self._gain[at] * e + g * (self._size[at] * _norm(v) + added) * (1 + 2**-20)) * UP
        if isinstance(layer, Scale):
            return _scaled(layer, v, e)
        gain = _fixed(layer, node, v.shape[1:])
        if isinstance(layer, MaxMin):
            return max_min(v), e
        if isinstance(layer, L2Pool):
            out = layer.square_sum(v * v).sqrt()
            lost = 2 * math.sqrt(layer.terms * torch.finfo(v.dtype).tiny * math.prod(out.shape[1:]))
            return out, (gain * e + sum_error(layer.terms + 4, out) * _norm(out) + lost) * UP
        if isinstance(layer, AveragePool):
            out = layer.function(v)
            return out, (gain * e + sum_error(layer.terms, out) * _norm(layer.function(v.abs()))) * UP
        out = layer(v) if isinstance(layer, Pad) else layer.function(v)  # type: ignore[attr-defined]
        if isinstance(layer, Elementwise) and layer.error:
            unit = layer.error * torch.finfo(v.dtype).eps
            e = gain * e + _norm(unit * (1 + v.abs() + out.abs()) + layer.jump)
        else:
            e = gain * e
        return out, e * UP


def _fixed(layer: Layer, node: Node, shape: Sequence[int]) -> float:
    """:func:`fixed_gain`, and for overlapping windows, each output 1-Lipschitz by itself, the root of their number.

    L2 pooling may scale a window that is cut.
    """
    if isinstance(layer, (MaxPool, L2Pool)) and not layer.disjoint:
        scaled = layer.terms if isinstance(layer, L2Pool) else 1
        return math.sqrt(math.prod(node.shape) * scaled) * UP
    return fixed_gain(layer, node.name, shape)


def _differences(v: Tensor, e: Tensor, last: Linear, label: Tensor) -> Ball:  # (B, K) twice
    """The last layer merged with e_y - e_j, and what these may err."""
    v, weight, bias = v.double(), last.weight.double(), None if last.bias is None else last.bias.double()
    K, I = weight.shape
    g, found = rounding.gamma(I + 2, torch.float64, v.device), []
    step = max(1, 2**25 // (K * I))  # the row differences (B, K, I) stay below a quarter of a gigabyte
    for part, radius, y in zip(v.split(step), e.split(step), label.split(step), strict=True):
        rows = weight[y][:, None] - weight
        margin, length = torch.einsum("bi,bki->bk", part, rows), _norm(rows.flatten(0, 1)).view(-1, K)
        added = torch.zeros_like(margin) if bias is None else bias[y][:, None] - bias
        slack = length * (radius + g * _norm(part))[:, None] + 4 * _eps(margin) * (margin.abs() + added.abs())
        found.append((margin + added, slack * (1 + 2**-20)))
    margins, slacks = zip(*found, strict=True)
    return torch.cat(margins), torch.cat(slacks)


def _product(layer: Linear | Conv, v: Tensor) -> Tensor:
    if isinstance(layer, Linear):
        return F.linear(v, layer.weight, layer.bias)
    arguments = conv2d_arguments(layer)
    line = layer.weight.ndim == 3
    out = plain_conv2d(v.unsqueeze(-2) if line else v, *arguments.values())
    out = out if layer.bias is None else out + layer.bias[:, None, None]
    return out.squeeze(-2) if line else out


def _scaled(layer: Scale, v: Tensor, e: Tensor) -> Ball:
    shift, factor, offset = (None if t is None else t.to(v) for t in (layer.shift, layer.factor, layer.offset))
    out, size = (v, v.abs()) if shift is None else (v - shift, v.abs() + shift.abs())
    if factor is not None:
        out, size = out * factor, size * factor.abs()
    if offset is not None:
        out, size = out + offset, size + offset.abs()
    slack = 8 * _eps(v) * size + torch.finfo(v.dtype).tiny  # also for shift, factor and offset, rounded themselves
    return out, (scale_gain(layer, "bound") * e + _norm(slack)) * UP


def _eps(like: Tensor) -> float:
    return torch.finfo(like.dtype).eps


def _norm(t: Tensor) -> Tensor:  # (B, ...) -> (B,), float64; not below the l_2 norm of each sample but for underflow
    flat = t.double().flatten(1)
    return torch.linalg.vector_norm(flat, dim=1) * (1 + rounding.gamma(flat.shape[1], torch.float64, t.device))


def _schur(layer: Linear | Conv) -> float:
    """sqrt(||W||_1 ||W||_inf), of a convolution over all images: not below the norm of |W|."""
    groups = layer.groups if isinstance(layer, Conv) else 1
    size = layer.weight.double().abs()[..., None].unflatten(0, (groups, -1)).flatten(3)  # (G, O, C, taps)
    rows, columns = size.sum((2, 3)).amax(), size.sum((1, 3)).amax()
    return (rows * columns).sqrt().item() * (1 + 2.0**-20)


def _growth(network: Network, gain: dict[int, float]) -> float:
    """Of an error on the way from the input to the output."""
    found: list[float] = []
    for at, node in enumerate(network.nodes):
        inputs = [found[i] for i in node.inputs]
        if isinstance(node.layer, Input):
            found.append(1.0)
        elif isinstance(node.layer, Sum):
            found.append(sum(inputs))
        elif isinstance(node.layer, Scale):
            found.append(inputs[0] * float(scale_gain(node.layer, "bound")))
        elif at in gain:
            found.append(inputs[0] * gain[at])
        else:
            found.append(inputs[0] * _fixed(node.layer, node, network.nodes[node.inputs[0]].shape))
    return found[-1]


def _spectral(model: nn.Module, network: Network, gain: dict[int, float], known: Norms | None) -> dict[int, float]:
    """The same with proven norms in place of what is larger."""
    known = norms(model, network.nodes[0].shape) if known is None else known
    better = {}
    for at, operator in operators(network, "bound").items():
        plain = network.nodes[at].layer
        assert isinstance(plain, (Linear, Conv))
        alone = operator.first == operator.last
        sigma = known.sigma[operator.name] if alone else replace(operator, layer=plain, error=0.0).bound()
        better[at] = min(gain[at], float(sigma.max()))
    return better
