"""From a network with ReLUs to one with grafted units, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lipfast.grafting.scores import graftable
from lipfast.nn import GraftedReLU

Start = float | Mapping[str, Tensor]


def graft(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    slope: Start = 0.4,
    intercept: Start = 0.0,
    input_shape: tuple[int, ...] | None = None,
) -> nn.Module:
    """Makes straight lines of the chosen units, in place.

    An ``nn.ReLU`` becomes a :class:`lipfast.nn.GraftedReLU`, on the device and in the dtype of the model's parameters. A
    GraftedReLU that grafts nothing yet stays, with its parameters, which an optimiser may hold: it is filled.

    Args:
        masks: by the name of an activation the units to graft, bool of the shape of a sample, as of
            :func:`lipfast.grafting.select`; other activations stay as they are.
        slope, intercept: where the lines start: one number for all; or by the same names tensors of the shape of a sample, such
            as ``scores.chord_slope`` and ``scores.chord_intercept`` of :func:`lipfast.grafting.score`, the line through the
            ends of ReLU on a unit's box, which widens no later box, averaged over the calibration images.
        input_shape: of one sample of the model's input, from which the shape of an ``nn.ReLU`` follows. None where all that
            ``masks`` names are GraftedReLU, which know theirs.

    Returns: ``model``.

    Raises: ValueError, before anything is changed, for a name, shape or dtype that is not this network's, a layer that is
        grafted already, or, with ``input_shape``, a network without ReLU modules, a ReLU that is a function or one that is used
        at several places.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> graft(model, {"1": torch.tensor([True, False])}, input_shape=(3,))[1]
    GraftedReLU((2,), grafted=1)
    """
    shapes = _shapes(model, input_shape)
    for name, mask in masks.items():
        if name not in shapes and input_shape is None:
            raise ValueError(
                f"graft: input_shape must be given for layer {name!r}, which is no GraftedReLU that knows its shape"
            )
        if name not in shapes:
            raise ValueError(f"graft: masks must name activations of the model, {', '.join(shapes)}, got {name!r}")
        if mask.dtype != torch.bool or mask.shape != shapes[name]:
            raise ValueError(f"graft: mask of {name!r} must be bool {shapes[name]}, got {mask.dtype} {tuple(mask.shape)}")
        layer = model.get_submodule(name)
        if isinstance(layer, GraftedReLU) and layer.mask.any():
            raise ValueError(f"graft: layer {name!r} is grafted already; ungraft the model first")
    lines = {name: (_at("slope", slope, name, mask), _at("intercept", intercept, name, mask)) for name, mask in masks.items()}
    like = next((t for t in model.parameters() if t.is_floating_point()), torch.empty(()))
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, GraftedReLU):
            plain, layer = layer, GraftedReLU(mask.shape).to(like).train(layer.training)
            _replace(model, plain, layer)
        with torch.no_grad():
            for own, start in zip((layer.mask, layer.slope, layer.intercept), (mask, *lines[name]), strict=True):
                own.copy_(start)
    return model


def _shapes(model: nn.Module, input_shape: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    """Of a sample at each activation that can be grafted."""
    if input_shape is None:
        return {name: tuple(m.mask.shape) for name, m in model.named_modules() if isinstance(m, GraftedReLU)}
    network, at = graftable(model, input_shape)
    return {name: network.nodes[p].shape for name, p in at.items()}


def _at(argument: str, start: Start, name: str, mask: Tensor) -> Tensor:
    """Where the lines of a layer start."""
    if not isinstance(start, Mapping):
        return torch.tensor(start, dtype=torch.float64)
    if name not in start or start[name].shape != mask.shape:
        got = tuple(start[name].shape) if name in start else "none"
        raise ValueError(f"graft: {argument} of {name!r} must be a tensor of shape {tuple(mask.shape)}, got {got}")
    return start[name]


def ungraft(model: nn.Module) -> nn.Module:
    """Makes an ``nn.ReLU`` of every GraftedReLU, in place: the network before :func:`graft`, if no weight has changed since.

    Masks, slopes and intercepts are gone afterwards.

    Returns: ``model``.

    Raises: ValueError if ``model`` is itself a GraftedReLU, which nothing holds.
    """
    if isinstance(model, GraftedReLU):
        raise ValueError("ungraft: model must be a network that holds its GraftedReLU modules, got one")
    for layer in list(model.modules()):
        if isinstance(layer, GraftedReLU):
            _replace(model, layer, nn.ReLU().train(layer.training))
    return model


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Under every name that the module has: which of them forward takes, nothing tells."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, key, new)
