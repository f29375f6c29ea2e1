"""The command line: train, certify, evaluate, export, report, info.

Exit status 0, or 2 with one line on standard error for whatever the user can mend. matplotlib, scikit-learn and tensorboard
are imported by what needs them, so that ``--help`` and ``info`` are quick.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

import lipfast
from lipfast import recipes
from lipfast._methods import METHODS
from lipfast.certify import Certificate, certify
from lipfast.data import NAMES, Images, load
from lipfast.figures import kind_name, norm_name
from lipfast.report import report

# The modules of what lipfast[loops] brings, and the names of their packages.
_EXTRA = {name: name for name in ("matplotlib", "safetensors", "tensorboard", "tqdm")} | {"sklearn": "scikit-learn"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 2 for an error of the user's, 130 when interrupted.

    ``--help`` leaves by SystemExit, as argparse does.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _tell(f"warning: {message}")
        try:
            arguments = _parser().parse_args(words)
            arguments.command(arguments)
        except KeyboardInterrupt:
            resume = ["--resume"] if words[0] == "train" and "--resume" not in words else []
            _tell(f"interrupted; to go on: {shlex.join(['lipfast', *words, *resume])}")
            return 130
        except (ValueError, OSError, ModuleNotFoundError, torch.OutOfMemoryError) as error:
            missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
            if "--debug" in words or (isinstance(error, ModuleNotFoundError) and missing not in _EXTRA):
                raise
            _tell(f"{_EXTRA[missing]} is needed: pip install lipfast[loops]" if missing else _one_line(error))
            return 2
    return 0


def _train(arguments: argparse.Namespace) -> None:
    from lipfast.train import train

    settings = dict(arguments.set or [])
    if arguments.seed is not None:
        settings["seed"] = arguments.seed
    folder = train(
        arguments.recipe,
        arguments.data,
        arguments.out or Path("runs") / f"{arguments.recipe}-{Path(arguments.data).name}",
        device=arguments.device,
        epochs=arguments.epochs,
        resume=arguments.resume,
        settings=settings,
        root=arguments.root,
        limit=arguments.limit,
        deterministic=arguments.deterministic,
        progress=sys.stderr.isatty(),
    )
    if os.environ.get("RANK", "0") == "0":  # under torchrun the first process speaks
        print(f"written: {folder}")


def _certify(arguments: argparse.Namespace) -> None:
    from lipfast import checkpoint

    source = Path(arguments.run)
    folder = source if source.is_dir() else source.parent
    stored = checkpoint.read(source)
    about = stored["metadata"]
    model = checkpoint.load(source)
    import_module("matplotlib.figure")  # asked before the long work, not after
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder}: cannot be written to")
    certificate = certify(
        model,
        _test_images(arguments, about, stored["arguments"]),
        arguments.eps or _default_eps(about),
        p=arguments.p,
        method=arguments.method or _default_method(about),
        kind=arguments.kind,
        batch_size=arguments.batch_size,
        pixel_range=arguments.pixel_range and tuple(arguments.pixel_range),
        device=arguments.device,
        progress=sys.stderr.isatty(),
        failure_probability=arguments.failure_probability,
    )
    chance = f"-{certificate.failure_probability:g}" if certificate.failure_probability else ""
    stem = f"certificate-{certificate.method}-{certificate.kind}{chance}-l{certificate.p:g}"
    certificate.save(folder / f"{stem}.npz")
    certificate.plot(folder / f"{stem}.png")
    print(_table(certificate))
    print(f"written: {folder / stem}.npz and .png")


def _default_eps(about: dict[str, Any]) -> list[float]:
    """The radius that the run was trained for, its half and its quarter."""
    eps = about.get("settings", {}).get("eps")
    if not eps:
        raise ValueError("certify: argument --eps: the run names no radius, so name one")
    return [eps / 4, eps / 2, eps]


def _default_method(about: dict[str, Any]) -> str:
    """What the run's recipe trains for; interval where no recipe is known."""
    recipe = recipes.RECIPES.get(about.get("recipe", ""))
    return recipe.certificate if recipe else "interval"


