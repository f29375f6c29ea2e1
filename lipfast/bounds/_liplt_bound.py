"""LipLT as a proof: Lipschitz constants by loop transformation (Fazlyab et al. 2023, https://arxiv.org/abs/2310.00116).

An activation with slopes in [a, b] is phi(s) = c s + r psi(s), c = (a + b)/2, r = (b - a)/2, psi 1-Lipschitz. So a network is
linear but for its psi. With A_kj the linear map from the output of nonlinearity j (0: the input) to the input of nonlinearity
k, all psi cut,

    m_k  =  || A_k0 ||  +  sum_{0 < j < k} || A_kj R_j || m_j

bounds the slope of that input, and at the logits, whose differences are differences of rows,

    L_ab  =  || a_0 - b_0 ||  +  sum_{j > 0} || (a_j - b_j) R_j || m_j,        a_j, b_j rows of A_end,j.

For elementwise activations with c >= 0 this is at most the product of the layers' norms. MaxMin keeps the mean of a pair
and takes the absolute value of half its difference: C = P, the projector on means, R = 1 - P. What is not of this kind (max and
L2 pooling; and the cuts of :mod:`lipfast.bounds._torus`) has c = 0 and its own gain.

The norms of all A_kj are proven: of convolutions through their symbols on a torus (:mod:`lipfast.bounds._symbols`), of Linear
layers as matrices. A product of float64 matrices errs by gamma |P||Q|, in Frobenius norm by gamma ||P||_F ||Q||_F, and
carries ||P||_F times the error of Q on. The distance of two rows of A comes from the Gram matrix B of A as
(B_aa + B_bb - 2 B_ab + 4 e)^(1/2), with e the error of B in spectral norm.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from lipfast import rounding
from lipfast.bounds import _torus
from lipfast.bounds._explicit import explicit_bound
from lipfast.bounds._gains import UP, fixed_gain, scale_gain
from lipfast.bounds._symbols import Gram, Norms, Split, product_norms
from lipfast.bounds._torus import Place, Plan
from lipfast.bounds.layers import Conv, Elementwise, Input, Layer, Linear, MaxMin, Rearrange, Scale, Sum
from lipfast.bounds.network import Network, Node
from lipfast.bounds.norms import Operator
from lipfast.ops._gram_norm import gram_norm
from lipfast.ops.pairwise_distance import pairwise_distance


def liplt_bound(network: Network, explicit: int = 0) -> Tensor:  # (K, K) float64
    """l2 constants of all differences of two logits, (B, K); ``explicit``: see :mod:`lipfast.bounds._explicit`."""
    plan = _torus.plan(network)
    if plan.places[-1].torus is not None:  # the logits are pixels: read them as rows
        K, like = network.nodes[-1].shape[0], _like(network)
        end = Node("logits", Linear(torch.eye(K).to(like), None), (len(network.nodes) - 1,), (K,))
        network = Network((*network.nodes, end))
        plan = _torus.plan(network)
    splits = {
        position: split(node.layer, plan.places[position])
        for position, node in enumerate(network.nodes)
        if isinstance(node.layer, (Elementwise, MaxMin)) and position not in plan.cuts
    }
    nonlinear = splits.keys() | plan.cuts
    wanted = {i for position in nonlinear for i in network.nodes[position].inputs}
    norms = product_norms(network, plan, splits, wanted, _like(network))
    recursion = _Recursion(network, plan, splits, norms)
    found = recursion.constants()
    if not explicit:
        return found
    own = {
        position: torch.as_tensor(own_gain(node.layer, node.name, network.nodes[node.inputs[0]].shape))
        for position, node in enumerate(network.nodes)
        if isinstance(node.layer, (Linear, Conv))
    }
    return torch.minimum(found, explicit_bound(network, recursion.before, own, explicit))


def _like(network: Network) -> Tensor:
    weights = [node.layer.weight for node in network.nodes if isinstance(node.layer, (Linear, Conv))]
    return torch.zeros((), dtype=torch.float64, device=weights[0].device if weights else None)


def split(layer: Layer, place: Place) -> Split:
    """c and r over all inputs; where the place is larger than the image, of the masked activation."""
    if isinstance(layer, MaxMin):
        n = place.shape[0]
        one = torch.eye(n, dtype=torch.float64)
        mean = (one + one.roll(n // 2, 0)) / 2
        return Split(mean, one - mean) if place.full else Split(mean / 2, one - mean / 2)
    assert isinstance(layer, Elementwise), layer
    low, high = layer.slopes
    if not place.full:
        low, high = min(low, 0.0), max(high, 0.0)
    keep = (low + high) / 2
    turn = max(high - keep, keep - low)
    if not math.isfinite(turn):  # a learned slope may be lost: no bound, then
        return Split(math.nan, math.nan)
    while Fraction(keep) + Fraction(turn) < Fraction(high) or Fraction(keep) - Fraction(turn) > Fraction(low):
        turn = math.nextafter(turn, math.inf)
    return Split(keep, turn)


@dataclass(frozen=True)
class _Rows:
    """A product of layers that ends in a vector.

    Attributes:
        matrix: (m, n), or () for a multiple of 1.
        error: () of the matrix, in spectral norm.
        gram: of the product before the matrix; None: the matrix is all.
    """

    matrix: Tensor
    error: Tensor
    gram: Gram | None = None

    def norm(self, iterations: int) -> Tensor:
        if self.gram is not None:
            value, error = self.square()
            return gram_norm(value, iterations, error).sqrt() * UP
        if self.matrix.ndim == 0:
            return (self.matrix.abs() + self.error) * UP
        return gram_norm(self.matrix, iterations, self.error)

    def square(self) -> tuple[Tensor, Tensor]:
        """The product's Gram matrix (m, m) and its error in spectral norm."""
        assert self.gram is not None
        Q, M = self.gram.value, self.matrix
        whole = _frobenius(Q)
        if M.ndim == 0:
            error = (M.abs() + self.error).square() * self.gram.error + (2 * M.abs() + self.error) * self.error * whole
            return M.square() * Q, (error + 2.0**-50 * M.square() * whole) * UP
        g = rounding.gamma(2 * len(Q), torch.float64, Q.device)
        size = _frobenius(M)
        error = size.square() * (self.gram.error + 2 * g * whole) + (2 * size + self.error) * self.error * whole
        return M @ Q @ M.mT, error * UP

    def distances(self, K: int) -> Tensor:  # (K, K)
        apart = 1 - torch.eye(K, dtype=torch.float64, device=self.matrix.device)
        if self.gram is not None:
            B, error = self.square()
            diagonal = B.diagonal()
            error = 4 * error + 2.0**-48 * diagonal.abs().amax()
            return (diagonal[:, None] + diagonal - B - B.mT + error).clamp(min=0).sqrt() * UP * apart
        if self.matrix.ndim == 0:
            return (self.matrix.abs() + self.error) * (math.sqrt(2) * UP) * apart
        slack = 1 + 4 * (self.matrix.shape[-1] + 16) * torch.finfo(torch.float64).eps
        return (pairwise_distance(self.matrix) * slack + 2 * self.error) * UP * apart


