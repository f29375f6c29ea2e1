"""LipLT as a proof, on the images themselves: products of layers as matrices, where their smaller side allows it.

The recursion of :mod:`lipfast.bounds._liplt_bound` on the network as it is, zero padding included. A product whose smaller side
has at most so many entries is made explicit, by pushing unit vectors through its layers; of the others the layers' norms are
multiplied. Products of the tori must not stand beside these in one sum, since an image's activations are not those of a torus;
but both sums bound the same slope, so the smaller counts.

**Rounding.** Let g bound the norm of a product of layers and e the error of what its computed value does to a unit vector. A
layer of norm s, whose matrix of absolute values has a norm of at most a (the root of its largest row sum times its largest
column sum), makes g' = s g and e' = s e + gamma a (g + e), gamma for its number of terms forwards or backwards. A matrix of n
such images is then within sqrt(n) e of the exact one in Frobenius norm.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lipfast import rounding
from lipfast.bounds._gains import UP, fixed_gain
from lipfast.bounds._maps import linear, transposed
from lipfast.bounds.layers import AveragePool, Conv, Elementwise, Grafted, L2Pool, Linear, MaxMin, MaxPool, Scale, Sum, widened
from lipfast.bounds.network import Network
from lipfast.ops._gram_norm import gram_norm
from lipfast.ops.pairwise_distance import pairwise_distance

_NONLINEAR = (Elementwise, MaxMin, MaxPool, L2Pool)
_U = 2.0**-52


def explicit_bound(network: Network, reached: dict[int, Tensor], norms: dict[int, Tensor], largest: int) -> Tensor:  # (K, K)
    """l2 constants of all differences of two logits.

    Args:
        reached: for each nonlinearity a bound on the slope of its input.
        norms: of each Linear and Conv, by position.
        largest: side of a matrix that is still made.
    """
    walk = _Images(network, norms)
    nonlinear = [p for p, node in enumerate(network.nodes) if isinstance(node.layer, _NONLINEAR)]
    sources = [0, *nonlinear]
    gains = {j: walk.gains(j) for j in sources}
    known = walk.explicit(sources, nonlinear, gains, largest)
    slope = {0: torch.ones_like(walk.one)}
    product = [slope[0]]  # of the layers' norms since the last nonlinearity, which is less for some activations
    for p, node in enumerate(network.nodes[1:], 1):
        inputs = [product[i] for i in node.inputs]
        if isinstance(node.layer, Sum):
            product.append((inputs[0] + inputs[1]) * UP)
        elif p in nonlinear:
            at = node.inputs[0]
            parts = [known.get((at, j), gains[j][at][0]) * slope[j] for j in sources if j < p and at in gains[j]]
            total = torch.stack(parts).sum() * (1 + (len(parts) + 8) * _U)
            slope[p] = torch.minimum(torch.minimum(total, reached[p]), inputs[0])
            product.append(slope[p] * fixed_gain(node.layer, node.name, network.nodes[at].shape) * UP)
        else:
            product.append(inputs[0] * walk.measures(p)[0] * UP)
    end = len(network.nodes) - 1
    K = network.nodes[end].shape[0]
    rows = walk.backward(end, torch.eye(K, dtype=torch.float64, device=walk.one.device))
    parts = []
    for j, A in rows:
        slack = 1 + 4 * (A.shape[1] + 16) * torch.finfo(torch.float64).eps
        parts.append((pairwise_distance(A) * slack + 2 * gains[j][end][1]) * slope[j])
    apart = 1 - torch.eye(K, dtype=torch.float64, device=walk.one.device)
    return torch.stack(parts).sum(0) * (1 + (len(parts) + 8) * _U) * apart


class _Images:
    """The linear maps of a network between its nonlinearities, in float64."""

    def __init__(self, network: Network, norms: dict[int, Tensor]):
        self.network, self.norms = network, norms
        self.layers = [widened(node.layer) for node in network.nodes]
        self.one = next(iter(norms.values())).new_ones(()) if norms else torch.ones((), dtype=torch.float64)

    def turned(self, p: int, v: Tensor) -> Tensor:
        """R v, for v (N, C, ...)."""
        layer = self.layers[p]
        if isinstance(layer, MaxMin):
            return v - _mean_of_pairs(v)
        return v * _halves(layer)[1] if isinstance(layer, Elementwise) else v

    def kept(self, p: int, v: Tensor) -> Tensor | None:
        """C v; None for zero."""
        layer = self.layers[p]
        if isinstance(layer, MaxMin):
            return _mean_of_pairs(v)
        keep = _halves(layer)[0] if isinstance(layer, Elementwise) else 0.0
        return v * keep if isinstance(keep, Tensor) or keep else None

    def gains(self, source: int) -> dict[int, tuple[Tensor, Tensor]]:
        """g and e of the map from a source to every node that it reaches."""
        layer, zero = self.layers[source], torch.zeros_like(self.one)
        first = self.one * (_largest(_halves(layer)[1]) if isinstance(layer, Elementwise) else 1.0)
        found = {source: (first, 4 * _U * first if isinstance(layer, (Elementwise, MaxMin)) else zero)}
        for p, node in enumerate(self.network.nodes[source + 1 :], source + 1):
            inputs = [found[i] for i in node.inputs if i in found]
            if not inputs:
                continue
            layer, (g, e) = self.layers[p], inputs[0]
            if isinstance(layer, Sum):
                g, e = (torch.stack([v[i] for v in inputs]).sum() for i in (0, 1))
                found[p] = g * UP, (e + _U * g) * UP
            elif isinstance(layer, _NONLINEAR):
                size = _largest(_halves(layer)[0]) if isinstance(layer, Elementwise) else float(isinstance(layer, MaxMin))
                if size:
                    found[p] = g * size * UP, (e + 4 * _U * (g + e)) * size * UP
            else:
                norm, absolute, slack = self.measures(p)
                found[p] = g * norm * UP, (e * norm + slack * absolute * (g + e)) * UP
        return found

    def measures(self, p: int) -> tuple[Tensor | float, Tensor | float, float]:
        """A layer's norm, that of its absolute values, and the relative rounding of its sums."""
        layer, node = self.layers[p], self.network.nodes[p]
        if isinstance(layer, (Linear, Conv)):
            size = layer.weight.abs()
            outputs = size.flatten(1).sum(1).amax()
            grouped = size.unflatten(0, (layer.groups, -1)) if isinstance(layer, Conv) else size[None]
            inputs = grouped.transpose(1, 2).flatten(2).sum(2).amax()
            terms = max(layer.weight[0].numel(), layer.weight.shape[0] * layer.weight[0, 0].numel())
            absolute = (outputs * inputs).sqrt() * (1 + 2.0**-30)
            return self.norms[p], absolute, rounding.gamma(terms, torch.float64, size.device)
        if isinstance(layer, Scale):
            if layer.factor is None:
                return 1.0, 0.0, 0.0
            most = layer.factor.abs().amax().double()
            slack = 16 * torch.finfo(layer.factor.dtype).eps
            return most * (1 + slack), most, slack
        gain = fixed_gain(layer, node.name, self.network.nodes[node.inputs[0]].shape)
        return gain, gain, rounding.gamma(layer.terms if isinstance(layer, AveragePool) else 16, torch.float64, self.one.device)

    def forward(self, source: int, v: Tensor) -> Iterator[tuple[int, Tensor]]:  # (N, ...)
        """What the maps from a source make of vectors, at the inputs of all nonlinearities."""
        wanted = {n.inputs[0] for n in self.network.nodes if isinstance(n.layer, _NONLINEAR)}
        readers = self.network.readers()
        values: dict[int, Tensor] = {source: self.turned(source, v) if source else v}
        for p, node in enumerate(self.network.nodes[source:], source):
            inputs = [values.get(i) for i in node.inputs] if p > source else []
            if any(t is not None for t in inputs):
                value = self.through(p, inputs)
                if value is not None:
                    values[p] = value
            if p in values and p in wanted:
                yield p, values[p].flatten(1)
            for i in node.inputs:
                if readers[i][-1] == p:
                    values.pop(i, None)

    def through(self, p: int, inputs: list[Tensor | None]) -> Tensor | None:
        layer = self.layers[p]
        if isinstance(layer, Sum):
            parts = [v * sign for v, sign in zip(inputs, layer.signs, strict=True) if v is not None]
            return parts[0] if len(parts) == 1 else parts[0] + parts[1]
        (v,) = inputs
        assert v is not None
        return self.kept(p, v) if isinstance(layer, _NONLINEAR) else linear(layer, v)

    def backward(self, target: int, v: Tensor) -> Iterator[tuple[int, Tensor]]:  # (N, ...)
        """The rows v A R of the maps from all sources to a node, from the last source to the input."""
        flows = {target: v}
        for p in range(target, -1, -1):
            if p not in flows:
                continue
            flow, node = flows.pop(p), self.network.nodes[p]
            if p == 0 or isinstance(node.layer, _NONLINEAR):
                yield p, (self.turned(p, flow) if p else flow).flatten(1)
            if p == 0:
                continue
            layer, shape = self.layers[p], self.network.nodes[node.inputs[0]].shape
            if isinstance(layer, Sum):
                pulled = [flow * sign for sign in layer.signs]
            elif isinstance(layer, _NONLINEAR):
                back = self.kept(p, flow)
                pulled = [] if back is None else [back]
            else:
                pulled = [transposed(layer, flow, shape)]
            for i, t in zip(node.inputs, pulled, strict=False):
                flows[i] = flows[i] + t if i in flows else t

    def explicit(
        self, sources: list[int], targets: list[int], gains: dict[int, dict[int, tuple[Tensor, Tensor]]], largest: int
    ) -> dict[tuple[int, int], Tensor]:
        """Norms of products, by the position that they lead to and their source."""
        found: dict[tuple[int, int], Tensor] = {}

        def add(at: int, source: int, matrix: Tensor, pushed: int) -> None:
            g, e = gains[source][at]
            found[at, source] = torch.minimum(gram_norm(matrix, 12, e * pushed**0.5 * UP), g)

        basis = lambda p: torch.eye(math.prod(self.network.nodes[p].shape), dtype=torch.float64, device=self.one.device)
        small = lambda p: math.prod(self.network.nodes[p].shape) <= largest
        for at in sorted({self.network.nodes[k].inputs[0] for k in targets}):
            if small(at):
                rows = basis(at)
                for source, matrix in self.backward(at, rows.unflatten(1, self.network.nodes[at].shape)):
                    add(at, source, matrix, len(rows))
        for source in filter(small, sources):
            columns = basis(source)
            for at, matrix in self.forward(source, columns.unflatten(1, self.network.nodes[source].shape)):
                if (at, source) not in found:
                    add(at, source, matrix, len(columns))
        return found


def _halves(layer: Elementwise) -> tuple[float | Tensor, float | Tensor]:
    """c and r, r rounded up; of each unit, (1, ...), where units differ."""
    if isinstance(layer, Grafted):
        least, greatest = (t.double() for t in layer.unit_slopes)
        middle = (least + greatest) / 2
        turn = torch.nextafter(torch.maximum(greatest - middle, middle - least), middle.new_tensor(math.inf))
        return middle, torch.where(greatest == least, 0.0, turn)
    low, high = layer.slopes
    keep = (low + high) / 2
    return keep, math.nextafter(max(high - keep, keep - low), math.inf) if keep else max(high, -low)


def _largest(value: float | Tensor) -> float:
    return value.abs().amax().item() if isinstance(value, Tensor) else abs(value)


def _mean_of_pairs(v: Tensor) -> Tensor:  # (N, C, ...)
    a, b = v.chunk(2, 1)
    mean = (a + b) / 2
    return torch.cat([mean, mean], 1)
