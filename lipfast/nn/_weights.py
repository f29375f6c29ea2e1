"""What the parametrizations of this package ask of the weight that they replace."""

from torch import nn

from lipfast.ops._arguments import check_alike


def weight_of(function: str, layer: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that name, if it is a floating tensor of at least two dimensions without a parametrization."""
    weight = getattr(layer, name, None)
    if not isinstance(weight, nn.Parameter):
        raise ValueError(f"{function}: name must be that of a plain parameter of {type(layer).__name__}, got {name!r}")
    check_alike(function, **{name: weight})
    if weight.ndim < 2:
        raise ValueError(f"{function}: {name} must be (O, I) or (O, C, ...), got {tuple(weight.shape)}")
    return weight
