import pytest
import torch

# Deterministic mode also fills every fresh allocation with NaN, in Python and in C++ alike.
torch.use_deterministic_algorithms(True)
torch.backends.cudnn.conv.fp32_precision = "ieee"  # tf32, torch's default there, is no float32 to the tests' tolerances
# As in a program that has called it: torch's batched LU on a CPU is wrong from then on (pytorch/pytorch#142815), and no op
# may rest on it. A test that wants a factor asks for one matrix at a time.
torch.set_num_threads(max(2, torch.get_num_threads()))

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param