def _evaluate(arguments: argparse.Namespace) -> None:
    from lipfast import checkpoint, evaluation

    source = Path(arguments.run)
    about = checkpoint.read(source)["metadata"]
    eps, device = _linf_eps(arguments, about), arguments.device or "cpu"
    found = evaluation.evaluate(
        checkpoint.load(source, device),
        _test_images(arguments, about, checkpoint.read(source)["arguments"]).to(device),
        eps,
        tuple(arguments.methods or evaluation.METHODS),
        limit=arguments.limit,
        steps=arguments.steps,
        restarts=arguments.restarts,
        progress=sys.stderr.isatty(),
    )
    path = (source if source.is_dir() else source.parent) / evaluation.NAME
    found.save(path)
    print(f"{found.data}: the first {found.images} test images, l_inf, eps {found.eps:.4g} in pixel units")
    print("\n".join(f"{name:<50}{value:>12}" for name, value in found.lines()))
    print(f"written: {path}")


def _export(arguments: argparse.Namespace) -> None:
    from lipfast import checkpoint, export

    stored, folder = checkpoint.read(arguments.run), Path(arguments.folder)
    eps, model = _linf_eps(arguments, stored["metadata"]), checkpoint.load(arguments.run)
    data = _test_images(arguments, stored["metadata"], stored["arguments"])
    folder.mkdir(parents=True, exist_ok=True)
    export.onnx(model, data.shape, folder / "model.onnx")
    x, labels = next(data.in_order(arguments.limit))
    for i, (image, label) in enumerate(zip(x, labels.tolist(), strict=True)):
        export.vnnlib(folder / f"image{i}.vnnlib", image, label, data.classes, eps)
    rows = "".join(f"model.onnx,image{i}.vnnlib,{arguments.timeout}\n" for i in range(len(x)))
    checkpoint.replace_file(folder / "instances.csv", rows.encode())
    print(f"written: {folder}: model.onnx, {len(x)} properties at l_inf eps {eps:.4g} in pixel units, instances.csv")


def _linf_eps(arguments: argparse.Namespace, about: dict[str, Any]) -> float:
    """The radius that was named, or the run's if that is one of l_inf."""
    recipe = recipes.RECIPES.get(about.get("recipe", ""))
    trained = about.get("settings", {}).get("eps") if recipe and recipe.p == math.inf else None
    if not (eps := arguments.eps or trained):
        raise ValueError("argument --eps: the run names no l_inf radius, so name one")
    return eps


def _test_images(arguments: argparse.Namespace, about: dict[str, Any], build: dict[str, Any]) -> Images:
    root = arguments.root or (None if arguments.data else about.get("root"))
    shape = build.get("shape", [224])
    return load(arguments.data or about["data"], root, "test", arguments.limit, size=shape[-1])


def _report(arguments: argparse.Namespace) -> None:
    out = arguments.out or Path(arguments.runs[0]) / "report.html"
    print(f"written: {report(arguments.runs, out)}")


