"""Linearity grafting: ReLU units that loosen bounds most become straight lines, which no bound has to relax.

:func:`score` ranks units on calibration images, :func:`select` chooses them, :func:`graft` makes them lines whose slopes then
learn with the weights. Chen et al. 2022 (https://arxiv.org/abs/2206.07839), Han and Kim 2025 (https://arxiv.org/abs/2510.25130).
"""

from lipfast.grafting.conversion import graft, ungraft
from lipfast.grafting.prune import prune
from lipfast.grafting.scores import Scores, score
from lipfast.grafting.selection import outgoing, select

__all__ = ["Scores", "graft", "outgoing", "prune", "score", "select", "ungraft"]
