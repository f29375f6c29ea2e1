"""What the documentation shows of result files: docs/speed.md with its plots, and the README's table."""

import re
from pathlib import Path
from typing import Any

from bench import cases, compare, record
from bench.ops import OWN_COMPILED
from bench.problem import COMPILED, DEFINITION, OWN

ROOT = Path(__file__).parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "speed.md"
BESIDE = (DEFINITION, COMPILED, "nominal", "nominal x2")  # no peers, and neither is what starts with "lipfast"
MARKS = ("<!-- python -m bench --tables writes what follows -->\n", "<!-- to here -->\n")
HEAD = "| | size | on | ours, ms | best peer | torch | compiled torch | floor |\n|---|---|---|---|---|---|---|---|\n"


def write(paths: list[Path]) -> int:
    """All files are read before anything is written."""
    found = [(path.resolve(), record.read(path)) for path in paths]
    README.write_text(between(README.read_text(), short(found)))
    PAGE.write_text(between(PAGE.read_text(), long(found)))
    for _, run in found:
        plot(run, PAGE.parent / f"roofline-{run['machine']['name']}.png")
    return 0


def between(text: str, table: str) -> str:
    """``text`` with ``table`` between the marks. Raises ValueError where they are missing."""
    found = re.search("(.*" + re.escape(MARKS[0]) + ").*(" + re.escape(MARKS[1]) + ".*)", text, re.DOTALL)
    if not found:
        raise ValueError(f"the marks {MARKS[0].strip()} and {MARKS[1].strip()} expected around the table, got none")
    return f"{found[1]}\n{table}\n{found[2]}"


def short(found: list[tuple[Path, dict[str, Any]]]) -> str:
    """Every op at the last of its sizes and every bound at the first, in float32."""
    lines = []
    for _, run in found:
        sizes: dict[str, str] = {}
        for name, size, dtype, _ in compare.rows(run):
            if dtype == "float32" and (name not in sizes or name in cases.names()):
                sizes[name] = size
        lines += [line for (name, size, dtype), line in _lines(run).items() if dtype == "float32" and sizes[name] == size]
    return HEAD + "".join(lines)


def long(found: list[tuple[Path, dict[str, Any]]]) -> str:
    return "\n".join(_section(path, run) for path, run in found)


def _section(path: Path, run: dict[str, Any]) -> str:
    machine, versions = run["machine"], run["versions"]
    peers = ", ".join(
        f"{name} {version}" for name, version in versions.items() if version and name not in ("lipfast", "python")
    )
    rates = {int(size): rate for size, rate in run["ceilings"]["bytes_per_second"].items()}
    products = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in run["ceilings"]["flops_per_second"].items())
    link = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    return (
        f"## {machine['gpu'] or machine['cpu']}\n\n"
        f"`{run['command']}`, commit {(run['commit'] or 'unknown')[:12]}, {machine['threads']} thread(s); {peers}. "
        f"All numbers: [{link}](../{link}).\n\n"
        f"Ceilings: {products}; copies of {min(rates) >> 10} KiB {rates[min(rates)] / 1e9:.0f} GB/s, of {max(rates) >> 20} MiB "
        f"{rates[max(rates)] / 1e9:.1f} GB/s.\n\n"
        f"{HEAD}{''.join(_lines(run).values())}\n![Roofline](roofline-{machine['name']}.png)\n"
    )


def _lines(run: dict[str, Any]) -> dict[tuple[str, str, str], str]:
    """A line for every name, size and dtype; where both passes were timed, a cell holds "forward / with backward"."""
    rows = compare.rows(run)
    keys = dict.fromkeys(key[:3] for key in rows)
    return {key: _line(run, key, [rows[(*key, p)] for p in ("forward", "both") if (*key, p) in rows]) for key in keys}


