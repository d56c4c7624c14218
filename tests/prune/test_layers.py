"""Choosing layers by loss; what it chooses is judged in ``test_prune.py`` and ``importance/test_layer_loss.py``."""

import numpy as np
import pytest
import torch

from nemo_minitron import runtime
from nemo_minitron.config.layer_selection import LAYER_SELECTIONS
from nemo_minitron.importance.echoes import echoed
from nemo_minitron.importance.layer_loss import LayerLoss, Removed
from nemo_minitron.prune.choose import BY_SCORES
from nemo_minitron.prune.layers import BY_LOSS, layers_by_loss
from nemo_minitron.prune.tried import both_kinds
from tests.importance.made import made
from tests.importance.reference import answers
from tests.prune.test_resolve import SHAPE, TOKENS, model_in_float32
from tests.ranks import run_ranks

COUNTED = answers(12, 33)
COUNTED[8:] = True
SENSITIVITY = torch.rand(6, *TOKENS.shape, generator=torch.Generator().manual_seed(3)) ** 4

PAIRS = [Removed({0, 1}), Removed({0, 2}), Removed({1, 2})]


def chats(counted=COUNTED):
    """Scores of twelve samples, of which the model wrote the last four itself."""
    draw = np.random.default_rng(0).random
    arrays = {"tokens": TOKENS.numpy(), "sensitivity": SENSITIVITY.numpy(), "counted": counted.numpy()}
    return made(SHAPE, draw, reconstruction=True, calibration={"own_samples": 4}, **arrays)


def chosen(stand_ins, tokens=12 * 33, count=1):
    if torch.distributed.is_initialized():
        runtime.init_distributed()
    scores = chats()
    return layers_by_loss(model_in_float32(SHAPE), "leave_one_out", count, scores, tokens=tokens, stand_ins=stand_ins)


def tried(samples, again):
    """Tokens to measure losses on and which of them count: samples, and samples that say themselves twice."""
    echoes, repeated = echoed(TOKENS[again])
    return torch.cat([TOKENS[samples], echoes]), torch.cat([COUNTED[samples], repeated])


def test_only_what_counts_is_lost_and_prompts_weigh_in_the_fit_what_they_are_worth():
    model = model_in_float32(SHAPE)
    tokens, counted = tried([0, 1, 2, 8, 9, 10], [6, 7, 8, 9, 10, 11])
    weights = torch.ones(3, *TOKENS.shape)
    for layer in range(3):
        squares = SENSITIVITY[2 * layer + 1].square()
        for sample, answer in enumerate(COUNTED):
            mean = squares[sample, answer].mean()
            weights[layer, sample, ~answer] = (squares[sample, ~answer] / mean).clamp_max(1)
    for given in (None, weights):
        losses = LayerLoss(model, tokens, counted=counted, stand_ins=None if given is None else TOKENS, weights=given)
        whole, *pairs = losses([Removed(), *PAIRS])
        found, (step,) = chosen(given is not None, count=2)
        assert found == whole and step.loss == pytest.approx(pairs[PAIRS.index(Removed(step.removed))], abs=1e-6)
    (alike,) = LayerLoss(model, tokens, counted=counted, stand_ins=TOKENS)([Removed(step.removed)])
    assert abs(alike - step.loss) > 1e-4, "or this test could not tell"
    tokens, counted = tried([0, 8], [10, 11])
    (few,) = LayerLoss(model, tokens, counted=counted)([Removed()])
    assert chosen(False, 4 * 33)[0] == few


def test_processes_lose_the_same():
    expected = chosen(True)
    assert run_ranks(chosen, 2, True) == [expected, expected]


def test_every_layer_selection_of_the_config_is_done_where_it_says():
    assert set(BY_LOSS) == {name for name, selection in LAYER_SELECTIONS.items() if selection.by_loss}
    assert set(BY_SCORES) == {name for name, selection in LAYER_SELECTIONS.items() if not selection.by_loss}


def test_half_of_the_tried_samples_are_the_models_own():
    """Rows are numbered; the last three of eight are its own."""
    tokens = torch.arange(8)[:, None]
    assert both_kinds(tokens, 3, 4)[:, 0].tolist() == [0, 1, 5, 6]
    assert both_kinds(tokens, 1, 4)[:, 0].tolist() == [0, 1, 2, 7]
    assert both_kinds(tokens, 0, 3)[:, 0].tolist() == [0, 1, 2]
    assert both_kinds(tokens, 7, 4)[:, 0].tolist() == [0, 1, 2, 3]  # drawn are fewer than half
    assert both_kinds(tokens, 3, 50)[:, 0].tolist() == list(range(8))
