"""Prints the folder of the installed torch, without importing it; an empty line if there is none."""

import importlib.util
import os
import sysconfig
from pathlib import Path

spec = importlib.util.find_spec("torch")
places = [Path(spec.origin).parent] if spec and spec.origin else []
places += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
if venv := os.environ.get("VIRTUAL_ENV"):
    places.append(Path(sysconfig.get_path("platlib", vars={"base": venv, "platbase": venv})) / "torch")
print(next((p for p in places if (p / "version.py").is_file()), ""))
