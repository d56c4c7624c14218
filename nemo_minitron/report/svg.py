"""Plots as SVG that stands in a page: no fonts, scripts or addresses of its own, in the page's colours.

Lines and text are drawn in marker colours that become CSS variables, so that one drawing serves a light and a dark
page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT, MUTED, LINE, BLUE, ORANGE, VIOLET = (f"#0a0b0{n}" for n in range(1, 7))
_VARIABLES = {
    TEXT: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    VIOLET: "var(--violet)",
}
_WIDTH = 6.8  # inches
_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nemo_minitron",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.5,
    "grid.color": LINE,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": TEXT,
    "text.color": TEXT,
    "axes.titlecolor": TEXT,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "hatch.linewidth": 0.8,
}


@contextmanager
def style() -> Iterator[None]:
    """Our settings over matplotlib's own, whatever the user's file of settings says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def new_figure(height: float) -> Figure:
    """An empty figure of this height in inches, as wide as the page."""
    from matplotlib.figure import Figure

    return Figure((_WIDTH, height), layout="constrained")


def finished(figure: Figure) -> str:
    """The drawing, ready to stand in HTML once its ids are :func:`numbered`."""
    buffer = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.S)  # it would style the page
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # known to HTML
    text = re.sub(r'<svg width="[^"]*" height="[^"]*"', '<svg aria-hidden="true"', text, count=1)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for marker, variable in _VARIABLES.items():
        text = text.replace(marker, variable)
    return re.sub(r"\n\s*", "\n", text).strip()


def numbered(drawing: str, number: int) -> str:
    """The drawing with ids that no drawing of another number has."""
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>drawing-{number}-", drawing)


def thousands(axis: Any, integer: bool = False) -> None:
    """Few ticks, written as ``12,000``."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, integer=integer))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
