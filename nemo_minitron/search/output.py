"""What a search leaves for people and for other tools: ``candidates.yaml``, two plots, a last table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from nemo_minitron import __version__
from nemo_minitron.files.staging import Staging
from nemo_minitron.prune.plan import TARGETS
from nemo_minitron.search.space import count, describe

if TYPE_CHECKING:
    from nemo_minitron.search.journey import Candidate, Outcome

FORMAT = "nemo_minitron.candidates/1"
UNITS = {"num_parameters": "parameters", "memory_gib": "weights and KV cache, GiB", "latency_ms": "decoding step, ms"}


def ordered(outcome: Outcome) -> list[Candidate]:
    """Best first: by how far it came, then by the loss there; probes and what is over the budget last."""

    def place(one: Candidate) -> tuple[Any, ...]:
        outside = one.role == "probe" or (one.role == "given" and one.rank is None)
        loss = one.distilled[-1] if one.distilled else one.zero_shot if one.zero_shot is not None else one.predicted
        return (one is not outcome.winner, outside, -len(one.distilled), one.zero_shot is None, loss, one.key)

    return sorted(outcome.candidates, key=place)


def document(outcome: Outcome, folder: Path) -> str:
    """The text of ``candidates.yaml``: budget, space, prediction, and every candidate, best first.

    ``predicted`` is in nats/token where the source's loss was measured, else a multiple of the source's loss. Plans are
    named relative to the file.
    """
    budget, found = outcome.budget, outcome.found
    limits = {name: getattr(budget, name) for name in UNITS if getattr(budget, name) is not None}
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "source": {name: getattr(outcome.space.source, name) for name in TARGETS}
        | {"loss": _round(outcome.source_loss)},
        "budget": limits
        | {name: getattr(budget, name) for name in ("batch_size", "seq_length", "bytes_per_value", "tolerance")},
        "space": {
            "considered": found.considered,
            "feasible": found.feasible,
            "sizes": {axis: [sizes[0], sizes[-1], len(sizes)] for axis, sizes in outcome.space.axes.items()},
        },
        "prediction": {
            "unit": "times the source's loss" if outcome.source_loss is None else "nats/token",
            "fitted_to": outcome.predictor.measured,
            "coefficients": outcome.predictor.table(),
            "rank_correlation": _round(outcome.rank_correlation),
        },
        "distilled_steps": [int(total) for total in np.cumsum(outcome.steps)],
        "winner": None if outcome.winner is None else outcome.winner.key,
        "candidates": [_entry(one, folder) for one in ordered(outcome)],
    }
    if budget.rates is not None:
        content["budget"]["rates"] = budget.rates.to_dict()
    return yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True)


def _entry(one: Candidate, folder: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": one.key, "role": one.role}
    entry |= {name: getattr(one.shape, name) for name in TARGETS}
    entry |= {name: int(value) if name == "num_parameters" else _round(value) for name, value in one.costs.items()}
    entry["predicted"] = _round(one.predicted)
    if one.role == "given":
        entry["rank"] = one.rank
    if one.zero_shot is not None:
        entry["zero_shot"] = _round(one.zero_shot)
    if one.distilled:
        entry["distilled"] = [_round(loss) for loss in one.distilled]
    if one.plan is not None:
        entry["plan"] = os.path.relpath(one.plan, folder)
    return entry


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def summary(outcome: Outcome, rows: int = 8) -> str:
    """The best candidates as a table."""
    lines = [f"\n{'':<26}{'size':>9}{'GiB':>8}{'ms':>8}{'predicted':>11}{'zero-shot':>11}{'distilled':>11}  role"]
    for one in ordered(outcome)[:rows]:
        cells = [
            count(one.costs["num_parameters"]),
            f"{one.costs['memory_gib']:.2g}",
            f"{one.costs['latency_ms']:.3g}" if "latency_ms" in one.costs else "-",
        ]
        losses = [one.predicted, one.zero_shot, one.distilled[-1] if one.distilled else None]
        cells += ["-" if loss is None else f"{loss:.4f}" for loss in losses]
        widths = (9, 8, 8, 11, 11, 11)
        text = "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{one.key:<26}{text}  {one.role}")
    if outcome.winner is not None:
        lines.append(f"best: {describe(outcome.winner.shape)}; prune.plan={outcome.winner.plan}")
    return "\n".join(lines)


def plots(outcome: Outcome, folder: Path) -> None:
    """``prediction.png``, predicted against measured loss, and ``pareto.png``, loss against each cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [one for one in outcome.candidates if one.zero_shot is not None]
    unit = "loss, times the source's" if outcome.source_loss is None else "loss, nats/token"
    colours = {"searched": "#1e6fb3", "validation": "#5f9e6e", "probe": "#999999", "given": "#b3541e"}
    if measured:
        figure, panel = pyplot.subplots(figsize=(4.6, 4.2))
        for role, colour in colours.items():
            some = [one for one in measured if one.role == role]
            if some:
                label = f"{role} (fitted)" if role == "probe" else role
                panel.scatter(
                    [o.predicted for o in some],
                    [float(o.zero_shot or 0) for o in some],
                    s=18,
                    color=colour,
                    label=label,
                )
        ends = [min(o.predicted for o in measured), max(o.predicted for o in measured)]
        panel.plot(ends, ends, color="grey", linewidth=0.8, linestyle=":")
        rho = outcome.rank_correlation
        panel.set(xlabel="predicted " + unit, ylabel="measured before training, " + unit.partition(", ")[2])
        panel.set_title("prediction" + ("" if rho is None else f", rank correlation {rho:.2f}"), fontsize=10)
        panel.legend(frameon=False, fontsize=8)
        _save(figure, folder / "prediction.png")
    costs = [name for name in UNITS if name in outcome.found.fronts]
    figure, panels = pyplot.subplots(1, len(costs), figsize=(4.6 * len(costs), 4.0), squeeze=False)
    for panel, cost in zip(panels[0], costs, strict=True):
        sample, front = outcome.found.sample, outcome.found.fronts[cost]
        if sample is not None:
            panel.scatter(sample.costs[cost], sample.loss, s=3, color="#dddddd", label="within the budget, predicted")
        panel.plot(front.costs[cost], front.loss, color="#444444", linewidth=1, label="Pareto front, predicted")
        for role, colour in colours.items():
            some = [one for one in measured if one.role == role]
            if some and role != "probe":
                panel.scatter(
                    [o.costs[cost] for o in some],
                    [float(o.zero_shot or 0) for o in some],
                    s=18,
                    color=colour,
                    label=role,
                )
        final = [one for one in measured if one.distilled]
        if final:
            at = [o.costs[cost] for o in final]
            panel.scatter(at, [o.distilled[-1] for o in final], s=26, marker="v", color="black", label="distilled")
        limit = getattr(outcome.budget, cost)
        if limit is not None:
            panel.axvline(limit, color="grey", linestyle=":", linewidth=0.8)
        shown = [loss for o in measured for loss in (o.zero_shot, *o.distilled) if loss is not None]
        top = max([*shown, *(sample.loss[:] if sample is not None else [])], default=None)
        if top is not None:
            panel.set_ylim(float(front.loss.min()) * 0.98, float(top) * 1.02)
        panel.set(xlabel=UNITS[cost], ylabel=unit, title=f"loss against {UNITS[cost].partition(',')[0]}")
        panel.locator_params(axis="x", nbins=5)  # long numbers of small models
        if cost == "num_parameters":
            panel.xaxis.set_major_formatter(lambda value, _: count(value))
    panels[0][0].legend(frameon=False, fontsize=7)
    _save(figure, folder / "pareto.png")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    with Staging(path) as staging:
        figure.savefig(staging.path, dpi=120, format="png")
    pyplot.close(figure)
