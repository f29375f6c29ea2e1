"""Upper bounds on spectral norms, from Gram matrices in float64, rounding included.

Everywhere P is a computed Gram matrix, A A^H or A^H A, the smaller, of A scaled by a power of two so that ||A||_F >= 1/2. A
computed product P of G and G^H has |P - G G^H| <= gamma |G| |G|^H, entry by entry, whatever its order of summation
(lipfast.rounding). gamma counts 4k terms for a complex sum of k: 2k real products for each part, or Gauss' three products.
Its sixteen spare terms also pay for underflow, which loses at most 2^-1074 an entry, and for a few roundings of P's size.
Not covered: float64 products that a library emulates in lower precision. Three ways, of which the smallest result is taken:

**Gram iteration** (Delattre et al. 2023, https://arxiv.org/abs/2305.16173, section 3): P_1 = P, P_{t+1} = G_t G_t^H, where
G_t = P_t / 2^e has a Frobenius norm in [1/2, 1). In real arithmetic the norms of A, P_1, ... are squares of each other, and
||G_T||_2 <= ||G_T||_F ends the chain above ||A||_2, by a factor of at most r^(2^-(T+1)) for r singular values: T = 12 gives
1.0009 at r = 1024. With rounding, since ||G||_2^2 = ||G G^H||_2 for every matrix G, Hermitian or not,

    ||G_t||_2^2  <=  2^e ||G_{t+1}||_2 + gamma ||G_t||_F^2,        G_0 = A,

which is applied backwards from ||G_T||_2 <= min(||G_T||_F, sqrt(||G_T||_1 ||G_T||_inf)). Nothing is assumed of the
condition of A. The scalars' own roundings are relative, below 4 eps a step; powers of two are exact. The slack is
gamma r <= r (k + 16) eps relative, 2e-10 at r = k = 1024.

**A multiple of an orthogonal matrix**, nearly, where every step of the chain still loses the factor of r: the first product
tells more. For the mean c of its diagonal, or any other number,

    ||A||_2^2  <=  c + ||P - c I||_2 + gamma ||A||_F^2,

with the norm on the right bounded as above. As ||A||_2^2 >= c up to rounding, it is seen to be enough where it is.

**A Cholesky factor**, on a CPU, where eigenvalues cost less than a dozen products. For any matrix L and number s

    ||A||_2^2  =  lambda_max(A A^H)  <=  lambda_max(A A^H + L L^H)  <=  s + ||A A^H + L L^H - s I||_2,

so no more is asked of L and s than that the last norm, which is computed from P and L L^H, is small: s is the largest
eigenvalue of P, as computed, and a little; L the factor of s I - P. The errors of both products, gamma ||A||_F^2 and
gamma ||L||_F^2, and of s I - P are added. The result is within 2^-21 of the norm, relative (of matrices below 256, or for more
than 18 iterations, 2^-47 r), and twice the chain's slack. Where there is no such factor, the chain goes on.
"""

import torch
from torch import Tensor

from lipfast.rounding import gamma

_SIDE = 256  # of a product from which on halving pays, and of a matrix from which on Lanczos does
MANY = 7  # products for which eigenvalues are had
_STEPS = 64  # of Lanczos' iteration
_EPS = torch.finfo(torch.float64).eps


