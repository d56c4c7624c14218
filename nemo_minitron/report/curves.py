"""What a training logged, against the tokens it had seen.

TensorBoard's event files are read first: a resumed training adds to them, while Lightning's ``metrics.csv`` begins
anew.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nemo_minitron.errors import MinitronError

LOGGED = (
    "train_kd_loss",
    "train_lm_loss",
    "val_kd_loss",
    "val_lm_loss",
    "val_top1_agreement",
    "tokens",
)


@dataclass(frozen=True)
class Curve:
    """One logged value: ``at`` tokens (or optimizer steps) ``[n]``, ascending, and ``values`` ``[n]``; float64."""

    at: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Training:
    """One training's log.

    Attributes:
        name: of its folder. curves: by the name that was logged; never empty, and no curve is.
        by_tokens: whether ``Curve.at`` counts tokens; otherwise optimizer steps, where tokens were not logged.
        tokens: seen in all; None where not logged. steps: optimizer steps taken.
    """

    name: str
    curves: dict[str, Curve] = field(default_factory=dict)
    by_tokens: bool = True
    tokens: int | None = None
    steps: int = 0

    @property
    def is_distillation(self) -> bool:
        return "train_kd_loss" in self.curves or "val_kd_loss" in self.curves


def read_training(folder: Path) -> Training | None:
    """The log below ``folder``, None where there is none.

    Raises:
        MinitronError: a ``metrics.csv`` that is not one, where there are no event files.
    """
    logged = _from_events(sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.name))
    if not logged:
        logged = _from_csv(sorted(folder.rglob("metrics.csv")))
    logged = {name: values for name, values in logged.items() if values}
    if not logged.keys() - {"tokens"}:
        return None
    steps, tokens = (np.array(list(part), dtype=np.float64) for part in _sorted(logged.pop("tokens", {})))
    curves = {}
    for name, values in logged.items():
        at, found = (np.array(list(part), dtype=np.float64) for part in _sorted(values))
        curves[name] = Curve(np.interp(at, steps, tokens) if len(steps) else at + 1, found)
    last = max(max(values) for values in logged.values())
    return Training(
        folder.name, curves, bool(len(steps)), int(tokens[-1]) if len(tokens) else None, int(max([last, *steps])) + 1
    )


def thinned(curve: Curve, most: int = 300) -> Curve:
    """At most ``most`` points, each the mean of its neighbourhood."""
    count = len(curve.at)
    if count <= most:
        return curve
    edges = np.linspace(0, count, most + 1).astype(int)[:-1]
    sizes = np.diff(np.append(edges, count))
    return Curve(np.add.reduceat(curve.at, edges) / sizes, np.add.reduceat(curve.values, edges) / sizes)


def _from_events(files: Iterable[Path]) -> dict[str, dict[int, float]]:
    """{name: {step: value}}; files in the order in which they were begun."""
    logged: dict[str, dict[int, float]] = {}
    for file in files:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()  # a file that is cut short gives what it holds
        for name in set(LOGGED) & set(events.Tags()["scalars"]):
            scalars = [event for event in events.Scalars(name) if math.isfinite(event.value)]
            if not scalars:
                continue
            before = logged.setdefault(name, {})
            for step in [step for step in before if step >= scalars[0].step]:
                del before[step]  # a resumed training took these steps again
            before.update((event.step, event.value) for event in scalars)
    return logged


def _from_csv(files: Iterable[Path]) -> dict[str, dict[int, float]]:
    logged: dict[str, dict[int, float]] = {}
    for file in files:
        try:
            with file.open(newline="", encoding="utf-8") as stream:
                for row in csv.DictReader(stream):
                    for name in LOGGED:
                        if row.get(name) and row.get("step") and math.isfinite(value := float(row[name])):
                            logged.setdefault(name, {})[int(row["step"])] = value
        except (OSError, ValueError, csv.Error) as error:
            raise MinitronError(f"{file}: expected a training's metrics.csv, found: {error}") from None
    return logged


def _sorted(values: dict[int, float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if not values:
        return (), ()
    steps, found = zip(*sorted(values.items()), strict=True)
    return steps, found
