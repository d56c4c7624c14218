"""Which layers go, for every number of layers, where they are chosen by the loss without them; kept in a record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.config.grid import Machines
from nemo_minitron.config.layer_selection import LAYER_SELECTIONS
from nemo_minitron.config.schema import SearchConfig
from nemo_minitron.errors import MinitronError, required
from nemo_minitron.importance.scores import Scores
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.layers import layers_by_loss
from nemo_minitron.recipe import Records
from nemo_minitron.search.space import Space


def removed_layers(
    cfg: SearchConfig, scores: Scores, space: Space, given: Sequence[ModelShape], records: Records
) -> tuple[list[tuple[int, ...]], list[float] | None]:
    """Layers to remove by their number, and the damage of that, where both are found by loss; else nothing.

    For every number that is in the space, or of a shape that is ``given`` (``search.shapes``).
    """
    fewest = min([space.axes["num_layers"][0], *(shape.num_layers for shape in given)])
    most = scores.shape.num_layers - fewest
    if not most or not LAYER_SELECTIONS[cfg.search.layer_selection].by_loss:
        return [], None
    if not cfg.model.get("restore_from_path"):
        raise MinitronError(
            f"search.layer_selection={cfg.search.layer_selection}: runs the model; give model.restore_from_path"
        )
    precision = str(Machines.of(cfg.trainer).precision)
    what = [scores.fingerprint(), cfg.search.layer_tokens, cfg.search.compensate, precision]
    fingerprint = hashlib.sha256(json.dumps([*what, most]).encode()).hexdigest()
    known = records.read("layers")
    if known.get("fingerprint") != fingerprint:
        known = {"fingerprint": fingerprint, **_search_layers(cfg, scores, most)}
        records.write("layers", known)
    damage = np.log(np.array(known["losses"]) / known["losses"][0])
    return [tuple(layers) for layers in known["removed"]], damage.tolist()


def _search_layers(cfg: SearchConfig, scores: Scores, most: int) -> dict[str, Any]:
    with NemoReader(Path(required(cfg, "model.restore_from_path"))) as reader:
        scores.check_matches(reader.fingerprint(), reader.shape)
        whole, steps = layers_by_loss(
            reader,
            cfg.search.layer_selection,
            most,
            scores,
            tokens=cfg.search.layer_tokens,
            stand_ins=cfg.search.compensate is not False,
            half=Machines.of(cfg.trainer).half,
            section="search",
        )
    return {
        "losses": [whole, *(step.loss for step in steps)],
        "removed": [[], *(list(step.removed) for step in steps)],
    }
