"""Networks that lipfast's authors did not train, and real images, where they are at hand; None of it is part of the project."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lipfast.nn

DATA = Path(os.environ.get("LIPFAST_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
NAMES = ("mnist_fc_3layer", "kw_mnist", "cifar_2c2f", "resnet2b")


class BasicBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


def _resnet2b():
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2471, 0.2435, 0.2616])
    body = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), BasicBlock(8, 16, 2), BasicBlock(16, 16, 1)]
    return nn.Sequential(
        lipfast.nn.Normalize(mean, std), *body, nn.Flatten(), nn.Linear(1024, 100), nn.ReLU(), nn.Linear(100, 10)
    )


_BUILD = {
    "mnist_fc_3layer": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    ),
    "kw_mnist": lambda: nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    ),
    "cifar_2c2f": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(3136, 32), nn.ReLU(), nn.Linear(32, 10),
    ),
    "resnet2b": _resnet2b,
}  # fmt: skip


def third_party(name: str) -> nn.Module:
    """The trained network of that name, its arrays assigned in the order of the model's own parameters."""
    path = DATA / "networks" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no third-party network at {path.name}: set LIPFAST_TEST_DATA")
    arrays = [torch.from_numpy(a) for a in np.load(path).values()]
    model = _BUILD[name]()
    with torch.no_grad():
        for parameter, array in zip(model.parameters(), arrays, strict=True):
            assert parameter.shape == array.shape
            parameter.copy_(array)
    return model.eval()


def images(name: str, count: int) -> torch.Tensor:
    """Test images for that network, pixels in [0, 1]: MNIST's first ones, or seeded noise of CIFAR-10's size."""
    if "cifar" in name or "resnet" in name:
        return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    path = DATA / "mnist" / "t10k-images-idx3-ubyte.gz"
    if not path.exists():
        pytest.skip("no MNIST test images: set LIPFAST_TEST_DATA")
    pixels = np.frombuffer(gzip.open(path).read()[16:], np.uint8)[: count * 784]
    return torch.from_numpy(pixels.reshape(-1, 1, 28, 28).copy()).float() / 255


def jacobian(model: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """The matrix of an affine model, in float64; the model's parameters become float64."""
    found = torch.autograd.functional.jacobian(model.double(), torch.zeros(1, *shape, dtype=torch.float64))
    return found.reshape(-1, int(np.prod(shape)))


def svd_slack(norm: torch.Tensor) -> torch.Tensor:
    """More than what LAPACK's singular values of the small matrices of the tests err."""
    return 1e-12 * norm
