"""Scores on tasks in the report, of evaluations that may be anybody's."""

from __future__ import annotations

import json

import pytest

from nemo_minitron.report.tasks import MOST_TASKS, rows, task_scores
from tests.test_report import DISTILLED, TEACHER, make_run, pages

ARC = {"acc": 0.5, "acc_stderr": 0.01, "acc_norm": 0.25, "acc_norm_stderr": 0.0125}
CLOZE = {"perplexity": 12.345678, "perplexity_stderr": 0.5, "acc": 0.375}
ODD = {"exact_match,strict": 0.125, "exact_match_stderr,strict": 0.03, "alias": "x"}


def _evaluation(**tasks) -> dict:
    return {"lm_eval": {"version": "0.4", "tasks": tasks}}


def test_a_task_is_shown_by_its_first_known_metric():
    found = task_scores(_evaluation(arc=ARC, cloze=CLOZE, odd=ODD, mine={"b": 2.0, "a": 1.0, "a_stderr": 0.1}))
    assert found == {
        ("arc", "acc_norm"): "0.25 ± 0.013",
        ("cloze", "acc"): "0.375",
        ("odd", "exact_match,strict"): "0.125 ± 0.03",
        ("mine", "a"): "1 ± 0.1",
    }


@pytest.mark.parametrize(
    "evaluation",
    [None, [], {}, {"lm_eval": []}, {"lm_eval": {"tasks": [1]}}, _evaluation(a=[]), _evaluation(a={"acc": "1"}),
     _evaluation(a={"acc": float("nan")}), _evaluation(a={"acc_stderr": 0.5}), _evaluation(a={"acc": True})],
)  # fmt: skip
def test_what_is_no_score_is_left_out(evaluation):
    assert task_scores(evaluation) == {}


def test_names_are_short_and_few():
    found = task_scores(_evaluation(**{f"{'x' * 5000}{i}": {"acc": 0.5} for i in range(2 * MOST_TASKS)}))
    assert len(found) <= MOST_TASKS and max(len(name) for name, _ in found) < 1000


def test_models_stand_side_by_side():
    scores = {"teacher": task_scores(_evaluation(arc=ARC, cloze=CLOZE)), "distilled": task_scores(_evaluation(arc=ARC))}
    head, body = rows(scores)
    assert head == ["task", "metric", "teacher", "distilled"]
    assert body == [["arc", "acc_norm", "0.25 ± 0.013", "0.25 ± 0.013"], ["cloze", "acc", "0.375", "–"]]


def test_the_page_has_them(tmp_path):
    folder = make_run(tmp_path / "run")
    for role, metrics in (("teacher", TEACHER), ("distilled", DISTILLED)):
        (folder / "evaluation" / f"{role}.json").write_text(
            json.dumps(metrics | _evaluation(arc=ARC, **{"<b>": CLOZE}))
        )
    page, html, markdown = pages(folder)
    assert page.row("arc") == ["arc", "acc_norm", "0.25 ± 0.013", "0.25 ± 0.013"]
    assert page.row("<b>")[2:] == ["0.375", "0.375"] and "<b>&lt;" not in html
    assert "| arc | acc\\_norm | 0.25 ± 0.013 | 0.25 ± 0.013 |" in markdown
