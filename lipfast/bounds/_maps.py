"""All linear maps A_kj R_j of loop transformation (:mod:`lipfast.bounds._liplt`), applied together.

A node of the graph is applied once to a stack (T, S, B, ...) of vectors: for each target k whose input its value reaches, each
source j that reaches it, and each sample. At nonlinearity k the rows of target k leave, the others go on times c_k, and rows of
the new source k join. Images hold their channels last, so that joining moves no layout.

Values are kept near 1 however deep the network: a vector that goes through it once tells by which power of two each layer is
scaled, and the powers add up to an *exponent* of each node. Where c is one number for all units it is part of the exponent too,
and R that of the source's weight in m_k, so the usual activations over all inputs cost the stacks nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast.bounds.layers import AveragePool, Conv, Layer, Linear, MaxMin, Pad, Rearrange, Scale, Sum
from lipfast.bounds.network import Network
from lipfast.ops.spectral_norm_estimate import _random


@dataclass(frozen=True)
class Nonlinearity:
    """A nonlinear node of the graph.

    Attributes:
        position: in the graph.
        keep, turn: c and r of its units, (B, ...), or one number for all; None for MaxMin and pooling.
        reach: (B,), the product bound of its input, at the units that matter; None if it is not to be used.
    """

    position: int
    keep: Tensor | float | None
    turn: Tensor | float | None
    reach: Tensor | None


class Maps:
    """The maps between the nonlinearities ``found`` (ascending) of a network; of ``x`` (B, ...) batch, dtype and device count.

    Attributes:
        known: the nonlinearities by position.
        sources, targets: of every node the nonlinearities (0: the input) whose output reaches its value through linear maps,
            and those whose inputs its value reaches so; ascending.
        exponents: of every node, (): the network's values are 2^exponent times those here.
        sizes: of every layer with a weight, by position: the largest entry that it made of values near 1. Not finite if the
            weight is not.
    """

    def __init__(self, network: Network, found: Sequence[Nonlinearity], x: Tensor):
        self.network, self.known, self.x = network, {n.position: n for n in found}, x
        self.readers = network.readers()
        self.sources: list[list[int]] = []
        for p, node in enumerate(network.nodes):
            through = {j for i in node.inputs for j in self.sources[i]} if self.passes(p) else set()
            self.sources.append(sorted(through | ({p} if p == 0 or p in self.known else set())))
        self.targets: list[list[int]] = [[] for _ in network.nodes]
        for p in reversed(range(len(network.nodes))):
            onward = {k for q in self.readers[p] if self.passes(q) for k in self.targets[q]}
            self.targets[p] = sorted(onward | (self.known.keys() & self.readers[p]))
        self._random = _random(max(math.prod(network.nodes[p].shape) for p in (0, *self.known)), x)
        self.sizes: dict[int, Tensor] = {}
        self.exponents: list[Tensor] = []
        self._signs: dict[int, list[Tensor]] = {}  # of sums, scaled
        scales = self._probe()
        self._layers = [node.layer for node in network.nodes]
        for p, scale in scales.items():
            self._layers[p] = _with(self._layers[p], partial(_scaled, scale=scale))

    def passes(self, p: int) -> bool:
        """Whether the linear part of a node is not zero."""
        if p not in self.known or isinstance(self.network.nodes[p].layer, MaxMin):
            return True
        keep = self.known[p].keep
        return isinstance(keep, Tensor) or bool(keep)

    def base(self, p: int) -> float:
        """What the linear part of a nonlinearity is divided by."""
        keep = self.known[p].keep
        return abs(keep) if isinstance(keep, float) and keep else 1.0

    def starts(self, given: Mapping[tuple[int, int], Tensor]) -> dict[int, Tensor]:
        """Unit vectors (T, B, ...) for each source: those ``given`` by source and target, (B, ...), or fixed random ones."""
        found = {}
        for j in (0, *self.known):
            if self.targets[j]:
                fixed = self._start(j)
                right = [_last(v) if (v := given.get((j, k))) is not None else fixed for k in self.targets[j]]
                stack = torch.stack([v.detach().to(fixed) for v in right])
                length = lengths(stack)
                good = ((length > 0) & (length < math.inf)).reshape(*length.shape, *[1] * (stack.ndim - 2))
                found[j] = unit(torch.where(good, stack, fixed))
        return found

    def iterate(self, rights: dict[int, Tensor], iterations: int) -> dict[int, Tensor]:
        """Power iteration on all maps; the gradient of one forward pass is the transposed map."""
        if not (rights and iterations):
            return rights
        constant = [_with(layer, torch.Tensor.detach) for layer in self._layers]
        with torch.enable_grad():
            starts = [v.requires_grad_() for v in rights.values()]
            traced = list(self.images(rights, constant).values())
        with torch.no_grad():
            rights = {j: v.detach() for j, v in rights.items()}
            for i in range(iterations):
                lefts = [unit(v) for v in (self.images(rights, constant).values() if i else traced)]
                pulled = torch.autograd.grad(traced, starts, lefts, retain_graph=True)
                rights = {j: unit(v) for j, v in zip(rights, pulled, strict=True)}
        return rights

    def images(self, rights: Mapping[int, Tensor], layers: Sequence[Layer] | None = None) -> dict[int, Tensor]:
        """For each target what psi reads of the images of all vectors from its sources: (S, B, ...), by position."""
        layers = self._layers if layers is None else layers
        values: dict[int, Tensor] = {}
        images: dict[int, Tensor] = {}
        for p, node in enumerate(self.network.nodes):
            have = self.targets[p]
            if p in self.known:
                here, onward = self._leaving(values[node.inputs[0]], p)
                images[p] = self._read(p, here)
                if have:
                    joining = self._turned(p, rights[p])[:, None]
                    values[p] = torch.cat([self._kept(p, onward), joining], 1) if self.passes(p) else joining
            elif have and p == 0:
                values[p] = rights[p][:, None]
            elif have:
                inputs = [_pick(values[i], self.targets[i], have) for i in node.inputs]
                values[p] = self._sum(p, *inputs) if isinstance(node.layer, Sum) else _through(layers[p], inputs[0], 3)
            self._drop(values, p)
        return images

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """For each source, from the last to the input, the rows (B, K, n) of its map to the logits."""
        end = len(self.network.nodes) - 1
        (K,), B = self.network.nodes[end].shape, len(self.x)
        flows = {end: torch.eye(K, dtype=self.x.dtype, device=self.x.device)[:, None].expand(K, B, K)}
        last = self._layers[end]
        if isinstance(last, Linear):
            flows = {self.network.nodes[end].inputs[0]: last.weight[:, None].expand(K, B, -1)}
        for p in sorted(range(end + 1), reverse=True):
            if p not in flows:
                continue
            flow, node = flows.pop(p), self.network.nodes[p]
            if p == 0 or p in self.known:
                yield p, self._turned(p, flow).flatten(2).transpose(0, 1)
            if p == 0 or not self.passes(p):
                continue
            if p in self.known:
                pulled = [self._kept(p, flow)]
            elif isinstance(node.layer, Sum):
                pulled = [flow * sign for sign in self._signs[p]]
            else:
                pulled = [_back(self._layers[p], flow, self.network.nodes[node.inputs[0]].shape)]
            for i, v in zip(node.inputs, pulled, strict=True):
                flows[i] = flows[i] + v if i in flows else v

    def _start(self, p: int) -> Tensor:  # (B, ...)
        """A fixed vector of the node's shape, no entry of it zero."""
        shape = self.network.nodes[p].shape
        return _last(self._random[: math.prod(shape)].reshape(1, *shape).expand(len(self.x), *shape))

    def _kept(self, p: int, v: Tensor) -> Tensor:
        """The linear part of a nonlinearity, divided by its base."""
        keep = self.known[p].keep
        if keep is None:
            return _mean_of_pairs(v)
        if isinstance(keep, Tensor):
            return v * _last(keep)
        return v if keep > 0 else -v

    def _turned(self, p: int, v: Tensor) -> Tensor:
        """R v; without R if that is a number."""
        if isinstance(self.network.nodes[p].layer, MaxMin):
            return v - _mean_of_pairs(v)
        turn = self.known[p].turn if p in self.known else None
        return v * _last(turn) if isinstance(turn, Tensor) else v

    def _read(self, p: int, v: Tensor) -> Tensor:
        """The part of a nonlinearity's input that its psi reads."""
        turn = self.known[p].turn
        return v * (_last(turn) > 0) if isinstance(turn, Tensor) else self._turned(p, v)

    def _leaving(self, stack: Tensor, p: int) -> tuple[Tensor, Tensor]:
        """The rows whose target is the nonlinearity ``p``, and those that go on through it."""
        have, want = self.targets[self.network.nodes[p].inputs[0]], self.targets[p] if self.passes(p) else []
        at = have.index(p)
        if have[at + 1 :] == want:  # one split has one cheap gradient
            _, here, onward = stack.split([at, 1, len(want)])
            return here[0], onward
        return stack[at], _pick(stack, have, want)

    def _sum(self, p: int, left: Tensor, right: Tensor) -> Tensor:
        a, b = (self.sources[i] for i in self.network.nodes[p].inputs)
        left, right = (v * sign for v, sign in zip((left, right), self._signs[p], strict=True))
        if a == b:
            return left + right
        rows = dict(zip(a, left.unbind(1), strict=True))
        for j, row in zip(b, right.unbind(1), strict=True):
            rows[j] = rows[j] + row if j in rows else row
        return torch.stack([rows[j] for j in self.sources[p]], 1)

    @torch.no_grad()
    def _probe(self) -> dict[int, Tensor]:
        """What each weight is multiplied by; sets exponents, sizes and signs. A new vector joins at each nonlinearity."""
        scales: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        for p, node in enumerate(self.network.nodes):
            before = [self.exponents[i] for i in node.inputs]
            if p == 0:
                values[p], exponent = self._start(p), torch.zeros((), dtype=torch.float64, device=self.x.device)
            elif p in self.known:
                values[p], exponent = self._start(p), before[0] + math.log2(self.base(p))
                if self.passes(p):
                    values[p] = values[p] + self._kept(p, values[node.inputs[0]])
            elif isinstance(node.layer, Sum):
                top = torch.maximum(before[0], before[1])
                signs = [sign * torch.exp2(e - top) for sign, e in zip(node.layer.signs, before, strict=True)]
                value = values[node.inputs[0]] * signs[0] + values[node.inputs[1]] * signs[1]
                power = _power(value.abs().amax())
                values[p], exponent = value * torch.exp2(-power), top + power
                self._signs[p] = [sign * torch.exp2(-power) for sign in signs]
            else:
                values[p], exponent = _through(node.layer, values[node.inputs[0]], 1), before[0]
                if factor_of(node.layer) is not None:
                    self.sizes[p] = values[p].abs().amax()
                    power = _power(self.sizes[p])
                    scales[p] = torch.exp2(-power)
                    values[p], exponent = values[p] * scales[p], exponent + power
            self.exponents.append(exponent)
            self._drop(values, p)
        return scales

    def _drop(self, values: dict[int, Tensor], p: int) -> None:
        for i in self.network.nodes[p].inputs:
            if self.readers[i][-1] == p:
                values.pop(i, None)