class _Recursion:
    """From the norms of all products to the constants; node by node."""

    def __init__(self, network: Network, plan: Plan, splits: dict[int, Split], norms: Norms):
        self.network, self.plan, self.splits, self.norms = network, plan, splits, norms
        self.one = _like(network) + 1
        self.slope: dict[int, Tensor] = {}  # m_j of sources
        self.before: dict[int, Tensor] = {}  # and of their inputs, without the gain of a cut
        self.rows: list[dict[int, _Rows]] = []  # of vectors
        self.product: list[Tensor] = []  # a bound of each node's slope by the product of norms
        # only where it can be smaller
        self.needed = any(isinstance(s.keep, Tensor) or s.keep < 0 for s in splits.values())

    def constants(self) -> Tensor:
        for position, node in enumerate(self.network.nodes):
            nonlinear = position in self.plan.cuts or position in self.splits
            if nonlinear:
                self.slope[position] = self.reached(position, node)
            self.product.append(self.by_product(position, node))
            self.rows.append(self.vector(position, node) if self.plan.places[position].torus is None else {})
        K = self.network.nodes[-1].shape[0]
        found = _total([rows.distances(K) * self.slope[j] for j, rows in self.rows[-1].items()])
        return torch.maximum(found, found.mT)

    def reached(self, position: int, node: Node) -> Tensor:
        """m_k, of a cut times its gain."""
        if isinstance(node.layer, Input):
            return self.one
        inputs = [self.slope_of(i) for i in node.inputs]
        self.before[position] = inputs[0]
        if position in self.splits:
            return inputs[0]
        if isinstance(node.layer, Sum):
            return (inputs[0] + inputs[1]) * UP
        shape = self.network.nodes[node.inputs[0]].shape
        return inputs[0] * own_gain(node.layer, node.name, shape) * UP

    def slope_of(self, position: int) -> Tensor:
        """How fast a node's value can change."""
        place = self.plan.places[position]
        if place.wrapped:
            node = self.network.nodes[position]
            shape = self.network.nodes[node.inputs[0]].shape
            return self.slope_of(node.inputs[0]) * fixed_gain(node.layer, node.name, shape)
        if place.torus is None:
            terms = {j: rows.norm(4) * self.slope[j] for j, rows in self.rows[position].items()}
            shares = zip(terms, (torch.stack([*terms.values()]) / _total([*terms.values()])).tolist(), strict=True)
            for j in [j for j, share in shares if not share < 0.02]:  # the others, a tenth too large at most, may stay so
                terms[j] = self.rows[position][j].norm(11) * self.slope[j]
        else:
            terms = {j: norm * self.slope[j] for (at, j), norm in self.norms.spectral.items() if at == position}
        total = _total([*terms.values()])
        return torch.minimum(total, self.product[position]) if self.needed else total

    def by_product(self, position: int, node: Node) -> Tensor:
        infinity = self.one * math.inf
        if not self.needed:
            return infinity
        if position in self.plan.cuts:
            return self.slope[position]
        if position in self.splits:
            return self.slope[position] * fixed_gain(node.layer, node.name, ()) * UP
        inputs = [self.product[i] for i in node.inputs]
        if isinstance(node.layer, Sum):
            return (inputs[0] + inputs[1]) * UP
        if position in self.norms.layer:
            return inputs[0] * self.norms.layer[position] * UP
        return inputs[0] * own_gain(node.layer, node.name, self.network.nodes[node.inputs[0]].shape) * UP

    def vector(self, position: int, node: Node) -> dict[int, _Rows]:
        zero = torch.zeros_like(self.one)
        if position in self.plan.cuts:
            return {position: _Rows(self.one, zero)}
        layer = node.layer
        if isinstance(layer, Linear) and self.plan.places[node.inputs[0]].torus is not None:
            return {j: _Rows(self.one, zero, gram) for (at, j), gram in self.norms.grams.items() if at == position}
        inputs = [self.rows[i] for i in node.inputs]
        if isinstance(layer, Sum):
            return self.summed(layer, *inputs)
        (first,) = inputs
        if isinstance(layer, Rearrange):
            return first
        if isinstance(layer, Linear):
            return {j: _after(layer.weight.double(), rows) for j, rows in first.items()}
        if isinstance(layer, Scale):
            if layer.factor is None:
                return first
            factor = _torus.factors(layer, self.plan.places[node.inputs[0]])
            assert factor is not None
            slack = 16 * torch.finfo(layer.factor.dtype).eps
            return {j: _scaled(rows, factor, slack) for j, rows in first.items()}
        split = self.splits[position]
        turn = torch.as_tensor(split.turn, dtype=torch.float64, device=self.one.device)
        fresh = _Rows(turn, 4 * 2.0**-52 * _frobenius(turn) if turn.ndim else zero)
        if isinstance(split.keep, float):
            number = self.one * split.keep
            kept = {j: _times(rows, number) for j, rows in first.items()} if split.keep else {}
        else:
            kept = {j: _after(split.keep.to(self.one.device), rows) for j, rows in first.items()}
        return {**kept, position: fresh}

    def summed(self, layer: Sum, left: dict[int, _Rows], right: dict[int, _Rows]) -> dict[int, _Rows]:
        total = {j: _times(rows, self.one * layer.signs[0]) for j, rows in left.items()}
        for j, rows in right.items():
            rows = _times(rows, self.one * layer.signs[1])
            if j not in total:
                total[j] = rows
                continue
            total[j] = _sum(total[j], rows)
        return total