def gram_norm(
    matrix: Tensor,  # (*, M, N)
    iterations: int,
    error: Tensor | None = None,  # (*)
    chain: bool = False,
) -> Tensor:  # (*)
    """A bound on the spectral norm of a float64 or complex128 matrix, or of any that is ``error`` (spectral norm) from it.

    At most ``min(M, N) ** 2 ** -(iterations + 1)`` times the norm, and rounding. ``chain``: by the Gram iteration alone.
    """
    M, N = matrix.shape[-2:]
    if M * N == 0:
        return matrix.real.sum((-2, -1)) if error is None else error.clone()
    first, G = rescaled(matrix, parts_of(matrix).abs().flatten(matrix.ndim - 2).amax(-1))
    steps, near = [], None
    for t in range(iterations):
        norm, product, slack, rest_slack = _product(G)
        if t == 0 and not chain:
            near, least = _near_orthogonal(product, norm, slack)
            enough = near <= least * min(M, N) ** 2.0 ** -(iterations + 1)
            if not enough.all() and iterations >= MANY and matrix.device.type == "cpu":
                factored, found = _by_cholesky(product, norm, slack, rest_slack, iterations)
                near, enough = torch.minimum(near, factored), enough | found
            if enough.all():
                near = next_up(scaled(near, first))
                return near if error is None else next_up(near + error)
        exponent, G = rescaled(product, frobenius(product))
        steps.append((norm, exponent, slack))
    size = _modulus(G)
    rows, columns = size.sum(-1).amax(-1), size.sum(-2).amax(-1)
    bound = torch.minimum(frobenius(G), (rows * columns).sqrt() * (1 + gamma(M + N, torch.float64, G.device)))
    for norm, exponent, slack in reversed(steps):
        bound = (scaled(bound, exponent) + slack * norm.square()).sqrt() * (1 + 4 * _EPS)
    bound = next_up(scaled(bound if near is None else torch.minimum(bound, near), first))
    return bound if error is None else next_up(bound + error)


def _near_orthogonal(product: Tensor, norm: Tensor, slack: float) -> tuple[Tensor, Tensor]:  # (*, r, r), (*) -> (*), (*)
    """A bound that is close where ``product``, computed from A, is nearly a multiple of I; and what ||A|| hardly is below."""
    mean = product.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    rest = product.clone()
    rest.diagonal(dim1=-2, dim2=-1).sub_(mean[..., None])
    size = frobenius(rest)
    if (size <= 2.0**-4 * mean).all():  # otherwise not close enough to spend products on
        size = gram_norm(rest, 4, chain=True)
    bound = (mean + size * (1 + 4 * _EPS) + slack * norm.square()).sqrt() * (1 + 4 * _EPS)
    return bound, mean.sqrt()


def largest_norm(
    batch: Tensor,  # (B, M, N), B >= 1
    iterations: int,
    error: Tensor | None = None,  # ()
    floor: Tensor | None = None,  # ()
) -> tuple[Tensor, Tensor]:  # (), ()
    """A bound on the largest of the norms, and which matrix decides it; or up to ``floor`` if none is above."""
    if batch.device.type == "cpu" and iterations >= MANY and batch.numel():
        bound, first = _by_one_number(batch, error, floor)
        if bound.isfinite():
            return bound, first
    return _by_stages(batch, iterations, error, floor)


def _by_one_number(batch: Tensor, error: Tensor | None, floor: Tensor | None) -> tuple[Tensor, Tensor]:
    """One s serves all: first that of ``floor``, then the largest eigenvalue of those that it is too small for.

    They are scaled alike: what underflow takes from small ones is far below a rounding of s. Inf where there is no factor.
    """
    exponent, G = rescaled(batch, parts_of(batch).abs().amax())
    norm, P, slack, rest_slack = _product(G)
    whole = lambda bound: (
        next_up(scaled(bound, exponent)) if error is None else next_up(next_up(scaled(bound, exponent)) + error)
    )
    left = torch.arange(len(batch))
    if floor is not None:  # a little less, for what rounding adds
        limit = scaled(floor if error is None else (floor - error).clamp(min=0), -exponent).square() * (1 - 2.0**-30)
        bound, found = _completed(P, norm, limit.expand(len(batch)), slack, rest_slack)
        left = (~(found & (whole(bound) <= floor))).nonzero()[:, 0]
        if not len(left):
            return floor, left.new_zeros(())
    P, norm = P[left], norm[left]
    rough = torch.linalg.eigvalsh(_finite(P, norm))[:, -1]
    bound, found = _completed(P, norm, (rough.amax() * (1 + _margin(P))).expand(len(left)), slack, rest_slack)
    return whole(bound.amax()).where(found.all(), torch.inf), left[rough.argmax()]


