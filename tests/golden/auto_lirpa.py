"""Writes auto_lirpa.json: interval bounds by auto_LiRPA on the third-party networks. Run where auto_LiRPA is installed:

python -m tests.golden.auto_lirpa
"""

import json
import math
from pathlib import Path

import auto_LiRPA
import torch

from tests.networks import NAMES, images, third_party
from tests.test_interval_bounds import EPS

answers = {"auto_LiRPA": auto_LiRPA.__version__, "torch": torch.__version__, "eps": EPS}
for name in NAMES:
    model, x = third_party(name), images(name, 2)
    norm = auto_LiRPA.PerturbationLpNorm(norm=math.inf, eps=EPS)
    bounded = auto_LiRPA.BoundedModule(model, x)
    lower, upper = bounded.compute_bounds((auto_LiRPA.BoundedTensor(x, norm),), method="IBP")
    answers[name] = {"lower": lower.tolist(), "upper": upper.tolist()}
(Path(__file__).parent / "auto_lirpa.json").write_text(json.dumps(answers) + "\n")