def _sum(left: _Rows, right: _Rows) -> _Rows:
    assert left.gram is right.gram
    a, b = left.matrix, right.matrix
    if a.ndim != b.ndim:  # a matrix and a multiple of 1
        a, b = (t if t.ndim else t * torch.eye(max(len(m) for m in (a, b) if m.ndim)).to(t) for t in (a, b))
    return _Rows(a + b, (left.error + right.error + 2.0**-52 * (_frobenius(a) + _frobenius(b))) * UP, left.gram)


def _after(weight: Tensor, rows: _Rows) -> _Rows:
    size = _frobenius(weight)
    if rows.matrix.ndim == 0:
        matrix = weight * rows.matrix
        return replace(rows, matrix=matrix, error=(size * rows.error + 2.0**-52 * _frobenius(matrix)) * UP)
    g = rounding.gamma(weight.shape[1], torch.float64, weight.device)
    return replace(rows, matrix=weight @ rows.matrix, error=size * (rows.error + g * _frobenius(rows.matrix)) * UP)


def _times(rows: _Rows, number: Tensor) -> _Rows:
    matrix = rows.matrix * number
    return replace(rows, matrix=matrix, error=(rows.error * number.abs() + 2.0**-52 * _frobenius(matrix)) * UP)


def _scaled(rows: _Rows, factor: Tensor, slack: float) -> _Rows:
    matrix = torch.diag(factor) * rows.matrix if rows.matrix.ndim == 0 else factor[:, None] * rows.matrix
    most = factor.abs().amax() * (1 + slack)
    return replace(rows, matrix=matrix, error=(rows.error * most + 2 * (slack + 2.0**-52) * _frobenius(matrix)) * UP)


def _total(terms: list[Tensor]) -> Tensor:
    """The sum of products of two numbers >= 0, rounded up."""
    return torch.stack(terms).sum(0) * (1 + (len(terms) + 8) * 2.0**-52)


def _frobenius(matrix: Tensor) -> Tensor:
    return matrix.norm() * (1 + 2.0**-30)


def own_gain(layer: Layer, name: str, shape: tuple[int, ...]) -> Tensor | float:
    """The l2 norm of a layer by itself, from above."""
    if isinstance(layer, (Linear, Conv)):
        return Operator(name, layer, layer, 0, 0, shape, 0.0).bound()
    if isinstance(layer, Scale):
        return scale_gain(layer, "bound")
    return fixed_gain(layer, name, shape)
