"""The definition of an op under a name of its own, for a kernel that does not serve all that the op takes."""

from collections.abc import Callable

import torch


def name_definition(op: str, definition: Callable) -> None:
    """Registers ``definition`` as ``<op>_definition``, on every device and without a derivative."""
    torch.library.define(f"{op}_definition", torch.library.infer_schema(definition, mutates_args=()))
    torch.library.impl(f"{op}_definition", "CompositeExplicitAutograd", definition)
