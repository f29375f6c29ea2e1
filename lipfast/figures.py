"""The plots of certificates and of training, in one style. matplotlib is imported when a plot is drawn."""

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lipfast.certify import Certificate

KINDS = {"bound": "bound", "estimate": "estimate: not a certificate"}  # without a failure probability
PALETTE = ("#1f5fa8", "#c4571b", "#2d7d4e", "#83509e", "#8a6d1f", "#5c6670")  # dark enough for print
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#33373d",
    "xtick.color": "#55595f",
    "ytick.color": "#55595f",
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # text stays text: it can be searched and takes the page's font
}


def kind_name(certificate: "Certificate") -> str:
    """How sure a certificate is, as every table and plot names it."""
    chance = certificate.failure_probability
    return KINDS[certificate.kind] + (f" with probability 1 - {chance:g}" if chance else "")


def norm_name(p: float) -> str:
    """``l_inf``, ``l_2``, ``l_1``."""
    return f"l_{p:g}"


def certified_accuracy(certificates: Sequence[tuple[str, "Certificate"]]) -> Any:
    """A matplotlib figure of certified accuracy against eps, a curve per certificate; those of one name share a colour.

    Dots mark the eps that were asked for. Estimates are broad and pale, so that a bound of equal height shows on top, and the
    title says that they are no certificates.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for name, _ in certificates))
    with rc_context(_STYLE):
        drawing = Figure(figsize=(7.2, 3.9), layout="constrained")
        axes = drawing.add_subplot()
        for name, c in certificates:
            color = PALETTE[names.index(name) % len(PALETTE)]
            eps, accuracy = c.curve()
            if c.kind == "estimate":
                look: dict[str, Any] = {"linewidth": 5, "alpha": 0.3, "label": _plain(f"{name} ({kind_name(c)})"), "zorder": 1}
            else:
                label = f"{name} ({kind_name(c)})" if c.failure_probability else name
                look = {"label": _plain(label), "zorder": 2}
                axes.plot(c.eps, [100 * c.certified_accuracy(e) for e in c.eps], "o", color=color, markersize=4)
            axes.step(eps, [100 * a for a in accuracy], color=color, **look)
        axes.set(xlim=(0, None), ylim=(0, 101), ylabel="certified accuracy (%)")
        norms = ", ".join(dict.fromkeys(norm_name(c.p) for _, c in certificates))
        axes.set_xlabel(f"eps ({norms}, in units of the pixels)")
        if any(c.kind == "estimate" for _, c in certificates):
            axes.set_title("broad and pale: estimate: not a certificate", color="#a02c2c")
        axes.legend(loc="best")
    return drawing


def training_curves(panels: Sequence[tuple[str, Sequence[tuple[str, list[float], list[float]]]]]) -> Any:
    """A matplotlib figure of small plots in rows of three: each a title and its lines (name, steps, values)."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = -(-len(panels) // 3)
    names = list(dict.fromkeys(name for _, lines in panels for name, _, _ in lines))
    with rc_context(_STYLE):
        drawing = Figure(figsize=(9.6, 0.3 + 2.2 * rows), layout="constrained")
        for i, (title, lines) in enumerate(panels):
            axes = drawing.add_subplot(rows, 3, i + 1, title=_plain(title))
            for name, steps, values in lines:
                axes.plot(steps, values, color=PALETTE[names.index(name) % len(PALETTE)], label=_plain(name))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axes.set_xlabel("epoch")
        if len(names) > 1:
            drawing.legend(*drawing.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return drawing


def svg(drawing: Any, salt: str) -> str:
    """The figure as an ``<svg>`` element to stand in a page: no XML head, no metadata, the same text for the same figure.

    ``salt`` keeps the ids of several figures in one page apart.
    """
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({**_STYLE, "svg.hashsalt": salt}):
        drawing.savefig(text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", whole[whole.index("<svg") :], flags=re.DOTALL)


def _plain(text: str) -> str:
    """matplotlib reads $...$ as mathematics, and hides labels that begin with an underscore."""
    return text.replace("$", r"\$").removeprefix("_")
