"""Drawings of Block Influence, of losses during training, and of quality against size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_minitron.report.curves import Curve, Training, thinned
from nemo_minitron.report.measures import ROLES
from nemo_minitron.report.svg import BLUE, MUTED, ORANGE, VIOLET, finished, new_figure, style, thousands

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def block_influence(worth: np.ndarray, dropped: Sequence[int]) -> str:
    """Block Influence of each layer ``[L]``; dropped ones hatched, with a cross."""
    layers = np.arange(1, len(worth) + 1)
    with style():
        figure = new_figure(2.3)
        ax = figure.subplots()
        bars = ax.bar(layers, worth, color=BLUE, width=0.75)
        for layer in dropped:
            bars[layer].set(facecolor="none", edgecolor=ORANGE, hatch="/////", linewidth=0.8)
            ax.text(layer + 1, worth[layer], "×", ha="center", va="bottom", color=ORANGE, fontsize=11)
        ax.set(xlabel="layer", ylabel="Block Influence", xlim=(0.3, len(worth) + 0.7))
        ax.margins(y=0.12)
        ax.grid(axis="x", visible=False)
        thousands(ax.xaxis, integer=True)
        return finished(figure)


def losses(training: Training) -> str:
    """Curves of a training against tokens."""
    with style():
        figure = new_figure(2.8)
        panels = figure.subplots(1, len(kinds(training)), squeeze=False)[0]
        lines = draw_losses(panels, training, (BLUE, ORANGE))
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines))
        return finished(figure)


def kinds(training: Training) -> dict[str, list[str]]:
    """Kinds of loss that were logged: title of the panel → names of its curves."""
    found = {
        "distance to the teacher (KD loss)": ("train_kd_loss", "val_kd_loss"),
        "next-token loss (LM loss)": ("train_lm_loss", "val_lm_loss"),
    }
    logged = {title: [name for name in names if name in training.curves] for title, names in found.items()}
    return {title: names for title, names in logged.items() if names}


def draw_losses(panels: Sequence[Axes], training: Training, colours: tuple[str, str]) -> dict[str, Any]:
    """Draw each of :func:`kinds` into its panel.

    Args:
        colours: of training, of validation.

    Returns:
        A line for each of both, by its name.
    """
    lines: dict[str, Any] = {}
    for ax, (title, names) in zip(panels, kinds(training).items(), strict=True):
        for name in names:
            label = "validation" if name.startswith("val_") else "training"
            lines[label] = _curve(ax, training.curves[name], label, colours)
        ax.set(title=title, xlabel="tokens" if training.by_tokens else "steps", ylabel="nats per token")
        thousands(ax.xaxis)
    return lines


def quality(metrics: dict[str, dict[str, float]], distillation: Training | None) -> str:
    """Loss of the models against their parameters, and against the tokens of the distillation where known."""
    names = [role for role in ROLES if "num_parameters" in metrics.get(role, {})]
    size = {role: metrics[role]["num_parameters"] / 1e6 for role in names}
    loss = {role: metrics[role]["val_loss"] for role in names}
    spent = {"pruned": 0.0}
    if distillation is not None and distillation.tokens:
        spent["distilled"] = float(distillation.tokens)
    trained = spent.keys() <= set(names) and len(spent) == 2
    with style():
        figure = new_figure(2.8)
        axes = figure.subplots(1, 2 if trained else 1, squeeze=False)[0]
        _points(axes[0], size, loss, left=("pruned", "distilled"))
        axes[0].set(xlabel="parameters (millions)", ylabel="loss on held-out text", xlim=(0, 1.6 * max(size.values())))
        if trained:
            _points(axes[1], spent, loss, left=("distilled",))
            if "teacher" in loss:
                axes[1].axhline(loss["teacher"], color=VIOLET, linewidth=1, linestyle=":")
                axes[1].annotate("teacher", (0, loss["teacher"]), (4, 3), textcoords="offset points", color=VIOLET)
            axes[1].set(xlabel="tokens of distillation", ylim=axes[0].get_ylim())
        for ax in axes:
            thousands(ax.xaxis)
        return finished(figure)


def _curve(ax: Axes, curve: Curve, label: str, colours: tuple[str, str]) -> Any:
    points, validation = thinned(curve), label == "validation"
    (line,) = ax.plot(
        points.at,
        points.values,
        color=colours[validation],
        linestyle="--" if validation else "-",
        marker="o" if validation or len(points.at) == 1 else "",
        markersize=4,
        label=label,
    )
    return line


def _points(ax: Axes, at: dict[str, float], loss: dict[str, float], left: Sequence[str]) -> None:
    """A mark for each model, with an arrow from each to the next; labels on the ``left`` of some."""
    names = list(at)
    for here, there in itertools.pairwise(names):
        arrow = {"arrowstyle": "->", "color": MUTED, "linewidth": 0.9, "shrinkA": 6, "shrinkB": 6}
        ax.annotate("", (at[there], loss[there]), (at[here], loss[here]), arrowprops=arrow)
    for name in names:
        marker, colour = {"teacher": ("o", VIOLET), "pruned": ("X", ORANGE), "distilled": ("D", BLUE)}[name]
        ax.plot(at[name], loss[name], marker, color=colour, markersize=7)
        shift, side = (-8, "right") if name in left else (8, "left")
        label = f"{name} {loss[name]:.3f}"
        ax.annotate(label, (at[name], loss[name]), (shift, 0), textcoords="offset points", ha=side, va="center")
    ax.margins(x=0.1, y=0.2)
