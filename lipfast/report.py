"""One HTML file about one run or several: what was trained, what is certified, and how sure that is.

The file stands alone: style and plots are inside, it links to nothing, and every string from outside is escaped.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lipfast import evaluation, figures
from lipfast._version import __version__
from lipfast.certify import Certificate
from lipfast.checkpoint import replace_file
from lipfast.evaluation import Evaluation

_CSS = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #23262b; background: #fff;
       max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.55rem; font-weight: 650; margin: 0; }
h2 { font-size: 1.1rem; font-weight: 650; margin: 2.4rem 0 .6rem; padding-top: .9rem; border-top: 1px solid #e4e6ea; }
p, li { max-width: 46rem; } .quiet { color: #666c75; font-size: .88rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; margin: .4rem 0; }
th, td { padding: .28rem .8rem; text-align: left; vertical-align: top; border-bottom: 1px solid #eceef1; }
th { font-weight: 600; } thead th { border-bottom: 1.5px solid #8a8f98; } td { font-variant-numeric: tabular-nums; }
td.number, th.number { text-align: right; } td.number { white-space: nowrap; } th.number { max-width: 11rem; }
td.text { overflow-wrap: break-word; max-width: 22rem; }
tr.differs td { background: #fff7e0; } svg { max-width: 100%; height: auto; font-family: inherit; }
@media print { body { margin: 0; max-width: none; font-size: 11px; } h2 { break-after: avoid; }
               svg, table { break-inside: avoid; } }
"""
_MISSING = "–"


@dataclass(frozen=True)
class Run:
    """What a run folder holds: the name it goes by, settings, one row of numbers per epoch, certificates, an evaluation."""

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    certificates: list[Certificate]
    evaluation: Evaluation | None = None


def report(runs: Sequence[str | os.PathLike], out: str | os.PathLike) -> Path:
    """Writes one self-contained HTML file that compares run folders, and returns its path. Whole or not at all.

    Raises: ValueError if there is no run, or a folder or one of its files is not what :func:`lipfast.train` and
        ``lipfast certify`` write, or ``out`` cannot be written.
    """
    if not runs:
        raise ValueError("report: runs must name at least one run folder, got none")
    out = Path(out)
    page = _page([read_run(folder, name) for folder, name in zip(runs, _names(runs), strict=True)])
    replace_file(out, page.encode())
    return out


def read_run(folder: str | os.PathLike, name: str) -> Run:
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"report: {folder} is no run folder: it has no config.json")
    metrics = folder / "metrics.jsonl"
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ValueError(f"report: {folder}: config.json or metrics.jsonl is damaged ({error})") from error
    if not isinstance(settings, dict) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"report: {folder}: config.json and the lines of metrics.jsonl must be JSON objects")
    path = folder / evaluation.NAME
    certificates = [Certificate.load(path) for path in sorted(folder.glob("certificate*.npz"))]
    return Run(name, settings, rows, certificates, Evaluation.load(path) if path.is_file() else None)


def _names(runs: Sequence[str | os.PathLike]) -> list[str]:
    """The folders' own names, or whole paths where two folders share a name."""
    short = [Path(run).resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


def _page(runs: list[Run]) -> str:
    title = "lipfast: " + ", ".join(run.name for run in runs)
    norms = sorted({c.p for run in runs for c in run.certificates}, reverse=True)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">lipfast {escape(__version__)}</p>',
        _summary(runs),
        *(_certified(runs, p) for p in norms),
        _evaluated(runs),
        _training(runs),
        _settings(runs),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_CSS}</style></head>\n<body>\n{body}\n</body></html>\n'


def _summary(runs: list[Run]) -> str:
    head = [
        "run",
        "recipe",
        "data",
        "model",
        "#parameters",
        "#epochs",
        "#training seconds",
        "#clean accuracy",
        "#certified accuracy",
    ]
    rows = []
    for run in runs:
        last = run.metrics[-1] if run.metrics else {}
        told = next((found for found in (*run.certificates, run.evaluation) if found), None)
        clean = told.clean_accuracy if told else None
        known = [run.config.get(key) for key in ("recipe", "data", "model", "parameters")]
        numbers = map(_text, [*known, last.get("epoch"), last.get("seconds")])
        rows.append([run.name, *numbers, _percent(clean), _proven(run)])
    return _table(head, rows)


def _proven(run: Run) -> str:
    """At the largest eps of each norm, and in the evaluation; estimates have no place here."""
    proven = [c for c in run.certificates if c.kind == "bound"]
    chance = lambda c: f", {figures.kind_name(c)}" if c.failure_probability else ""
    how = lambda c: f"{figures.norm_name(c.p)}, {c.method}{chance(c)}"
    at = lambda c: f"{_percent(c.certified_accuracy(c.eps[-1]))} at {c.eps[-1]:g} ({how(c)})"
    e = run.evaluation
    more = [f"{_percent(v)} at {e.eps:g} (l_inf, {m}, pixels in [0, 1])" for m, v in e.verified_accuracy.items()] if e else []
    return ", ".join([*map(at, proven), *more]) or _MISSING


