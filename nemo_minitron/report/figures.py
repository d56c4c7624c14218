"""Plots as SVG that stands in a page: no fonts, scripts or addresses of its own, in the page's colours.

Lines and text are drawn in marker colours that become CSS variables, so that one drawing serves a light and a dark
page. Heat maps are pictures of few pixels whose faint cells are transparent.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_minitron.report.curves import Curve, Training, thinned
from nemo_minitron.report.measures import ROLES
from nemo_minitron.report.removal import Axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
_BLUE, _ORANGE = (0.18, 0.49, 0.85), (0.93, 0.55, 0.20)  # of pictures: to be seen on white and on near-black
_COLUMNS = 256
_WIDTH = 6.8  # inches
_RC = {
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


def unit_map(axis: Axis, dropped: Sequence[int], row_name: str = "layer") -> str:
    """Worth of every unit above what was kept, and beside it the share of worth that each layer keeps.

    Wider axes than 256 show the mean of neighbours. ``dropped`` rows are hatched.
    """
    panels = [panel for panel in (axis.worth, axis.kept if axis.is_cut else None) if panel is not None]
    rows = len(panels[0])
    share = axis.worth_kept() if axis.is_cut else None
    height = min(3.2, max(0.45, 0.075 * rows))
    beside = share is not None and rows > 1
    with _style():
        figure = _figure(0.75 + len(panels) * (height + 0.62))
        grid = figure.subplots(
            len(panels), 2, squeeze=False, gridspec_kw={"width_ratios": [1, 0.16 if beside else 0.012]}
        )
        for row, (panel, (ax, side)) in enumerate(zip(panels, grid, strict=True)):
            is_worth = axis.worth is not None and row == 0
            if is_worth:
                picture, low, high = _shades(binned(panel))
                _scale(side, low, high) if not beside else side.set_visible(False)
                if beside:
                    _scale(side.inset_axes((0.0, 0.0, 0.12, 1.0)), low, high)
                    side.set_visible(True)
                    side.set_axis_off()
                ax.set_title("worth (faint: little, full: much; logarithmic)")
            else:
                picture = _two_colours(binned(panel.astype(float)))
                ax.set_title("kept (blue) and removed (orange)")
                if beside:
                    side.barh(np.arange(1, rows + 1), 100 * share, color=BLUE, height=0.8)
                    side.set(xlim=(0, 100), ylim=(rows + 0.5, 0.5), title="% of worth kept")
                    side.tick_params(labelleft=False, left=False)
                    side.grid(axis="y", visible=False)
                else:
                    side.set_axis_off()
            ax.imshow(picture, aspect="auto", interpolation="none", extent=(0.5, axis.before + 0.5, rows + 0.5, 0.5))
            _layer_ticks(ax, rows, row_name)
            for layer in dropped if rows > 1 else ():
                ax.axhspan(layer + 0.5, layer + 1.5, facecolor="none", edgecolor=ORANGE, hatch="////", linewidth=0)
        grid[-1, 0].set_xlabel(f"unit, of {axis.before:,}")
        return _svg(figure, f"map-{axis.name}")


def block_influence(worth: np.ndarray, dropped: Sequence[int]) -> str:
    """Block Influence of each layer ``[L]``; dropped ones hatched, with a cross."""
    layers = np.arange(1, len(worth) + 1)
    with _style():
        figure = _figure(2.3)
        ax = figure.subplots()
        bars = ax.bar(layers, worth, color=BLUE, width=0.75)
        for layer in dropped:
            bars[layer].set(facecolor="none", edgecolor=ORANGE, hatch="/////", linewidth=0.8)
            ax.text(layer + 1, worth[layer], "×", ha="center", va="bottom", color=ORANGE, fontsize=11)
        ax.set(xlabel="layer", ylabel="Block Influence", xlim=(0.3, len(worth) + 0.7))
        ax.margins(y=0.12)
        ax.grid(axis="x", visible=False)
        ax.xaxis.get_major_locator().set_params(integer=True)
        return _svg(figure, "block-influence")


def losses(training: Training, references: dict[str, float]) -> str:
    """Curves of a training against tokens; ``references`` are losses of whole models, drawn as level lines."""
    panels = [
        (title, drawn)
        for title, names in (
            ("distance to the teacher (KD loss)", ("train_kd_loss", "val_kd_loss")),
            ("next-token loss (LM loss)", ("train_lm_loss", "val_lm_loss")),
        )
        if (drawn := [name for name in names if name in training.curves])
    ]
    with _style():
        figure = _figure(2.6)
        for ax, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for name in names:
                _curve(ax, training.curves[name], name)
            if "LM" in title:
                for (role, loss), style in zip(references.items(), ((0, (1, 1)), (0, (5, 2, 1, 2))), strict=False):
                    ax.axhline(loss, color=MUTED, linewidth=1, linestyle=style, label=role)
            ax.set(title=title, xlabel="tokens" if training.by_tokens else "steps", ylabel="nats per token")
            _thousands(ax.xaxis)
            ax.legend(fontsize=7.5)
        return _svg(figure, f"losses-{'kd' if training.is_distillation else 'lm'}")


def quality(metrics: dict[str, dict[str, float]]) -> str:
    """Loss of the models against their parameters."""
    names = [role for role in ROLES if "num_parameters" in metrics.get(role, {})]
    xs = [metrics[role]["num_parameters"] / 1e6 for role in names]
    ys = [metrics[role]["val_loss"] for role in names]
    with _style():
        figure = _figure(2.7)
        ax = figure.subplots()
        for here, there in zip(range(len(names)), range(1, len(names)), strict=False):
            arrow = {"arrowstyle": "->", "color": MUTED, "linewidth": 0.9, "shrinkA": 6, "shrinkB": 6}
            ax.annotate("", (xs[there], ys[there]), (xs[here], ys[here]), arrowprops=arrow)
        for name, x, y, colour, marker in zip(
            names, xs, ys, _colours(names), [{"teacher": "o", "pruned": "X", "distilled": "D"}[n] for n in names], strict=True
        ):
            ax.plot(x, y, marker, color=colour, markersize=8)
            ax.annotate(f"{name} {y:.3f}", (x, y), (9, 0), textcoords="offset points", va="center")
        ax.set(xlabel="parameters (millions)", ylabel="loss on held-out text")
        ax.margins(x=0.25, y=0.2)
        _thousands(ax.xaxis)
        return _svg(figure, "quality")


def binned(values: np.ndarray, most: int = _COLUMNS) -> np.ndarray:
    """``[rows, n]`` to at most ``most`` columns, each the mean of neighbours."""
    count = values.shape[1]
    if count <= most:
        return values
    edges = np.linspace(0, count, most + 1).astype(int)[:-1]
    return np.add.reduceat(values, edges, axis=1) / np.diff(np.append(edges, count))


def _shades(worth: np.ndarray) -> tuple[np.ndarray, float, float]:
    """RGBA ``[rows, columns, 4]``, and the worth at which it is faintest and fullest."""
    positive = worth[worth > 0]
    if not positive.size:
        low = high = 0.0
        shade = np.full(worth.shape, 0.5)
    else:
        low, high = np.quantile(positive, (0.01, 0.999))
        span = np.log(high / low)
        logs = np.log(np.maximum(worth, low) / low)
        shade = np.clip(logs / span, 0, 1) if span > 1e-9 else np.full(worth.shape, 0.5)
    return np.dstack([np.full(worth.shape, part) for part in _BLUE] + [0.04 + 0.96 * shade]), low, high


def _two_colours(share: np.ndarray) -> np.ndarray:
    parts = [one * share + other * (1 - share) for one, other in zip(_BLUE, _ORANGE, strict=True)]
    return np.clip(np.dstack([*parts, np.ones_like(share)]), 0, 1)


def _scale(ax: Axes, low: float, high: float) -> None:
    ramp = np.linspace(1, 0, 64)[:, None]
    ax.imshow(
        np.dstack([np.full(ramp.shape, part) for part in _BLUE] + [0.04 + 0.96 * ramp]),
        aspect="auto",
        interpolation="none",
        extent=(0, 1, 0, 1),
    )
    ax.yaxis.tick_right()
    ax.set(xticks=[], yticks=[0, 1], yticklabels=[f"{low:.1e}", f"{high:.1e}"])
    ax.grid(visible=False)


def _layer_ticks(ax: Axes, rows: int, row_name: str) -> None:
    ax.grid(visible=False)
    if rows == 1:
        ax.set_yticks([])
        return
    ax.set_ylabel(row_name)
    step = max(1, -(-rows // 8))
    ax.set_yticks(range(1, rows + 1, step))


def _curve(ax: Axes, curve: Curve, name: str) -> None:
    points, validation = thinned(curve), name.startswith("val_")
    ax.plot(
        points.at,
        points.values,
        color=ORANGE if validation else BLUE,
        linestyle="--" if validation else "-",
        marker="o" if validation or len(points.at) == 1 else "",
        markersize=4,
        label="validation" if validation else "training",
    )


def _thousands(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _colours(names: Sequence[str]) -> list[str]:
    return [{"teacher": VIOLET, "pruned": ORANGE, "distilled": BLUE}[name] for name in names]


def _style() -> Any:
    from matplotlib import rc_context

    return rc_context(_RC)


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure((_WIDTH, height), layout="constrained")


def _svg(figure: Figure, name: str) -> str:
    """The drawing, ready to stand in HTML; ``name`` keeps its ids apart from those of other drawings."""
    buffer = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.S)  # it would style the page
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)  # known to HTML
    text = re.sub(r'<svg width="[^"]*" height="[^"]*"', '<svg aria-hidden="true"', text, count=1)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for marker, variable in _VARIABLES.items():
        text = text.replace(marker, variable)
    return re.sub(r"\n\s*", "\n", text).strip()
