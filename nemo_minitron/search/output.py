"""What a search leaves for people and for other tools: ``candidates.yaml``, two plots, a last table."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nemo_minitron import __version__
from nemo_minitron.config.sections import Serving
from nemo_minitron.files.staging import Staging
from nemo_minitron.prune.plan import TARGETS
from nemo_minitron.search.candidate import Candidate, Outcome
from nemo_minitron.search.space import count, describe

FORMAT = "nemo_minitron.candidates/1"
COLOURS = {"searched": "#1e6fb3", "validation": "#5f9e6e", "probe": "#999999", "given": "#b3541e"}
UNITS = {"num_parameters": "parameters", "memory_gib": "weights and KV cache, GiB", "latency_ms": "decoding step, ms"}


def ordered(outcome: Outcome) -> list[Candidate]:
    """Best first: by how far it came, then by the loss there; probes and what is over the budget last."""

    def place(candidate: Candidate) -> tuple[Any, ...]:
        outside = candidate.role == "probe" or (candidate.role == "given" and candidate.rank is None)
        loss = (
            candidate.distilled[-1]
            if candidate.distilled
            else candidate.zero_shot
            if candidate.zero_shot is not None
            else candidate.predicted
        )
        return (
            candidate is not outcome.winner,
            outside,
            -len(candidate.distilled),
            candidate.zero_shot is None,
            loss,
            candidate.key,
        )

    return sorted(outcome.candidates, key=place)


def document(outcome: Outcome, folder: Path) -> str:
    """The text of ``candidates.yaml``: budget, space, prediction, and every candidate, best first.

    ``predicted`` is in nats/token where the source's loss was measured, else a multiple of the source's loss. Plans are
    named relative to the file. Under ``search.serving`` candidates tell what is ``refused`` or ``runs_badly``.
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
        "candidates": [_entry(outcome, candidate, folder) for candidate in ordered(outcome)],
    }
    if outcome.serving != Serving():
        content["serving"] = dataclasses.asdict(outcome.serving) | {"left_out": dict(found.refused)}
    if budget.rates is not None:
        content["budget"]["rates"] = budget.rates.to_dict()
    return yaml.safe_dump(content, sort_keys=False, width=120, allow_unicode=True)


