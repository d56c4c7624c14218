"""What the runs of ``claims.py`` say: verdicts, and the table as text, as Markdown and as a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HOLDS, FAILS, WITHIN, OPEN = "holds", "fails", "within the spread", "not judged: one seed has no spread"
BEGIN, END = "<!-- claims.py writes from here -->", "<!-- claims.py writes to here -->"


def verdict(better: Sequence[float], worse: Sequence[float]) -> dict[str, Any]:
    """Whether ``better`` has the lower losses, from pairs of them.

    Returns:
        ``difference``: mean of worse − better, nats/token; ``spread``: standard deviation of the pairs' differences;
        ``margin``: half-width of the 95% confidence interval of the mean (Student's t); ``pairs``; ``verdict``.
        ``spread`` and ``margin`` are None for a single pair.
    """
    from scipy.stats import t

    differences = np.subtract(worse, better, dtype=float)
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return {"difference": mean, "spread": None, "margin": None, "pairs": count, "verdict": OPEN}
    spread = float(differences.std(ddof=1))
    margin = float(t.ppf(0.975, count - 1)) * spread / math.sqrt(count)
    found = HOLDS if mean > margin else FAILS if mean < -margin else WITHIN
    return {"difference": mean, "spread": spread, "margin": margin, "pairs": count, "verdict": found}


def text(table: dict[str, Any]) -> str:
    """The table for a terminal, with a last line that counts the verdicts."""
    lines = ["", _summary(table), ""]
    lines += [f"{'claim':<14}{'should lose less':<38}{'than':<38}{'difference ± spread':>24}  verdict"]
    for row in table["claims"]:
        sides = (f"{row[side]}{_rate(row, side)} {row[f'{side}_loss']:.3f}" for side in ("better", "worse"))
        cells = "".join(f"{side:<38}" for side in sides)
        lines.append(f"{row['claim']:<14}{cells}{_difference(row):>24}  {row['verdict']}")
    verdicts = [row["verdict"] for row in table["claims"]]
    counted = (f"{verdicts.count(one)} {one}" for one in (HOLDS, WITHIN, FAILS, OPEN) if one in verdicts)
    return "\n".join([*lines, "", f"of {len(verdicts)} comparisons: {', '.join(counted)}"])


def markdown(table: dict[str, Any]) -> str:
    """The same for a document."""
    lines = [_summary(table), "", "| claim | should lose less | than | difference ± spread | verdict |"]
    lines.append("|---|---|---|---|---|")
    for row in table["claims"]:
        sides = (f"{row[side]}{_rate(row, side)}: {row[f'{side}_loss']:.3f}" for side in ("better", "worse"))
        unit = f"{row['pairs']} {row['unit']}"
        found = row["verdict"] if row["verdict"] == HOLDS else f"**{row['verdict']}**"
        title = f"`{row['claim']}`: {row['title']} ({row['paper']})"
        lines.append(f"| {title} | {' | '.join(sides)} | {_difference(row)}, {unit} | {found} |")
    lines += ["", "| student | parameters | loss before training |", "|---|---|---|"]
    for name, student in table["students"].items():
        lines.append(f"| {name} | {student['parameters'] / 1e6:.1f}M | {np.mean(student['losses']):.3f} |")
    return "\n".join([*lines, "", f"`{table['command']}` on {table['machine']}."]) + "\n"


def insert(content: str, path: Path) -> None:
    """Write ``content`` between the markers of a file that has them, else as the file."""
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    if BEGIN in old and END in old:
        before, rest = old.split(BEGIN, 1)
        content = f"{before}{BEGIN}\n\n{content}\n{END}{rest.split(END, 1)[1]}"
    path.write_text(content, encoding="utf-8")


def plot(table: dict[str, Any], path: Path) -> None:
    """Losses of both sides, a panel per comparison; a thin line joins a pair."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = table["claims"]
    across = min(4, len(rows))
    down = -(-len(rows) // across)
    figure, panels = pyplot.subplots(down, across, figsize=(3.4 * across, 3.4 * down), squeeze=False)
    for panel in panels.flat[len(rows) :]:
        panel.axis("off")
    for panel, row in zip(panels.flat, rows, strict=False):
        sides = row["better_losses"], row["worse_losses"]
        for pair in zip(*sides, strict=True):
            panel.plot((0, 1), pair, color="grey", linewidth=0.6, alpha=0.6)
        for at, (losses, colour) in enumerate(zip(sides, ("#1e6fb3", "#b3541e"), strict=True)):
            panel.plot([at] * len(losses), losses, "o", color=colour, markersize=4, alpha=0.8)
            panel.plot((at - 0.2, at + 0.2), [np.mean(losses)] * 2, color=colour, linewidth=2)
        panel.set(xticks=(0, 1), xticklabels=(row["better"], row["worse"]), xlim=(-0.5, 1.5))
        panel.set_title(f"{row['claim']}: {row['verdict']}", fontsize=9)
        panel.tick_params(axis="x", labelsize=7)
        panel.set_ylabel(f"loss, nats/token; {row['pairs']} {row['unit']}", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _summary(table: dict[str, Any]) -> str:
    teacher = ", ".join(f"{loss:.3f} on {name}" for name, loss in table["teacher"].items())
    seeds = table["setting"]["seeds"]
    words = f"Teacher: {teacher}. Every trained student saw {table['tokens']:,} tokens; {seeds} seeds."
    if corrected := table["corrected_teacher"]:
        words += f" The corrected teachers: {np.mean(corrected):.3f} on brown."
    return f"{words} All of it took {table['seconds'] / 60:.0f} minutes."


def _rate(row: dict[str, Any], side: str) -> str:
    rate = row[f"{side}_lr"]
    return "" if rate is None else f" (lr {rate:.0e})".replace("e-0", "e-")


def _difference(row: dict[str, Any]) -> str:
    return f"{row['difference']:+.3f}" + ("" if row["spread"] is None else f" ± {row['spread']:.3f}")
