"""Weights with orthonormal rows or columns, whatever the optimiser does to them.

The weight is seen as a tall matrix (N, K), K <= N; a wide one is transposed. For the maps "cayley" and "exponential" it is

    Q = base phi(S) E,        S = [[A, -B^T], [B, 0]],        E = [I; 0]  (N, K),

with phi the Cayley transform or the exponential, A the skew part of the first K rows of what is trained and B the others: a
trivialisation around ``base`` (Lezcano-Casado 2019, https://arxiv.org/abs/1909.09501, section 4), so that S = 0 may stand for
any Q, of determinant -1 too. The first K columns of a Cayley transform take an inverse of K rows only, that of I + A + B^T B,
whose symmetric part is at least I:

    phi(S) E = [2 X - I; -2 B X],        X = (I + A + B^T B)^-1.

``base`` (N, N) is Q0, where the weight starts, if that is square. Else it is never formed either: for the singular value
decomposition U s W^T of the first K rows of Q0 = [Q1; Q2],

    base = (I - 2 Z Z^T) diag(-P, I),        P = U W^T,        Z = [U sqrt((1 + s)/2); Q2 W / sqrt(2 (1 + s))]

is orthogonal and base E = Q0. The map "polar" is the nearest matrix with orthonormal columns to what is trained.
"""

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from lipfast.nn._weights import weight_of
from lipfast.ops._cayley_around import cayley_around
from lipfast.ops._matrices import inverse
from lipfast.ops.polar import polar
from lipfast.ops.skew_exponential import skew_exponential
from lipfast.rounding import accumulator

L = TypeVar("L", bound=nn.Module)
_MAPS = ("cayley", "exponential", "polar")


def orthogonal(layer: L, map: str = "cayley", name: str = "weight") -> L:
    """Gives a layer's weight orthonormal rows, or columns where it is taller than wide.

    A drop-in for :func:`torch.nn.utils.parametrizations.orthogonal` on lipfast's operators.

    Args:
        layer: changed in place. Its weight becomes the nearest orthonormal one; what is trained from there is
            ``layer.parametrizations.weight.original``, of the weight's shape: zeros for "cayley" and "exponential".
        map: "cayley", "exponential" or "polar".
        name: of a weight (O, I); of a convolution's (O, C, ...), which counts as a matrix (O, C ...); of another layer's with
            more dimensions, a batch (*, O, I).

    Returns:
        The layer, still of its class for :mod:`lipfast.bounds`. ``layer.weight = Q`` starts again from the orthonormal weight
        nearest to Q; ``torch.nn.utils.parametrize.remove_parametrizations(layer, name)`` leaves a plain weight, and
        ``torch.nn.utils.parametrize.cached()`` spares computing it at every use.

    A Linear layer is then 1-Lipschitz up to rounding. A convolution is if its windows do not overlap; in general its norm is
    at most the square root of the number of windows that share a pixel.

    Dtypes: float64, float32, and bfloat16/float16, computed in float32 and orthonormal up to their own rounding. Autocast
        does not reach the computation. For N by K, K <= N, "cayley" and "polar" take memory N K, "exponential" N N.
    Raises: ValueError for another map, or if the layer has no such plain parameter or it has another dtype or shape.

    >>> layer = orthogonal(nn.Linear(3, 2))
    >>> torch.dist(layer.weight @ layer.weight.T, torch.eye(2)).item() < 1e-5
    True
    """
    if map not in _MAPS:
        raise ValueError(f"orthogonal: map must be one of {', '.join(_MAPS)}, got {map!r}")
    weight = weight_of("orthogonal", layer, name)
    parametrize.register_parametrization(layer, name, Orthogonal(weight.shape, map, isinstance(layer, _ConvNd)))
    return layer


