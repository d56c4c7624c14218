"""Scores on tasks of lm-evaluation-harness: ``lm_eval`` of a run's evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_minitron.files.plain import short
from nemo_minitron.report.measures import ROLES, number

MOST_TASKS = 200
SHOWN = ("acc_norm", "acc", "exact_match", "f1", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics by which a task is shown: the first that it has, then any other by the alphabet."""


def task_scores(evaluation: object) -> dict[tuple[str, str], str]:
    """(task, metric) → value, with its standard error where there is one, of what an evaluation's JSON says."""
    section = evaluation.get("lm_eval") if isinstance(evaluation, Mapping) else None
    tasks = section.get("tasks") if isinstance(section, Mapping) else None
    found: dict[tuple[str, str], str] = {}
    for name, values in list(tasks.items())[:MOST_TASKS] if isinstance(tasks, Mapping) else ():
        metric = _metric(values)
        if metric is not None:
            found[short(name) or "–", short(metric) or "–"] = _shown(values, metric)
    return found


def rows(scores: Mapping[str, Mapping[tuple[str, str], str]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: a task in each, a model in each column."""
    roles = [role for role in ROLES if scores.get(role)]
    tasks = dict.fromkeys(task for role in roles for task in scores[role])
    head = ["task", "metric", *roles]
    return head, [[task, metric, *(scores[role].get((task, metric), "–") for role in roles)] for task, metric in tasks]


def _metric(values: Any) -> str | None:
    if not isinstance(values, Mapping):
        return None
    names = [name for name, value in values.items() if "_stderr" not in name and number(value) is not None]
    return next((name for name in (*SHOWN, *sorted(names)) if name in names), None)


def _shown(values: Mapping[str, Any], metric: str) -> str:
    base, comma, filtered = metric.partition(",")
    error = number(values.get(f"{base}_stderr{comma}{filtered}"))
    return f"{values[metric]:.4g}" + ("" if error is None else f" ± {error:.2g}")
