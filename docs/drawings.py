"""Draw ``tutorials/pictures/``: the step of each tutorial, in one style.

    python docs/drawings.py

A row of the journey's steps, with those of the tutorial in colour, and under it what happens there. They are SVG with
their letters as outlines, on a light card, as those of ``docs/pictures.py``, and hold a digest of this file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "tutorials" / "pictures"
CARD, INK, QUIET, PALE = "#ffffff", "#1f2328", "#59636e", "#e6e9ec"
GONE, STAYS, PALE_GONE, PALE_STAYS = "#d55e00", "#0072b2", "#fdf1e8", "#eaf4fb"
"""Vermilion and blue of Okabe and Ito's palette: what goes, what stays; and both as grounds."""
STEPS = ("convert, preprocess", "finetune", "importance", "prune", "distill", "evaluate", "convert, report")


def main(kind: str = "svg", folder: Path = FOLDER) -> None:
    """Draw all; ``kind`` is ``svg``, or ``png`` to look at them."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "nemo_minitron", "font.family": "DejaVu Sans"}
    from matplotlib import pyplot

    for name, (steps, draw) in DRAWINGS.items():
        figure = pyplot.figure(figsize=(9.6, 2.7))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 96), ylim=(0, 27))
        axes.axis("off")
        strip(axes, steps)
        draw(axes)
        metadata = {"Description": digest(), "Date": None} if kind == "svg" else {}
        figure.savefig(folder / f"{name}.{kind}", metadata=metadata, facecolor=CARD, dpi=110)
        pyplot.close(figure)


def digest() -> str:
    """What the pictures are drawn from: this file."""
    return f"sha256:{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"


# ------------------------------------------------------------------------------------------------------------- elements


def box(axes: Any, x: float, y: float, width: float, height: float, edge: str, ground: str, **more: Any) -> None:
    """A rectangle with round corners; ``x, y`` is its lower left."""
    from matplotlib.patches import FancyBboxPatch

    shape = "round,pad=0,rounding_size=0.5"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=shape, edgecolor=edge, facecolor=ground, linewidth=1.2, **more)
    )


def say(axes: Any, x: float, y: float, text: str, size: float = 9, colour: str = INK, **more: Any) -> None:
    """Text, its middle at ``x, y``."""
    axes.text(
        x, y, text, **{"ha": "center", "va": "center", "fontsize": size, "color": colour, "linespacing": 1.25} | more
    )


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    """An arrow from ``start`` to ``end``."""
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 10}
    axes.annotate("", end, start, arrowprops=style)


def strip(axes: Any, steps: Iterable[int]) -> None:
    """The steps of the journey in a row, some of them in colour."""
    some, width = set(steps), 12.2
    for number, name in enumerate(STEPS):
        x, here = 2 + number * (width + 1.1), number in some
        box(axes, x, 22.8, width, 2.6, STAYS if here else PALE, PALE_STAYS if here else CARD)
        say(axes, x + width / 2, 24.1, name, 7.2, INK if here else QUIET, fontweight="bold" if here else "normal")


def model(
    axes: Any, x: float, middle: float, width: float, layers: int = 8, gone: Iterable[int] = (), cut: float = 0.0
) -> None:
    """A stack of layers from ``x`` on, ``gone`` ones dashed and a share ``cut`` of each in the colour of what goes."""
    height, gap, removed = 1.45, 0.45, set(gone)
    bottom = middle - (layers * (height + gap) - gap) / 2
    for layer in range(layers):
        y = bottom + layer * (height + gap)
        if layer in removed:
            box(axes, x, y, width, height, GONE, PALE_GONE, linestyle=(0, (2, 1.5)))
            continue
        box(axes, x, y, width, height, STAYS, PALE_STAYS)
        if cut:
            box(axes, x + width * (1 - cut), y, width * cut, height, GONE, PALE_GONE, linestyle=(0, (2, 1.5)))


def distribution(axes: Any, x: float, y: float, heights: Iterable[float], colour: str) -> None:
    """Bars of next-token probabilities, from ``x`` on and standing on ``y``."""
    from matplotlib.patches import Rectangle

    for number, height in enumerate(heights):
        axes.add_patch(Rectangle((x + 1.7 * number, y), 1.3, height, color=colour, linewidth=0))
    axes.plot([x - 0.4, x + 8.6], [y, y], color=QUIET, linewidth=0.8)


# ------------------------------------------------------------------------------------------------------------- drawings


def journey(axes: Any) -> None:
    """All of it: a model is scored, cut and taught."""
    for x, width, layers, cut, name in ((5, 13, 8, 0, "teacher"), (31, 13, 8, 0.3, "what matters least"),
                                        (57, 9.1, 8, 0, "student"), (79, 9.1, 8, 0, "student, taught")):  # fmt: skip
        model(axes, x, 12.6, width, layers, cut=cut)
        say(axes, x + width / 2, 2.6, name, 8.5, QUIET)
    for start, end, text in ((19, 30, "score"), (45, 56, "prune"), (67, 78, "distill")):
        arrow(axes, (start, 12.6), (end, 12.6))
        say(axes, (start + end) / 2, 13.2, text, 9, va="baseline")


def data(axes: Any) -> None:
    """A checkpoint of one format becomes one of another; text becomes tokens."""
    box(axes, 4, 14.2, 15, 5.6, GONE, PALE_GONE)
    say(axes, 11.5, 17, "HF folder\nor GGUF", 9)
    arrow(axes, (20, 17), (31, 17))
    say(axes, 25.5, 18.5, "convert", 8.5)
    box(axes, 32, 13.4, 29, 7.2, STAYS, PALE_STAYS)
    say(axes, 46.5, 19.2, ".nemo, a tar file", 8.5, fontweight="bold")
    for x, text in ((33, "config"), (42.3, "weights"), (51.6, "tokenizer")):
        box(axes, x, 14.2, 8.4, 3.4, STAYS, CARD)
        say(axes, x + 4.2, 15.9, text, 8)
    box(axes, 4, 3.6, 15, 5.6, GONE, PALE_GONE)
    say(axes, 11.5, 6.4, "text:\ndocuments", 9)
    arrow(axes, (20, 6.4), (31, 6.4))
    say(axes, 25.5, 7.9, "preprocess", 8.5)
    arrow(axes, (55.8, 13.4), (55.8, 9.6))
    say(axes, 64.5, 11.5, "the same tokenizer", 8, QUIET)
    box(axes, 32, 3.6, 29, 5.6, STAYS, PALE_STAYS)
    for number, token in enumerate((504, 27, 1390, 8, 66, 2911)):
        box(axes, 33 + 4.6 * number, 4.9, 4, 3, STAYS, CARD)
        say(axes, 35 + 4.6 * number, 6.4, str(token), 7.5)
    say(axes, 77, 7.3, ".bin: tokens, one after the other", 8)
    say(axes, 77, 5.2, ".idx: how long each document is", 8)


def teacher(axes: Any) -> None:
    """The teacher learns to predict the text that it will teach."""
    model(axes, 6, 12, 13)
    say(axes, 12.5, 2.4, "original", 8.5, QUIET)
    arrow(axes, (20, 12), (29, 12))
    for number, token in enumerate(("The", "while", "state", "ment", "is", "?")):
        last = token == "?"
        box(axes, 30 + 6.1 * number, 10.5, 5.4, 3, GONE if last else STAYS, PALE_GONE if last else PALE_STAYS)
        say(axes, 32.7 + 6.1 * number, 12, token, 8.5)
    say(axes, 48, 17.6, "predict the next token of the text, again and again", 9)
    say(axes, 48, 6.6, "loss: the surprise at the token that came,\nin nats per token", 8.5, QUIET)
    arrow(axes, (67.5, 12), (76, 12))
    model(axes, 77, 12, 13)
    say(axes, 83.5, 2.4, "teacher", 8.5, QUIET)


def depth(axes: Any) -> None:
    """Layers go."""
    model(axes, 10, 12, 18, gone=(2, 3, 5))
    say(axes, 19, 2.4, "teacher: which layers can go?", 8.5, QUIET)
    arrow(axes, (30, 12), (39, 12))
    model(axes, 41, 12, 18, layers=5)
    say(axes, 50, 2.4, "student: fewer layers, as wide", 8.5, QUIET)
    say(axes, 79, 15.6, "Block Influence: how much\na layer turns the stream", 9, GONE)
    say(axes, 79, 8.4, "loss without it: what the\nmodel loses when it is gone", 9, STAYS)


def width(axes: Any) -> None:
    """Every layer becomes narrower."""
    model(axes, 10, 12, 18, cut=0.33)
    say(axes, 19, 2.4, "teacher: which units can go?", 8.5, QUIET)
    arrow(axes, (30, 12), (39, 12))
    model(axes, 41, 12, 12)
    say(axes, 47, 2.4, "student: as many layers, narrower", 8.5, QUIET)
    say(axes, 77, 15.6, "cut: leave the other weights\nas they were", 9, GONE)
    say(axes, 77, 8.4, "re-solve: choose them anew, so that each\nlayer puts out what it did before", 9, STAYS)


def distilling(stack: Callable[[Any], None], narrower: str) -> Callable[[Any], None]:
    """Both models read the same text, and the student learns the teacher's answer."""

    def draw(axes: Any) -> None:
        box(axes, 3, 9.4, 13, 5.2, QUIET, CARD)
        say(axes, 9.5, 12, "the same\ntokens", 9)
        arrow(axes, (16.6, 13.2), (25, 16.6))
        arrow(axes, (16.6, 10.8), (25, 7.2))
        for number in range(4):
            box(axes, 26, 14.6 + 1.5 * number, 14, 1.1, STAYS, PALE_STAYS)
        say(axes, 33, 13.3, "teacher, as it is", 8, QUIET)
        stack(axes)
        say(axes, 33, 2.4, narrower, 8, QUIET)
        for y in (17.2, 7.2):
            arrow(axes, (41, y), (48, y))
        distribution(axes, 50, 14.8, (1.2, 4.4, 2.2, 0.6, 0.9), INK)
        distribution(axes, 50, 4.8, (2.0, 3.2, 1.4, 1.5, 1.2), STAYS)
        say(axes, 54.2, 13.3, "what comes next?", 8, QUIET)
        style = {"arrowstyle": "<|-|>", "color": GONE, "linewidth": 1.2, "mutation_scale": 10}
        axes.annotate("", (63, 7), (63, 17), arrowprops=style)
        say(axes, 79, 14.4, "KL divergence: how far the\nstudent's answer is from\nthe teacher's", 9, GONE)
        say(axes, 79, 7.2, "its gradient trains\nthe student alone", 9, STAYS)

    return draw


