"""Writes auto_lirpa_crown.json: margins of the predicted class by auto_LiRPA's CROWN, in float64. Run where it is installed:

python -m tests.golden.auto_lirpa_crown
"""

import json
import math
from pathlib import Path

import auto_LiRPA
import torch

from tests.networks import images, third_party
from tests.test_crown import EPS, GOLDEN

answers: dict = {"auto_LiRPA": auto_LiRPA.__version__, "torch": torch.__version__, "eps": EPS}
for name, intermediate in GOLDEN:
    model, x = third_party(name).double(), images(name, 2).double()
    label = model(x).argmax(1)
    if name == "resnet2b":  # it wants constants with a batch dimension
        model[0].mean, model[0].std = model[0].mean[None], model[0].std[None]
    apart = torch.eye(10).double()[label][:, None] - torch.eye(10).double()
    ball = auto_LiRPA.BoundedTensor(x, auto_LiRPA.PerturbationLpNorm(norm=math.inf, eps=EPS))
    method = "CROWN" if intermediate == "crown" else "CROWN-IBP"
    lower, _ = auto_LiRPA.BoundedModule(model, x).compute_bounds((ball,), C=apart, method=method, bound_upper=False)
    answers.setdefault(name, {})[intermediate] = lower.tolist()
(Path(__file__).parent / "auto_lirpa_crown.json").write_text(json.dumps(answers) + "\n")
