import pytest
import torch

from lipfast.ops._matrices import in_parts, parts, skew_product, symmetric_part, symmetric_product, transposed
from tests.checks import assert_near

# 300 makes two blocks of 128 and a smaller one, in two parts; 1030 eight and a smaller one
SIZES = [(0, 4), (3, 0), (5, 7), (3, 300), (1, 1030)]


@pytest.mark.parametrize(("B", "N"), SIZES)
def test_half_products_are_products(B, N, device):
    A = torch.randn(B, N, N, device=device, dtype=torch.float64)
    A = A - A.mT
    assert_near(symmetric_product(A, A), A @ A, torch.float64)
    assert_near(skew_product(A, A @ A), A @ A @ A, torch.float64)
    assert torch.equal(skew_product(A, A @ A)[:, :1, 200:], -skew_product(A, A @ A)[:, 200:, :1].mT)


def test_gram_matrices_of_tall_matrices(device):
    tall = torch.randn(2, 400, 270, device=device, dtype=torch.float64)
    assert_near(symmetric_product(tall.mT, tall), tall.mT @ tall, torch.float64)


def test_half_products_have_derivatives(device):
    A = torch.randn(1, 258, 258, device=device, dtype=torch.float64).requires_grad_()
    skew = A - A.mT
    seed = symmetric_part(torch.randn_like(skew))
    (want,) = torch.autograd.grad(skew @ skew, A, seed, retain_graph=True)
    assert_near(torch.autograd.grad(symmetric_product(skew, skew), A, seed)[0], want, torch.float64)


@pytest.mark.parametrize(("B", "N"), SIZES)
def test_parts_are_the_batch(B, N, device):
    A, C = torch.randn(2, B, N, N, device=device)
    assert torch.equal(torch.cat(parts(A)), A)
    assert torch.equal(in_parts(lambda a, c: a - 2 * c, A, C), A - 2 * C)
    assert torch.equal(transposed(A), A.mT)


def test_parts_are_small_on_a_cpu():
    assert [len(part) for part in parts(torch.empty(10, 256, 256))] == [4, 4, 2]
    assert [len(part) for part in parts(torch.empty(2, 2000, 2000, device="meta"))] == [2]
