"""The question that every certificate answers: does an attack find a point that it says does not exist?"""

import copy

import torch
from torch import Tensor, nn

from lipfast.attacks import pgd
from lipfast.certify import Certificate


def broken(
    certificate: Certificate,
    model: nn.Module,
    images: Tensor,  # (B, ...) that were certified, in their order
    times: float = 1.0,
    steps: int = 100,
    restarts: int = 2,
) -> Tensor:  # (B,) bool
    """Where an attack within ``times`` the certified radius changes the prediction: PGD with steps of a quarter of the radius.

    In float64, since a certificate is about the exact network.
    """
    exact = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(0)
    radius = times * certificate.radius
    found = pgd(
        exact,
        images.double(),
        certificate.prediction,
        radius,
        certificate.p,
        steps,
        restarts,
        step_size=radius / 4,
        pixel_range=None,
        generator=generator,
    )
    with torch.no_grad():
        return exact(found).argmax(1) != certificate.prediction
