"""Ways to choose which layers go: what ``prune.layer_selection`` and ``search.layer_selection`` may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSelection:
    """One way.

    Attributes:
        by_loss: the model is run without the layers (:mod:`nemo_minitron.prune.layers`); else scores decide
            (:mod:`nemo_minitron.prune.choose`).
        in_search: ``minitron search`` can use it: one run of it answers for every number of layers.
    """

    by_loss: bool = False
    in_search: bool = False


LAYER_SELECTIONS = {
    "block_influence": LayerSelection(in_search=True),
    "contiguous": LayerSelection(in_search=True),
    "leave_one_out": LayerSelection(by_loss=True),
    "contiguous_loss": LayerSelection(by_loss=True),
    "greedy": LayerSelection(by_loss=True, in_search=True),
    "beam": LayerSelection(by_loss=True),
}
