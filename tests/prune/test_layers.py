"""Choosing layers by loss; what it chooses is judged in ``test_prune.py`` and ``importance/test_layer_loss.py``."""

from nemo_minitron.config.layer_selection import LAYER_SELECTIONS
from nemo_minitron.prune.choose import BY_SCORES
from nemo_minitron.prune.layers import BY_LOSS


def test_every_layer_selection_of_the_config_is_done_where_it_says():
    assert set(BY_LOSS) == {name for name, selection in LAYER_SELECTIONS.items() if selection.by_loss}
    assert set(BY_SCORES) == {name for name, selection in LAYER_SELECTIONS.items() if not selection.by_loss}
