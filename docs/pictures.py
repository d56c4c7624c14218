"""Draw ``docs/pictures/``: the journey, and what re-solving gives.

    python docs/pictures.py

Both are SVG with their letters as outlines, on a light card, so that they look the same everywhere and in a dark theme.
Each holds a digest of what it was drawn from: this file, and for the result the figures of
``benchmarks/results/zero_shot_draws_smollm2_135m.json``. ``tests/test_pictures.py`` fails where they differ.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pictures"
RESULT = ROOT / "benchmarks" / "results" / "zero_shot_draws_smollm2_135m.json"
CUT, RESOLVED, CARD, INK, QUIET = "#d55e00", "#0072b2", "#ffffff", "#1f2328", "#59636e"
"""Vermilion and blue of Okabe and Ito's palette, which people with any colour vision tell apart; card; text."""
TEXTS = {"brown": "Brown corpus: kind of the calibration text", "pydoc": "Python's documentation: another kind"}
"""The texts that are shown, by their names in the result."""

STAGES = (
    ("teacher", "your model:\nHF, GGUF, .nemo,\nMegatron", ""),
    ("importance", "score neurons,\nheads, channels,\nlayers", "scores"),
    ("prune", "remove the least\nimportant, re-solve\nwhat stays", "plan, student"),
    ("distill", "train the student\nto follow the\nteacher", "student, trained"),
    ("evaluate", "loss, speed,\nmemory, tasks", "JSON, report"),
    ("convert", "take it out:\nHF, GGUF,\nMegatron", "a smaller model"),
)
"""Name, what it does, and what it writes."""


def figures() -> dict[str, dict[str, tuple[float, float]]]:
    """Loss above the unpruned model in nats per token: text → row → cut, re-solved."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    rows = {name: row for name, row in found.items() if {"plain", "ours"} <= row.keys()}
    return {
        text: {name: (row["plain"]["above"][text], row["ours"]["above"][text]) for name, row in rows.items()}
        for text in TEXTS
    }


def digests() -> dict[str, str]:
    """Name of each picture, and the digest of what it is drawn from."""
    script = Path(__file__).read_text(encoding="utf-8")
    sources = {"journey": script, "result": script + json.dumps(figures())}
    return {name: f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" for name, text in sources.items()}


def journey():
    """The stages from left to right, the teacher's way into distillation above them."""
    from matplotlib import pyplot
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    figure = pyplot.figure(figsize=(10.2, 2.6))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 102), ylim=(1, 27))
    axes.axis("off")
    width, gap = 14.2, 2.6
    for number, (name, does, writes) in enumerate(STAGES):
        left = 1.9 + number * (width + gap)
        middle = left + width / 2
        is_model = number == 0
        axes.add_patch(
            FancyBboxPatch(
                (left, 8), width, 11.5, boxstyle="round,pad=0,rounding_size=1.2", linewidth=1.4,
                edgecolor=CUT if is_model else RESOLVED, facecolor="#fdf1e8" if is_model else "#eaf4fb",
            )
        )  # fmt: skip
        axes.text(middle, 17.4, name, ha="center", va="center", fontsize=11, fontweight="bold", color=INK)
        axes.text(middle, 12.3, does, ha="center", va="center", fontsize=9, color=INK, linespacing=1.3)
        axes.text(middle, 5.3, writes, ha="center", va="center", fontsize=9, color=QUIET, style="italic")
        if number:
            start, end = (left - gap + 0.2, 13.7), (left - 0.2, 13.7)
            axes.add_patch(
                FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=INK, shrinkA=0, shrinkB=0)
            )
    first, distill = 1.9 + width / 2, 1.9 + 3 * (width + gap) + width / 2
    axes.plot([first, first, distill], [19.5, 23.5, 23.5], color=CUT, linewidth=1.4)
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0}
    arrow = FancyArrowPatch((distill, 23.5), (distill, 19.7), color=CUT, linewidth=1.4, **style)
    axes.add_patch(arrow)
    axes.text((first + distill) / 2, 25.4, "teaches", ha="center", va="center", fontsize=9, color=CUT)
    axes.text(1.9, 5.3, "in italics: what\na stage writes", fontsize=8, color=QUIET, va="center")
    return figure


def result():
    """Bars of cut and re-solved weights for each row, one panel per text."""
    from matplotlib import pyplot

    shown = figures()
    figure, panels = pyplot.subplots(1, len(shown), figsize=(10.2, 4.0), sharey=True)
    for axes, (text, rows) in zip(panels, shown.items(), strict=True):
        for shift, (how, colour) in enumerate((("cut", CUT), ("re-solved", RESOLVED))):
            places = [number + (shift - 0.5) * 0.4 for number in range(len(rows))]
            values = [pair[shift] for pair in rows.values()]
            axes.barh(places, values, height=0.38, color=colour, label=how)
            for place, value in zip(places, values, strict=True):
                axes.text(value + 0.03, place, f"{value:.2f}", va="center", fontsize=8, color=INK)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
        axes.set_title(TEXTS[text], fontsize=9.5, loc="left", color=INK)
        axes.set_xlabel("nats per token above the unpruned model (less is better)", fontsize=8.5, color=QUIET)
        axes.tick_params(colors=INK, length=0, labelsize=8.5)
        axes.set_xlim(0, 1.12 * max(max(pair) for values in shown.values() for pair in values.values()))
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    panels[0].invert_yaxis()
    panels[0].legend(loc="lower right", fontsize=9, frameon=False)
    figure.suptitle("What pruning SmolLM2-135M costs before any training", fontsize=12, fontweight="bold", color=INK)
    figure.tight_layout()
    return figure


def main(kind: str = "svg", folder: Path = FOLDER) -> None:
    """Draw all; ``kind`` is ``svg``, or ``png`` to look at them."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "nemo_minitron", "font.family": "DejaVu Sans"}
    for name, draw in (("journey", journey), ("result", result)):
        metadata = {"Description": digests()[name], "Date": None} if kind == "svg" else {}
        figure = draw()
        figure.savefig(folder / f"{name}.{kind}", metadata=metadata, facecolor=CARD, dpi=110)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    main()
