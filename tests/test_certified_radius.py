import math
from fractions import Fraction

import pytest
import torch

import lipfast.ops.certified_radius as module
from lipfast import certified_radius
from tests.checks import DTYPES, check_op

KINDS = ["scalar", "matrix", "samples"]
#        leading sizes, K
SIZES = [((5,), 10), ((1,), 2), ((0,), 3), ((2, 3), 33), ((), 4), ((3,), 129)]
CASES = [(*size, kind) for size in SIZES for kind in KINDS]
LARGE = {
    "10 classes, batch 10000": ((10_000,), 10, "matrix"),
    "1000 classes, batch 1024": ((1024,), 1000, "matrix"),
    "200 classes, local, batch 256": ((256,), 200, "samples"),
}
if torch.cuda.is_available():
    LARGE |= {
        "10 classes, batch 100000": ((100_000,), 10, "matrix"),
        "1000 classes, batch 100000": ((100_000,), 1000, "matrix"),
        "1000 classes, one constant": ((100_000,), 1000, "scalar"),
    }


def inputs(shape, n_classes, kind, device, dtype):
    logits = torch.randn(*shape, n_classes, device=device, dtype=dtype)
    sizes = {"scalar": (), "matrix": (n_classes, n_classes), "samples": (*shape, n_classes, n_classes)}[kind]
    return logits, torch.rand(sizes, device=device, dtype=dtype) + 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(case, dtype, device):
    check_op(module, inputs(*case, device, dtype))


@pytest.mark.parametrize("n_classes", [2, 3, 32, 33, 128, 129, 1000, 1024, 1025, 3000])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_definition(kind, n_classes, device):
    logits, lipschitz = inputs((7,), n_classes, kind, device, torch.float64)
    radius, prediction = certified_radius(logits, lipschitz)
    for b in range(7):
        y = max(range(n_classes), key=logits[b].tolist().__getitem__)
        quotient = (logits[b, y] - logits[b]) / lipschitz.expand(7, n_classes, n_classes)[b, y]
        quotient[y] = math.inf
        assert prediction[b] == y
        torch.testing.assert_close(radius[b], quotient.min())


@pytest.mark.parametrize("scale", ["ordinary", "close", "tiny", "huge", "steep", "flat"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_never_above_the_exact_quotient(dtype, scale, device):
    logits, lipschitz = inputs((300,), 4, "samples", device, dtype)
    limits = torch.finfo(dtype)
    if scale == "close":
        logits = 1 + torch.randint(-3, 4, logits.shape, device=device) * limits.eps
    logits = (logits * {"tiny": limits.tiny, "huge": limits.max / 2}.get(scale, 1.0)).to(dtype)
    lipschitz = (lipschitz * {"steep": limits.max / 2, "flat": limits.tiny / 8}.get(scale, 1.0)).to(dtype)
    radius, prediction = certified_radius(logits, lipschitz)
    assert radius.isfinite().all()
    assert (radius >= 0).all()
    for z, constants, r, y in zip(logits.tolist(), lipschitz.tolist(), radius.tolist(), prediction.tolist(), strict=True):
        if not all(map(math.isfinite, z)):
            assert r == 0
            continue
        exact = [(Fraction(z[y]) - Fraction(z[j])) / Fraction(c) for j, c in enumerate(constants[y]) if j != y and c]
        assert Fraction(r) <= min(exact, default=math.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_tight(dtype, device):
    logits, lipschitz = inputs((50,), 10, "matrix", device, dtype)
    radius = certified_radius(logits, lipschitz)[0].double()
    want = module.reference(logits.double(), lipschitz.double())[0]
    assert (radius >= want * (1 - 6 * torch.finfo(dtype).eps) - torch.finfo(dtype).smallest_normal).all()


def one(logits, row, device):
    """The radius of one sample whose class 0 has these constants."""
    lipschitz = torch.full((len(row), len(row)), math.nan, device=device)  # other rows do not count
    lipschitz[0] = torch.tensor(row)
    radius, prediction = certified_radius(torch.tensor([logits], device=device), lipschitz)
    assert prediction.tolist() == [0]
    return radius.item()


def test_ties_certify_nothing(device):
    assert one([1.0, 1.0, 0.0], [0.0, 1.0, 1.0], device) == 0
    assert one([1.0, 1.0, 0.0], [0.0, 0.0, 1.0], device) == 0
    assert one([0.0, -0.0, -1.0], [0.0, 1.0, 1.0], device) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 39])
def test_a_logit_that_is_not_finite_certifies_nothing(at, bad, device):
    for kind in KINDS:
        logits, lipschitz = inputs((3,), 40, kind, device, torch.float32)
        logits[1, at] = bad
        radius, prediction = certified_radius(logits, lipschitz)
        assert radius[1] == 0
        assert (radius[[0, 2]] > 0).all()
        assert prediction.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0, -1e-45])
