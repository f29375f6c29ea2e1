import math
from itertools import pairwise

import pytest

from lipfast.recipes import Gloro
from lipfast.schedules import decay, linear_ramp, log_ramp, smooth_ramp


@pytest.mark.parametrize("ramp", [linear_ramp, smooth_ramp, log_ramp])
def test_ramps_rise_from_0_to_1(ramp):
    values = [ramp(e / 10, 2, 5) for e in range(100)]
    assert values[:21] == [0.0] * 21
    assert values[70:] == [1.0] * 30
    assert all(a < b for a, b in pairwise(values[20:71]))
    assert ramp(0, 0, 0) == 1
    assert ramp(0.5, 1, 0) == 0
    assert ramp(1, 1, 0) == 1


def test_smooth_ramp_has_no_corner():
    step = 1e-6
    slope = lambda t: (smooth_ramp(t + step, 0, 1) - smooth_ramp(t - step, 0, 1)) / (2 * step)
    assert slope(1e-3) < 1e-6
    assert slope(0.25 - 2 * step) == pytest.approx(slope(0.25 + 2 * step), rel=1e-4)
    assert slope(0.3) == pytest.approx(slope(0.9), rel=1e-6)


def test_log_ramp_is_the_papers():
    """GloRo's code: eps (log(1 + t (e - 1))), which is faster at first."""
    for t in (0.1, 0.5, 0.9):
        assert math.exp(log_ramp(3 + 4 * t, 3, 4)) == pytest.approx(1 + t * (math.e - 1))
        assert log_ramp(3 + 4 * t, 3, 4) > linear_ramp(3 + 4 * t, 3, 4)


def test_decay_is_exponential_between_its_ends():
    values = [decay(e / 10, 2, 5, 1e-3) for e in range(80)]
    assert values[:21] == [1.0] * 21
    assert values[50:] == pytest.approx([1e-3] * 30)
    assert all(b / a == pytest.approx(1e-3 ** (1 / 30)) for a, b in pairwise(values[20:51]))


def test_the_learning_rate_falls_to_its_end():
    recipe = Gloro.preset("mnist").with_settings(
        {"epochs": 10, "decay_start": 4, "lr": 1e-2, "lr_end": 1e-4, "milestones": "9"}
    )
    assert [recipe.lr_at(e) for e in range(5)] == [1e-2] * 5
    assert recipe.lr_at(7) == pytest.approx(1e-3)
    assert recipe.lr_at(9) == pytest.approx(0.2 * 1e-2 * 0.01 ** (5 / 6))
    assert recipe.with_settings({"lr_end": 0}).lr_at(8) == 1e-2
    assert recipe.with_epochs(20).lr_at(14) == pytest.approx(1e-3)