def _by_stages(batch: Tensor, iterations: int, error: Tensor | None, floor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Matrices that a few iterations show to be below another's bound are let go."""
    index, bounds, found = torch.arange(len(batch), device=batch.device), [], []
    for steps in (3, 6, iterations) if len(batch) > 1 else (iterations,):
        rough = gram_norm(batch, min(steps, iterations), error)
        bound, first = rough.max(0)
        if steps < iterations:
            bound = gram_norm(batch[first], iterations, error)
        bounds.append(bound)
        found.append(index[first])
        highest = torch.stack(bounds if floor is None else [*bounds, floor]).amax()
        left = (~(rough <= highest)).nonzero()[:, 0]
        batch, index = batch[left], index[left]
        if not len(batch):
            break
    bound, first = torch.stack(bounds).max(0)
    return bound, torch.stack(found)[first]


def _product(G: Tensor) -> tuple[Tensor, Tensor, float, float]:
    """The norm and the Gram matrix of G, and the error of its sums and of those of an r x r matrix."""
    M, N = G.shape[-2:]
    of = lambda terms: gamma(4 * terms if G.is_complex() else terms, torch.float64, G.device)
    return frobenius(G), gram(G if M <= N else G.mH), of(max(M, N)), of(min(M, N))


def _by_cholesky(
    product: Tensor, norm: Tensor, slack: float, rest_slack: float, iterations: int
) -> tuple[Tensor, Tensor]:  # (*), (*)
    """A bound on ||A||, at most ``norm``, and whether it is as close as the iterations' (or NaN, for A not finite)."""
    P, quick = _finite(product, norm), 2.0**-20
    if P.shape[-1] >= _SIDE and P.shape[-1] ** 2.0**-iterations > 1 + 2 * quick:
        rough = torch.stack([_lanczos(matrix) for matrix in P.reshape(-1, *P.shape[-2:])]).reshape(norm.shape)
        bound, found = _completed(P, norm, rough * (1 + quick), slack, rest_slack)
        if found.all():
            return bound, found
    return _completed(P, norm, torch.linalg.eigvalsh(P)[..., -1] * (1 + _margin(P)), slack, rest_slack)


def _completed(
    P: Tensor,  # (*, r, r)
    norm: Tensor,  # (*)
    size: Tensor,  # (*)
    slack: float,
    rest_slack: float,
) -> tuple[Tensor, Tensor]:  # (*), (*)
    """A bound on ||A||, at most ``norm``, from s = ``size``, and whether there is a factor of s I - P (or A is not finite)."""
    size, finite = size.clamp(min=2.0**-500), norm.isfinite()
    rest = -P
    rest.diagonal(dim1=-2, dim2=-1).add_(size[..., None])
    L, failed = torch.linalg.cholesky_ex(rest)
    found = failed == 0
    L = L if found.all() else L.where(found[..., None, None], 0.0)
    off = size + frobenius(_gram_of_lower(L).sub_(rest)) + slack * norm.square() + rest_slack * frobenius(L).square()
    bound = torch.minimum((off * (1 + 8 * _EPS)).sqrt() * (1 + 4 * _EPS), norm)
    return bound.where(finite, norm), found | ~finite


def _finite(P: Tensor, norm: Tensor) -> Tensor:
    """Zeros for matrices with NaN or Inf, on which LAPACK stops."""
    finite = norm.isfinite()
    return P if finite.all() else P.where(finite[..., None, None], 0.0)


def _margin(P: Tensor) -> float:
    """Relative, for eigenvalues as LAPACK computes them: a factor exists mostly, and always the bound holds."""
    return 2.0**-46 * P.shape[-1]


def _lanczos(P: Tensor) -> Tensor:  # (r, r) -> ()
    """From below. Vectors that lose orthogonality repeat eigenvalues, and leave the largest."""
    v = torch.randn(len(P), generator=torch.Generator().manual_seed(0), dtype=P.dtype)
    v = v / torch.linalg.vector_norm(v)
    before, diagonal, beside = torch.zeros_like(v), [], [torch.zeros((), dtype=torch.float64)]
    for _ in range(_STEPS):
        w = P @ v - beside[-1] * before
        diagonal.append(torch.vdot(v, w).real)
        w = w - diagonal[-1] * v
        beside.append(torch.linalg.vector_norm(w))
        before, v = v, w / beside[-1].clamp(min=2.0**-500)
    off = torch.stack(beside[1:-1])
    T = torch.diag(torch.stack(diagonal)) + torch.diag(off, 1) + torch.diag(off, -1)
    return torch.linalg.eigvalsh(T)[-1]


def gram(G: Tensor) -> Tensor:  # (*, M, N) -> (*, M, M)
    """G G^H, of whose mirrored blocks one is computed and the other copied."""
    M = G.shape[-2]
    if M < _SIDE:
        return G @ G.mH
    top, bottom = G[..., : M // 2, :], G[..., M // 2 :, :]
    corner = top @ bottom.mH
    product = G.new_empty(*G.shape[:-1], M)
    product[..., : M // 2, : M // 2], product[..., M // 2 :, M // 2 :] = gram(top), gram(bottom)
    product[..., : M // 2, M // 2 :], product[..., M // 2 :, : M // 2] = corner, corner.mH
    return product


def _gram_of_lower(L: Tensor) -> Tensor:  # (*, M, M) -> (*, M, M)
    """The same without the products by zeros above the diagonal."""
    M = L.shape[-1]
    if M < _SIDE:
        return L @ L.mH
    top, left, bottom = L[..., : M // 2, : M // 2], L[..., M // 2 :, : M // 2], L[..., M // 2 :, M // 2 :]
    corner = top @ left.mH
    product = L.new_empty(L.shape)  # by rows, which the factor is not
    product[..., : M // 2, : M // 2] = _gram_of_lower(top)
    product[..., M // 2 :, M // 2 :] = _gram_of_lower(bottom).add_(gram(left))
    product[..., : M // 2, M // 2 :], product[..., M // 2 :, : M // 2] = corner, corner.mH
    return product


def frobenius(matrix: Tensor) -> Tensor:  # (*, M, N) -> (*), rounded up
    terms = sum(matrix.shape[-2:])
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(parts_of(matrix).flatten(matrix.ndim - 1), dim=-1), dim=-1)
    return norm * (1 + gamma(terms, torch.float64, matrix.device))


def _modulus(matrix: Tensor) -> Tensor:
    """Of every entry; what squares lose to underflow is far below a rounding of the largest."""
    return torch.linalg.vector_norm(torch.view_as_real(matrix), dim=-1) if matrix.is_complex() else matrix.abs()


def parts_of(matrix: Tensor) -> Tensor:  # (*, M, N) -> (*, M, N, 2) if complex
    return torch.view_as_real(matrix) if matrix.is_complex() else matrix


def rescaled(matrix: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """(e, matrix / 2^e) where size / 2^e is near 1, but e at most 1000 either way; e is 0 for a size of 0, NaN or Inf."""
    exponent = torch.frexp(size).exponent.where(size.isfinite(), 0).clamp(-1000, 1000)
    return exponent, scaled(matrix, -exponent[..., None, None])


def scaled(t: Tensor, exponent: Tensor) -> Tensor:
    """t 2^exponent, the factor made of bits, which is exact."""
    factor = ((exponent.long() + 1023) << 52).view(torch.float64)
    return torch.view_as_complex(torch.view_as_real(t) * factor[..., None]) if t.is_complex() else t * factor


def next_up(bound: Tensor) -> Tensor:
    """Past one rounding, also among subnormal numbers; 0 is exact."""
    return torch.where(bound > 0, torch.nextafter(bound, bound.new_tensor(torch.inf)), bound)
