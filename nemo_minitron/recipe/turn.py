"""A stage's turn: whether it runs at all, what is recorded when it begins, and when it ends."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import write_file
from nemo_minitron.recipe.records import Records, versions
from nemo_minitron.recipe.stage import Stage
from nemo_minitron.report.measures import duration

Say = Callable[[str], None]


@dataclass(frozen=True)
class Turn:
    """A stage that has begun.

    Attributes:
        fingerprint: of all that decides its result. began: in seconds since the epoch.
        resumed: it may go on from what an earlier, interrupted turn left.
    """

    stage: Stage
    fingerprint: str
    began: float
    resumed: bool


def begin(stage: Stage, records: Records, say: Say, *, force: bool = False) -> Turn | None:
    """Record that ``stage`` begins, its work folder emptied unless it resumes; None where it is done and unchanged.

    Writes ``NAME.yaml`` into the records' folder, the configuration to run with.

    Raises:
        MinitronError: an input is absent.
    """
    fingerprint = records.fingerprint(stage)
    record = records.read(stage.name)
    if not force and _has_done(stage, records, fingerprint):
        say(f"up to date, skipped (took {duration(record['seconds'])})")
        return None
    resume = record.get("fingerprint") == fingerprint and record.get("state") != "done" and not force
    if stage.work is not None and not resume and stage.work.exists():
        shutil.rmtree(stage.work)  # checkpoints of another configuration must not be resumed
    resumed = bool(resume and record)
    say(f"{'resuming' if resumed else 'running'} minitron {stage.command}")
    turn = Turn(stage, fingerprint, time.time(), resumed)
    records.write(stage.name, {"state": "started", "fingerprint": fingerprint, "began": turn.began, "resumed": resumed})
    write_file(records.folder / f"{stage.name}.yaml", OmegaConf.to_yaml(stage.config))
    return turn


def is_done(stage: Stage, records: Records) -> bool:
    """Whether ``stage`` is done and unchanged, so that it need not run.

    Raises:
        MinitronError: an input is absent.
    """
    return _has_done(stage, records, records.fingerprint(stage))


def _has_done(stage: Stage, records: Records, fingerprint: str) -> bool:
    record = records.read(stage.name)
    done = record.get("state") == "done" and record.get("fingerprint") == fingerprint
    return done and bool(stage.outputs) and records.outputs(stage) == record.get("outputs")


def finish(turn: Turn, records: Records, say: Say, code: int, seconds: float, log: Path | None = None) -> None:
    """Record that a stage is done.

    Args:
        code: exit status of its command. seconds: that it took. log: where what it said went.

    Raises:
        MinitronError: its command failed, or did not write what the stage declares; the record then stays that of a
            stage that has begun.
    """
    stage = turn.stage
    outputs = records.outputs(stage)
    if code:
        raise MinitronError(
            f"stage '{stage.name}' failed (minitron {stage.command}, exit status {code}, after {duration(seconds)}); "
            f"the same command starts again from this stage{_last_words(log)}"
        )
    if outputs is None:
        absent = [path for path in stage.outputs if not os.path.exists(path)]
        raise MinitronError(f"stage '{stage.name}' ended well but did not write {', '.join(absent)}")
    record = {"state": "done", "fingerprint": turn.fingerprint, "seconds": round(seconds, 3), "outputs": outputs}
    records.write(stage.name, record | {"resumed": turn.resumed, "versions": versions()})
    say(f"done in {duration(seconds)}")


def _last_words(log: Path | None) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log and log.is_file() else []
    return f"; {log} ends with: {lines[-1]}" if lines else ""
