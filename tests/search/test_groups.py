"""Query groups chosen by loss once for a search; the losses are judged in ``importance/test_group_loss.py``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nemo_minitron.errors import MinitronError
from nemo_minitron.prune.plan import Plan
from nemo_minitron.search import groups
from tests.search.test_predict import make_scores
from tests.search.test_rounds import run, source, stages  # noqa: F401

BY_LOSS = "search.group_selection=loss"
WORTH = np.array([[2, 0, 1, 2], [1, 2, 2, 0], [2, 2, 0, 1]], dtype=float)


def with_tokens(folder):
    tokens = np.arange(12, dtype=np.int32).reshape(4, 3)
    scores = replace(make_scores(ranks=True, seed=5), tokens=tokens, sensitivity=np.ones((6, 4, 3)))
    folder.mkdir()
    scores.write(folder)


def test_groups_are_chosen_once_and_plans_follow(source, tmp_path, stages, monkeypatch):  # noqa: F811
    calls = []

    def searched(cfg, scores, fewer):
        calls.append((fewer, cfg.search.layer_tokens))
        return WORTH

    monkeypatch.setattr(groups, "_worth", searched)
    with_tokens(tmp_path / "scores")
    given = "search.shapes=[{num_query_groups: 3}, {num_query_groups: 2}]"
    overrides = (f"scores={tmp_path}/scores", "search.until=zero_shot", given, BY_LOSS)
    for _ in range(2):
        outcome = run(source, tmp_path / "out", *overrides)
    assert calls == [(2, 6144)], "at least half of four groups stay; found once"
    plans = [Plan.load(one.plan) for one in outcome.candidates if one.role == "given"]
    kept = {plan.target.num_query_groups: plan.groups for plan in plans}
    assert kept[3] == ((0, 2, 3), (0, 1, 2), (0, 1, 3))
    assert kept[2] == ((0, 3), (1, 2), (0, 1))
    with pytest.raises(MinitronError, match=r"group_selection=loss: expected ranking with search\.compensate=false"):
        run(source, tmp_path / "cut", *overrides, "search.compensate=false")
    with pytest.raises(MinitronError, match=r"group_selection=loss: the scores hold no calibration tokens"):
        run(source, tmp_path / "bare", f"scores={source}/scores", *overrides[1:])
    narrow = ("search.shrink=[ffn_hidden_size,hidden_size,num_layers]", "search.shapes=[]")
    run(source, tmp_path / "whole", *overrides, *narrow)
    run(source, tmp_path / "ranked", *overrides[:-1])
    assert len(calls) == 1, "where all groups stay, or nobody asked, none are chosen"


def test_a_given_shape_below_the_space_is_heeded(source, tmp_path, stages, monkeypatch):  # noqa: F811
    """Of groups that nobody removed in turn none is worth more than another: the first would stay."""
    calls = []

    def searched(cfg, scores, fewer):
        calls.append(fewer)
        return np.array([[0, 1, 2, 3], [3, 0, 1, 2], [0, 3, 2, 1]], dtype=float)

    monkeypatch.setattr(groups, "_worth", searched)
    with_tokens(tmp_path / "scores")
    given = "search.shapes=[{num_query_groups: 1}]"
    overrides = (f"scores={tmp_path}/scores", "search.until=zero_shot", given, BY_LOSS)
    for name, shrink in (("all", ()), ("ffn", ("search.shrink=[ffn_hidden_size]", "budget.num_parameters=120e3"))):
        outcome = run(source, tmp_path / name, *overrides, *shrink)
        (plan,) = (Plan.load(one.plan) for one in outcome.candidates if one.role == "given")
        assert plan.groups == ((3,), (0,), (1,))
    assert calls == [3, 3]