def unit(v: Tensor) -> Tensor:
    """Each (..., n) of (N, B, ...) divided by its length; zero stays zero."""
    length = lengths(v).clamp_min(torch.finfo(v.dtype).tiny)
    return v / length.reshape(*length.shape, *[1] * (v.ndim - 2))


def lengths(v: Tensor) -> Tensor:  # (N, B, ...) -> (N, B)
    return torch.linalg.vector_norm(v.flatten(2), dim=2)


def _power(size: Tensor) -> Tensor:
    """The power of two next to a size, 0 if there is none; float64."""
    return torch.where((size > 0) & (size < math.inf), size.double().log2().round(), 0.0)


def factor_of(layer: Layer) -> Tensor | None:
    """The weights that a layer multiplies by."""
    if isinstance(layer, (Linear, Conv)):
        return layer.weight
    return layer.factor if isinstance(layer, Scale) else None


def _scaled(factor: Tensor, scale: Tensor) -> Tensor:
    """Of a convolution with channels last, as its images are."""
    return (factor.contiguous(memory_format=torch.channels_last) if factor.ndim == 4 else factor) * scale


def _with(layer: Layer, change: Callable[[Tensor], Tensor]) -> Layer:
    """The layer with other such weights."""
    if isinstance(layer, (Linear, Conv)):
        return replace(layer, weight=change(layer.weight))
    if isinstance(layer, Scale) and layer.factor is not None:
        return replace(layer, factor=change(layer.factor))
    return layer