def _line(run: dict[str, Any], key: tuple[str, str, str], passes: list[dict[str, Any]]) -> str:
    name, size, dtype = key
    place = "H200" if "H200" in (run["machine"]["gpu"] or "") else (run["machine"]["gpu"] or "CPU")
    cells = [
        " / ".join(f"{own(row)[0] * 1e3:.3g}{'†' * own(row)[1]}" for row in passes),
        " / ".join(best_peer(row) for row in passes),
        " / ".join(_times(row, DEFINITION) for row in passes),
        " / ".join(_times(row, COMPILED) for row in passes),
        " / ".join(f"{own(row)[0] / row['work']['floor']:.2f}" if row["work"] else "-" for row in passes),
    ]
    cells = ["-" if set(cell) <= set("-/ ") else cell for cell in cells]
    both = ", both ways" if passes[0]["pass"] == "both" else ""
    return f"| {name}{both} | {size}{'' if dtype == 'float32' else ', ' + dtype} | {place} | {' | '.join(cells)} |\n"


def own(row: dict[str, Any]) -> tuple[float, bool]:
    """The median of lipfast's seconds, and whether they are those under torch.compile, being fewer."""
    eager = row["seconds"][OWN][1]
    ratio = row["ratios"].get(OWN_COMPILED, (1, 1, 1))[1]
    return (eager * ratio, True) if ratio < 1 else (eager, False)


def _ratio(row: dict[str, Any], who: str) -> float:
    return row["ratios"][who][1] / min(1, row["ratios"].get(OWN_COMPILED, (1, 1, 1))[1])


def _times(row: dict[str, Any], who: str) -> str:
    return f"{_ratio(row, who):.2f}" if who in row["ratios"] else "-"


def best_peer(row: dict[str, Any]) -> str:
    peers = {who: _ratio(row, who) for who in row["ratios"] if who not in BESIDE and not who.startswith(OWN)}
    if not peers:
        return "-"
    who = min(peers, key=peers.__getitem__)
    return f"{peers[who]:.3g} ({who})"


def plot(run: dict[str, Any], path: Path) -> None:
    """FLOP/s over FLOP/byte of forward passes in float32, below the ceilings of the machine; variants are left out."""
    from matplotlib import pyplot

    points = {
        name: (row["work"]["flops"] / row["work"]["bytes"], row["work"]["flops"] / own(row)[0])
        for (name, _, dtype, direction), row in compare.rows(run).items()
        if row["work"] and row["work"]["flops"] and dtype == "float32" and direction == "forward" and "," not in name
    }
    rates = {int(size): rate for size, rate in run["ceilings"]["bytes_per_second"].items()}
    top = run["ceilings"]["flops_per_second"]["float32"]
    memory = rates[max(rates)]
    low, high = min(top / memory, *(x for x, _ in points.values())) / 4, max(x for x, _ in points.values()) * 4
    figure, axes = pyplot.subplots(figsize=(10, 6.5), layout="constrained")
    lines = {f"memory, {memory / 1e9:.1f} GB/s": (memory, "k-")}
    if run["machine"]["gpu"] is None:
        lines[f"fastest cache, {max(rates.values()) / 1e9:.0f} GB/s"] = max(rates.values()), "k:"
    for label, (rate, style) in lines.items():
        axes.plot([low, top / rate, high], [low * rate, top, top], style, linewidth=1, label=label)
    for n, (name, (x, y)) in enumerate(sorted(points.items(), key=lambda item: item[1])):
        axes.plot(x, y, "o", color=f"C{n % 10}", markersize=5)
        axes.annotate(name, (x, y), xytext=(5, -3 if n % 2 else 3), textcoords="offset points", fontsize=8, color=f"C{n % 10}")
    axes.set(xscale="log", yscale="log", xlabel="least work: FLOP per byte", ylabel="FLOP/s reached")
    axes.set_title(f"{run['machine']['gpu'] or run['machine']['cpu']}, float32: product {top / 1e9:.0f} GFLOP/s")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