def _certified(runs: list[Run], p: float) -> str:
    """Figure and table of one norm: a row per eps, a column per certificate, bound and estimate side by side."""
    found = [(f"{run.name}, {c.method}", c) for run in runs for c in run.certificates if c.p == p]
    norm = figures.norm_name(p)
    head = ["#eps"] + [f"#{name}, {figures.kind_name(c)}" for name, c in found]
    rows = [["images", *(f"{len(c.radius)}, {c.data or 'unnamed'}" for _, c in found)]]
    rows.append(["0 (clean)", *(_percent(c.clean_accuracy) for _, c in found)])
    for eps in sorted({e for _, c in found for e in c.eps}):
        rows.append([f"{eps:g}", *(_certified_at(c, eps) for _, c in found)])
    rows.append(["seconds", *(f"{c.seconds:.1f}" for _, c in found)])
    drawing = figures.svg(figures.certified_accuracy(found), salt=f"certified {norm}")
    notes = [f"eps in pixel units, {norm}: each image may move by up to eps in this norm, in units of the pixels handed over."]
    if any(c.kind == "bound" and not c.failure_probability for _, c in found):
        notes.append("A bound is proven, floating-point rounding included.")
    if any(c.failure_probability for _, c in found):
        notes.append("A bound with probability: so probable for each image by itself, over random starts that lipfast drew.")
    if any(c.kind == "estimate" for _, c in found):
        notes.append("An estimate is not a certificate: it leaves out rounding and approaches spectral norms from below.")
    if any(c.pixel_range for _, c in found):
        cut = ", ".join(f"{name} {c.pixel_range}" for name, c in found if c.pixel_range)
        notes.append(f"Balls cut with the range of pixels: {cut}.")
    text = "".join(f'<p class="quiet">{escape(note)}</p>' for note in notes)
    return f"<h2>Certified accuracy, {escape(norm)}</h2>{drawing}{_table(head, rows)}{text}"


def _certified_at(c: Certificate, eps: float) -> str:
    """A certificate says nothing above its largest eps, and between the eps that were asked for at least what it found."""
    if eps > c.eps[-1]:
        return _MISSING
    return ("" if eps in c.eps or c.kind == "estimate" else "≥ ") + _percent(c.certified_accuracy(eps))


def _evaluated(runs: list[Run]) -> str:
    """A column per run with an evaluation, a row per number."""
    found = [(run.name, run.evaluation) for run in runs if run.evaluation]
    if not found:
        return ""
    columns = [dict(e.lines()) for _, e in found]
    head = ["", *(f"#{name}" for name, _ in found)]
    rows = [
        ["images", *(f"{e.images}, {e.data}" for _, e in found)],
        ["eps (l_inf, pixel units)", *(f"{e.eps:.4g}" for _, e in found)],
    ]
    rows += [[key, *(column.get(key, _MISSING) for column in columns)] for key in dict.fromkeys(k for c in columns for k in c)]
    note = "Pixels are clipped to [0, 1]. Unstable and grafted units are shares of all units; a grafted unit is never unstable."
    return f'<h2>Robustness at one radius</h2>{_table(head, rows)}<p class="quiet">{note}</p>'


def _training(runs: list[Run]) -> str:
    """A small plot per recorded number that changes in some run."""
    panels = []
    for key in dict.fromkeys(key for run in runs for row in run.metrics for key in row):
        lines = [(run.name, *_series(run.metrics, key)) for run in runs]
        if key not in ("epoch", "seconds") and any(len(set(values)) > 1 for _, _, values in lines):
            panels.append((key.replace("_", " "), lines))
    return f"<h2>Training</h2>{figures.svg(figures.training_curves(panels), salt='training')}" if panels else ""


def _series(metrics: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    rows = [(float(row.get("epoch", i + 1)), row[key]) for i, row in enumerate(metrics) if _is_number(row.get(key))]
    return [step for step, _ in rows], [float(value) for _, value in rows]


def _settings(runs: list[Run]) -> str:
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [[key, *(_text(config.get(key)) for config in flat)] for key in keys]
    differs = [len(set(row[1:])) > 1 for row in rows]
    hint = '<p class="quiet">Coloured rows differ between the runs.</p>' if any(differs) else ""
    return "<h2>Settings</h2>" + hint + _table(["setting", *(run.name for run in runs)], rows, marked=differs)


def _table(head: list[str], rows: list[list[str]], marked: Iterable[bool] = ()) -> str:
    """Columns whose head begins with # hold numbers: they stand to the right, and the # goes."""
    kinds = ["number" if name.startswith("#") else "text" for name in head]
    heads = "".join(f'<th class="{k}">{escape(name.removeprefix("#"))}</th>' for k, name in zip(kinds, head, strict=True))
    lines = []
    for row, mark in zip(rows, [*marked] or [False] * len(rows), strict=True):
        cells = "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))
        lines.append(f'<tr class="{"differs" if mark else "plain"}">{cells}</tr>')
    body = "".join(lines)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    if value is None:
        return _MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _percent(fraction: float | None) -> str:
    return _MISSING if fraction is None else f"{100 * fraction:.2f} %"