def _entry(outcome: Outcome, candidate: Candidate, folder: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": candidate.key, "role": candidate.role}
    entry |= {name: getattr(candidate.shape, name) for name in TARGETS}
    entry |= {
        name: int(value) if name == "num_parameters" else _round(value) for name, value in candidate.costs.items()
    }
    entry["predicted"] = _round(candidate.predicted)
    if candidate.role == "given":
        entry["rank"] = candidate.rank
    if candidate.zero_shot is not None:
        entry["zero_shot"] = _round(candidate.zero_shot)
    if candidate.distilled:
        entry["distilled"] = [_round(loss) for loss in candidate.distilled]
    if candidate.plan is not None:
        entry["plan"] = os.path.relpath(candidate.plan, folder)
    for kind, refused in (("refused", True), ("runs_badly", False)):
        if some := [reason.text for reason in outcome.reasons(candidate) if reason.refused is refused]:
            entry[kind] = some
    return entry


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def summary(outcome: Outcome, scores: Path | None = None, rows: int = 8) -> str:
    """The best candidates as a table; beside the role, why one is refused or run badly where it is to be served.

    Args:
        scores: those that plans are for, where they are not the ones that were given.
    """
    lines = [f"\n{'':<26}{'size':>9}{'GiB':>8}{'ms':>8}{'predicted':>11}{'zero-shot':>11}{'distilled':>11}  role"]
    for candidate in ordered(outcome)[:rows]:
        cells = [
            count(candidate.costs["num_parameters"]),
            f"{candidate.costs['memory_gib']:.2g}",
            f"{candidate.costs['latency_ms']:.3g}" if "latency_ms" in candidate.costs else "-",
        ]
        losses = [candidate.predicted, candidate.zero_shot, candidate.distilled[-1] if candidate.distilled else None]
        cells += ["-" if loss is None else f"{loss:.4f}" for loss in losses]
        widths = (9, 8, 8, 11, 11, 11)
        text = "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        why = [reason.name for reason in outcome.reasons(candidate)]
        lines.append(f"{candidate.key:<26}{text}  {candidate.role}" + (f" ({', '.join(why)})" if why else ""))
    if outcome.winner is not None:
        beside = "" if scores is None else f" prune.scores={scores}"
        lines.append(f"best: {describe(outcome.winner.shape)}; prune.plan={outcome.winner.plan}{beside}")
    return "\n".join(lines)


def plots(outcome: Outcome, folder: Path) -> None:
    """``prediction.png``, predicted against measured loss, and ``pareto.png``, loss against each cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    unit = "loss, times the source's" if outcome.source_loss is None else "loss, nats/token"
    if any(candidate.zero_shot is not None for candidate in outcome.candidates):
        figure, panel = pyplot.subplots(figsize=(4.6, 4.2))
        _prediction(panel, outcome, unit)
        _save(figure, folder / "prediction.png")
    costs = [name for name in UNITS if name in outcome.found.fronts]
    figure, panels = pyplot.subplots(1, len(costs), figsize=(4.6 * len(costs), 4.0), squeeze=False)
    for panel, cost in zip(panels[0], costs, strict=True):
        _pareto(panel, outcome, cost, unit)
    panels[0][0].legend(frameon=False, fontsize=7)
    _save(figure, folder / "pareto.png")


def _measured(outcome: Outcome, role: str | None = None) -> tuple[list[Candidate], list[float]]:
    """Measured candidates, those of a role or all, and their losses before training."""
    some = [
        candidate
        for candidate in outcome.candidates
        if candidate.zero_shot is not None and role in (None, candidate.role)
    ]
    return some, [float(candidate.zero_shot or 0) for candidate in some]


def _prediction(panel: Any, outcome: Outcome, unit: str) -> None:
    for role, colour in COLOURS.items():
        some, losses = _measured(outcome, role)
        if some:
            label = f"{role} (fitted)" if role == "probe" else role
            panel.scatter([candidate.predicted for candidate in some], losses, s=18, color=colour, label=label)
    predicted = [candidate.predicted for candidate in _measured(outcome)[0]]
    ends = [min(predicted), max(predicted)]
    panel.plot(ends, ends, color="grey", linewidth=0.8, linestyle=":")
    rho = outcome.rank_correlation
    panel.set(xlabel="predicted " + unit, ylabel="measured before training, " + unit.partition(", ")[2])
    panel.set_title("prediction" + ("" if rho is None else f", rank correlation {rho:.2f}"), fontsize=10)
    panel.legend(frameon=False, fontsize=8)


def _pareto(panel: Any, outcome: Outcome, cost: str, unit: str) -> None:
    sample, front = outcome.found.sample, outcome.found.fronts[cost]
    if sample is not None:
        panel.scatter(sample.costs[cost], sample.loss, s=3, color="#dddddd", label="within the budget, predicted")
    panel.plot(front.costs[cost], front.loss, color="#444444", linewidth=1, label="Pareto front, predicted")
    for role, colour in COLOURS.items():
        some, losses = _measured(outcome, role)
        if some and role != "probe":
            panel.scatter([candidate.costs[cost] for candidate in some], losses, s=18, color=colour, label=role)
    measured, _ = _measured(outcome)
    final = [candidate for candidate in measured if candidate.distilled]
    if final:
        costs, losses = [candidate.costs[cost] for candidate in final], [candidate.distilled[-1] for candidate in final]
        panel.scatter(costs, losses, s=26, marker="v", color="black", label="distilled")
    limit = getattr(outcome.budget, cost)
    if limit is not None:
        panel.axvline(limit, color="grey", linestyle=":", linewidth=0.8)
    shown = [loss for candidate in measured for loss in (candidate.zero_shot, *candidate.distilled) if loss is not None]
    top = max([*shown, *(sample.loss[:] if sample is not None else [])], default=None)
    if top is not None:
        panel.set_ylim(float(front.loss.min()) * 0.98, float(top) * 1.02)
    panel.set(xlabel=UNITS[cost], ylabel=unit, title=f"loss against {UNITS[cost].partition(',')[0]}")
    panel.locator_params(axis="x", nbins=5)  # long numbers of small models
    if cost == "num_parameters":
        panel.xaxis.set_major_formatter(lambda value, _: count(value))


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    with Staging(path) as staging:
        figure.savefig(staging.path, dpi=120, format="png")
    pyplot.close(figure)
