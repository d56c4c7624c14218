"""Choosing layers by loss; what it chooses is judged in ``test_prune.py`` and ``importance/test_layer_loss.py``."""

import numpy as np
import pytest
import torch

from nemo_minitron import runtime
from nemo_minitron.config.layer_selection import LAYER_SELECTIONS
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


def chats(counted=COUNTED):
    """Scores of twelve samples, of which the model wrote the last four itself."""
    draw = np.random.default_rng(0).random
    arrays = {"tokens": TOKENS.numpy(), "sensitivity": SENSITIVITY.numpy(), "counted": counted.numpy()}
    return made(SHAPE, draw, reconstruction=True, calibration={"own_samples": 4}, **arrays)


def chosen(stand_ins, tokens=12 * 33):
    if torch.distributed.is_initialized():
        runtime.init_distributed()
    scores = chats()
    return layers_by_loss(model_in_float32(SHAPE), "leave_one_out", 1, scores, tokens=tokens, stand_ins=stand_ins)


def test_only_what_counts_is_lost_and_prompts_weigh_in_the_fit_what_they_are_worth():
    model = model_in_float32(SHAPE)
    weights = torch.ones(3, *TOKENS.shape)
    for layer in range(3):
        squares = SENSITIVITY[2 * layer + 1].square()
        for sample, counted in enumerate(COUNTED):
            mean = squares[sample, counted].mean()
            weights[layer, sample, ~counted] = (squares[sample, ~counted] / mean).clamp_max(1)
    for given in (None, weights):
        losses = LayerLoss(model, TOKENS, counted=COUNTED, stand_ins=None if given is None else TOKENS, weights=given)
        whole, *alone = losses([Removed(), *(Removed({layer}) for layer in range(3))])
        found, (step,) = chosen(given is not None)
        assert found == whole and step.loss == pytest.approx(min(alone), abs=1e-6)
    alike = LayerLoss(model, TOKENS, counted=COUNTED, stand_ins=TOKENS)([Removed({layer}) for layer in range(3)])
    assert abs(min(alike) - step.loss) > 1e-4, "or this test could not tell"
    half = LayerLoss(model, TOKENS[[0, 1, 8, 9]], counted=COUNTED[[0, 1, 8, 9]])([Removed()])
    assert chosen(False, 4 * 33)[0] == half[0]


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