class Orthogonal(nn.Module):
    """The parametrization of :func:`orthogonal`, for weights of that shape."""

    corner: Tensor | None  # (*, K, K): P
    reflector: Tensor | None  # (*, N, K): Z; None for a square weight, whose base is P

    def __init__(self, shape: torch.Size, map: str, flat: bool):
        super().__init__()
        self.shape, self.map = shape, map
        self.lead = () if flat else tuple(shape[:-2])
        O, I = (shape[0], math.prod(shape[1:])) if flat else shape[-2:]
        self.wide, self.rows, self.columns = O < I, max(O, I), min(O, I)
        self.register_buffer("corner", None)
        self.register_buffer("reflector", None)

    def forward(self, raw: Tensor) -> Tensor:  # of the weight's shape, as is the result
        with torch.autocast(raw.device.type, enabled=False):
            tall = self._tall(raw.to(accumulator(raw.dtype)))
            if self.map == "polar":
                Q = polar(tall)
            elif self.map == "cayley" and self.rows == self.columns:
                assert self.corner is not None, "right_inverse has run"
                Q = cayley_around(self.corner.to(tall.dtype), tall)
            else:
                Q = self._around_base(_cayley_columns(tall) if self.map == "cayley" else _exponential_columns(tall))
        return (Q.mT if self.wide else Q).reshape(self.shape).to(raw.dtype)

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        if weight.shape != self.shape:
            raise ValueError(f"orthogonal: weight must be {tuple(self.shape)}, got {tuple(weight.shape)}")
        Q = polar(self._tall(weight.double()))
        if self.map == "polar":
            return (Q.mT if self.wide else Q).reshape(self.shape).to(weight.dtype)
        if self.rows > self.columns:
            U, s, Wh = torch.linalg.svd(Q[..., : self.columns, :])
            root = ((1 + s) / 2).sqrt()[..., None, :]
            Z = torch.cat([U * root, Q[..., self.columns :, :] @ Wh.mT / (2 * root)], -2)
            self.reflector = Z.to(weight.dtype)
            Q = U @ Wh
        self.corner = Q.to(weight.dtype)
        return torch.zeros_like(weight)

    def _tall(self, weight: Tensor) -> Tensor:  # (*, N, K)
        sides = (self.columns, self.rows) if self.wide else (self.rows, self.columns)
        matrix = weight.reshape(*self.lead, *sides)
        return matrix.mT if self.wide else matrix

    def _around_base(self, Q: Tensor) -> Tensor:  # (*, N, K)
        assert self.corner is not None, "right_inverse has run"
        corner = self.corner.to(Q.dtype)
        if self.reflector is None:
            return corner @ Q
        Z = self.reflector.to(Q.dtype)
        Q = torch.cat([-corner @ Q[..., : self.columns, :], Q[..., self.columns :, :]], -2)
        return Q - 2 * Z @ (Z.mT @ Q)

    def extra_repr(self) -> str:
        return f"map={self.map!r}"


def _cayley_columns(raw: Tensor) -> Tensor:  # (*, N, K)
    K = raw.shape[-1]
    A, B = raw[..., :K, :].double(), raw[..., K:, :].double()  # in float32 B^T B would lose |B|^2 eps of orthogonality
    eye = torch.eye(K, dtype=A.dtype, device=A.device)
    M = eye + (A - A.mT) / 2 + B.mT @ B
    X = inverse(M.reshape(-1, K, K)).reshape(M.shape)
    Q = torch.cat([2 * X - eye, -2 * B @ X], -2)
    if raw.dtype == torch.float64:  # a Newton step, which has no derivative along the orthonormal matrices
        Q = Q + (Q - Q @ (Q.mT @ Q)).detach() / 2
    return Q.to(raw.dtype)


def _exponential_columns(raw: Tensor) -> Tensor:  # (*, N, K)
    N, K = raw.shape[-2:]
    doubled = torch.cat([raw[..., :K, :], 2 * raw[..., K:, :]], -2)  # the skew part takes half
    return skew_exponential(F.pad(doubled, (0, N - K)))[..., :K]
