"""Where a training begins: anew, or from which checkpoint of an earlier run; said in one line, or refused by name."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
from nemo.utils.exp_manager import get_log_dir
from omegaconf import DictConfig

from nemo_minitron.errors import MinitronError
from nemo_minitron.nemo.run_record import RunRecord, content_of
from nemo_minitron.values.trainer import MONITOR

_STEP = re.compile(r"step=(\d+)")


@dataclass(frozen=True)
class Start:
    """How a run begins.

    Attributes:
        folder: of the checkpoints. checkpoint, step: what is restored; None and 0 where it begins anew.
        line: what is said about it; None where there is nothing to say. done: whether nothing is left to do at all.
    """

    folder: Path
    checkpoint: Path | None = None
    step: int = 0
    line: str | None = None
    done: bool = False


def checkpoint_folder(manager: DictConfig, trainer: Trainer) -> Path:
    """Where ``exp_manager`` keeps the checkpoints of a run that may be resumed."""
    given = (manager.get("checkpoint_callback_params") or {}).get("dirpath")
    if given:
        return Path(given)
    names = ("exp_dir", "name", "version", "explicit_log_dir")
    found = {name: manager.get(name) for name in names}
    return (
        Path(get_log_dir(trainer, resume_if_exists=bool(manager.get("resume_if_exists")), **found)[0]) / "checkpoints"
    )


def name_checkpoints(manager: DictConfig) -> None:
    """See to it that checkpoints are named after their step, from which a resumed run knows its place in the data.

    Raises:
        MinitronError: the name that is asked for has no step.
    """
    params = manager.get("checkpoint_callback_params")
    if not manager.get("create_checkpoint_callback", True) or params is None:
        return
    name = params.get("filename")
    if name is None:
        monitor = params.get("monitor") or MONITOR
        params.filename = f"{manager.get('name') or 'default'}--{{{monitor}:.2f}}-{{step}}-{{consumed_samples}}"
    elif "{step" not in str(name):
        raise MinitronError(
            f"exp_manager.checkpoint_callback_params.filename: expected '{{step}}' in it, by which a run is resumed, "
            f"found '{name}'"
        )


def decide(
    manager: DictConfig, trainer: Trainer, asked: dict[str, Any], grid: list[int], outputs: tuple[Path, Path]
) -> Start:
    """Look at what is there, refuse what does not go together, and tidy up; on rank 0 alone.

    What an earlier run left unfinished is removed where this one resumes; checkpoints of an earlier training are set
    aside where this one begins anew.

    Args:
        asked: :func:`identity` of this run. outputs: best and last.

    Raises:
        MinitronError: another model, other data, another schedule, or no checkpoint where one is insisted on.
    """
    folder, max_steps = checkpoint_folder(manager, trainer), int(trainer.max_steps)
    given = manager.get("resume_from_checkpoint")
    if not manager.get("resume_if_exists"):
        if not given:
            return Start(folder, line=_set_aside(folder) if manager.get("create_checkpoint_callback", True) else None)
        return _from(Path(given), folder, asked, grid, max_steps)
    finished, unfinished = _checkpoints(folder)
    if finished:
        newest = max(finished, key=lambda path: (_step(path), path.name.endswith("-last")))
        start = _from(newest, folder, asked, grid, max_steps, outputs)
        if not start.done:
            NeMoModelCheckpoint._remove_unfinished_checkpoints(folder)
            _remove_older(finished, newest)
        return start
    if given:
        return _from(Path(given), folder, asked, grid, max_steps)
    why = f"no checkpoint in {folder}"
    if unfinished:
        why = f"{unfinished[0]}, the only checkpoint, was not finished when the earlier run ended"
        NeMoModelCheckpoint._remove_unfinished_checkpoints(folder)
    if not manager.get("resume_ignore_no_checkpoint", True):
        raise MinitronError(f"exp_manager.resume_ignore_no_checkpoint=false: expected a checkpoint to resume, {why}")
    return Start(folder, line=f"starting anew: {why}")


def _from(
    checkpoint: Path,
    folder: Path,
    asked: dict[str, Any],
    grid: list[int],
    max_steps: int,
    outputs: tuple[Path, Path] | None = None,
) -> Start:
    """Resumption from one checkpoint, if its training is this one."""
    if not checkpoint.is_dir() or NeMoModelCheckpoint.is_checkpoint_unfinished(checkpoint):
        raise MinitronError(f"exp_manager.resume_from_checkpoint: expected the folder of a finished checkpoint, found "
                            f"{checkpoint}")  # fmt: skip
    step, record = _step(checkpoint), RunRecord(checkpoint.parent)
    if step > max_steps:
        raise MinitronError(f"trainer.max_steps={max_steps}: {checkpoint} is at step {step} already")
    notes = ""
    if record.read():
        record.check_identity(asked)
        _check_steps(record, asked, max_steps)
        before = record.content.get("grid")
        if before and before != grid:
            notes = f", on another grid ({_grid(grid)} after {_grid(before)}), so that the last digits may differ"
        done = record.content.get("finished") or {}
        at_end = done.get("step") == step == max_steps
        if outputs and at_end and all(_is_there(path, done.get("outputs") or {}) for path in outputs):
            best, last = outputs
            line = f"finished before, at step {step} of {max_steps} in {folder}: {best} is there (last: {last})"
            return Start(folder, checkpoint, step, line, done=True)
    else:
        notes = ", which has no record of what it was trained on"
    line = f"resuming at step {step} of {max_steps} from {checkpoint}{notes}"
    return Start(folder, checkpoint, step, line)


def _check_steps(record: RunRecord, asked: dict[str, Any], max_steps: int) -> None:
    """Refuse another number of steps where the learning rates before would have been others."""
    before = record.content.get("max_steps")
    if before is None or before == max_steps or not asked.get("model.optim.sched.name"):
        return
    raise MinitronError(
        f"trainer.max_steps: the training in {record.path.parent} is laid out for {before} steps, this run asks for "
        f"{max_steps}, over which model.optim.sched would have given other learning rates from the start; resume with "
        f"trainer.max_steps={before}, or begin a new training from its result (model.restore_from_path) in another "
        "exp_manager.explicit_log_dir; a training without model.optim.sched may be made longer"
    )


def _checkpoints(folder: Path) -> tuple[list[Path], list[Path]]:
    """Finished and unfinished ones, in the order of their names."""
    found = sorted(path for path in folder.glob("*") if path.is_dir() and _STEP.search(path.name))
    unfinished = [path for path in found if NeMoModelCheckpoint.is_checkpoint_unfinished(path)]
    return [path for path in found if path not in unfinished], unfinished


def _step(checkpoint: Path) -> int:
    found = _STEP.findall(checkpoint.name)
    if not found:
        raise MinitronError(f"{checkpoint}: expected a checkpoint named after its step, such as NAME-step=100")
    return int(found[-1])


def _remove_older(finished: list[Path], newest: Path) -> None:
    """A run that is killed between two steps of its housekeeping leaves the last checkpoint but one."""
    lasts = [path for path in finished if path.name.endswith("-last")]
    keep = newest if newest in lasts else max(lasts, key=_step, default=newest)
    for path in lasts:
        if path != keep:
            shutil.rmtree(path)


def _set_aside(folder: Path) -> str | None:
    """Rename a folder of checkpoints that this run does not continue."""
    if not any(_checkpoints(folder)):
        return None
    number = 0
    while (aside := folder.with_name(f"{folder.name}_{number}")).exists():
        number += 1
    try:
        folder.rename(aside)
    except OSError as error:
        raise MinitronError(f"exp_manager: cannot set {folder} of an earlier run aside: {error}") from None
    return f"starting anew: exp_manager.resume_if_exists is false; the checkpoints of an earlier run are in {aside} now"


def _is_there(path: Path, outputs: dict[str, str]) -> bool:
    known = outputs.get(str(path.absolute()))
    return known is not None and path.exists() and content_of(path) == known


def _grid(sizes: list[int]) -> str:
    return "TP {} x PP {} x DP {}".format(*sizes)
