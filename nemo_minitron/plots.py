"""Figures for notebooks: ``from nemo_minitron import plots; plots.losses({"pruned": 3.1, "distilled": 2.9})``.

Each function returns a matplotlib figure. A notebook shows it where it is the last line of a cell, and
``figure.savefig("losses.png")`` writes it. Colours are those of Okabe and Ito, which people with any colour vision tell
apart. The report of a run has pictures of its own (:mod:`nemo_minitron.report`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from nemo_minitron.api.results import Evaluation, PathLike, SearchResult
from nemo_minitron.errors import MinitronError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, GREY = "#1f2328", "#59636e", "#b6bec7"
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
_OF_WORDS = {"distilled": BLUE, "re-solved": BLUE, "cut": ORANGE, "teacher": INK}
"""Last word of a bar's name → its colour; others are grey."""
_MARKS = ("v", "s", "D", "^")
_RC: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": "#e6e9ec",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
P = ParamSpec("P")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in our settings over matplotlib's.

    Raises:
        MinitronError: matplotlib is missing.
    """

    @functools.wraps(draw)
    def styled(*args: P.args, **given: P.kwargs) -> Figure:
        try:
            import matplotlib
        except ImportError:
            raise MinitronError("plots need matplotlib, which is not installed: pip install matplotlib") from None
        with matplotlib.rc_context(_RC):
            return draw(*args, **given)

    return styled


@_styled
def losses(
    values: Mapping[str, float], *, teacher: float | None = None, title: str = "loss on held-out text"
) -> Figure:
    """Draw losses as bars, on an axis that is cut: it does not begin at 0.

    Args:
        values: name → loss in nats per token. A name ending in ``cut``, ``re-solved`` or ``distilled`` gives the bar
            its colour.
        teacher: loss of the teacher, a line across.
    """
    figure, (axes,) = _figure(1, 1.5 + 1.05 * len(values), 3.3)
    shown = [*values.values(), *([] if teacher is None else [teacher])]
    low, high = min(shown), max(shown)
    span = high - low or abs(high) / 10 or 1.0
    bottom = max(0.0, low - 0.35 * span) if low >= 0 else low - 0.35 * span
    names = [name.replace(", ", ",\n") for name in values]
    colours = [_OF_WORDS.get(name.split()[-1], GREY) for name in values]
    bars = axes.bar(names, [value - bottom for value in values.values()], bottom=bottom, color=colours, width=0.6)
    axes.bar_label(bars, [f"{value:.3f}" for value in values.values()], padding=2)
    if teacher is not None:
        axes.axhline(teacher, color=INK, linewidth=1, linestyle="--", label=f"teacher, {teacher:.3f}")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
        axes.set_title(title, pad=22)
    else:
        axes.set_title(title)
    axes.set(ylim=(bottom, high + 0.15 * span), xlim=(-0.6, len(values) - 0.4))
    axes.tick_params(axis="x", length=0)
    if bottom > 0:
        _cut(axes)
        axes.set_ylabel("nats per token (axis is cut)")
    else:
        axes.set_ylabel("nats per token")
    return figure


@_styled
def parts(counts: Mapping[str, int], *, title: str = "parameters") -> Figure:
    """Draw what a whole is made of, as bars with their shares.

    Args:
        counts: name of each part → its size; a part of size 0 has a bar of no length.
    """
    total = sum(counts.values())
    unit, word = _unit(total)
    figure, (axes,) = _figure(1, 6.5, 0.9 + 0.36 * len(counts))
    bars = axes.barh(list(counts), [count / unit for count in counts.values()], color=BLUE, height=0.65)
    labels = [f"{count / total:.1%}" if total else "" for count in counts.values()]
    axes.bar_label(bars, labels, padding=3)
    axes.set(xlabel=word, title=f"{title}: {total:,}")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    return figure


@_styled
def training(log: PathLike, *, held_out: Mapping[str, float] | None = None) -> Figure:
    """Draw the curves of a training: losses and, of a distillation, agreement with the teacher.

    Args:
        log: folder of logs, as ``finetune`` and ``distill`` write it beside their output (``NAME.logs``).
        held_out: losses measured elsewhere, name → nats per token, as lines across the panel of next-token losses.

    Raises:
        MinitronError: nothing was logged there.
    """
    from nemo_minitron.report.curves import read_training
    from nemo_minitron.report.figures import draw_losses, kinds
    from nemo_minitron.report.svg import thousands

    found = read_training(Path(log)) if Path(log).is_dir() else None
    if found is None or not kinds(found):
        raise MinitronError(f"log: expected a folder with a training's log, found none in '{os.fspath(log)}'")
    agreement, count = found.curves.get("val_top1_agreement"), len(kinds(found))
    columns = count + (agreement is not None)
    figure, panels = _figure(columns, 4.4 * columns + (1.6 if columns == 1 else 0), 3.2)
    draw_losses(panels[:count], found, (BLUE, ORANGE))
    for number, (name, loss) in enumerate((held_out or {}).items()):
        dashes = ("-", "--", ":")[number % 3]
        panels[count - 1].axhline(loss, color=INK, linewidth=1, linestyle=dashes, label=f"{name}, {loss:.3f}")
    if agreement is not None:
        axes = panels[-1]
        axes.plot(agreement.at, 100 * agreement.values, "o--", color=ORANGE, markersize=4, label="validation")
        axes.set(title="same likeliest token as the teacher", ylabel="% of tokens")
        axes.set(xlabel="tokens" if found.by_tokens else "steps")
        thousands(axes.xaxis)
    for axes in panels:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), borderaxespad=0, ncols=2)
        axes.grid(axis="y")
    return figure


@_styled
def layers(worth: Sequence[float] | np.ndarray, removed: Mapping[str, Sequence[int]]) -> Figure:
    """Draw what each layer is worth, and which ones a choice removes.

    Args:
        worth: Block Influence ``[L]``.
        removed: name of a choice → layers that it removes, counted from 1: a row of marks below the bars for each.
    """
    figure, (axes,) = _figure(1, max(6.0, 2.5 + 0.2 * len(worth)), 3.2)
    axes.bar(range(1, len(worth) + 1), worth, color=GREY, width=0.75)
    step = 0.07 * float(max(worth))
    for row, (name, some) in enumerate(removed.items(), 1):
        colour = (ORANGE, BLUE, GREEN, PINK)[(row - 1) % 4]
        axes.plot(list(some), [-row * step] * len(some), _MARKS[(row - 1) % 4], color=colour, label=name, markersize=5)
    axes.axhline(0, color=QUIET, linewidth=0.8)
    axes.set(xlabel="layer", ylabel="Block Influence, 1 - cosine", xlim=(0.3, len(worth) + 0.7))
    axes.set_title("how much each layer turns the stream")
    axes.locator_params(axis="x", integer=True)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick >= 0])
    if removed:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=len(removed))
    return figure


@_styled
def ranked(scores: Mapping[str, tuple[np.ndarray, int | None]]) -> Figure:
    """Draw scores from the best unit to the worst, a line for each layer, and where the cut is.

    Args:
        scores: name of a kind of unit → scores ``[L, n]`` or ``[n]``, and how many are kept; None keeps all.
    """
    import numpy as np

    figure, panels = _figure(len(scores), 4.6 * len(scores), 3.3)
    for axes, (name, (array, kept)) in zip(panels, scores.items(), strict=True):
        rows = np.sort(np.atleast_2d(np.asarray(array, dtype=float)), axis=1)[:, ::-1]
        colours = _shades(len(rows))
        for number, row in enumerate(rows):
            label = {0: "first layer", len(rows) - 1: "last layer"}.get(number) if len(rows) > 1 else None
            axes.plot(range(1, len(row) + 1), row, color=colours[number], linewidth=1, label=label)
        if rows.min() > 0 and rows.max() > 10 * rows.min():
            axes.set_yscale("log")
        if kept is not None:
            axes.axvline(kept + 0.5, color=ORANGE, linestyle="--", linewidth=1.2, label=f"{kept:,} are kept")
        axes.set(xlabel=f"{name}, best first", ylabel="score", title=name)
        axes.margins(x=0.02)
        axes.grid(axis="y")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure


@_styled
def size_against_loss(evaluations: Mapping[str, Evaluation], *, title: str = "loss against size") -> Figure:
    """Draw models as points: parameters, and loss on held-out text.

    Args:
        evaluations: by name: ``teacher``, ``pruned``, ``distilled``, or for several students ``depth, pruned`` and the
            like. A student's points are joined in the order given.
    """
    unit, word = _unit(max(found.values["num_parameters"] for found in evaluations.values()))
    figure, (axes,) = _figure(1, 6.8, 3.8)
    students: dict[str, list[str]] = {}
    for name in evaluations:
        students.setdefault(name.rpartition(", ")[0] if name != "teacher" else "teacher", []).append(name)
    colours = iter((BLUE, ORANGE, GREEN, PINK) * len(students))
    for student, names in students.items():
        colour = INK if student == "teacher" else next(colours)
        at = [evaluations[name].values["num_parameters"] / unit for name in names]
        loss = [evaluations[name].loss for name in names]
        axes.plot(at, loss, color=colour, linewidth=1)
        for name, x, y in zip(names, at, loss, strict=True):
            filled = colour if name.split()[-1] in ("distilled", "teacher") else "white"
            axes.plot(x, y, "*" if name == "teacher" else "o", color=colour, markerfacecolor=filled, markersize=8)
            left = student == "teacher" or list(students).index(student) % 2 == 1
            axes.annotate(
                f"{name} {y:.3f}", (x, y), (-9 if left else 9, 0), textcoords="offset points", color=colour,
                ha="right" if left else "left", va="center", fontsize=8.5,
            )  # fmt: skip
    axes.set(xlabel=f"parameters, {word}", ylabel="loss, nats per token", title=title)
    axes.margins(x=0.45, y=0.12)
    axes.grid()
    return figure


@_styled
def candidates(found: SearchResult, *, most: int = 12) -> Figure:
    """Draw the shapes that a search measured, best first: loss before training and after each one's last round.

    Args:
        found: what ``search`` returned. most: rows.

    Raises:
        MinitronError: none was measured.
    """
    measured = [one for one in found.candidates if "zero_shot" in one and one["role"] != "probe"][:most]
    if not measured:
        raise MinitronError(f"'{os.fspath(found)}': expected candidates that were measured, found none")
    figure, (axes,) = _figure(1, 9.5, 1.5 + 0.5 * len(measured))
    rows = range(len(measured))
    axes.scatter([one["zero_shot"] for one in measured], rows, color=GREY, s=50, label="before training")
    trained = [(one["distilled"][-1], row) for row, one in enumerate(measured) if "distilled" in one]
    if trained:
        ends, at = zip(*trained, strict=True)
        axes.scatter(ends, at, color=BLUE, s=50, label="after its last round of distillation")
    if found.teacher_loss is not None:
        axes.axvline(found.teacher_loss, color=INK, linestyle="--", linewidth=1, label="teacher")
    axes.set_yticks(list(rows), [_described(one) for one in measured])
    axes.invert_yaxis()
    axes.grid(axis="y")
    axes.margins(y=0.4 / len(measured) + 0.1)
    axes.set(xlabel="loss on held-out text, nats per token", title="measured shapes, best first")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _described(candidate: Mapping[str, Any]) -> str:
    sizes = "{num_layers} layers, hidden {hidden_size}, ffn {ffn_hidden_size}".format_map(candidate)
    unit, word = _unit(candidate["num_parameters"])
    return f"{sizes} ({candidate['num_parameters'] / unit:.4g} {word}, {candidate['role']})"


def _unit(count: float) -> tuple[float, str]:
    """What a number of parameters is told in, and its name."""
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if count >= unit:
            return unit, name
    return 1e3, "thousand"


def _shades(count: int) -> list[Any]:
    """Colours from light to dark blue, one for each layer."""
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("layers", ["#a9d3ee", BLUE, "#00263d"])
    return [shades(0.5 if count == 1 else number / (count - 1)) for number in range(count)]


def _cut(axes: Axes) -> None:
    """Two strokes across the foot of the vertical axis, which say that it does not begin at 0."""
    for height in (0.045, 0.075):
        axes.plot((-0.014, 0.014), (height - 0.014, height + 0.014), transform=axes.transAxes, color=QUIET,
                  linewidth=1, clip_on=False)  # fmt: skip


def _figure(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, which pyplot does not keep: a notebook shows it once."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    pyplot.close(figure)
    return figure, list(axes[0])
