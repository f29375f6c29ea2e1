"""Certification: for each image the radius within which no change of the pixels changes the prediction."""

import copy
import io
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipfast import figures
from lipfast._methods import METHODS, Task
from lipfast._version import __version__
from lipfast.bounds import read
from lipfast.checkpoint import replace_file
from lipfast.data import Dataset, Folder, unit
from lipfast.figures import KINDS, kind_name, norm_name


@dataclass(eq=False)
class Certificate:
    """What :func:`certify` found: one radius, prediction and label per image, on the CPU.

    Attributes:
        radius: (B,) float64, in the l_p norm and the units of the pixels handed over; no point of the closed ball has
            another class than ``prediction``. 0 where nothing could be certified.
        prediction, label: (B,) int64.
        eps: the radii that were asked for, ascending; nothing larger was tried.
        kind: ``"bound"``, proven, or ``"estimate"``, which is no certificate.
        pixel_range: the box that the ball was cut with, or None.
        failure_probability: with which the radius of an image may be wrong, over random starts that the method drew; 0: none.
        data, seconds, versions: where it comes from.
    """

    radius: Tensor
    prediction: Tensor
    label: Tensor
    eps: tuple[float, ...]
    method: str
    kind: str
    p: float
    pixel_range: tuple[float, float] | None = None
    data: str = ""
    seconds: float = 0.0
    failure_probability: float = 0.0
    versions: dict[str, str] = field(default_factory=lambda: {"lipfast": __version__, "torch": torch.__version__})

    @property
    def correct(self) -> Tensor:  # (B,)
        return self.prediction == self.label

    @property
    def clean_accuracy(self) -> float:
        """Fraction of images whose prediction is the label."""
        return self.correct.double().mean().item()

    def certified_accuracy(self, eps: float) -> float:
        """Fraction of images that are right and stay so within ``eps``; at 0 the clean accuracy.

        Raises: ValueError if ``eps`` is negative, NaN, or above the largest that was tried.
        """
        if not 0 <= eps <= self.eps[-1]:
            raise ValueError(f"certified_accuracy: eps must be from 0 to {self.eps[-1]:g}, the largest tried, got {eps}")
        return (self.correct & (self.radius >= eps)).double().mean().item()

    def curve(self) -> tuple[list[float], list[float]]:
        """Every eps at which the certified accuracy falls, and its value up to there: the corners of a step plot."""
        held = self.radius[self.correct].sort().values
        eps = torch.cat([held.new_zeros(1), held, held.new_tensor(self.eps[-1:])]).unique()
        accuracy = (len(held) - torch.searchsorted(held, eps)).double() / len(self.radius)
        return eps.tolist(), accuracy.tolist()

    def __repr__(self) -> str:
        top = self.eps[-1]
        return (
            f"Certificate({self.method}, {kind_name(self)}, {norm_name(self.p)}, {len(self.radius)} images: "
            f"clean {self.clean_accuracy:.1%}, at eps {top:g} {self.certified_accuracy(top):.1%})"
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes an ``.npz`` file that numpy reads too; the text entry ``about`` is JSON. Whole or not at all.

        Raises: ValueError if ``path`` does not end in .npz or cannot be written.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"Certificate.save: path must end in .npz, got {path}")
        arrays = {name: getattr(self, name).numpy() for name in ("radius", "prediction", "label")}
        about = {key: value for key, value in vars(self).items() if key not in arrays}
        content = io.BytesIO()
        np.savez(content, about=json.dumps(about), **arrays)
        replace_file(path, content.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Certificate":
        """Reads what :meth:`save` wrote. Raises: ValueError if the file is damaged or something else."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                about = json.loads(str(stored["about"]))
                arrays = {name: torch.from_numpy(stored[name]) for name in ("radius", "prediction", "label")}
            about["eps"] = tuple(about["eps"])
            about["pixel_range"] = about["pixel_range"] and tuple(about["pixel_range"])
            certificate = cls(**{**about, **arrays})
            shapes = {t.shape for t in arrays.values()}
            known = certificate.kind in KINDS and 0 <= certificate.failure_probability < 1
            if len(shapes) != 1 or certificate.radius.ndim != 1 or not known or not certificate.eps:
                raise ValueError("its entries do not fit together")
        except OSError:
            raise
        except Exception as error:  # zip, zlib, numpy and json each have their own
            raise ValueError(f"Certificate.load: {path} is damaged or no certificate ({error})") from error
        return certificate

    def plot(self, path: str | os.PathLike) -> None:
        """Draws certified accuracy against eps; the suffix of ``path`` chooses png, svg or pdf. Needs matplotlib."""
        figures.certified_accuracy([(self.data or "model", self)]).savefig(path, dpi=150)


def certify(
    model: nn.Module,
    data: Any,
    eps: float | Sequence[float],
    p: float | None = None,
    method: str = "interval",
    kind: str = "bound",
    batch_size: int = 256,
    limit: int | None = None,
    pixel_range: tuple[float, float] | None = None,
    resolution: int = 6,
    progress: bool = True,
    device: str | torch.device | None = None,
    failure_probability: float = 0.0,
) -> Certificate:
    """Finds the largest radius around each image within which ``model`` provably keeps its prediction.

    Args:
        model: any network that :mod:`lipfast.bounds` reads. It is put into eval mode, and back.
        data: a :class:`lipfast.data.Dataset` or :class:`lipfast.data.Folder`, a pair (images (B, ...), labels (B,)), or
            an iterable of such pairs. uint8 images become floats in [0, 1]. Images are cast to the dtype of the
            parameters: the ball is around the image that the network sees.
        eps: one radius or several, in the l_p norm and in units of the pixels handed over. Each is tried for each image,
            so certified accuracies at these are those of the method.
        p: norm of the ball, by default the method's own, named first.
        method:
            ``"interval"``, p = inf, 1 or 2: boxes through the network, the last layer merged with e_y - e_j.
            ``"product"``, p = 2 or inf: the margins at the image over global Lipschitz constants, one for each pair of classes,
            from products of the layers' norms.
            ``"liplt"``, p = 2 or inf: the same with the constants of LipLT (:func:`lipfast.bounds.lipschitz`), which are never
            larger. What networks trained by CRM are certified with.
            ``"local"``, p = 2: what ``"liplt"`` proves; beyond it, products of each layer's norm on the units that vary within
            the ball, and at each ``eps`` that these do not reach local LipLT (:func:`lipfast.bounds.local`), which is tighter
            still. Much slower. ``resolution`` narrows by the product of local norms alone.
            ``"crown"``, p = inf, 1 or 2: what ``"interval"`` proves, and each ``eps`` beyond it that linear bounds do
            (:func:`lipfast.bounds.crown_margin`), for networks of ReLU, grafted or leaky. Much tighter, and much slower.
            ``resolution`` narrows by boxes alone. Estimates, p = inf, are auto_LiRPA's, which must be installed.
            ``"alpha-crown"``, p = inf, estimates only: the same with slopes that auto_LiRPA improves in 20 steps.
        kind: ``"bound"``, proven, rounding included; ``"estimate"``, no certificate: rounded to nearest, spectral norms by
            100 steps of the power method, which come near from below.
        limit: take only the first so many images.
        pixel_range: (0, 1) leaves out what no picture can be; the default certifies the whole ball, and the methods of
            Lipschitz constants know no other.
        resolution: how often the gap between an eps that holds and the next, which does not, is halved.
        device: where to compute; by default where the model is.
        failure_probability: for the bounds of method ``"local"``, below 1; 1e-9, say. Above 0, convolutions too are bounded on
            the units that vary (:func:`lipfast.conv2d_norm_confidence`), and the radius of an image is wrong with at most this
            probability, over random starts that are drawn anew for every test of a radius and share it.

    Raises: ValueError if an argument is out of range, a pixel is NaN or Inf, a label is no class, or the network has a layer
        that is not supported. Pixels outside [0, 1] only warn: the certificate stays true, in units of those pixels.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"certify: model must be an nn.Module, got {type(model).__name__}")
    levels, p = _check(eps, p, method, kind, batch_size, limit, pixel_range, resolution)
    _check_chance(failure_probability, method, kind)
    images, labels, name = _read(data, limit)
    _check_images(images, pixel_range)
    start = time.perf_counter()
    radius, prediction = [], []
    with _evaluating(model, device) as like, torch.no_grad():
        shape = tuple(images.shape[1:])
        _check_labels(labels, read(model, shape).nodes[-1].shape)
        model = _plain(model)
        task = Task(model, shape, levels, p, kind, pixel_range, resolution, float(failure_probability))
        radii = METHODS[method].prepare(task)
        for batch in _bar(images.split(batch_size), progress):
            x = unit(batch)
            x = x.to(like) if like is not None else x
            logits = model(x)
            y = logits.argmax(1)
            radius.append(torch.where(logits.isfinite().all(1), radii(x, y), 0).cpu())
            prediction.append(y.cpu())
    return Certificate(
        radius=torch.cat(radius),
        prediction=torch.cat(prediction),
        label=labels.cpu().long(),
        eps=levels,
        method=method,
        kind=kind,
        p=p,
        pixel_range=pixel_range and (float(pixel_range[0]), float(pixel_range[1])),
        data=name,
        seconds=time.perf_counter() - start,
        failure_probability=float(failure_probability),
    )