def test_a_constant_that_is_no_bound_certifies_nothing(bad, device):
    assert one([2.0, 1.0, 0.0], [0.0, 1.0, bad], device) == 0
    assert certified_radius(torch.tensor([[2.0, 1.0]], device=device), torch.tensor(bad, device=device))[0].tolist() == [0]


@pytest.mark.parametrize("diagonal", [0.0, math.nan, math.inf, -1.0])
def test_the_diagonal_does_not_count(diagonal, device):
    assert one([2.0, 1.0, 0.0], [diagonal, 1.0, 1.0], device) == pytest.approx(1)


def test_a_class_that_never_gains_sets_no_limit(device):
    assert one([4.0, 3.0, 0.0], [0.0, 0.0, 2.0], device) == pytest.approx(2)
    assert one([4.0, 3.0, 0.0], [0.0, 0.0, 0.0], device) == pytest.approx(torch.finfo(torch.float32).max)


def test_several_nans_predict_as_argmax_does(device):
    logits = torch.randn(5, 40, device=device)
    logits[0, [3, 35]] = math.nan
    logits[1, [35, 36]], logits[1, 2] = math.nan, math.inf
    logits[2, [7, 38]] = 9.0
    logits[3] = -math.inf
    radius, prediction = certified_radius(logits, torch.tensor(1.0, device=device))
    assert prediction[:4].tolist() == [3, 35, 7, 0]
    assert radius[:4].tolist() == [0, 0, 0, 0]


def test_gradient_flows_through_the_closest_class(device):
    logits = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0]], device=device, requires_grad=True)
    lipschitz = torch.tensor([[0.0, 4.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]], device=device, requires_grad=True)
    grads = torch.autograd.grad(certified_radius(logits, lipschitz)[0].sum(), (logits, lipschitz))
    torch.testing.assert_close(grads[0].cpu(), torch.tensor([[0.25, -0.25, 0], [0, 0, 0]]))
    torch.testing.assert_close(grads[1].cpu(), torch.tensor([[0, -0.125, 0], [0, 0, 0], [0, 0, 0]]))


@pytest.mark.parametrize("kind", KINDS)
def test_differentiates_twice(kind, device):
    args = [t.requires_grad_() for t in inputs((3,), 4, kind, device, torch.float64)]
    torch.autograd.gradgradcheck(lambda *t: certified_radius(*t)[0], args)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_repeatable(kind, device):
    logits, lipschitz = (t.requires_grad_() for t in inputs((2000,), 3, kind, device, torch.float32))
    torch.use_deterministic_algorithms(False)  # as users run it
    try:
        grads = [torch.autograd.grad(certified_radius(logits, lipschitz)[0].sum(), (logits, lipschitz)) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(True)
    assert all(torch.equal(a, b) for pair in grads for a, b in zip(pair, grads[0], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_break(kind, device):
    args = [t.requires_grad_() for t in inputs((3,), 5, kind, device, torch.float32)]
    loss = lambda *t: (certified_radius(*t)[0] ** 2).sum()
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*args), args)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*args), args))


@pytest.mark.parametrize(
    ("logits", "lipschitz", "message"),
    [
        (torch.zeros(3, 1), torch.tensor(1.0), r"logits must be \(\*, K\) with K at least 2, got \(3, 1\)"),
        (torch.zeros(()), torch.tensor(1.0), r"logits must be \(\*, K\), got \(\)"),
        (torch.zeros(3, 4), torch.zeros(4), r"lipschitz must be \(\), \(4, 4\) or \(3, 4, 4\), got \(4,\)"),
        (torch.zeros(3, 4), torch.zeros(2, 4, 4), "lipschitz must be"),
        (torch.zeros(3, 4), torch.zeros(3, 3), "lipschitz must be"),
        (torch.zeros(3, 4), 1.0, "lipschitz must be a torch.float32 tensor"),
        (torch.zeros(3, 4), torch.tensor(1.0, dtype=torch.float64), "lipschitz must be a torch.float32 tensor"),
        (torch.zeros(3, 4), torch.zeros((), device="meta"), "lipschitz must be on cpu"),
        (torch.zeros(3, 4, dtype=torch.int64), torch.tensor(1), "logits must be a float64"),
    ],
)
def test_names_the_wrong_argument(logits, lipschitz, message):
    with pytest.raises(ValueError, match=f"certified_radius: {message}"):
        certified_radius(logits, lipschitz)
