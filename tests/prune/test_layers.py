"""Choosing layers by loss; what it chooses is judged in ``test_prune.py`` and ``importance/test_layer_loss.py``."""

import torch

from nemo_minitron.config.layer_selection import LAYER_SELECTIONS
from nemo_minitron.prune.choose import BY_SCORES
from nemo_minitron.prune.layers import BY_LOSS, _both_kinds


def test_every_layer_selection_of_the_config_is_done_where_it_says():
    assert set(BY_LOSS) == {name for name, selection in LAYER_SELECTIONS.items() if selection.by_loss}
    assert set(BY_SCORES) == {name for name, selection in LAYER_SELECTIONS.items() if not selection.by_loss}


def test_half_of_the_tried_samples_are_the_models_own():
    """Rows are numbered; the last three of eight are its own."""
    tokens = torch.arange(8)[:, None]
    assert _both_kinds(tokens, 3, 4)[:, 0].tolist() == [0, 1, 5, 6]
    assert _both_kinds(tokens, 1, 4)[:, 0].tolist() == [0, 1, 2, 7]
    assert _both_kinds(tokens, 0, 3)[:, 0].tolist() == [0, 1, 2]
    assert _both_kinds(tokens, 7, 4)[:, 0].tolist() == [0, 1, 2, 3]  # drawn are fewer than half
    assert _both_kinds(tokens, 3, 50)[:, 0].tolist() == list(range(8))