def _last(v: Tensor) -> Tensor:
    """Channels of (N, C, ...) last."""
    return v.movedim(1, -1)


def _mean_of_pairs(v: Tensor) -> Tensor:  # (..., C)
    a, b = v.chunk(2, -1)
    mean = (a + b) / 2
    return torch.cat([mean, mean], -1)


def _pick(stack: Tensor, have: list[int], want: list[int]) -> Tensor:
    """The rows of the targets that are wanted."""
    if have == want:
        return stack
    at = [have.index(k) for k in want]
    if not at or at == list(range(at[0], at[-1] + 1)):
        return stack[at[0] : at[-1] + 1] if at else stack[:0]
    return torch.stack([stack[n] for n in at])


def _through(layer: Layer, stack: Tensor, leading: int) -> Tensor:
    """The layer's linear part on a stack with channels last."""
    return _on_samples(lambda v: linear(layer, v), stack, leading)


def _back(layer: Layer, stack: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The transposed of the layer's linear part on (K, B, ...), differentiable; ``shape`` is its input's."""
    return _on_samples(lambda v: transposed(layer, v, shape), stack, 2)


def _on_samples(function: Callable[[Tensor], Tensor], stack: Tensor, leading: int) -> Tensor:
    samples = stack.flatten(0, leading - 1).movedim(-1, 1)
    return _last(function(samples)).unflatten(0, stack.shape[:leading])


def linear(layer: Layer, v: Tensor) -> Tensor:
    if isinstance(layer, Linear):
        return F.linear(v, layer.weight)
    if isinstance(layer, Conv):
        conv = F.conv1d if layer.weight.ndim == 3 else F.conv2d
        return conv(v, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    if isinstance(layer, Scale):
        return v if layer.factor is None else v * layer.factor.to(v)
    if isinstance(layer, (Rearrange, AveragePool)):
        return layer.function(v)
    assert isinstance(layer, Pad), layer
    return layer(v)


def transposed(layer: Layer, v: Tensor, shape: tuple[int, ...]) -> Tensor:
    if isinstance(layer, Linear):
        return v @ layer.weight
    if isinstance(layer, Conv):
        sides = zip(shape[1:], v.shape[2:], layer.stride, layer.padding, layer.dilation, layer.weight.shape[2:], strict=True)
        unread = [n - (m - 1) * s + 2 * p - d * (taps - 1) - 1 for n, m, s, p, d, taps in sides]  # pixels at the far end
        conv = F.conv_transpose1d if layer.weight.ndim == 3 else F.conv_transpose2d
        return conv(v, layer.weight, None, layer.stride, layer.padding, unread, layer.groups, layer.dilation)
    if isinstance(layer, Scale):
        return linear(layer, v)
    with torch.enable_grad():
        at = v.new_zeros(len(v), *shape).requires_grad_()
        image = linear(layer, at)
    return torch.autograd.grad(image, at, v, create_graph=torch.is_grad_enabled())[0]
