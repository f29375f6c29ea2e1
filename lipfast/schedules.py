"""Quantities that change during training, as functions of the epoch: a real number, the epochs done so far."""

import math


def linear_ramp(epoch: float, start: float, length: float) -> float:
    """0 until ``start``, then a straight line to 1 at ``start + length``.

    >>> [linear_ramp(e, 1, 4) for e in (0, 1, 3, 9)]
    [0.0, 0.0, 0.5, 1.0]
    """
    if epoch >= start + length:
        return 1.0
    return 0.0 if epoch <= start else (epoch - start) / length


def smooth_ramp(epoch: float, start: float, length: float, middle: float = 0.25) -> float:
    """0 until ``start``, then a fourth power that meets a straight line to 1 at ``start + length``.

    With t = (epoch - start)/length and m = ``middle`` (0 < m < 1)

        a t^4                      for t <= m
        a m^4 + 4 a m^3 (t - m)    for t >= m,    a = 1/(m^3 (4 - 3 m)),

    equal in value and slope at m, and 1 at t = 1. The schedule of eps in Shi et al. 2021 (https://arxiv.org/abs/2103.17268,
    Appendix), there called smoothed.

    >>> [round(smooth_ramp(e, 0, 1), 4) for e in (0, 0.25, 0.5, 1)]
    [0.0, 0.0769, 0.3846, 1.0]
    """
    t, m = linear_ramp(epoch, start, length), middle
    a = 1 / (m**3 * (4 - 3 * m))
    return a * t**4 if t <= m else min(1.0, a * m**4 + 4 * a * m**3 * (t - m))


def log_ramp(epoch: float, start: float, length: float) -> float:
    """0 until ``start``, then log(1 + (e - 1) t), t from 0 to 1, until ``start + length``: faster at first.

    The schedule of eps in GloRo's code (Leino et al. 2021, https://arxiv.org/abs/2102.08452), there from 0.01 on.

    >>> [round(log_ramp(e, 0, 1), 4) for e in (0, 0.5, 1)]
    [0.0, 0.6201, 1.0]
    """
    return math.log1p((math.e - 1) * linear_ramp(epoch, start, length))


def decay(epoch: float, start: float, end: float, factor: float) -> float:
    """1 until ``start``, then exponentially to ``factor`` at ``end``.

    >>> [round(decay(e, 4, 8, 0.01), 3) for e in (0, 4, 6, 8)]
    [1.0, 1.0, 0.1, 0.01]
    """
    return factor ** linear_ramp(epoch, start, end - start)


def cosine(epoch: float, start: float, length: float) -> float:
    """1 until ``start``, then half a cosine down to 0 at ``start + length``.

    >>> [round(cosine(e, 1, 4), 3) for e in (0, 1, 3, 5)]
    [1.0, 1.0, 0.5, 0.0]
    """
    return (1 + math.cos(math.pi * linear_ramp(epoch, start, length))) / 2
