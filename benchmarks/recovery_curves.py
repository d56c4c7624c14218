"""What cells of ``recovery_scale.py`` say: losses by budget, power laws, the lead and the tokens that it is worth.

A point is the end of a run: its budget and its loss. ``L = floor + scale · T^-exponent`` is fitted to the points of an
arm, all seeds, by least squares (scipy); three budgets are the least for it. The lead at a budget is the loss of an arm
above that of ``ours``, seed by seed. What an arm needs for the loss that ``ours`` has is read from its points, straight
in log T between them; beyond the last it is told as more than that, and what its law would say is marked so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("prose", "python")
OURS = "ours"
_UNIT = 1e6
"""Tokens that ``scale`` is of."""


@dataclass(frozen=True)
class PowerLaw:
    """``floor + scale · (T / 10⁶)^-exponent``, nats/token of T tokens.

    Attributes:
        errors: standard errors of the three; None where there are no more points than parameters. rms: what is left.
    """

    floor: float
    scale: float
    exponent: float
    errors: tuple[float, float, float] | None
    rms: float

    def at(self, tokens: float) -> float:
        return self.floor + self.scale * (tokens / _UNIT) ** -self.exponent

    def tokens_for(self, loss: float) -> float:
        """Tokens until a loss; infinity where the floor is not below it."""
        if loss <= self.floor:
            return math.inf
        return _UNIT * float(((loss - self.floor) / self.scale) ** (-1 / self.exponent))

    def __str__(self) -> str:
        around = [f" ±{error:.2g}" for error in self.errors] if self.errors else [""] * 3
        words = f"{self.floor:.3f}{around[0]} + {self.scale:.3f}{around[1]} (T/10⁶)^-{self.exponent:.3f}{around[2]}"
        return f"{words}, rms {self.rms:.4f}"


def fit(tokens: Sequence[float], losses: Sequence[float]) -> PowerLaw | None:
    """Least squares; None where fewer than three budgets are there or nothing falls."""
    from scipy.optimize import OptimizeWarning, curve_fit

    x, y = np.asarray(tokens, float) / _UNIT, np.asarray(losses, float)
    if len(set(x)) < 3:
        return None

    def law(at: np.ndarray, floor: float, scale: float, exponent: float) -> np.ndarray:
        return floor + scale * at**-exponent

    best: tuple[float, Any, Any] | None = None
    for exponent in (0.05, 0.15, 0.4, 1.0):  # the sum of squares may have more than one minimum
        slope, floor = np.polyfit(x**-exponent, y, 1)
        start = (min(max(floor, 1e-3), y.min()), max(slope, 1e-3), exponent)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OptimizeWarning)
                bounds = ((0.0, 0.0, 1e-3), (np.inf, np.inf, 5.0))
                found, covariance = curve_fit(law, x, y, p0=start, bounds=bounds, max_nfev=20_000)
        except RuntimeError:
            continue
        squares = float(np.square(law(x, *found) - y).sum())
        if best is None or squares < best[0]:
            best = squares, found, covariance
    if best is None or best[1][1] < 1e-6:  # nothing falls
        return None
    squares, found, covariance = best
    errors = np.sqrt(np.diag(covariance)) if len(x) > 3 and np.isfinite(covariance).all() else None
    floor, scale, exponent = (float(one) for one in found)
    return PowerLaw(
        floor, scale, exponent, None if errors is None else tuple(map(float, errors)), math.sqrt(squares / len(x))
    )  # fmt: skip


Points = Mapping[int, Mapping[int, float]]
"""Losses of an arm by budget and seed."""


def points(table: Mapping[str, Any], target: str, arm: str, kind: str) -> Points:
    """Of a target and an arm on a kind of text, budgets in order."""
    found: dict[int, dict[int, float]] = {}
    for cell in table["cells"].values():
        if (cell["target"], cell["arm"]) == (target, arm):
            found.setdefault(cell["budget"], {})[cell["seed"]] = cell["loss"][kind]
    return {budget: dict(sorted(found[budget].items())) for budget in sorted(found)}


def law_of(found: Points) -> PowerLaw | None:
    """Fitted to all ends of an arm's runs."""
    flat = [(budget, loss) for budget, seeds in found.items() for loss in seeds.values()]
    return fit(*zip(*flat, strict=True)) if flat else None


def lead(other: Points, ours: Points) -> dict[int, tuple[float, float, int]]:
    """At each budget of both: mean of other − ours over the seeds of both, half their range, and how many they are."""
    found = {}
    for budget in other.keys() & ours.keys():
        both = sorted(other[budget].keys() & ours[budget].keys())
        if both:
            above = [other[budget][seed] - ours[budget][seed] for seed in both]
            found[budget] = float(np.mean(above)), float(np.ptp(above) / 2), len(both)
    return dict(sorted(found.items()))


def needs(other: Points, ours: Points, budget: int) -> tuple[float, bool]:
    """Tokens that an arm needs for the loss of ours at a budget, as a multiple of it, and whether that is all that is
    known: it needs more than so many (False), or so many (True)."""
    tokens = np.array(list(other))
    losses = np.minimum.accumulate([np.mean(list(seeds.values())) for seeds in other.values()])
    wanted = float(np.mean(list(ours[budget].values())))
    if wanted < losses[-1]:
        return float(tokens[-1] / budget), False
    return float(np.exp(np.interp(-wanted, -losses, np.log(tokens)))) / budget, True


