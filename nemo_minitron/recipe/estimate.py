"""How long a run's stages will take, from what earlier runs of the same stages took; or nothing."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

from omegaconf import OmegaConf

from nemo_minitron.jobs.run_place import RunPlace
from nemo_minitron.recipe.records import Records
from nemo_minitron.recipe.stage import Stage


def took(stage: Stage, records: Records) -> float | None:
    """Seconds of the stage's last whole run with this configuration; None where there was none."""
    record, config = records.read(stage.name), records.folder / f"{stage.name}.yaml"
    whole = record.get("state") == "done" and not record.get("resumed")
    if not whole or not config.is_file() or config.read_text() != OmegaConf.to_yaml(stage.config):
        return None
    return float(record["seconds"])


def run_place(
    number: int,
    stages: Sequence[Stage],
    reads: Mapping[str, Collection[str]],
    records: Records,
    ran: Collection[str],
    force: bool = False,
) -> RunPlace:
    """The place of ``stages[number]`` in a run, about to begin, with what earlier runs say of the time.

    Of the stages after it those count that read what it or another one of this run writes, and those that are not done;
    all others will be skipped.

    Args:
        stages: all that the run walks. reads: as :func:`nemo_minitron.recipe.order.readers` gives it.
        ran: names of those that this run did not skip so far. force: it skips none.
    """
    stage = stages[number]
    running, after = {*ran, stage.name}, 0.0
    known = True
    for other in stages[number + 1 :]:
        if not force and records.read(other.name).get("state") == "done" and running.isdisjoint(reads[other.name]):
            continue
        running.add(other.name)
        seconds = took(other, records)
        known, after = known and seconds is not None, after + (seconds or 0.0)
    own = took(stage, records)
    ends = None if own is None else time.time() + own
    return RunPlace(number + 1, len(stages), stage.name, stage.command, ends, after if known else None)
