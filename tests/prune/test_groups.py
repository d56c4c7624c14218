"""Choosing query groups by loss for a plan; the losses are judged in ``importance/test_group_loss.py``."""

import dataclasses

import numpy as np
import pytest
import torch

from nemo_minitron import runtime
from nemo_minitron.config.sections import Prune
from nemo_minitron.errors import MinitronError
from nemo_minitron.importance.group_loss import GroupLoss, eliminate
from nemo_minitron.prune.groups import groups_by_loss
from nemo_minitron.prune.plan import Compensation
from nemo_minitron.prune.request import make_requested_plan
from tests.importance.made import made
from tests.prune.test_layers import SENSITIVITY, chats, tried
from tests.prune.test_resolve import SHAPE, TOKENS, model_in_float32
from tests.ranks import run_ranks


def chosen(layers, count):
    if torch.distributed.is_initialized():
        runtime.init_distributed()
    return groups_by_loss(model_in_float32(SHAPE), chats(), layers, count, tokens=4 * 33)


def test_losses_are_of_all_kinds_and_the_fit_is_weighted_as_compensation_weights_it():
    model = model_in_float32(SHAPE)
    weights = SENSITIVITY[::2].sqrt()
    tokens, counted = tried([0, 8], [10, 11])
    losses = GroupLoss(model, tokens, TOKENS, weights, ridge=Compensation.attention, counted=counted)
    expected = eliminate(losses, [0, 2], 2)
    found = chosen([0, 2], 2)
    assert found.tolist() == expected.tolist()
    assert not found[1].any() and found[0].any()


def test_processes_choose_the_same():
    expected = chosen([0, 1, 2], 2)
    assert [found.tolist() for found in run_ranks(chosen, 2, [0, 1, 2], 2)] == [expected.tolist()] * 2


def scores_that_rank_otherwise(model):
    """Scores by whose rankings the groups that are best by loss are the worst."""
    worth = chosen([0, 1, 2], 1)
    groups = worth.max() - worth + np.arange(3) * 1e-3
    scores = chats()
    rankings = {name: {**ranking, "groups": groups} for name, ranking in scores.rankings.items()}
    return dataclasses.replace(scores, rankings=rankings, source_fingerprint=model.fingerprint())


def test_groups_go_by_their_ranking_unless_the_loss_is_asked_for():
    model = model_in_float32(SHAPE)
    scores = scores_that_rank_otherwise(model)
    worth = chosen([0, 1, 2], 1)
    by_loss = tuple(tuple(np.flatnonzero(row).tolist()) for row in worth)
    ranked = tuple(tuple(np.sort(np.argsort(-row)[:2]).tolist()) for row in scores.rankings["minitron"]["groups"])
    assert all(a != b for a, b in zip(by_loss, ranked, strict=True))
    base = {"num_query_groups": 2, "layer_tokens": 4 * 33}
    cases = [
        ({}, ranked),
        ({"group_selection": "loss"}, by_loss),
        ({"ranking": "minitron", "group_selection": "loss"}, by_loss),
        ({"compensate": False, "group_selection": "loss"}, by_loss),
    ]
    for keys, groups in cases:
        plan = make_requested_plan(model, Prune(**base, **keys), scores, half=False)
        assert plan.groups == groups, keys
        assert plan.selection == ({"groups": "loss"} if "group_selection" in keys else {}), keys
    shallow = make_requested_plan(model, Prune(**base, drop_layers=[2], group_selection="loss"), scores, half=False)
    assert shallow.groups == (by_loss[0], by_loss[2])
    assert shallow.selection == {"groups": "loss", "layers": "drop_layers"}


def test_what_cannot_be_is_refused():
    model = model_in_float32(SHAPE)
    without = made(SHAPE, np.random.default_rng(0).random, reconstruction=True)
    without = dataclasses.replace(without, source_fingerprint=model.fingerprint())
    with pytest.raises(MinitronError, match=r"prune\.group_selection=loss: the scores hold no calibration tokens"):
        make_requested_plan(model, Prune(num_query_groups=2, group_selection="loss"), without, half=False)
    with pytest.raises(MinitronError, match=r"prune\.group_selection: .*ranking, loss"):
        make_requested_plan(model, Prune(num_query_groups=2, group_selection="other"), chats(), half=False)
