"""Which query groups go, for every number of them, by the loss of the model without them; kept in a record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.config.grid import Machines
from nemo_minitron.config.schema import SearchConfig
from nemo_minitron.errors import MinitronError, required
from nemo_minitron.importance.scores import Scores, with_tokens
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.groups import groups_by_loss
from nemo_minitron.recipe import Records
from nemo_minitron.search.space import Space


def with_groups_by_loss(
    cfg: SearchConfig, scores: Scores, space: Space, given: Sequence[ModelShape], records: Records
) -> Scores:
    """Scores whose ranking for compensation has query groups in the order in which ``minitron prune`` removes them by
    loss.

    The scores themselves where that is not asked for, or where neither a shape of the space nor one that is ``given``
    (``search.shapes``, which may be smaller) has fewer groups.

    Raises:
        MinitronError: asked for, and weights are cut, or the scores hold no calibration tokens to measure a loss on.
    """
    if cfg.search.group_selection != "loss":
        return scores
    fewest = min([*space.axes["num_query_groups"], *(shape.num_query_groups for shape in given)])
    fewer = scores.shape.num_query_groups - fewest
    if not fewer:
        return scores
    scores = with_tokens(scores if "reconstruction" in scores.rankings else None, "search.group_selection=loss")
    if cfg.search.compensate is False:
        raise MinitronError("search.group_selection=loss: expected ranking with search.compensate=false, found loss")
    what = [scores.fingerprint(), cfg.search.layer_tokens, str(Machines.of(cfg.trainer).precision), fewer]
    fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    known = records.read("groups")
    if known.get("fingerprint") != fingerprint:
        worth = _worth(cfg, scores, fewer)
        known = {"fingerprint": fingerprint, "worth": worth.tolist()}
        records.write("groups", known)
    chosen = {**scores.rankings["reconstruction"], "groups": np.array(known["worth"])}
    return dataclasses.replace(scores, rankings={**scores.rankings, "reconstruction": chosen})


def _worth(cfg: SearchConfig, scores: Scores, fewer: int) -> np.ndarray:
    with NemoReader(Path(required(cfg, "model.restore_from_path"))) as reader:
        scores.check_matches(reader.fingerprint(), reader.shape)
        layers = range(scores.shape.num_layers)
        tokens, half = cfg.search.layer_tokens, Machines.of(cfg.trainer).half
        return groups_by_loss(reader, scores, layers, fewer, tokens=tokens, half=half)