def show(table: Mapping[str, Any]) -> str:
    """The tables of both kinds of text, as lines."""
    lines: list[str] = []
    for kind in KINDS:
        unpruned = table["teacher"].get("loss", {}).get(kind)
        lines += ["", f"{kind}, nats/token" + (f"; unpruned {unpruned:.3f}" if unpruned is not None else "")]
        for target in dict.fromkeys(cell["target"] for cell in table["cells"].values()):
            lines += _target_lines(table, target, kind)
    lines += _cloze_lines(table)
    return "\n".join(lines)


def _target_lines(table: Mapping[str, Any], target: str, kind: str) -> Iterator[str]:
    arms = _arms(table, target)
    by_arm = {arm: points(table, target, arm, kind) for arm in arms}
    budgets = sorted({budget for found in by_arm.values() for budget in found})
    yield f"  {target:<26}{'start':>18}" + "".join(f"{_tokens(budget):>18}" for budget in budgets)
    for arm, found in by_arm.items():
        cells = [f"{_start(table, target, arm, kind):.3f}"]
        cells += [_around(list(found[budget].values())) if budget in found else "" for budget in budgets]
        yield f"    {arm:<24}" + "".join(f"{cell:>18}" for cell in cells)
        if (law := law_of(found)) is not None:
            yield f"      {law}"
    ours = by_arm.get(OURS)
    for arm, found in by_arm.items():
        if ours is None or arm == OURS:
            continue
        leads = lead(found, ours)
        cells = ["", *(f"{leads[b][0]:+.3f} ±{leads[b][1]:.3f}" if b in leads else "" for b in budgets)]
        yield f"    {'lead over ' + arm:<24}" + "".join(f"{cell:>18}" for cell in cells)
        cells = ["", *(_multiple(found, ours, budget) if budget in ours else "" for budget in budgets)]
        yield f"    {arm + ' needs, x tokens':<24}" + "".join(f"{cell:>18}" for cell in cells)


def _multiple(other: Points, ours: Points, budget: int) -> str:
    times, known = needs(other, ours, budget)
    if known:
        return f"{times:.1f}" if times * budget > min(other) else f"under {times:.1f}"
    law = law_of(other)
    wanted = float(np.mean(list(ours[budget].values())))
    by_law = f" (law {law.tokens_for(wanted) / budget:.0f})" if law and law.tokens_for(wanted) < math.inf else ""
    return f"over {times:.1f}{by_law}"


def _cloze_lines(table: Mapping[str, Any]) -> Iterator[str]:
    cells = [cell for cell in table["cells"].values() if cell.get("cloze") is not None]
    if not cells:
        return
    yield ""
    yield f"cloze accuracy; unpruned {table['teacher']['cloze']:.3f}"
    for target in dict.fromkeys(cell["target"] for cell in cells):
        for arm in _arms(table, target):
            ends: dict[int, list[float]] = {}
            for cell in cells:
                if (cell["target"], cell["arm"]) == (target, arm):
                    ends.setdefault(cell["budget"], []).append(cell["cloze"])
            words = [f"{_tokens(budget)} {_around(ends[budget])}" for budget in sorted(ends)]
            if words:
                yield f"  {target}, {arm}: " + ", ".join(words)


def _arms(table: Mapping[str, Any], target: str) -> list[str]:
    return list(dict.fromkeys(cell["arm"] for cell in table["cells"].values() if cell["target"] == target))


def _start(table: Mapping[str, Any], target: str, arm: str, kind: str) -> float:
    starts = (c["curve"][0][kind] for c in table["cells"].values() if (c["target"], c["arm"]) == (target, arm))
    return float(next(starts))


def _around(values: Sequence[float]) -> str:
    spread = f" ±{np.ptp(values) / 2:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _tokens(count: int) -> str:
    return f"{count / 1e6:g}M"


def plot(table: Mapping[str, Any], path: Path) -> None:
    """Ends of runs and their laws, a row of panels for each kind of text, a column for each target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    targets = list(dict.fromkeys(cell["target"] for cell in table["cells"].values()))
    figure, panels = pyplot.subplots(
        len(KINDS), len(targets), figsize=(5 * len(targets), 3.4 * len(KINDS)), squeeze=False
    )
    colours = {"nvidia": "#b3541e", "cut": "#d49a6a", OURS: "#1e6fb3"}
    for kind, row in zip(KINDS, panels, strict=True):
        for target, panel in zip(targets, row, strict=True):
            for number, arm in enumerate(_arms(table, target)):
                found = points(table, target, arm, kind)
                colour = colours.get(arm, f"C{number}")
                flat = [(budget, loss) for budget, seeds in found.items() for loss in seeds.values()]
                panel.plot(*zip(*flat, strict=True), "o", color=colour, markersize=4)
                means = [np.mean(list(seeds.values())) for seeds in found.values()]
                law = law_of(found)
                if law is None:
                    panel.plot(list(found), means, color=colour, label=arm)
                else:
                    at = np.geomspace(min(found), max(found), 100)
                    label = f"{arm}: {law.floor:.2f} + {law.scale:.2f}·T^-{law.exponent:.2f}"
                    panel.plot(at, [law.at(one) for one in at], color=colour, label=label)
            if kind in table["teacher"].get("loss", {}):
                panel.axhline(table["teacher"]["loss"][kind], color="grey", linestyle=":", label="unpruned")
            panel.set(xscale="log", title=f"{target}, {kind}", xlabel="tokens distilled", ylabel="nats/token")
            panel.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
