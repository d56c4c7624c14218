"""Heat maps of what each unit is worth and of what was kept.

Pictures of at most 256 columns. Faint cells are transparent, so that they stand on a light as on a dark page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nemo_minitron.report.removal import Axis
from nemo_minitron.report.svg import BLUE, ORANGE, finished, new_figure, style, thousands

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE = (0.18, 0.49, 0.85), (0.93, 0.55, 0.20)  # to be seen on white and on near-black
_COLUMNS = 256


def unit_map(axis: Axis, dropped: Sequence[int]) -> str:
    """Importance of every unit above what was kept, and beside it the share of importance that each layer keeps.

    In axes wider than 256 the units of each row stand in the order of their importance, and cells are means of
    neighbours. ``dropped`` rows are hatched.
    """
    worth, kept = axis.worth, axis.kept if axis.is_cut else None
    if worth is not None and in_order(axis):
        order = np.argsort(-worth, axis=1, kind="stable")
        worth = np.take_along_axis(worth, order, axis=1)
        kept = None if kept is None else np.take_along_axis(kept, order, axis=1)
    panels = [panel for panel in (worth, kept) if panel is not None]
    rows = len(panels[0])
    share = axis.worth_kept() if axis.is_cut and rows > 1 else None
    height = min(3.2, max(0.45, 0.075 * rows))
    widths = [1, 0.012 if share is None else 0.16]
    with style():
        figure = new_figure(0.75 + len(panels) * (height + 0.62))
        grid = figure.subplots(len(panels), 2, squeeze=False, gridspec_kw={"width_ratios": widths})
        for panel, (ax, side) in zip(panels, grid, strict=True):
            if panel is worth:
                picture, low, high = _shades(binned(panel))
                ax.set_title("importance (faint: little, full: much; logarithmic)")
                _scale(side if share is None else side.inset_axes((0.0, 0.0, 0.12, 1.0)), low, high)
                if share is not None:
                    side.set_axis_off()
            else:
                picture = _two_colours(binned(panel.astype(float)))
                ax.set_title("kept (blue) and removed (orange)")
                _shares(side, share)
            ax.imshow(picture, aspect="auto", interpolation="none", extent=(0.5, axis.before + 0.5, rows + 0.5, 0.5))
            for layer in dropped if rows > 1 else ():
                ax.axhspan(layer + 0.5, layer + 1.5, facecolor="none", edgecolor=ORANGE, hatch="////", linewidth=0)
            _ticks(ax, rows)
        unit = "units, the most important first" if in_order(axis) else "unit"
        grid[-1, 0].set_xlabel(f"{unit}, of {axis.before:,}")
        return finished(figure)


def in_order(axis: Axis) -> bool:
    """Whether an axis is drawn in the order of importance: one too wide for a cell per unit."""
    return axis.worth is not None and axis.before > _COLUMNS


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
        low, high = np.quantile(positive, (0.01, 0.99))
        span = np.log(high) - np.log(low)
        logs = np.log(np.maximum(worth, low)) - np.log(low)
        shade = np.clip(logs / span, 0, 1) if span > 1e-9 else np.full(worth.shape, 0.5)
    return np.dstack([np.full(worth.shape, part) for part in _BLUE] + [0.04 + 0.96 * shade]), low, high


def _two_colours(share: np.ndarray) -> np.ndarray:
    parts = [one * share + other * (1 - share) for one, other in zip(_BLUE, _ORANGE, strict=True)]
    return np.clip(np.dstack([*parts, np.ones_like(share)]), 0, 1)


def _scale(ax: Axes, low: float, high: float) -> None:
    """What the shades of :func:`_shades` mean."""
    ramp = np.linspace(1, 0, 64)[:, None]
    picture = np.dstack([np.full(ramp.shape, part) for part in _BLUE] + [0.04 + 0.96 * ramp])
    ax.imshow(picture, aspect="auto", interpolation="none", extent=(0, 1, 0, 1))
    ax.yaxis.tick_right()
    ax.set(xticks=[], yticks=[0, 1], yticklabels=[f"{low:.3g}", f"{high:.3g}"])
    ax.grid(visible=False)


def _shares(ax: Axes, share: np.ndarray | None) -> None:
    """Bars in line with the rows of the map beside them."""
    if share is None:
        ax.set_axis_off()
        return
    ax.barh(np.arange(1, len(share) + 1), 100 * share, color=BLUE, height=0.8)
    ax.set(xlim=(0, 100), ylim=(len(share) + 0.5, 0.5), title="% kept of it")
    ax.tick_params(labelleft=False, left=False)
    ax.grid(axis="y", visible=False)


def _ticks(ax: Axes, rows: int) -> None:
    ax.grid(visible=False)
    thousands(ax.xaxis, integer=True)
    if rows == 1:
        ax.set_yticks([])
    else:
        ax.set_ylabel("layer")
        ax.set_yticks(range(1, rows + 1, max(1, -(-rows // 8))))