def shallow(axes: Any) -> None:
    """A student of fewer layers, which are as wide."""
    for number in range(2):
        box(axes, 26, 5.9 + 1.5 * number, 14, 1.1, STAYS, PALE_STAYS)


def narrow(axes: Any) -> None:
    """A student of as many layers, which are narrower."""
    for number in range(4):
        box(axes, 28.5, 4.4 + 1.5 * number, 9, 1.1, STAYS, PALE_STAYS)


def results(axes: Any) -> None:
    """What was lost at either shape and what came back, and the way out."""
    axes.annotate("", (4, 20.5), (4, 4), arrowprops={"arrowstyle": "-|>", "color": QUIET})
    axes.annotate("", (44, 4), (4, 4), arrowprops={"arrowstyle": "-|>", "color": QUIET})
    say(axes, 5.2, 20.2, "loss", 8, QUIET, ha="left")
    say(axes, 41, 2.4, "parameters", 8, QUIET)
    axes.plot(39, 6, "*", color=INK, markersize=11)
    say(axes, 39, 8.4, "teacher", 8.5)
    for x, top, low, colour, name in ((13, 18, 11, GONE, "depth"), (24, 15.4, 9, STAYS, "width")):
        axes.plot(x, top, "o", color=colour, markerfacecolor=CARD, markersize=8)
        arrow(axes, (x, top - 1), (x, low + 1), colour)
        axes.plot(x, low, "o", color=colour, markersize=8)
        say(axes, x, top + 2, name, 8.5, colour)
    for x, text in ((51, "report.html:\na page for people"), (73, "HF folder:\ntransformers, vLLM, …")):
        box(axes, x, 9, 19, 6, STAYS, PALE_STAYS)
        say(axes, x + 9.5, 12, text, 8.5)


