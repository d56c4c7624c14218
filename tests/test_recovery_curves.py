"""What ``benchmarks/recovery_curves.py`` makes of cells."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import recovery_curves as curves

BUDGETS = (100_000, 1_000_000, 10_000_000, 30_000_000)


@pytest.mark.parametrize("law", [(2.5, 0.8, 0.3), (0.5, 2.0, 0.08), (3.0, 0.05, 0.9)])
def test_a_fit_finds_the_law_that_made_its_points(law):
    floor, scale, exponent = law
    losses = [floor + scale * (tokens / 1e6) ** -exponent for tokens in BUDGETS]
    found = curves.fit(BUDGETS, losses)
    assert (found.floor, found.scale, found.exponent) == pytest.approx(law, rel=1e-3)
    assert found.rms < 1e-6 and found.at(3e6) == pytest.approx(floor + scale * 3**-exponent, rel=1e-4)
    assert found.tokens_for(losses[2]) == pytest.approx(1e7, rel=1e-2) and found.tokens_for(floor - 0.1) == math.inf


def test_a_fit_says_how_far_its_parameters_may_be_off():
    """Its errors are those of many draws of the noise."""
    generator = np.random.default_rng(0)
    tokens = np.geomspace(1e5, 3e7, 12)
    exact = 2.5 + 0.8 * (tokens / 1e6) ** -0.3
    fits = [curves.fit(tokens, exact + generator.normal(0, 0.01, len(tokens))) for _ in range(200)]
    spread = np.std([one.exponent for one in fits])
    assert np.median([one.errors[2] for one in fits]) == pytest.approx(spread, rel=0.3)
    assert np.median([one.rms for one in fits]) == pytest.approx(0.01 * math.sqrt(9 / 12), rel=0.15)


def test_no_law_of_too_few_budgets_or_of_what_does_not_fall():
    assert curves.fit(BUDGETS[:2] * 3, [3.0, 2.0] * 3) is None
    assert curves.fit(BUDGETS[:3], [3.0, 2.5, 2.3]).errors is None, "three points, three parameters"
    assert curves.fit(BUDGETS, [2.0, 2.1, 2.2, 2.3]) is None


def test_the_lead_is_of_pairs_of_one_seed():
    other = {100: {0: 5.0, 1: 4.0, 2: 9.0}, 200: {0: 3.0}}
    ours = {100: {0: 4.0, 1: 3.5}, 300: {0: 1.0}}
    assert curves.lead(other, ours) == {100: (0.75, 0.25, 2)}


def test_tokens_that_another_needs():
    other = {100: {0: 5.0}, 1000: {0: 4.0}, 10_000: {0: 3.0}}
    assert curves.needs(other, {100: {0: 4.5}}, 100) == (pytest.approx(math.sqrt(10)), True)
    assert curves.needs(other, {100: {0: 3.0}}, 100) == (pytest.approx(100), True)
    assert curves.needs(other, {100: {0: 2.9}}, 100) == (100, False), "more than all it had"
    assert curves.needs(other, {100: {0: 6.0}}, 100) == (pytest.approx(1), True), "it is there at its first point"


def table() -> dict:
    """Two arms by known laws; the other one needs 4 times the tokens, prose and Python alike."""
    cells = {}
    for arm, factor in (("cut", 4), ("ours", 1)):
        for budget in BUDGETS:
            for seed in range(2 if budget <= 10_000_000 else 1):
                loss = 2.5 + 0.8 * (budget / factor / 1e6) ** -0.3 + 0.002 * seed
                losses = {kind: loss + shift for kind, shift in (("prose", 0.0), ("python", -1.0))}
                start = {"tokens": 0, "prose": 6.0 if arm == "cut" else 4.0, "python": 5.0}
                cell = {"target": "96M", "arm": arm, "budget": budget, "seed": seed, "loss": losses}
                cells[f"{arm}{budget}{seed}"] = cell | {"curve": [start], "cloze": 0.25 if arm == "ours" else None}
    return {"cells": cells, "teacher": {"loss": {"prose": 2.2, "python": 1.1}, "cloze": 0.4}}


def test_table_and_plot(tmp_path):
    text = curves.show(table())
    lines = [" ".join(line.split()) for line in text.splitlines()]
    prose = lines[: lines.index("python, nats/token; unpruned 1.100")]
    assert "96M start 0.1M 1M 10M 30M" in prose and "prose, nats/token; unpruned 2.200" in prose
    ours = [2.5 + 0.8 * (budget / 1e6) ** -0.3 for budget in BUDGETS]
    assert f"ours 4.000 {ours[0] + 0.001:.3f} ±0.001 {ours[1] + 0.001:.3f} ±0.001" in " ".join(prose)
    ahead = [(4**0.3 - 1) * (loss - 2.5) for loss in ours]
    assert f"lead over cut +{ahead[0]:.3f} ±0.000 +{ahead[1]:.3f} ±0.000" in " ".join(prose)
    needs = next(line for line in prose if line.startswith("cut needs, x tokens")).split()
    assert [float(one) for one in needs[4:6]] == pytest.approx([4, 4], abs=0.9), "between points a straight line"
    assert " ".join(needs[6:]) == "over 3.0 (law 4) over 1.0 (law 4)"
    assert "96M, ours: 0.1M 0.250 ±0.000, 1M 0.250 ±0.000, 10M 0.250 ±0.000, 30M 0.250" in lines
    assert not any(line.startswith("96M, cut:") for line in lines), "what was not measured is not told"
    curves.plot(table(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
