import math

import pytest
import torch

import lipfast.ops.skew as module
from lipfast import skew
from tests.checks import DTYPES, check_op

#        leading sizes, N
CASES = [((), 5), ((), 1), ((0,), 4), ((2, 3), 17), ((), 0), ((3,), 64)]
LARGE = {"1024x1024": ((), 1024), "32x256x256": ((32,), 256)}
if torch.cuda.is_available():
    LARGE |= {"64x256x256": ((64,), 256), "4096x4096": ((), 4096)}


def inputs(lead, N, device, dtype):
    return torch.randn(*lead, N, N, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, device):
    matrix = inputs(*case, device, dtype)
    check_op(module, (matrix,), gradient=matrix.numel() > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_skew_to_the_last_bit(dtype, device):
    matrix = torch.randn(4, 33, 33, device=device, dtype=dtype)
    out = skew(matrix)
    assert torch.equal(out, -out.mT)
    assert torch.equal(skew(out), out)
    assert not skew(matrix + matrix.mT).any()


def test_is_the_nearest_skew_matrix(device):
    matrix = torch.randn(9, 9, device=device, dtype=torch.float64)
    rest = matrix - skew(matrix)
    torch.testing.assert_close(rest, rest.mT)  # orthogonal to every skew matrix


def test_nan_stays_visible(device):
    matrix = torch.zeros(3, 3, device=device)
    matrix[0, 2] = math.nan
    assert skew(matrix).isnan().nonzero().tolist() == [[0, 2], [2, 0]]


def test_differentiates_twice(device):
    matrix = torch.randn(2, 3, 3, device=device, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(skew, matrix)
    torch.autograd.gradgradcheck(lambda m: skew(m) ** 3, matrix)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(3), r"matrix must be \(\*, N, N\), got \(3,\)"),
        (torch.zeros(2, 3, 4), r"matrix must be \(\*, 4, 4\), got \(2, 3, 4\)"),
        (torch.zeros(3, 3, dtype=torch.int64), "matrix must be a float64"),
        (None, "matrix must be a float64"),
    ],
)
def test_names_the_wrong_argument(matrix, message):
    with pytest.raises(ValueError, match=f"skew: {message}"):
        skew(matrix)