def _check(eps, p, method, kind, batch_size, limit, pixel_range, resolution) -> tuple[tuple[float, ...], float]:
    levels = sorted({float(e) for e in (eps if isinstance(eps, Iterable) else [eps])})
    if not levels or not all(0 < e < math.inf for e in levels):
        raise ValueError(f"certify: eps must be positive and finite, got {eps}")
    if method not in METHODS:
        raise ValueError(f"certify: method {method!r} is not available in this version; available: {', '.join(METHODS)}")
    if kind not in KINDS:
        raise ValueError(f"certify: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "bound" and not METHODS[method].proves:
        raise ValueError(f"certify: kind must be 'estimate' for method {method!r}, which rounds to nearest; 'crown' has bounds")
    norms = METHODS[method].norms
    if p is not None and p not in norms:
        known = " or ".join(f"{n:g}" for n in sorted(norms))
        raise ValueError(f"certify: p must be {known} for method {method!r}, got {p}")
    for name, value, least in (("batch_size", batch_size, 1), ("limit", limit, 1), ("resolution", resolution, 0)):
        if value is not None and value < least:
            raise ValueError(f"certify: {name} must be at least {least}, got {value}")
    if pixel_range is not None and not pixel_range[0] < pixel_range[1]:
        raise ValueError(f"certify: pixel_range must be (low, high) with low < high, got {pixel_range}")
    if pixel_range is not None and not METHODS[method].clips:
        raise ValueError(f"certify: pixel_range must be None for method {method!r}, which knows only whole balls")
    return tuple(levels), float(norms[0] if p is None else p)


def _check_chance(failure_probability: float, method: str, kind: str) -> None:
    if not 0 <= failure_probability < 1:
        raise ValueError(f"certify: failure_probability must be from 0 to below 1, got {failure_probability}")
    if failure_probability and not METHODS[method].draws:
        raise ValueError(f"certify: failure_probability must be 0 for method {method!r}, got {failure_probability}")
    if failure_probability and kind != "bound":
        raise ValueError(f"certify: failure_probability must be 0 for kind {kind!r}, got {failure_probability}")


def _read(data: Any, limit: int | None) -> tuple[Tensor, Tensor, str]:
    """All images and labels in two tensors, and the name of the data set, if it has one."""
    if isinstance(data, Dataset):
        batches: Iterable = [(data.images, data.labels)]
    elif isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
        batches = [data]
    elif isinstance(data, Iterable):
        batches = data
    else:
        raise ValueError(f"certify: data must be a Dataset, a pair (images, labels) or batches, got {type(data).__name__}")
    images, labels, count = [], [], 0
    for batch in batches:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
            raise ValueError(f"certify: data must give pairs (images, labels) of tensors, got {type(batch).__name__}")
        x, y = batch
        if y.ndim != 1 or x.ndim < 2 or len(x) != len(y):
            shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(f"certify: data must be images (B, ...) and labels (B,), got {shapes}")
        images.append(x)
        labels.append(y)
        count += len(x)
        if limit is not None and count >= limit:
            break
    if not count:
        raise ValueError("certify: data must have at least one image, got none")
    name = data.name if isinstance(data, (Dataset, Folder)) else ""
    return torch.cat(images)[:limit], torch.cat(labels)[:limit], name


def _check_images(images: Tensor, pixel_range: tuple[float, float] | None) -> None:
    if not images.is_floating_point() and images.dtype != torch.uint8:
        raise ValueError(f"certify: images must be floating, with pixels in [0, 1], or uint8, got {images.dtype}")
    broken = ~images.flatten(1).isfinite().all(1)
    if broken.any():
        raise ValueError(f"certify: pixels must be finite, got NaN or Inf in image {broken.nonzero()[0].item()}")
    low, high = (unit(t).item() for t in images.aminmax())
    if pixel_range is not None and not pixel_range[0] <= low <= high <= pixel_range[1]:
        raise ValueError(f"certify: pixels must be within pixel_range {pixel_range}, got {low:g} to {high:g}")
    if low < 0 or high > 1:
        warnings.warn(f"certify: pixels from {low:g} to {high:g} are not in [0, 1]; eps is in their units", stacklevel=3)


def _check_labels(labels: Tensor, output_shape: tuple[int, ...]) -> None:
    if len(output_shape) != 1 or output_shape[0] < 2:
        raise ValueError(f"certify: model must give logits (B, K) of two classes or more, got (B, {str(output_shape)[1:]}")
    wrong = (labels < 0) | (labels >= output_shape[0])
    if labels.is_floating_point() or wrong.any():
        first = labels[wrong.nonzero()[0]].item() if wrong.any() else labels.dtype
        raise ValueError(f"certify: labels must be classes 0 to {output_shape[0] - 1} of the model, got {first}")


@contextmanager
def _evaluating(model: nn.Module, device: str | torch.device | None) -> Iterator[Tensor | None]:
    """The model in eval mode on ``device``, and afterwards as it was. Yields a parameter, for its dtype and device.

    No autocast: what it would round is not what the weights say.
    """
    modes = [(m, m.training) for m in model.modules()]
    parameter = next(model.parameters(), None)
    home = parameter.device if parameter is not None else None
    try:
        if device is not None:
            try:
                model.to(device)
            except (RuntimeError, AssertionError) as error:  # torch raises either for a device that it does not have
                reason = str(error).splitlines()[0]
                raise ValueError(f"certify: device must be one that torch can use, got {device}: {reason}") from error
        model.eval()
        like = next(model.parameters(), None)
        with torch.autocast(like.device.type if like is not None else "cpu", enabled=False):
            yield like
    finally:
        if home is not None and device is not None:
            model.to(home)
        for module, mode in modes:
            module.training = mode


def _plain(model: nn.Module) -> nn.Module:
    """The model with the weights that its parametrizations compute, as numbers: each step of a proof then reads the same."""
    if not any(parametrize.is_parametrized(module) for module in model.modules()):
        return model
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):  # torch's own removal would alter the class, which the original shares
            names = dict(module.parametrizations.named_children())  # type: ignore[operator, union-attr]
            weights = {name: nn.Parameter(getattr(module, name).detach().clone()) for name in names}
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for name, weight in weights.items():
                module.register_parameter(name, weight)
    return model


def _bar(batches: Sequence[Tensor], progress: bool) -> Iterable[Tensor]:
    try:
        from tqdm.auto import tqdm
    except ImportError:  # the bar is a comfort, not a need
        return batches
    return tqdm(batches, "certify", unit="batch", leave=False, disable=not progress)
