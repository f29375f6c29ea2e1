import math

import pytest
import torch

from lipfast.optim import fast_exponential
from lipfast.optim.fast_exponential import BANDS
from tests.checks import assert_near

# order of the series, and the singular value of it at an eigenvalue i t: the largest distance from 1 is at the end of the band
VALUES = {
    2: lambda t: math.sqrt(1 + t**4 / 4),
    3: lambda t: math.sqrt(1 - t**4 / 12 + t**6 / 36),
    4: lambda t: math.sqrt(1 - t**6 / 72 + t**8 / 576),
}
PUBLISHED = {2: 2e-7, 3: 4.1e-5, 4: 8.2e-4}  # of that distance, rounded up


def skewed(shape, norm, device, dtype=torch.float64):
    A = torch.randn(*shape, device=device, dtype=dtype)
    A = A - A.mT
    return A * (norm / torch.linalg.matrix_norm(A))[..., None, None]


def series(A, order):
    term = total = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    for n in range(1, order + 1):
        term = term @ A / n
        total = total + term
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_order_follows_the_norm_of_each_matrix(dtype, device):
    norms = torch.tensor([0.0, 0.01, 0.049, 0.051, 0.2, 0.249, 0.251, 0.9, 0.999], device=device, dtype=dtype)
    orders = [2, 2, 2, 3, 3, 3, 4, 4, 4]
    A = skewed((9, 6, 6), norms, device, dtype)
    got = fast_exponential(A)
    for X, a, order in zip(got, A, orders, strict=True):
        assert_near(X, series(a.double(), order), dtype)
    for X, a in zip(got[:4:3], A[:4:3], strict=True):  # alone as among others
        assert_near(fast_exponential(a), X.double(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_from_norm_one_on_it_is_the_exponential(dtype, device):
    norms = torch.tensor([0.02, 1.0001, 3.0, 40.0], device=device, dtype=dtype)
    A = skewed((4, 7, 7), norms, device, dtype)
    got = fast_exponential(A)
    exact = torch.linalg.matrix_exp(A.double())
    torch.testing.assert_close(got[1:].double(), exact[1:], rtol=0, atol=100 * torch.finfo(dtype).eps)
    assert_near(got[0], series(A[0].double(), 2), dtype)


@pytest.mark.parametrize("band", range(3))
def test_errors_at_the_end_of_each_band_are_those_published(band, device):
    order, norm = band + 2, BANDS[band] * (1 - 1e-9)
    A = torch.zeros(8, 8, device=device, dtype=torch.float64)
    A[0, 1], A[1, 0] = norm / math.sqrt(2), -norm / math.sqrt(2)  # one pair of eigenvalues: the worst case
    values = torch.linalg.svdvals(fast_exponential(A))
    off = (values - 1).abs().max().item()
    assert off == pytest.approx(abs(VALUES[order](norm / math.sqrt(2)) - 1), abs=1e-12)
    assert off <= PUBLISHED[order]
    generic = torch.linalg.svdvals(fast_exponential(skewed((128, 128), norm, device)))
    assert (generic - 1).abs().max() < PUBLISHED[order] / 100


def test_any_shape_of_batch(device):
    A = skewed((2, 3, 5, 5), 0.3, device)
    assert fast_exponential(A).shape == A.shape
    assert fast_exponential(A[:0]).shape == (0, 3, 5, 5)
    assert_near(fast_exponential(A.mT), fast_exponential(A).mT, torch.float64)
    assert_near(fast_exponential(A.tril() * 2), fast_exponential(A), torch.float64)  # the skew part counts


def test_names_the_wrong_argument(device):
    for bad, message in [
        (torch.zeros(2, 3, device=device), r"fast_exponential: skew must be \(\*, 3, 3\)"),
        (torch.zeros(3, device=device), r"fast_exponential: skew must be \(\*, N, N\)"),
        (torch.zeros(2, 2, device=device, dtype=torch.bfloat16), "fast_exponential: skew must be float32 or float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            fast_exponential(bad)