def _info(arguments: argparse.Namespace) -> None:
    rows = [
        ("lipfast", f"{lipfast.__version__} in {Path(lipfast.__file__).parent}"),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", torch.__version__),
        *((package, _version(package)) for package in _EXTRA.values()),
        *_build(),
        (
            "loaded",
            ", ".join(name for name, there in lipfast.loaded.items() if there) or "nothing: every op runs its reference",
        ),
    ]
    if hasattr(torch.ops.lipfast, "cpu_capability"):
        rows.append(("CPU kernels use", str(torch.ops.lipfast.cpu_capability())))
    rows.append(("device cpu", f"{torch.get_num_threads()} threads"))
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        rows.append((f"device cuda:{i}", f"{gpu.name}, compute {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def _build() -> list[tuple[str, str]]:
    if importlib.util.find_spec("lipfast._C") is None:
        return [("built", "without lipfast._C, which would tell")]
    from lipfast import _C  # type: ignore[attr-defined]  # compiled, with no stub

    as_text = lambda v: "none" if v is None or v == [] else ", ".join(v) if isinstance(v, (list, tuple)) else str(v)
    return [(f"built: {key.replace('_', ' ')}", as_text(value)) for key, value in _C.build_info().items()]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing (pip install lipfast[loops])"


def _table(certificate: Certificate) -> str:
    """One line per eps: the share of images that are right and stay so."""
    c = certificate
    cut = f", pixels within {c.pixel_range}" if c.pixel_range else ""
    lines = [
        f"{c.data}: {len(c.radius)} images, {norm_name(c.p)}, eps in pixel units{cut}; method {c.method}, {kind_name(c)}",
        f"{'eps':>10}  {'certified accuracy' if c.kind == 'bound' else kind_name(c)}",
        f"{'0 (clean)':>10}  {c.clean_accuracy:8.2%}",
        *(f"{eps:10.4g}  {c.certified_accuracy(eps):8.2%}" for eps in c.eps),
    ]
    return "\n".join(lines)


def _one_line(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory on the device"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _tell(text: str) -> None:
    print(f"lipfast: {' '.join(text.split())}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog.removeprefix('lipfast ')}: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("lipfast", description="Train, certify and report networks with interval and Lipschitz certificates.")
    parser.add_argument("--version", action="version", version=f"lipfast {lipfast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about)
        made.set_defaults(command=run)
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return made

    train = command("train", _train, "Train a network by a recipe into a run folder.")
    train.add_argument("recipe", metavar="RECIPE", help=", ".join(recipes.RECIPES))
    _add_data(train, default="digits")
    train.add_argument("--out", metavar="DIR", help="the run folder (default: runs/RECIPE-DATA)")
    train.add_argument("--epochs", type=int, metavar="N", help="stretch or squeeze the recipe to N epochs")
    train.add_argument(
        "--set", type=_setting, nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="recipe fields"
    )
    train.add_argument("--seed", type=int, metavar="N", help="the same as --set seed=N")
    train.add_argument("--resume", action="store_true", help="go on after the last finished epoch of the run in --out")
    train.add_argument("--deterministic", action="store_true", help="refuse what torch cannot repeat to the bit")

    certify = command("certify", _certify, "Certify a trained network on the test images; the result goes into its folder.")
    certify.add_argument("run", metavar="RUN_OR_CHECKPOINT")
    _add_data(certify, default=None)
    certify.add_argument("--eps", type=_number, nargs="+", metavar="EPS", help="radii in pixel units; 8/255 is a number too")
    certify.add_argument("--p", type=float, help="norm of the ball: 1, 2 or inf (default: inf for interval and crown, else 2)")
    certify.add_argument("--method", help=f"{', '.join(METHODS)} (default: what the run was trained for)")
    certify.add_argument("--kind", default="bound", help="bound: proven (default); estimate: not a certificate")
    certify.add_argument("--pixel-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="leave out what no image can be")
    certify.add_argument(
        "--failure-probability",
        type=_number,
        default=0.0,
        metavar="P",
        help="of an image's bound, for method local: tighter where 1e-9, say, is allowed (default: 0)",
    )
    certify.add_argument("--batch-size", type=int, default=256, metavar="N")

    evaluate = command("evaluate", _evaluate, "Accuracy of a trained network, attacked and proven, at one l_inf radius.")
    evaluate.add_argument("run", metavar="RUN_OR_CHECKPOINT")
    _add_data(evaluate, default=None, limit=1000)
    evaluate.add_argument("--eps", type=_number, metavar="EPS", help="radius in pixel units (default: the run's)")
    evaluate.add_argument("--methods", nargs="+", metavar="METHOD", help="of verification: interval, crown (default: both)")
    evaluate.add_argument("--steps", type=int, default=100, metavar="N", help="of the attack, PGD (default: 100)")
    evaluate.add_argument("--restarts", type=int, default=1, metavar="N", help="starts of the attack (default: 1)")

    export = command("export", _export, "ONNX file and VNN-LIB properties of a trained network, for other verifiers.")
    export.add_argument("run", metavar="RUN_OR_CHECKPOINT")
    export.add_argument("folder", metavar="DIR", help="where the files go")
    _add_data(export, default=None, limit=100)
    export.add_argument("--eps", type=_number, metavar="EPS", help="l_inf radius in pixel units (default: the run's)")
    export.add_argument(
        "--timeout", type=int, default=300, metavar="SECONDS", help="per image, in instances.csv (default: 300)"
    )

    report = command("report", _report, "Compare run folders in one self-contained HTML file.")
    report.add_argument("runs", nargs="+", metavar="RUN")
    report.add_argument("--out", metavar="FILE", help="(default: report.html in the first run)")

    command("info", _info, "Versions, what was built, what is loaded, devices.")
    return parser


def _add_data(parser: argparse.ArgumentParser, default: str | None, limit: int | None = None) -> None:
    told = default or "what the run was trained on"
    parser.add_argument("--data", default=default, help=f"{', '.join(NAMES)} or a folder (default: {told})")
    parser.add_argument("--root", metavar="DIR", help="the folder of the data's files (default: $LIPFAST_DATA)")
    parser.add_argument(
        "--limit", type=int, default=limit, metavar="N", help=f"only the first N images (default: {limit or 'all'})"
    )
    parser.add_argument("--device", type=_device, metavar="D", help="cpu, cuda, cuda:1, ...")


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    return key, value


def _number(text: str) -> float:
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from error


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that it does not have
        raise argparse.ArgumentTypeError(f"must be one that torch can use, got {text!r}") from error
