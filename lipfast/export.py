"""Networks and properties in the formats of other verifiers: ONNX and VNN-LIB 1.0, as the VNN competition reads them.

    from lipfast import export
    export.onnx(model, (3, 32, 32), "model.onnx")
    export.vnnlib("image7.vnnlib", image, label=3, classes=10, eps=2 / 255)

A grafted unit needs no operator of its own: ``relu((1 - m) x) + m a x + m b`` is the grafted ReLU of mask m, slope a and
intercept b, and where m is 1 that ReLU only ever sees 0, which no verifier has to relax or to split.
"""

import copy
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any

import torch
from torch import Tensor, nn

from lipfast.bounds import read
from lipfast.certify import _plain
from lipfast.checkpoint import replace_file
from lipfast.data import unit
from lipfast.grafting.conversion import _replace
from lipfast.nn import GraftedReLU

OPSET = 18
DIGITS = Decimal("1e-12")  # the last decimal place of a VNN-LIB file


def onnx(model: nn.Module, input_shape: tuple[int, ...], path: str | os.PathLike) -> None:
    """Writes ``model`` in eval mode as an ONNX file of standard operators, in float32; whole or not at all.

    Input and output are batches of any size. Weights are written as the numbers that they are, parametrised ones too, and
    rounded if they are float64: what a verifier proves then holds for the file.

    Args:
        model: a network that :mod:`lipfast.bounds` reads. It is not changed.
        input_shape: of one sample.
        path: of the file; one that is there is replaced.

    Needs the packages onnx and onnxscript: ``pip install lipfast[onnx]``.

    Raises: ValueError for a layer that is not supported, which it names, an operator that torch cannot export, missing
        packages, or a file that cannot be written.
    """
    try:
        import onnx as package
        import onnxscript  # noqa: F401  torch asks for it only later
    except ImportError as error:
        raise ValueError("onnx: the packages onnx and onnxscript are needed (pip install lipfast[onnx])") from error
    plain = _with_lines(_plain(copy.deepcopy(model)).to("cpu", torch.float32).eval())
    read(plain, tuple(input_shape))
    found = _exported(plain, torch.zeros(2, *input_shape))  # the size 1 would be taken for a constant
    for node in found.graph.node:
        if node.domain or found.functions:
            raise ValueError(f"onnx: only operators of the ONNX standard can be written, got {node.domain}.{node.op_type}")
    _strip(found)
    package.checker.check_model(found)
    replace_file(path, found.SerializeToString())


def vnnlib(
    path: str | os.PathLike,
    x: Tensor,  # (...)
    label: int,
    classes: int,
    eps: float,
    pixel_range: tuple[float, float] | None = (0.0, 1.0),
) -> None:
    """Writes the property of one image as a VNN-LIB 1.0 file: what a verifier is to refute.

    The file asks for an input within ``eps`` of ``x`` in each pixel, for which another class is at least as likely as
    ``label``. "unsat" then proves that the image is robust. Its decimal numbers are rounded outward, so that they hold every
    real number of the ball.

    Args:
        path: of the file; one that is there is replaced.
        x: one image, floating, or uint8, which becomes floats in [0, 1]; its numbers in order are X_0, X_1, ...
        label: the class, from 0 to ``classes - 1``.
        classes: the number of the network's outputs Y_0, Y_1, ...
        eps: l_inf radius in units of the pixels handed over.
        pixel_range: values outside of it are no inputs; None clips nothing.

    Raises: ValueError for an argument out of range, a pixel that is not finite or not in ``pixel_range``, or a file that
        cannot be written.
    """
    low, high = (-math.inf, math.inf) if pixel_range is None else pixel_range
    pixels = _pixels(x, low, high)
    if not (classes >= 2 and 0 <= label < classes):
        raise ValueError(f"vnnlib: label must be from 0 to classes - 1 of at least two, got {label} of {classes}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"vnnlib: eps must be finite and not negative, got {eps}")
    lines = [f"; within {eps} of an image of class {label} in each pixel, is another class as likely?"]
    lines += [f"(declare-const X_{i} Real)" for i in range(len(pixels))]
    lines += [f"(declare-const Y_{j} Real)" for j in range(classes)]
    for i, pixel in enumerate(pixels):
        least = max(_FLOOR.subtract(pixel, Decimal(eps)), Decimal(low))
        greatest = min(_CEILING.add(pixel, Decimal(eps)), Decimal(high))
        lines += [f"(assert (>= X_{i} {_FLOOR.quantize(least, DIGITS):f}))"]
        lines += [f"(assert (<= X_{i} {_CEILING.quantize(greatest, DIGITS):f}))"]
    others = [f"    (and (>= Y_{j} Y_{label}))" for j in range(classes) if j != label]
    lines += ["(assert (or", *others, "))", ""]
    replace_file(path, "\n".join(lines).encode())


_FLOOR, _CEILING = Context(60, ROUND_FLOOR), Context(60, ROUND_CEILING)


def _pixels(x: Tensor, low: float, high: float) -> list[Decimal]:
    """The exact values of an image."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.dtype == torch.uint8):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"vnnlib: x must be an image, floating or uint8, got {got}")
    values = unit(x).detach().flatten()
    if not (values.isfinite() & (values >= low) & (values <= high)).all():
        raise ValueError(
            f"vnnlib: pixels must be finite and from {low:g} to {high:g}, got {values.min():g} to {values.max():g}"
        )
    return [Decimal(value) for value in values.tolist()]


class _Lines(nn.Module):
    """A grafted ReLU of standard operators."""

    def __init__(self, layer: GraftedReLU):
        super().__init__()
        self.keep = nn.Buffer((~layer.mask).to(layer.slope.dtype))
        self.slope = nn.Buffer(torch.where(layer.mask, layer.slope, 0.0).detach())
        self.intercept = nn.Buffer(torch.where(layer.mask, layer.intercept, 0.0).detach())

    def forward(self, x: Tensor) -> Tensor:
        return (self.keep * x).relu() + self.slope * x + self.intercept


def _with_lines(model: nn.Module) -> nn.Module:
    holder = nn.Sequential(model)  # which holds the model itself, if that is all there is
    for layer in list(model.modules()):
        if isinstance(layer, GraftedReLU):
            _replace(holder, layer, _Lines(layer) if layer.mask.any() else nn.ReLU())
    return holder[0]


def _exported(model: nn.Module, example: Tensor) -> Any:
    """The model as a protocol buffer of onnx."""
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["output"], "opset_version": OPSET, "verbose": False}
    try:
        with _tracing():
            program = torch.onnx.export(
                model, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), **names
            )
    except Exception as error:  # the exporter has many kinds, the first cause below
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"onnx: torch cannot export the model: {str(cause).splitlines()[0]}") from error
    return program.model_proto  # type: ignore[union-attr]


@contextmanager
def _tracing() -> Iterator[None]:
    """What the exporter needs: cuDNN's flag for TF32, which cannot be read once convolutions have a precision of their own, and
    not to be heard about packages that it does without and about its own future."""
    cudnn: Any = torch.backends.cudnn
    log, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    precisions = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            log.setLevel(logging.ERROR)
            if not _readable(cudnn):
                cudnn.allow_tf32 = True
            yield
    finally:
        log.setLevel(level)
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = precisions


def _readable(cudnn: Any) -> bool:
    try:
        return cudnn.allow_tf32 in (True, False)
    except RuntimeError:
        return False


def _strip(found: Any) -> None:
    """Takes out what the exporter says about its origins: folders of this computer, and more text than numbers."""
    graph = found.graph
    for entry in (found, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        entry.ClearField("metadata_props")
        entry.ClearField("doc_string")
