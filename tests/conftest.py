import pytest
import torch

# Deterministic mode also fills every fresh allocation with NaN, in Python and in C++ alike.
torch.use_deterministic_algorithms(True)
torch.backends.cudnn.conv.fp32_precision = "ieee"  # tf32, torch's default there, is no float32 to the tests' tolerances

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param
