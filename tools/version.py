"""Version for pyproject.toml: lipfast/_version.py plus an optional local label.

LIPFAST_LOCAL_VERSION=cu130 gives 0.1.0+cu130, for an index with one folder per CUDA version.
"""

import os
import re
from pathlib import Path


def dynamic_metadata(field, settings=None):
    if field != "version":
        raise RuntimeError(f"tools/version.py: only the version is dynamic, got {field}")
    text = (Path(__file__).parents[1] / "lipfast" / "_version.py").read_text()
    version = re.search(r'__version__ = "([^"]+)"', text).group(1)
    label = os.environ.get("LIPFAST_LOCAL_VERSION")
    return f"{version}+{label}" if label else version
