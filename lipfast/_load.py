"""Loads the compiled kernels. Each only makes an op faster: without them every op runs its reference."""

import importlib.util
import os

import torch

if tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 10):
    raise ImportError(f"lipfast: torch 2.10 or newer is needed, got {torch.__version__}")


def load() -> dict[str, bool]:
    """Which libraries are in the process now. LIPFAST_CPU_CAPABILITY=none leaves every op to its reference."""
    loaded = {"cpu": False, "cuda": False, "triton": False}
    if os.environ.get("LIPFAST_CPU_CAPABILITY") == "none":
        return loaded
    for name, wanted in (("cpu", True), ("cuda", torch.version.cuda is not None)):
        spec = importlib.util.find_spec(f"lipfast._ops_{name}")  # finds the library of an editable install too
        if spec and spec.origin and wanted:
            torch.ops.load_library(spec.origin)
            loaded[name] = True
    if torch.version.cuda is not None and importlib.util.find_spec("triton"):
        from lipfast.kernels import register

        register()
        loaded["triton"] = True
    return loaded
