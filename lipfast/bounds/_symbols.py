"""Norms of products of layers on a torus, from their symbols, rounding included.

The unitary Fourier transform of a torus of N pixels turns a convolution into multiplication by a matrix for each frequency w,
W(w) = sum_t W_t exp(2 pi i w (d t - p) / N). Keeping every s-th of the N pixels adds the s frequencies w + a N / s, times
s^(-1/2). So a product of layers is a matrix for each frequency of its output, with a column for each channel and each of the
frequencies of its input that fall onto it, and its norm is the largest of theirs. With tori of N = g M pixels, all frequencies
w + M b, b < g, belong to one base frequency w < M, and nothing leads from one base frequency to another: they are walked
through in parts. Of w and -w, which are conjugates, one does.

**Rounding.** For every product S of layers a number ``error`` is carried with || computed - exact ||_2 <= error at all
frequencies. Entries of W(w) err by at most gamma_(n + 64) sum_t |W_t|, n taps (as in lipfast.ops.conv2d_norm_bound), in
Frobenius norm o = gamma_(n + 64) sqrt(n) ||W||_F. A computed complex product errs by gamma_(4C) |W||S|, so

    error'  <=  (||W|| + 2 o) error + (o + gamma_(4C) ||W(w)||_F) ||S||_F,

``||W||`` the torus norm; sums, factors and means likewise. :func:`lipfast.ops._gram_norm.gram_norm` then bounds the
norms of all matrices so near. A product that grows too large is given up for its norm: S = 0, error = the norm.

**Images made vectors.** A Linear layer with rows R, laid onto the torus, has the symbol row R(w) = N^(-1) sum_x R_x
exp(2 pi i w x / N) and the product R S the Gram matrix Q = sum_w R(w) S(w) S(w)^H R(w)^H, real. With |G - S S^H| <= e_G,

    ||Q - exact||  <=  ||R||_F^2 ( (gamma_T + 3 gamma_(HW + 64) sqrt(HW)) max_w ||G(w)||_F + e_G ),     T = 8 C N^2 terms.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.bounds._gains import UP
from lipfast.bounds._torus import Pair, Place, Plan, Step, Torus, factors, shift
from lipfast.bounds.layers import AveragePool, Conv, Elementwise, Linear, MaxMin, Pad, Rearrange, Scale, Sum
from lipfast.bounds.network import Network
from lipfast.ops._gram_norm import gram_norm, largest_norm
from lipfast.rounding import gamma

_PART = 2**21  # complex numbers of the largest product in work at a time
_LARGEST = 2**20  # of one product at one base frequency
_U = 2.0**-52


@dataclass(frozen=True)
class Product:
    """A product of layers at some frequencies.

    Attributes:
        value: (F, g, g, C, columns) complex; (C, C) or () real if it is the same at all frequencies: a matrix or a multiple of
            1; None for zero.
        error: () of every frequency's matrix in spectral norm.
    """

    value: Tensor | None
    error: Tensor


@dataclass
class Gram:
    """Q = A A^T of a product A that ends in a vector, within ``error`` in spectral norm."""

    value: Tensor  # (m, m)
    error: Tensor


@dataclass
class Norms:
    """Of all products of a network on its tori; keys are (position, source).

    Attributes:
        spectral: bounds on products up to a position, where they were asked for.
        layer: of each convolution alone.
        grams: of products up to a Linear layer that reads an image.
    """

    spectral: dict[tuple[int, int], Tensor]
    layer: dict[int, Tensor]
    grams: dict[tuple[int, int], Gram]


@dataclass(frozen=True)
class Split:
    """An activation phi(x) = keep x + turn psi(x), psi 1-Lipschitz: numbers, or matrices of channels for MaxMin."""

    keep: float | Tensor
    turn: float | Tensor


def product_norms(network: Network, plan: Plan, splits: dict[int, Split], wanted: set[int], like: Tensor) -> Norms:
    """``wanted``: positions whose products' norms are asked for. ``like``: a float64 tensor of the device."""
    found = Norms({}, {}, {})
    for torus in {id(p.torus): p.torus for p in plan.places if p.torus is not None}.values():
        for frequencies, weight in _base_frequencies(network, plan, torus, like):
            _Walk(network, plan, splits, wanted, torus, frequencies, weight, found).run()
    return found