def search(axes: Any) -> None:
    """Many shapes, a few of which are measured, fewer trained."""
    import random

    drawn = random.Random(3)
    columns = (
        (3, 60, "every shape within\nthe budget"), (28, 12, "predicted best:\npruned, measured"),
        (53, 4, "measured best:\ndistilled a little"), (78, 1, "winner"),
    )  # fmt: skip
    for number, (x, count, text) in enumerate(columns):
        for _ in range(count):
            at = (x + drawn.uniform(1, 14), drawn.uniform(8.5, 20)) if count > 1 else (x + 7.5, 14.2)
            axes.plot(*at, "o", color=STAYS, markersize=3.5 + 1.2 * number, alpha=0.45 + 0.18 * number, linewidth=0)
        say(axes, x + 7.5, 4.4, text, 8.5, QUIET)
        if number:
            arrow(axes, (x - 7.5, 14.2), (x - 1, 14.2))


DRAWINGS: dict[str, tuple[tuple[int, ...], Callable[[Any], None]]] = {
    "00_journey": (tuple(range(len(STEPS))), journey),
    "01_model_and_data": ((0,), data),
    "02_teacher_finetuning": ((1,), teacher),
    "03a_depth_pruning": ((2, 3), depth),
    "03b_width_pruning": ((2, 3), width),
    "04a_distilling_depth": ((4,), distilling(shallow, "student: fewer layers")),
    "04b_distilling_width": ((4,), distilling(narrow, "student: narrower layers")),
    "05_results": ((5, 6), results),
    "06_search": ((3, 4), search),
}
"""Tutorial → which steps are its, and its drawing."""

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    main()
