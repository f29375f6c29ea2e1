import math

import pytest
import torch
import torch.nn.functional as F

import lipfast.ops.conv2d_norm_confidence as module
from lipfast import conv2d_norm_bound, conv2d_norm_confidence
from tests.checks import DTYPES

#     C, H, W, O, kernel, stride, padding, dilation, groups
CASES = [
    (3, 5, 6, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (4, 7, 6, 6, (3, 2), (2, 3), (2, 1), (1, 2), 2),
    (4, 6, 5, 5, (3, 3), (2, 2), (0, 0), (1, 1), 1),  # a stride that does not divide
    (6, 5, 4, 6, (3, 3), (1, 1), (1, 1), (1, 1), 6),
]


def inputs(C, H, W, O, kernel, stride, padding, dilation, groups, device, dtype, B=4, kept=0.5):
    where = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    weight = torch.randn(O, C // groups, *kernel, device=device, dtype=dtype)
    output = F.conv2d(torch.zeros(1, C, H, W, device=device), weight.float(), **where).shape[1:]
    masks = [torch.rand(B, *shape, device=device) < kept for shape in ((C, H, W), output)]
    return weight, {"input_size": (H, W), **where, "input_mask": masks[0], "output_mask": masks[1]}


def norms(weight, input_size, input_mask, output_mask, **where):
    """By the SVD of each masked operator, from the identity pushed through conv2d."""
    shape = input_mask.shape[1:]
    pixels = torch.eye(shape.numel(), dtype=torch.float64, device=weight.device).view(-1, *shape)
    matrix = F.conv2d(pixels, weight.double(), **where)
    matrices = [(matrix * o * i.reshape(-1, 1, 1, 1)).flatten(1) for i, o in zip(input_mask, output_mask, strict=True)]
    return torch.stack([torch.linalg.matrix_norm(m, 2) for m in matrices])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_above_the_norm_by_the_stated_factor(case, device):
    """Ten networks of four samples each; a chance of 1e-3 comes, if ever, where eigenvalues crowd at the top."""
    for _ in range(10):
        weight, options = inputs(*case, device, torch.float64)
        exact = norms(weight, **options)
        limit = conv2d_norm_confidence(weight, **options, failure_probability=1e-3)
        factor = (1 - module._shortfall(options["input_mask"][0].numel(), 1e-3, 60)) ** -0.5
        assert factor < 1.01
        assert (limit >= exact * (1 - 1e-14)).all()
        assert (limit <= exact * factor * (1 + 2.0**-29) + 1e-59).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_takes_every_dtype(dtype, device):
    weight, options = inputs(*CASES[2], device, dtype)
    exact, limit = norms(weight, **options), conv2d_norm_confidence(weight, **options)
    assert limit.dtype == dtype
    assert limit.device.type == device
    assert (limit.double() >= exact).all()
    assert (limit.double() <= exact * (1.03 + torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize("iterations", [4, 6, 10, 20])
def test_few_iterations_are_wide_and_still_above(iterations, device):
    """Eigenvalues that crowd: a chance of one in a million pays for what the iterations have not found."""
    case = (1, 24, 24, 1, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    weight, options = inputs(*case, device, torch.float64, kept=0.9)
    exact = norms(weight, **options)
    limit = conv2d_norm_confidence(weight, **options, failure_probability=1e-6, iterations=iterations, bound=weight.sum() + 1e9)
    shortfall = module._shortfall(576, 1e-6, iterations)
    assert (shortfall == 1) == (iterations < 10)
    assert (limit >= exact * (1.01 if iterations >= 10 else 1)).all()
    bound = conv2d_norm_bound(weight, options["input_size"], padding=1)
    limit = conv2d_norm_confidence(weight, **options, failure_probability=1e-6, iterations=iterations)
    assert (limit <= bound).all()
    assert shortfall < 1 or (limit == bound).all()


def test_shortfall_makes_the_theorem_the_failure_probability():
    for n, q, chance in ((32768, 60, 1e-9), (100, 40, 1e-3), (576, 20, 1e-6)):
        e = module._shortfall(n, chance, q)
        assert 0 < e < 1
        assert 1.648 * math.sqrt(n) * math.exp(-(2 * q - 1) * math.sqrt(e)) == pytest.approx(chance, rel=1e-2)
        assert 1.648 * math.sqrt(n) * math.exp(-(2 * q - 1) * math.sqrt(e)) < chance
    assert module._shortfall(32768, 1e-9, 60) == pytest.approx(0.05, rel=0.03)
    assert module._shortfall(32768, 1e-13, 60) == 1  # beneath what rounding allows


def test_starts_are_uniform_on_the_sphere(device):
    """One step, eigenvalues 1, 0 and 0: theta is the square of a cosine, whose size is uniform in three dimensions."""
    samples = 4000
    weight = torch.full((1, 3, 1, 1), 3**-0.5, dtype=torch.float64, device=device)
    for generator in (None, torch.Generator(device).manual_seed(0)):
        start = module._starts([samples, 3, 1, 1], generator).to(device)
        theta = module._largest_ritz_value(weight, None, None, start, [[1, 1], [0, 0], [1, 1], 1], 1)
        for e in (0.1, 0.5, 0.9, 0.99):
            failures = (theta < 1 - e).double().mean().item()
            assert failures == pytest.approx(math.sqrt(1 - e), rel=0, abs=0.05)
            assert failures <= 1.648 * math.sqrt(3) * math.exp(-math.sqrt(e))


def test_every_sample_and_call_has_a_start_of_its_own(device):
    weight, options = inputs(*CASES[0], device, torch.float64)
    few = {**options, "failure_probability": 0.5, "iterations": 3, "bound": torch.tensor(1e9)}
    few["input_mask"] = torch.ones_like(few["input_mask"])
    few["output_mask"] = torch.ones_like(few["output_mask"])
    seeded = lambda: torch.Generator(device).manual_seed(0)
    first = conv2d_norm_confidence(weight, **few, generator=seeded())
    assert len(first.unique()) == len(first)
    assert torch.equal(first, conv2d_norm_confidence(weight, **few, generator=seeded()))
    torch.manual_seed(0)
    drawn = conv2d_norm_confidence(weight, **few)
    torch.manual_seed(0)
    assert not torch.equal(drawn, conv2d_norm_confidence(weight, **few))  # no seed of the weights makes a start


def test_samples_in_parts_give_the_same(device, monkeypatch):
    weight, options = inputs(*CASES[2], device, torch.float64)
    whole = conv2d_norm_confidence(weight, **options)
    monkeypatch.setattr(module, "_PART", 1)
    torch.testing.assert_close(conv2d_norm_confidence(weight, **options), whole, rtol=1e-9, atol=0)


def test_masks_broadcast(device):
    weight, options = inputs(*CASES[0], device, torch.float64, B=6)
    want = norms(weight, **{**options, "output_mask": options["output_mask"][:1].expand(6, -1, -1, -1)})
    both = {"input_mask": options["input_mask"].unflatten(0, (2, 3)), "output_mask": options["output_mask"][0]}
    got = conv2d_norm_confidence(weight, **{**options, **both})
    assert got.shape == (2, 3)
    torch.testing.assert_close(got.flatten(), want, rtol=0.03, atol=0)
    plain = conv2d_norm_confidence(weight, **{**options, "input_mask": None, "output_mask": None})
    assert plain.shape == ()
    ones = {key: torch.ones_like(options[key]) for key in ("input_mask", "output_mask")}
    torch.testing.assert_close(plain, norms(weight, **{**options, **ones})[0], rtol=0.03, atol=0)


def test_is_exact_but_for_its_factor_where_the_space_is_complete(device):
    """More iterations than inputs: whatever follows the last direction is zero, not noise."""
    weight, options = inputs(*CASES[0], device, torch.float64)
    options["input_mask"] = torch.zeros_like(options["input_mask"])
    for b in range(4):
        options["input_mask"][b, 0, 2, : b + 1] = True
    exact = norms(weight, **options)
    limit = conv2d_norm_confidence(weight, **options, iterations=300)
    assert (limit >= exact * (1 - 1e-14)).all()
    assert (limit <= exact * 1.002 + 1e-59).all()


def test_zero_masks_and_weights_give_zero(device):
    weight, options = inputs(*CASES[0], device, torch.float32)
    options["input_mask"][0], options["output_mask"][1] = False, False
    limit = conv2d_norm_confidence(weight, **options)
    assert (limit[:2] == 0).all()
    assert (limit[2:] > 0).all()
    for iterations in (1, 60):
        assert (conv2d_norm_confidence(torch.zeros_like(weight), **options, iterations=iterations) == 0).all()


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-30, 1e30, 1e300])
def test_survives_extreme_scales(scale, device):
    weight, options = inputs(*CASES[2], device, torch.float64)
    exact = norms(weight, **options) * scale
    limit = conv2d_norm_confidence(weight * scale, **options)
    assert (limit >= exact * (1 - 1e-14)).all()
    assert (limit <= exact * 1.03 + 1e-322).all()


def test_small_weights_that_masks_leave_alone_do_not_vanish(device):
    weight = torch.tensor([1.0, 1e-20, 1e-200], dtype=torch.float64, device=device).view(3, 1, 1, 1)
    masks = torch.eye(3, dtype=torch.bool, device=device)[:, :, None, None].expand(3, 3, 4, 4)
    limit = conv2d_norm_confidence(weight, 4, output_mask=masks)
    assert (limit >= weight.flatten()).all()
    assert (limit <= weight.flatten() * 1.03 + 1e-59).all()


def test_nan_and_inf_stay_visible(device):
    weight, options = inputs(*CASES[2], device, torch.float32)
    options["input_mask"][0] = False
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight[3, 1, 0, 1] = bad
        for bound in (None, torch.tensor(5.0)):
            assert not conv2d_norm_confidence(weight, **options, bound=bound).isfinite().any()


def test_is_never_above_the_bound_and_has_no_gradient(device):
    weight, options = inputs(*CASES[0], device, torch.float64)
    weight.requires_grad_()
    options["input_mask"], options["output_mask"] = None, torch.ones_like(options["output_mask"])
    bound = conv2d_norm_bound(weight, (5, 6), padding=1).detach()
    limit = conv2d_norm_confidence(weight, **options, iterations=25)
    assert (limit <= bound).all()
    assert not limit.requires_grad
    assert (conv2d_norm_confidence(weight, **options, bound=bound / 2) == bound / 2).all()


MASK = torch.ones(2, 3, 7, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weight": torch.ones(2, 4, 3, 3, 3)}, "weight"),
        ({"weight": torch.ones(4, 3, 3, 3).long()}, "weight"),
        ({"input_size": (0, 4)}, "input_size"),
        ({"stride": 0}, "stride"),
        ({"groups": 3}, "groups"),
        ({"input_mask": MASK.float()}, "input_mask"),
        ({"input_mask": MASK[..., :5]}, "input_mask"),
        ({"output_mask": MASK}, "output_mask"),
        ({"input_mask": MASK, "output_mask": torch.ones(3, 4, 7, 6, dtype=torch.bool)}, "output_mask"),
        ({"failure_probability": 0.0}, "failure_probability"),
        ({"failure_probability": 1.0}, "failure_probability"),
        ({"failure_probability": float("nan")}, "failure_probability"),
        ({"iterations": 0}, "iterations"),
        ({"bound": 3.0}, "bound"),
        ({"bound": torch.ones(2)}, "bound"),
    ],
)
def test_names_the_wrong_argument(change, word):
    with pytest.raises(ValueError, match=f"conv2d_norm_confidence: {word} must"):
        conv2d_norm_confidence(**{"weight": torch.ones(4, 3, 3, 3), "input_size": (7, 6), "padding": 1, **change})
