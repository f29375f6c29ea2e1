"""Optimisers."""

from lipfast.optim.fast_exponential import fast_exponential
from lipfast.optim.manifold_adam import ManifoldAdam, parameter_groups

__all__ = ["ManifoldAdam", "fast_exponential", "parameter_groups"]