def _base_frequencies(network: Network, plan: Plan, torus: Torus, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Half of all base frequencies (F, 2) and how often each counts (F,), some at a time."""
    height, width = (torch.arange(m, device=like.device) for m in torus.M)
    all_of_them = torch.cartesian_prod(height, width)
    sizes = torch.tensor(torus.M, device=like.device)
    mirrored = (-all_of_them) % sizes
    place = lambda w: w[:, 0] * torus.M[1] + w[:, 1]
    half = all_of_them[place(all_of_them) <= place(mirrored)]
    count = torch.where(((-half) % sizes == half).all(1), 1.0, 2.0).double()
    step = max(1, _PART // max(1, min(_LARGEST, _largest(network, plan, torus))))
    yield from zip(half.split(step), count.split(step), strict=True)


def _largest(network: Network, plan: Plan, torus: Torus) -> int:
    """Numbers of the largest matrix at one base frequency that any step makes."""
    channels = [(p.shape[0], math.prod(p.copies)) for p in plan.places if p.torus is torus]
    rows = [
        node.shape[0] * place.shape[0] * math.prod(place.copies)
        for node in network.nodes
        if isinstance(node.layer, Linear) and (place := plan.places[node.inputs[0]]).torus is torus
    ]
    return max([max(c for c, _ in channels) * max(c * g for c, g in channels), *rows])


class _Walk:
    """One pass through a component for some base frequencies."""

    def __init__(
        self,
        network: Network,
        plan: Plan,
        splits: dict[int, Split],
        wanted: set[int],
        torus: Torus,
        frequencies: Tensor,  # (F, 2)
        count: Tensor,  # (F,) float64
        found: Norms,
    ):
        self.network, self.plan, self.splits, self.wanted, self.torus = network, plan, splits, wanted, torus
        self.frequencies, self.count, self.found = frequencies, count, found
        self.zero = count.new_zeros(())

    def run(self) -> None:
        readers = self.network.readers()
        values: list[dict[int, Product] | None] = []
        for position, node in enumerate(self.network.nodes):
            place = self.plan.places[position]
            value: dict[int, Product] | None = None
            if position in self.plan.cuts:
                value = {position: Product(torch.ones_like(self.zero), self.zero)}
            elif isinstance(node.layer, Linear):
                if (before := values[node.inputs[0]]) is not None and self.plan.places[node.inputs[0]].torus is self.torus:
                    self.end(position, node.layer.weight.double(), self.plan.places[node.inputs[0]], before)
            elif place.torus is self.torus:
                inputs = [values[i] for i in node.inputs]
                value = self.value(position, [v for v in inputs if v is not None])
            if place.torus is not self.torus:
                value = None
            values.append(value)
            if value is not None and position in self.wanted:
                for source, product in value.items():
                    self.record(self.found.spectral, (position, source), product)
            for i in node.inputs:
                if readers[i][-1] == position:
                    values[i] = None

    def record(self, into: dict, key, product: Product) -> None:
        floor = into.get(key, self.zero)
        into[key] = torch.maximum(floor, self.norm(product, floor))

    def norm(self, product: Product, floor: Tensor) -> Tensor:
        """A bound on the norm at all frequencies, or a number up to ``floor`` if none is above it."""
        value = product.value
        if value is None:
            return product.error
        if value.ndim < 5:
            return (value.abs() if value.ndim == 0 else gram_norm(value, 12)) * UP + product.error * UP
        return largest_norm(value.flatten(0, 2), 12, floor=floor)[0] * UP + product.error * UP

    def value(self, position: int, inputs: list[dict[int, Product]]) -> dict[int, Product]:
        node, place = self.network.nodes[position], self.plan.places[position]
        layer, first = node.layer, inputs[0]
        before = self.plan.places[node.inputs[0]]
        if isinstance(layer, (Conv, AveragePool)):
            return self.convolved(position, self.plan.steps[position], before, first)
        if isinstance(layer, Sum):
            return self.summed(layer, *inputs)
        if isinstance(layer, Rearrange):
            return first
        if isinstance(layer, Scale):
            if layer.factor is None:
                return first
            factor = factors(layer, before)
            assert factor is not None
            slack = 16 * torch.finfo(layer.factor.dtype).eps
            return {j: self.scaled(p, factor, slack) for j, p in first.items()}
        if isinstance(layer, Pad):
            down, right = shift(layer)
            phase = (
                self.phases(before, 0, torch.tensor([-down]))[:, :, None]
                * self.phases(before, 1, torch.tensor([-right]))[:, None]
            )
            return {j: self.turned(p, phase[..., 0], place.shape[0]) for j, p in first.items()}
        split = self.splits[position]
        assert isinstance(layer, (Elementwise, MaxMin)), layer
        kept = (
            {} if isinstance(split.keep, float) and split.keep == 0 else {j: self.kept(p, split.keep) for j, p in first.items()}
        )
        turn = torch.as_tensor(split.turn, dtype=torch.float64, device=self.zero.device)
        return {**kept, position: Product(turn, 4 * _U * _frobenius(turn) if turn.ndim else self.zero)}

    def kept(self, product: Product, keep: float | Tensor) -> Product:
        """Times a number, or the mean of pairs of channels times one, which is what a matrix stands for."""
        value, error = product.value, product.error
        if isinstance(keep, float):
            size = abs(keep)
            if value is None:
                return Product(None, error * size * UP)
            return Product(value * keep, (error * size + _U * size * _frobenius(value)) * UP)
        if value is None:
            return Product(None, error * UP)  # of norm 1 at most
        keep = keep.to(value)
        value = keep * value if value.ndim == 0 else keep @ value
        return Product(value, (error + 8 * _U * _frobenius(value)) * UP)

    def scaled(self, product: Product, factor: Tensor, slack: float) -> Product:
        """``factor``: (C,), each within ``slack`` of the exact one, relatively."""
        most = factor.abs().amax() * (1 + slack)
        value = product.value
        if value is None:
            return Product(None, product.error * most * UP)
        value = torch.diag(factor) * value if value.ndim == 0 else factor[:, None] * value
        return Product(value, (product.error * most + 2 * (slack + _U) * _frobenius(value)) * UP)

    def turned(self, product: Product, phase: Tensor, channels: int) -> Product:  # (F, g, g)
        value = product.value
        if value is None:
            return product
        if value.ndim == 0:
            value = value * torch.eye(channels, dtype=torch.float64, device=phase.device)
        value = phase[..., None, None] * value
        return Product(value, (product.error + gamma(32, torch.float64, value.device) * _frobenius(value)) * UP)

    def summed(self, layer: Sum, left: dict[int, Product], right: dict[int, Product]) -> dict[int, Product]:
        total = dict(left) if layer.signs[0] > 0 else {j: Product(_negative(p.value), p.error) for j, p in left.items()}
        for j, product in right.items():
            value = product.value if layer.signs[1] > 0 else _negative(product.value)
            if j not in total:
                total[j] = Product(value, product.error)
                continue
            other, error = total[j].value, total[j].error + product.error
            if value is None or other is None:
                total[j] = Product(other if value is None else value, error * UP)
            else:
                both = _sum(other, value)
                size = _frobenius(other) + _frobenius(value)
                total[j] = Product(both, (error + _U * size) * UP)
        return total

    def convolved(self, position: int, step: Step, place: Place, inputs: dict[int, Product]) -> dict[int, Product]:
        weight = step.weight.to(self.zero.device)
        symbol = self.symbol(step, weight, place)
        taps = weight[0, 0].numel()
        own = gamma(taps + 64, torch.float64, weight.device) * taps**0.5 * _frobenius(weight)
        if step.stride != (1, 1):
            own = own + 4 * _U * _frobenius(symbol)  # of dividing by the root of the strides
        after = self.plan.places[position]
        floor = self.found.layer.get(position, self.zero)
        alone = _fold(symbol, step.stride, after.copies)
        here = largest_norm(alone.flatten(0, 2), 12)[0] + own
        self.found.layer[position] = torch.maximum(floor, here * UP)
        rounding = gamma(4 * weight.shape[1], torch.float64, weight.device) * _frobenius(symbol)
        out = {}
        for j, product in inputs.items():
            value, error = product.value, (here + 2 * own) * product.error
            if value is not None and value.ndim == 0:
                out[j] = Product(alone * value, (error + (own + _U * _frobenius(alone)) * value.abs()) * UP)
            elif value is not None and len(weight) * value.shape[-1] * math.prod(place.copies) > _LARGEST:
                out[j] = Product(None, here * self.norm(product, self.zero) * UP)
            elif value is not None:
                image = _fold(symbol @ value.to(symbol.dtype), step.stride, after.copies)
                out[j] = Product(image, (error + (own + rounding) * _frobenius(value) + 4 * _U * _frobenius(image)) * UP)
            else:
                out[j] = Product(None, error * UP)
        return out

    def symbol(self, step: Step, weight: Tensor, place: Place) -> Tensor:  # (F, g, g, O, C)
        sides = [torch.arange(k) * d - p for k, d, p in zip(weight.shape[2:], step.dilation, step.padding, strict=True)]
        down, across = (self.phases(place, side, positions) for side, positions in enumerate(sides))  # (F, g, taps)
        phase = down[:, :, None, :, None] * across[:, None, :, None, :]  # (F, g, g, taps, taps)
        flat = weight.flatten(2).permute(2, 0, 1).flatten(1)  # (taps, O C)
        parts = torch.view_as_real(phase.flatten(3)).movedim(-1, 0) @ flat
        return torch.complex(*parts).unflatten(-1, weight.shape[:2])

    def phases(self, place: Place, side: int, positions: Tensor) -> Tensor:  # (F, g, positions)
        """exp(2 pi i w x / N) along one side, for all frequencies w of the place."""
        g, M = place.copies[side], self.torus.M[side]
        N, device = g * M, self.frequencies.device
        w = self.frequencies[:, side, None] + M * torch.arange(g, device=device)
        turns = (w[..., None] * positions.to(device)) % N
        angle = torch.where(2 * turns > N, turns - N, turns).double() * (2 * math.pi / N)
        return torch.polar(torch.ones_like(angle), angle)

    def end(self, position: int, weight: Tensor, place: Place, inputs: dict[int, Product]) -> None:
        """Adds these frequencies' share of every Gram matrix of a Linear layer's rows (m, C H W)."""
        C, H, W = place.shape
        assert place.order is not None
        image = torch.zeros_like(weight)
        image[:, place.order.to(weight.device)] = weight
        N = place.N
        down, across = (self.phases(place, side, torch.arange(n)) for side, n in ((0, H), (1, W)))
        rows = torch.einsum("mchw,fah,fbw->fabmc", image.view(-1, C, H, W).to(down.dtype), down, across) / math.sqrt(
            N[0] * N[1]
        )
        size = _frobenius(weight).square()
        of = lambda terms: gamma(terms, torch.float64, weight.device)
        rounding = of(8 * C * N[0] * N[1] + 64) + 3 * of(H * W + 64) * (H * W) ** 0.5
        for j, product in inputs.items():
            value, error = product.value, product.error
            share, slack = torch.zeros_like(weight @ weight.mT), error.square()
            if value is not None:
                if value.ndim == 0:
                    value = value * torch.eye(C, dtype=torch.float64, device=weight.device)
                S = value.to(down.dtype)
                G = S @ S.mH
                made = rows @ G
                flat = lambda t: torch.view_as_real(t).movedim(3, 0).flatten(1)  # (m, F g g C 2)
                share = flat(made * self.count[:, None, None, None, None]) @ flat(rows).mT
                whole = _frobenius(S)
                slack = of(4 * S.shape[-1]) * whole.square() + error * (2 * whole + error) + rounding * _frobenius(G)
            gram = self.found.grams.setdefault((position, j), Gram(torch.zeros_like(share), self.zero))
            gram.value = gram.value + share
            gram.error = torch.maximum(gram.error, slack * size * UP)


def _fold(value: Tensor, stride: Pair, copies: Pair) -> Tensor:
    """(F, s g, s g, C, columns) -> (F, g, g, C, s s columns): what falls onto one frequency when pixels are dropped."""
    if stride == (1, 1):
        return value
    split = value.unflatten(2, (stride[1], copies[1])).unflatten(1, (stride[0], copies[0]))  # (F, s, g, s, g, C, columns)
    return split.permute(0, 2, 4, 5, 1, 3, 6).flatten(4) / math.sqrt(stride[0] * stride[1])


def _frobenius(value: Tensor) -> Tensor:
    """The largest of the matrices' Frobenius norms, rounded up; of fewer than five dimensions, of the whole."""
    real = torch.view_as_real(value) if value.is_complex() else value
    if value.ndim < 5:
        return real.norm() * (1 + 2.0**-30)
    return real.flatten(3).norm(dim=-1).amax() * (1 + 2.0**-30)


def _negative(value: Tensor | None) -> Tensor | None:
    return None if value is None else -value


def _sum(left: Tensor, right: Tensor) -> Tensor:
    if left.ndim == 0 and right.ndim == 0:
        return left + right
    if left.ndim == 0 or right.ndim == 0:
        value, number = (right, left) if left.ndim == 0 else (left, right)
        return value + number * torch.eye(value.shape[-1], dtype=value.dtype, device=value.device)
    return left + right
