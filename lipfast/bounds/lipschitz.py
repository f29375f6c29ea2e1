"""Lipschitz constants of a network over all inputs."""

import math

import torch
from torch import Tensor, nn

from lipfast.bounds._linf import lipschitz_inf
from lipfast.bounds._liplt_bound import liplt_bound
from lipfast.bounds._maps import factor_of
from lipfast.bounds._product import product
from lipfast.bounds.liplt import liplt
from lipfast.bounds.network import Network, read
from lipfast.bounds.norms import Norms, check_kind
from lipfast.bounds.norms import norms as norms_of

METHODS = ("liplt", "product")


def lipschitz(
    model: nn.Module,
    input_shape: tuple[int, ...],
    p: float = 2,
    method: str = "liplt",
    kind: str = "bound",
    norms: Norms | None = None,
    iterations: int = 10,
    explicit: int = 0,
) -> Tensor:  # (K, K)
    """Lipschitz constants of all differences of two logits: ``|(z_i - z_j)(x) - (z_i - z_j)(y)| <= L_ij ||x - y||_p``.

    Args:
        model: made of the layers that :mod:`lipfast.bounds.network` names.
        input_shape: of one sample; distances are measured between such inputs, in their units.
        p: 2 or inf.
        method: "product" of the layers' norms (Szegedy et al. 2013), a residual connection adding its branches, the last layer
            row by row: with its rows w_i, ``||w_i - w_j||`` times the constant of the layers before (Tsuzuki et al. 2018,
            https://arxiv.org/abs/1802.04034). "liplt", loop transformation (Fazlyab et al. 2023,
            https://arxiv.org/abs/2310.00116): norms of products of layers in place of products of norms; never above "product".
        kind: "bound", proven, rounding included, float64, without gradient; "estimate": differentiable in the parameters. For
            p = 2 its norms are power iterations, which approach them from below; :func:`lipfast.bounds.liplt` keeps their
            vectors.
        norms: for p = 2 and "product", or the bound of "liplt": from :func:`lipfast.bounds.norms`, of the same kind and
            parameters, to save their computation.
        iterations: of the power iterations of an estimate.
        explicit: for the bound of "liplt", p = 2: products of layers whose smaller side is at most this are formed as matrices,
            which tightens the constants of zero-padded convolutions; the work grows with its cube.

    Returns:
        (K, K), symmetric, with a zero diagonal.

    Raises: ValueError for an unknown p, method or kind, norms of another kind or model, fewer than two logits, a layer
        without a rule, which it names, or for "liplt" one with NaN or Inf in its weights.

    >>> lipschitz(nn.Linear(2, 2, bias=False).requires_grad_(False), (2,)).shape
    torch.Size([2, 2])
    """
    if p not in (2, math.inf):
        raise ValueError(f"p: 2 or inf expected, got {p}")
    if method not in METHODS:
        raise ValueError(f"method: {' or '.join(map(repr, METHODS))} expected, got {method!r}")
    for name, value in (("iterations", iterations), ("explicit", explicit)):
        if value < 0:
            raise ValueError(f"{name}: 0 or more expected, got {value}")
    check_kind(kind)
    shape = tuple(input_shape)
    with torch.set_grad_enabled(kind == "estimate" and torch.is_grad_enabled()):
        network = read(model, shape)
        logits = network.nodes[-1].shape
        if len(logits) != 1 or logits[0] < 2:
            raise ValueError(f"model: logits (B, K) of two classes or more expected, got (B, {str(logits)[1:]}")
        if method == "liplt" and kind == "bound":
            _check_finite(network)
        if p == math.inf:
            return lipschitz_inf(network, method, kind)
        if method == "liplt" and kind == "estimate":
            return liplt(model, shape, iterations).pairwise
        if method == "product":
            return product(network, kind, norms_of(model, shape, kind, iterations) if norms is None else norms)
        found = liplt_bound(network, explicit)
        if norms is None:
            # Power iteration approaches the norms from below: what is clearly under its product needs no proof of that.
            estimate = product(network, "estimate", norms_of(model, shape, "estimate")).double()
            if bool((found <= 0.99 * estimate).all() & estimate.isfinite().all()):
                return found
            norms = norms_of(model, shape)
        return torch.fmin(found, product(network, kind, norms))  # NaN, where numbers overflow, says nothing


def _check_finite(network: Network) -> None:
    for node in network.nodes:
        factor = factor_of(node.layer)
        if factor is not None and not factor.isfinite().all():
            raise ValueError(f"layer {node.name!r}: finite weights expected, got NaN or Inf; load an unbroken checkpoint")
